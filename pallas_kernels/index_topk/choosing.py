"""The exact choice of the best entries by bisection, given a way to count."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.index_topk.scoring import LAST


class Chosen(NamedTuple):
    """Per row: entries above `bound`, and those equal to it below index `end`."""

    bound: Array
    end: Array

    def mask(self, order: Array, index: Array) -> Array:
        return (order > self.bound) | ((order == self.bound) & (index < self.end))


def bisect(
    count: Callable[[Array, Array | None], Array], low: Array, high: Array, seen: Array, keep: int
) -> Chosen:
    """The exact choice from `count(bound, end)`: entries ≥ bound, or == bound at indices < end.

    low … high: order of the worst and (plus one) of the best of the `seen` entries of each row.
    """
    want = jnp.minimum(seen, keep)

    def is_open(low: Array, high: Array, at_low: Array) -> Array:
        return (at_low != want) & (low + 1 < high)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, at_low, at_high = state
        more = is_open(low, high, at_low)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        here = count(middle, None)
        up, down = more & (here >= want), more & (here < want)
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, here, at_low),
            jnp.where(down, here, at_high),
        )

    state = (low, high, seen, jnp.zeros_like(seen))
    state = lax.while_loop(lambda s: _any(is_open(s[0], s[1], s[2])), step, state)
    bound, _, at_low, above = state
    ties = want - above  # how many of the entries equal to `bound`; asked only where there are more

    def tie_step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        first, last, end, surplus = state  # surplus is int32: loops carry no booleans
        middle = (first + last) >> 1
        here = count(bound, middle)
        more = surplus > 0
        return (
            jnp.where(more & (here < ties), middle, first),
            jnp.where(more & (here > ties), middle, last),
            jnp.where(more & (here == ties), middle, end),
            jnp.where(here == ties, 0, surplus),
        )

    surplus = jnp.where(at_low != want, 1, 0)
    start = (jnp.zeros_like(seen), jnp.full_like(seen, 1 << 30), jnp.full_like(seen, LAST), surplus)
    end = lax.while_loop(lambda s: _any(s[3] > 0), tie_step, start)[2]
    return Chosen(bound, end)


def _any(x: Array) -> Array:
    return jnp.max(jnp.where(x, 1.0, 0.0)) > 0
