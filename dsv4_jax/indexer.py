"""Lightning indexer: which compressed rows a query of a CSA layer may see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax import cache as store
from dsv4_jax.numerics import Numerics


class IndexQuery(NamedTuple):
    """Indexer queries and the signed weight of each indexer head, in the activation dtype."""

    q_BTIJ: Array
    w_BTI: Array


def score_tile(query: IndexQuery, keys_BSJ: Array, num: Numerics) -> Array:
    """Σ_heads relu(q · k) · w as float32 `[B, T, S]`; rounds at every arrow in reference mode."""
    exact = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
    dots_BITS = exact("BTIJ,BSJ->BITS", query.q_BTIJ, keys_BSJ)
    w_BTI = query.w_BTI.astype(jnp.float32)
    if not num.rounds:
        return exact("BITS,BTI->BTS", jnp.maximum(dots_BITS, 0), w_BTI)
    relu_BITS = jnp.maximum(num.cast(dots_BITS).astype(jnp.float32), 0)
    weighted_BITS = num.cast(relu_BITS * jnp.moveaxis(w_BTI, 2, 1)[..., None])
    return num.cast(weighted_BITS.astype(jnp.float32).sum(axis=1)).astype(jnp.float32)


def score_rows(
    query: IndexQuery, keys: store.Rows, place: store.Place, visible_BT: Array, num: Numerics
) -> Array:
    """Scores of all rows `[B, T, C]`, -inf from `visible_BT` on. Reads only what is visible."""
    batch, fresh = visible_BT.shape
    tile = store.tile_rows(keys, place)
    capacity = -(-store.row_room(keys, place) // tile) * tile

    def body(step: Array, scores: Array) -> Array:
        start = step * tile
        keys_BSJ = store.read_tile(keys, place, start, tile, num.jnp_dtype)
        part = score_tile(query, keys_BSJ, num)
        hidden = (start + jnp.arange(tile))[None, None] >= visible_BT[..., None]
        return lax.dynamic_update_slice(scores, jnp.where(hidden, -jnp.inf, part), (0, 0, start))

    empty = jnp.full((batch, fresh, capacity), -jnp.inf, jnp.float32)
    return lax.fori_loop(0, (visible_BT.max() + tile - 1) // tile, body, empty)


class Selection(NamedTuple):
    """Chosen rows of each query, best first, and whether each choice is a real one."""

    rows_BTK: Array
    valid_BTK: Array


def select(scores_BTC: Array, keep: int) -> Selection:
    """The `keep` best-scored rows; of equal scores the lowest row wins."""
    # the sorter tells -0.0 from 0.0; as scores they are a tie
    scores = jnp.where(scores_BTC == 0, 0.0, scores_BTC)
    flat = scores.reshape(-1, scores.shape[-1])  # some backends have top_k for matrices only
    best, rows = (a.reshape(*scores.shape[:-1], keep) for a in lax.top_k(flat, keep))
    return Selection(rows, best > -jnp.inf)


def selection_mask(scores_BTC: Array, keep: int) -> Array:
    """The same choice as `select`, as a mask over all rows. Counts instead of sorting."""
    keys = _ordered(scores_BTC)
    bound = _largest(31, lambda t: _count(keys >= t) >= keep, start=_floor(keys, keep))
    above, ties = keys > bound, keys == bound
    missing = keep - _count(above)
    columns = jnp.arange(keys.shape[-1], dtype=jnp.int32)[None, None]
    bits = (keys.shape[-1] - 1).bit_length()
    last = _largest(bits, lambda t: _count(ties & (columns < t)) < missing, jnp.zeros_like(bound))
    return (above | (ties & (columns <= last))) & (scores_BTC > -jnp.inf)


def _ordered(scores: Array) -> Array:
    """Integers in the order of float32 `scores`; both zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _count(x: Array) -> Array:
    """How many of each row are true: `[..., 1]`."""
    return x.astype(jnp.float32).sum(axis=-1, keepdims=True)


def _floor(keys: Array, keep: int) -> Array:
    """Sign of the `keep`-th largest key: 0, or the smallest integer."""
    return jnp.where(_count(keys >= 0) >= keep, 0, jnp.iinfo(jnp.int32).min)


def _largest(bits: int, holds: Callable[[Array], Array], start: Array) -> Array:
    """Largest t in [start, start + 2^bits) with `holds(t)`, which is true up to some t."""

    def step(i: Array, t: Array) -> Array:
        higher = t + (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(holds(higher), higher, t)

    return lax.fori_loop(0, bits, step, start)
