"""Muon with the hybrid Newton–Schulz iteration of the technical report, for optax.

Momentum accumulates plainly (not as a mean), looks ahead once, and becomes an orthonormal factor
times a constant: the update's root mean square is 0.18 for every shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from dsv4_jax.training.partition import View, join, split

FAST, STABLE = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (FAST,) * 8 + (STABLE,) * 2
UPDATE_RMS = 0.18
EPSILON = 1e-30  # of norms; a zero matrix stays zero
CHUNK_ELEMENTS = 1 << 22  # matrices that are iterated together


class MuonState(NamedTuple):
    """Momentum, float32, like the parameters."""

    momentum: Any


def orthogonalise(x_nrq: Array, dtype: Any = jnp.float32) -> Array:
    """The nearest orthonormal factor of every matrix `[n, r, q]`, about; float32.

    Ten steps X ← aX + b(XXᵀ)X + c(XXᵀ)²X from X/‖X‖, on the side with fewer rows. Products take
    `dtype` operands and are summed in float32.
    """
    tall = x_nrq.shape[1] > x_nrq.shape[2]
    x = jnp.swapaxes(x_nrq, 1, 2) if tall else x_nrq
    x = x.astype(jnp.float32)
    # by the largest entry first: squares of tiny gradients would vanish
    x = x / (jnp.abs(x).max(axis=(1, 2), keepdims=True) + EPSILON)
    x = x / (jnp.sqrt((x * x).sum(axis=(1, 2), keepdims=True)) + EPSILON)

    def dot(a: Array, b: Array, transposed: bool = False) -> Array:
        return lax.dot_general(
            a.astype(dtype),
            b.astype(dtype),
            (((2,), (2 if transposed else 1,)), ((0,), (0,))),
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def step(x: Array, abc: Array) -> tuple[Array, None]:
        gram = dot(x, x, transposed=True)
        poly = abc[1] * gram + abc[2] * dot(gram, gram)
        return abc[0] * x + dot(poly, x), None

    x, _ = lax.scan(step, x, jnp.array(COEFFICIENTS, jnp.float32))
    return jnp.swapaxes(x, 1, 2) if tall else x


def orthogonalise_tree(updates: list[Array], how: list[View], dtype: Any) -> list[Array]:
    """Updates of all Muon leaves. Matrices of one shape are iterated as one batch."""
    parts = [split(u, v) for u, v in zip(updates, how, strict=True)]
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for i, pieces in enumerate(parts):
        for j, piece in enumerate(pieces):
            by_shape[piece.shape[1], piece.shape[2]].append((i, j))
    for (r, q), members in by_shape.items():
        batch = jnp.concatenate([parts[i][j] for i, j in members])
        done = _in_chunks(batch, dtype) * (UPDATE_RMS * max(r, q) ** 0.5)
        start = 0
        for i, j in members:
            size = len(parts[i][j])
            parts[i][j] = done[start : start + size]
            start += size
    return [join(p, u.shape) for p, u in zip(parts, updates, strict=True)]


def _in_chunks(x_nrq: Array, dtype: Any) -> Array:
    """`orthogonalise`, a bounded number of matrices at a time."""
    n, r, q = x_nrq.shape
    per = max(CHUNK_ELEMENTS // (r * q), 1)
    if n <= per:
        return orthogonalise(x_nrq, dtype)
    chunks = -(-n // per)
    per = -(-n // chunks)
    padded = jnp.pad(x_nrq, ((0, chunks * per - n), (0, 0), (0, 0)))
    done = lax.map(lambda x: orthogonalise(x, dtype), padded.reshape(chunks, per, r, q))
    return done.reshape(-1, r, q)[:n]


def scale_by_muon(
    views: Any,
    momentum: float = 0.95,
    nesterov: bool = True,
    dtype: Any = jnp.float32,
    factor: Callable[[list[Array], list[Any]], list[Array]] | None = None,
) -> optax.GradientTransformation:
    """The direction of Muon, to be scaled by the learning rate.

    views: tree of `View` like the parameters; leaves of other groups must be masked out
    (`optax.MaskedNode`), as `optax.partition` does.
    factor: what is done with all leaves and their entries of `views`, which may then be any kind of
    leaf; None: `orthogonalise_tree`.
    """
    factor = factor or partial(orthogonalise_tree, dtype=dtype)

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        mass = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        ahead = jax.tree.map(lambda m, g: momentum * m + g, mass, grads) if nesterov else mass
        leaves, treedef = jax.tree.flatten(ahead)
        found = treedef.flatten_up_to(_masked_like(views, ahead))
        return jax.tree.unflatten(treedef, factor(leaves, found)), MuonState(mass)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _masked_like(views: Any, tree: Any) -> Any:
    """`views` where `tree` has an array; nodes that optax masked are taken from `tree`."""
    masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(
        lambda node, view: node if masked(node) else view,
        tree,
        views,
        is_leaf=masked,
    )
