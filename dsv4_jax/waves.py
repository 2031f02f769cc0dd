"""A sum whose number of terms the data decide, differentiable: nothing of a term is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def sum_of(
    term: Callable[..., Array], count: Array, numbers: tuple[Array, ...], *values: Array
) -> Array:
    """Σ over n < count of `term(n, numbers, *values)`, differentiated by values and closure.

    count: int32, a scalar. numbers: integers that a term needs; it may close over floats only. The
    sum has a term's shape and dtype. The backward pass computes each term once more.
    """
    first = jnp.zeros((), jnp.int32)
    term, closed = jax.closure_convert(term, first, numbers, *values)
    return _sum(term, count, numbers, (*values, *closed))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(
    term: Callable[..., Array], count: Array, numbers: tuple[Array, ...], values: tuple[Array, ...]
) -> Array:
    shape = jax.eval_shape(term, count, numbers, *values)
    return _loop(count, lambda n: term(n, numbers, *values), shape)


def _loop(count: Array, term: Callable[[Array], Any], shapes: Any) -> Any:
    def body(state: tuple[Array, Any]) -> tuple[Array, Any]:
        n, total = state
        return n + 1, jax.tree.map(jnp.add, total, term(n))

    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    begin = (jnp.zeros((), jnp.int32), empty)
    return lax.while_loop(lambda state: state[0] < count, body, begin)[1]


def _forward(term: Any, count: Array, numbers: tuple[Array, ...], values: tuple[Array, ...]):
    return _sum(term, count, numbers, values), (count, numbers, values)


def _backward(term: Any, saved: Any, g: Array):
    count, numbers, values = saved

    def gradient(n: Array) -> tuple[Array, ...]:
        return jax.vjp(lambda *values: term(n, numbers, *values), *values)[1](g)

    none = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), (count, numbers))
    return (*none, _loop(count, gradient, values))


_sum.defvjp(_forward, _backward)
