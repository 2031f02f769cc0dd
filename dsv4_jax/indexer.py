"""Lightning indexer: which compressed rows a query of a CSA layer may see."""

from __future__ import annotations

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
    cast = num.cast if num.rounds else lambda a: a
    dots_BTIS = jnp.einsum(
        "BTIJ,BSJ->BTIS",
        query.q_BTIJ,
        keys_BSJ,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST,
    )
    relu = jnp.maximum(cast(dots_BTIS).astype(jnp.float32), 0)
    weighted = cast(relu * query.w_BTI.astype(jnp.float32)[..., None])
    return cast(weighted.astype(jnp.float32).sum(axis=2)).astype(jnp.float32)


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
    best, rows = lax.top_k(scores, keep)
    return Selection(rows, best > -jnp.inf)


def selection_mask(scores_BTC: Array, keep: int) -> Array:
    """The same choice as `select`, as a mask over all rows."""
    scores = jnp.where(scores_BTC == 0, 0.0, scores_BTC)
    best, rows = lax.top_k(scores, keep)
    bound, last = best[..., -1:], rows[..., -1:]  # ties are taken in row order up to `last`
    columns = jnp.arange(scores.shape[-1])[None, None]
    return (scores > bound) | ((scores == bound) & (columns <= last) & (bound > -jnp.inf))
