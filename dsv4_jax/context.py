"""One sequence over several devices: halos, rows in turn, an exact choice, softmaxes that add up.

Compressed rows and index keys are split along the `context` axis in blocks that go to its shards in
turn. Rings and positions are the same on all of them. New tokens are either split too (prefill:
`Shards.split`), then each shard joins the rows of a layer to attend to them; or every shard has all
(decoding), then each attends to its own rows and the parts are merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax import attend
from dsv4_jax import cache as store
from sharding.shards import Shards

if TYPE_CHECKING:
    from dsv4_jax.compress import Chunk, NewRows

MIN_SPLIT = 8  # new tokens per shard from which on they are split
NO_ROW = jnp.iinfo(jnp.int32).max


def can_split(fresh: int, shards: int) -> bool:
    """Whether `fresh` new tokens are split over the shards of a context."""
    return shards > 1 and fresh % shards == 0 and fresh // shards >= MIN_SPLIT


def own_tokens(x: Array, shards: Shards) -> Array:
    """This shard's part of `[B, T, ...]` along T."""
    if not shards.split:
        return x
    fresh = x.shape[1] // shards.count("context")
    return lax.dynamic_slice_in_dim(x, shards.rank("context") * fresh, fresh, axis=1)


def own_part(pos_B: Array, count_B: Array, fresh: int, shards: Shards) -> tuple[Array, Array]:
    """Position of the first of this shard's `fresh` tokens, and how many are real."""
    if not shards.split:
        return pos_B, count_B
    before = shards.rank("context") * fresh
    return pos_B + before, jnp.clip(count_B - before, 0, fresh)


def from_end(x: Array, chunk: Chunk, fresh: int, shards: Shards) -> Array:
    """`[B, ...]` of the shard that has the last new token of each sequence, on all shards."""
    if not shards.split:
        return x
    end_B = jnp.maximum(chunk.total_B - 1, 0) // fresh
    is_mine = (end_B == shards.rank("context")).reshape((-1,) + (1,) * (x.ndim - 1))
    return shards.one_of(x, "context", is_mine)


def history(ring_BLH: Array, new_BTH: Array, shards: Shards) -> Array:
    """Entries in front of this shard's tokens: of the ring for the first shard, else of others."""
    if not shards.split:
        return ring_BLH
    length, fresh = ring_BLH.shape[1], new_BTH.shape[1]
    rank, count = shards.rank("context"), shards.count("context")
    if fresh >= length:
        pairs = [(n, n + 1) for n in range(count - 1)]
        halo = lax.ppermute(new_BTH[:, fresh - length :], "context", pairs)
        return jnp.where(rank == 0, ring_BLH, halo)
    line = jnp.concatenate([ring_BLH, shards.join(new_BTH, "context", 1)], axis=1)
    return lax.dynamic_slice_in_dim(line, rank * fresh, length, axis=1)


def write_ring(
    ring: store.Rows,
    place: store.Place,
    chunk: Chunk,
    recent: Array,
    shards: Shards,
    kernels: str | None = None,
) -> store.Rows:
    """`cache.ring_write`, with what the shard of a sequence's end has seen."""
    length = store.num_rows(ring)
    newest = store.newest(recent, length, chunk.pos_B, chunk.count_B)
    newest = from_end(newest, chunk, recent.shape[1] - length, shards)
    return store.ring_put(ring, place, chunk.total_B, newest, kernels)


def rows_before(which: Array, shards: Shards) -> Array:
    """How many of the compressed rows in front of number `which` this shard has."""
    count, block = shards.count("context"), shards.row_block
    if count == 1:
        return which
    begin = shards.rank("context") * block
    turns, rest = which // (count * block), which % (count * block)
    return turns * block + jnp.clip(rest - begin, 0, block)


def row_numbers(local: Array, shards: Shards) -> Array:
    """Numbers within the sequence of this shard's compressed rows."""
    count, block = shards.count("context"), shards.row_block
    if count == 1:
        return local
    begin = shards.rank("context") * block
    return local // block * (count * block) + begin + local % block


def own_rows(new: NewRows, chunk: Chunk, ratio: int, fresh: int, shards: Shards) -> NewRows:
    """Of the rows that a chunk completes, on whatever shard, those that this shard keeps."""
    count, block = shards.count("context"), shards.row_block
    if count == 1:
        return new
    rows_BCH, first_B = new.rows_BCH, chunk.pos_B // ratio
    total_B = (chunk.pos_B + chunk.total_B) // ratio - first_B
    size = rows_BCH.shape[1]
    if shards.split:
        start_B = chunk.pos_B - shards.rank("context") * fresh  # of the whole chunk
        first_B, total_B = start_B // ratio, (start_B + chunk.total_B) // ratio - start_B // ratio
        rows_BCH = shards.join(rows_BCH, "context", 1)
    else:
        start_B = chunk.pos_B
    longest = rows_BCH.shape[1]
    longest = longest // (count * block) * block + min(longest % (count * block), block)
    begin_B, end_B = rows_before(first_B, shards), rows_before(first_B + total_B, shards)
    number_BC = row_numbers(begin_B[:, None] + jnp.arange(longest)[None], shards)
    source_BC = number_BC - first_B[:, None]
    if shards.split:
        # a shard's rows follow those of the shard before, but have `size` places
        edges = start_B[:, None] + jnp.arange(count + 1)[None] * fresh
        edges = jnp.minimum(edges, (start_B + chunk.total_B)[:, None]) // ratio
        maker = (number_BC[:, :, None] >= edges[:, None, 1:]).sum(-1).clip(0, count - 1)
        source_BC = maker * size + number_BC - jnp.take_along_axis(edges, maker, axis=1)
    source_BC = source_BC.clip(0, rows_BCH.shape[1] - 1)
    mine = jnp.take_along_axis(rows_BCH, source_BC[..., None], axis=1)
    return new._replace(rows_BCH=mine, first_B=begin_B, count_B=end_B - begin_B)


def whole_rows(rows: store.Rows, index: Array, shards: Shards) -> store.Rows:
    """Compressed rows of layer `index` from all shards, in order, as a stack of one layer."""

    def join(a: Array) -> Array:
        layer = lax.dynamic_index_in_dim(a, index, keepdims=False)
        blocks = layer.reshape(layer.shape[0], -1, 1, shards.row_block, layer.shape[2])
        blocks = shards.join(blocks, "context", 2)
        return blocks.reshape(layer.shape[0], -1, layer.shape[2])[None]

    return jax.tree.map(join, rows)


def merge(state: attend.SoftmaxState, shards: Shards) -> attend.SoftmaxState:
    """The softmax over the rows of all shards, from each shard's own. Sums in rank order."""
    peak = lax.pmax(state.peak_BTN1, "context")
    scale = jnp.exp(state.peak_BTN1 - peak)
    total = shards.total(state.total_BTN1 * scale, "context")
    return attend.SoftmaxState(peak, total, shards.total(state.sum_BTNH * scale, "context"))


def selection_mask(scores_BTC: Array, keep: int, shards: Shards) -> Array:
    """Which of this shard's rows are among the `keep` best of all; of equals the first ones."""
    scores = jnp.where(scores_BTC == 0, 0.0, scores_BTC)  # -0.0 ties with 0.0
    numbers = row_numbers(jnp.arange(scores.shape[-1]), shards)
    flat = scores.reshape(-1, scores.shape[-1])
    best, rows = lax.top_k(flat, min(keep, flat.shape[1]))
    bound, last = worst_winner(best, numbers[rows], keep, shards)
    chosen = (flat > bound) | ((flat == bound) & (numbers[None] <= last))
    return chosen.reshape(scores.shape) & (scores_BTC > -jnp.inf)


def worst_winner(best: Array, numbers: Array, keep: int, shards: Shards) -> tuple[Array, Array]:
    """Score and row number `[n, 1]` of the worst of the `keep` best candidates of all shards.

    best, numbers: `[n, k]`, this shard's candidates, as many as may win.
    """
    best, numbers = (shards.join(a, "context", 1) for a in (best, numbers))
    if best.shape[1] <= keep:
        return jnp.full_like(best[:, :1], -jnp.inf), jnp.full_like(numbers[:, :1], NO_ROW)
    bound = lax.top_k(best, keep)[0][:, -1:]
    missing = keep - (best > bound).sum(axis=1, keepdims=True)
    ties = jnp.sort(jnp.where(best == bound, numbers, NO_ROW), axis=1)
    return bound, jnp.take_along_axis(ties, missing - 1, axis=1)


def merge_parts(out_BTNH: Array, log_BTN: Array, sink_N: Array, shards: Shards) -> Array:
    """Attention over the rows of all shards and the sink, float32, from that over each one's own.

    log: logarithms of the parts' denominators.
    """
    log_BTN1, sink = log_BTN[..., None], sink_N.astype(jnp.float32).reshape(1, 1, -1, 1)
    peak = jnp.maximum(lax.pmax(log_BTN1, "context"), sink)
    weight = jnp.exp(log_BTN1 - peak)
    total = shards.total(weight, "context") + jnp.exp(sink - peak)
    return shards.total(out_BTNH.astype(jnp.float32) * weight, "context") / total


def local_cache(cache: dict[str, Any], index: Array, shards: Shards) -> tuple[dict, Array]:
    """A layer's cache with the compressed rows of all shards, and its place in their stack."""
    if not shards.split or "rows" not in cache:
        return cache, index
    joined = {k: whole_rows(cache[k], index, shards) for k in ("rows", "keys") if k in cache}
    return cache | joined, jnp.int32(0)
