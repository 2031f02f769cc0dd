"""Lightning indexer: which compressed rows a query of a CSA layer may see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax import cache as store
from dsv4_jax.numerics import Numerics

FEW_QUERIES = 8  # up to so many, heads of all are one matrix on a CPU too
SPAN = 16384  # rows whose scores exist at once where the best are selected


class IndexQuery(NamedTuple):
    """Indexer queries and the signed weight of each indexer head, in the activation dtype."""

    q_BTIJ: Array
    w_BTI: Array


_exact = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)


def score_tile(query: IndexQuery, keys_BSJ: Array, num: Numerics) -> Array:
    """Σ_heads relu(q · k) · w as float32 `[B, T, S]`; rounds at every arrow in reference mode."""
    at_once = partial(_at_once, num=num)
    if query.q_BTIJ.shape[1] <= FEW_QUERIES:
        return at_once(query, keys_BSJ)
    by_head = partial(_by_head, num=num)
    return lax.platform_dependent(query, keys_BSJ, cpu=by_head, default=at_once)


def _at_once(query: IndexQuery, keys_BSJ: Array, num: Numerics) -> Array:
    dots_BITS = _exact("BTIJ,BSJ->BITS", query.q_BTIJ, keys_BSJ)
    w_BTI = query.w_BTI.astype(jnp.float32)
    if not num.rounds:
        return _exact("BITS,BTI->BTS", jnp.maximum(dots_BITS, 0), w_BTI)
    relu_BITS = jnp.maximum(num.cast(dots_BITS).astype(jnp.float32), 0)
    weighted_BITS = num.cast(relu_BITS * jnp.moveaxis(w_BTI, 2, 1)[..., None])
    return num.cast(weighted_BITS.astype(jnp.float32).sum(axis=1)).astype(jnp.float32)


def _by_head(query: IndexQuery, keys_BSJ: Array, num: Numerics) -> Array:
    """The same sums, head by head: the CPU backend turns arrays of all heads × rows around."""

    def add(total_BTS: Array, head: IndexQuery) -> tuple[Array, None]:
        dots_BTS = _exact("BTJ,BSJ->BTS", head.q_BTIJ, keys_BSJ)
        relu_BTS = jnp.maximum(num.cast(dots_BTS).astype(jnp.float32), 0)
        part_BTS = relu_BTS * head.w_BTI.astype(jnp.float32)[..., None]
        return total_BTS + num.cast(part_BTS).astype(jnp.float32), None

    batch, fresh = query.w_BTI.shape[:2]
    empty = jnp.zeros((batch, fresh, keys_BSJ.shape[1]), jnp.float32)
    heads = IndexQuery(*(jnp.moveaxis(a, 2, 0) for a in query))
    total_BTS, _ = lax.scan(add, empty, heads)
    return num.cast(total_BTS).astype(jnp.float32)


def score_rows(
    query: IndexQuery,
    keys: store.Rows,
    place: store.Place,
    visible_BT: Array,
    num: Numerics,
    start: Array | int = 0,
    count: int | None = None,
) -> Array:
    """Scores of `count` rows from `start` on (of all), -inf from `visible_BT` on: `[B, T, count]`.

    Both are whole tiles, or `count` is all there is room for. Reads only what is visible.
    """
    batch, fresh = visible_BT.shape
    tile = store.tile_rows(keys, place)
    if count is None:
        count = whole_tiles(store.row_room(keys, place), keys, place)
    end = jnp.minimum(visible_BT.max(), start + count)

    def body(step: Array, scores: Array) -> Array:
        begin = start + step * tile
        keys_BSJ = store.read_tile(keys, place, begin, tile, num.jnp_dtype)
        part = score_tile(query, keys_BSJ, num)
        hidden = (begin + jnp.arange(tile))[None, None] >= visible_BT[..., None]
        part = jnp.where(hidden, -jnp.inf, part)
        return lax.dynamic_update_slice(scores, part, (0, 0, step * tile))

    empty = jnp.full((batch, fresh, count), -jnp.inf, jnp.float32)
    return lax.fori_loop(0, (end - start + tile - 1) // tile, body, empty)


def whole_tiles(count: int, keys: store.Rows, place: store.Place) -> int:
    """At least one tile, as many as hold `count` rows or all that a sequence can have."""
    tile = store.tile_rows(keys, place)
    return max(-(-min(count, store.row_room(keys, place)) // tile), 1) * tile


class Selection(NamedTuple):
    """Chosen rows of each query, best first, and whether each choice is a real one."""

    rows_BTK: Array
    valid_BTK: Array


def select(scores_BTC: Array, keep: int) -> Selection:
    """The `keep` best-scored rows; of equal scores the lowest row wins."""
    best, rows = _top(scores_BTC, keep)
    return Selection(rows, best > -jnp.inf)


def select_rows(
    query: IndexQuery,
    keys: store.Rows,
    place: store.Place,
    visible_BT: Array,
    keep: int,
    num: Numerics,
) -> Selection:
    """`select` among all rows below `visible_BT`, in memory that does not grow with their number.

    Spans of rows are scored in turn; the best so far stand in front of those of a span, so that
    they win ties.
    """
    span = whole_tiles(max(SPAN, keep), keys, place)
    if span >= store.row_room(keys, place):
        return select(score_rows(query, keys, place, visible_BT, num), keep)

    def body(step: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        start = step * span
        scores = score_rows(query, keys, place, visible_BT, num, start, span)
        best, rows = _top(scores, keep)
        best = jnp.concatenate([so_far[0], best], axis=-1)
        rows = jnp.concatenate([so_far[1], rows + start], axis=-1)
        best, order = _top_k(best, keep)
        return best, jnp.take_along_axis(rows, order, axis=-1)

    none = jnp.full((*visible_BT.shape, keep), -jnp.inf, jnp.float32)
    steps = (visible_BT.max() + span - 1) // span
    best, rows = lax.fori_loop(0, steps, body, (none, jnp.zeros_like(none, jnp.int32)))
    return Selection(rows, best > -jnp.inf)


def _top(scores_BTC: Array, keep: int) -> tuple[Array, Array]:
    """The `keep` largest scores, best first, and their columns; of equal ones the lowest column.

    They lie in the `keep` groups of neighbours with the largest maxima, of equal ones the first:
    any other group has `keep` columns before its own best. So only those are sorted.
    """
    # the sorter tells -0.0 from 0.0; as scores they are a tie
    scores = jnp.where(scores_BTC == 0, 0.0, scores_BTC)
    size = _group_size(scores.shape[-1], keep)
    if size == 1:
        return _top_k(scores, keep)
    groups = scores.reshape(*scores.shape[:-1], -1, size)
    chosen = jnp.sort(_top_k(groups.max(axis=-1), keep)[1], axis=-1)
    few = jnp.take_along_axis(groups, chosen[..., None], axis=-2)
    best, order = _top_k(few.reshape(*scores.shape[:-1], -1), keep)
    return best, jnp.take_along_axis(chosen, order // size, axis=-1) * size + order % size


def _group_size(columns: int, keep: int) -> int:
    """Power of two for which maxima and members of chosen groups are few; 1: not worth it."""
    size = 1
    while columns % (2 * size) == 0 and 4 * size * size * keep <= columns:
        size *= 2
    return size if size > 2 else 1


def _top_k(x: Array, keep: int) -> tuple[Array, Array]:
    """`lax.top_k`; some backends have it for matrices only."""
    best, order = lax.top_k(x.reshape(-1, x.shape[-1]), keep)
    return best.reshape(*x.shape[:-1], keep), order.reshape(*x.shape[:-1], keep)


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
