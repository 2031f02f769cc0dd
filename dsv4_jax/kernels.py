"""From the model's arrays to the kernels' and back. Which implementation runs is the caller's word.

Functions here raise NotImplementedError for sizes that a kernel does not cover; `Numerics.kernels`
says when they are asked at all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax import cache as store
from dsv4_jax import context
from dsv4_jax.compress import Chunk
from dsv4_jax.config import ModelConfig
from dsv4_jax.indexer import IndexQuery, score_tile
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import Rotation
from pallas_kernels.index_topk import api as index_topk
from pallas_kernels.query_heads import api as head_kernel
from pallas_kernels.sparse_attention import api as sparse_attention
from sharding.shards import Shards

PACKED_PAGE, PLAIN_PAGE = 128, 16  # rows of a page that can be copied into part of a tile


def query_heads(q_BTx: Array, turn: Rotation, cfg: ModelConfig, num: Numerics) -> Array:
    """Heads `[B, T, N, H]` of this device, normed and turned."""
    batch, fresh = q_BTx.shape[:2]
    heads = q_BTx.shape[2] // cfg.head_dim

    def per_token(a: Array) -> Array:
        """`[B·T, pairs]`, also where all sequences share their angles."""
        return jnp.broadcast_to(a, (batch, *a.shape[1:])).reshape(batch * fresh, -1)

    q_UNH = head_kernel.query_heads(
        q_BTx.reshape(batch * fresh, -1),
        per_token(turn.cos),
        per_token(turn.sin),
        heads,
        eps=cfg.norm_eps,
        rounds=num.rounds,
        implementation=None if num.implementation is None else num.matrix_kernels,
    )
    return q_UNH.reshape(batch, fresh, heads, -1)


def attend(
    q_BTNH: Array,
    recent_BSH: Array | None,
    sink_N: Array,
    chunk: Chunk,
    cache: store.LayerCache,
    index: Array,
    query: IndexQuery | None,
    ratio: int,
    turn: Rotation,
    cfg: ModelConfig,
    num: Numerics,
) -> Array:
    """Attention output `[B, T, N, H]` of a chunk, turned back by `turn`.

    recent_BSH: the window before the chunk, then the chunk; None: both are in the ring.
    """
    window = _window(recent_BSH, chunk, cache, index, q_BTNH.shape[1], cfg, num)
    compressed = None
    if ratio:
        compressed = _compressed(chunk, q_BTNH.shape[1], cache, index, query, ratio, cfg, num)
    return sparse_attention.sparse_attention(
        q_BTNH,
        sink_N.astype(jnp.float32),
        window,
        compressed,
        rotation=(turn.cos, turn.sin),
        implementation=num.kernels,  # type: ignore[arg-type]
    )


def attend_shared(
    q_BTNH: Array,
    recent_BSH: Array | None,
    sink_N: Array,
    chunk: Chunk,
    cache: store.LayerCache,
    index: Array,
    query: IndexQuery | None,
    ratio: int,
    turn: Rotation,
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
) -> Array:
    """`attend` where each shard of a context has rows of its own; the first one has the window."""
    fresh = q_BTNH.shape[1]
    window = _window(recent_BSH, chunk, cache, index, fresh, cfg, num)
    stop_BT = jnp.where(shards.rank("context") == 0, window.stop_BT, 0)
    start_BT = jnp.minimum(window.start_BT, stop_BT)
    compressed = None
    if ratio:
        visible_BT = context.rows_before(chunk.visible(jnp.arange(fresh), ratio), shards)
        words = None
        if query is not None:
            words = _shared_choice(query, cache["keys"], visible_BT, chunk, index, cfg, num, shards)
        compressed = sparse_attention.Compressed(
            _rows(cache["rows"]), visible_BT, index, words, keep=cfg.index_topk
        )
    out_BTNH, log_BTN = sparse_attention.partial_attention(
        q_BTNH,
        window._replace(start_BT=start_BT, stop_BT=stop_BT),
        compressed,
        rotation=(turn.cos, turn.sin),
        implementation=num.kernels,  # type: ignore[arg-type]
    )
    return num.cast(context.merge_parts(out_BTNH, log_BTN, sink_N, shards))


def _shared_choice(
    query: IndexQuery,
    keys: store.Rows,
    visible_BT: Array,
    chunk: Chunk,
    index: Array,
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
) -> Array:
    """Mask words of this shard's rows among the best of all shards.

    Each shard's candidates come from the kernel and are scored once more to be compared.
    """
    (batch, fresh), size = visible_BT.shape, store.num_rows(keys)
    keep = min(cfg.index_topk, size)
    # one layer first: XLA would turn the whole stack to read its entries as rows
    layer = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index), keys)
    rest = -size % store.KERNEL_TILE  # few keys: filled up to what the kernel reads at once
    edges = ((0, 0), (0, 0), (0, rest), (0, 0))
    chosen = index_topk.select_rows(
        query.q_BTIJ,
        query.w_BTI,
        _keys(jax.tree.map(lambda a: jnp.pad(a, edges), layer) if rest else keys),
        visible_BT,
        keep,
        layer=0 if rest else index,
        rounded=num.packed_cache,
        implementation=num.kernels,  # type: ignore[arg-type]
    )
    rows_BTK = chosen.rows_BTK
    place = chunk.place(jnp.int32(0))
    keys_BTKJ = store.gather_rows(layer, place, rows_BTK, num.jnp_dtype)
    alone = IndexQuery(*(a.reshape(batch * fresh, 1, *a.shape[2:]) for a in query))
    scores = score_tile(alone, keys_BTKJ.reshape(batch * fresh, *keys_BTKJ.shape[2:]), num)[:, 0]
    is_real = jnp.arange(keep)[None] < chosen.count_BT.reshape(-1, 1)
    scores = jnp.where(is_real, jnp.where(scores == 0, 0.0, scores), -jnp.inf)
    rows = rows_BTK.reshape(batch * fresh, keep)
    numbers = context.row_numbers(rows, shards)
    bound, last = context.worst_winner(scores, numbers, cfg.index_topk, shards)
    wins = is_real & ((scores > bound) | ((scores == bound) & (numbers <= last)))
    rows = jnp.where(wins, rows, size)  # out of range: dropped
    mask = jnp.zeros((batch * fresh, size), bool)
    mask = mask.at[jnp.arange(batch * fresh)[:, None], rows].set(True, mode="drop")
    return index_topk.mask_words(mask.reshape(batch, fresh, size))


def _window(
    recent_BSH: Array | None,
    chunk: Chunk,
    cache: store.LayerCache,
    index: Array,
    fresh: int,
    cfg: ModelConfig,
    num: Numerics,
) -> sparse_attention.Window:
    ring = cache["window"]
    if recent_BSH is None and (fresh > 1 or store.num_rows(ring) > cfg.window):
        # a longer ring holds more than may be seen, and kernels take one run of rows
        end_B, seen = chunk.pos_B + fresh, cfg.window + fresh - 1
        recent_BSH = store.ring_history(ring, chunk.place(index), end_B, seen, num.jnp_dtype)
    if recent_BSH is None:
        bounds = sparse_attention.window_bounds(chunk.pos_B, 1, store.num_rows(ring), cfg.window)
        return sparse_attention.Window(_rows(ring), *bounds, index, chunk.slots_B)
    bounds = sparse_attention.window_bounds(chunk.pos_B, fresh, recent_BSH.shape[1], cfg.window)
    return sparse_attention.Window(recent_BSH[None], *bounds)


def _compressed(
    chunk: Chunk,
    fresh: int,
    cache: store.LayerCache,
    index: Array,
    query: IndexQuery | None,
    ratio: int,
    cfg: ModelConfig,
    num: Numerics,
) -> sparse_attention.Compressed:
    """The rows that each query sees: all visible ones, or of those the indexer's choice."""
    visible_BT = chunk.visible(jnp.arange(fresh), ratio)
    rows, layer, table_BP = _nested(cache["rows"], index, chunk.table_BP)
    words = None
    if query is not None and store.row_room(cache["rows"], chunk.place(index)) > cfg.index_topk:
        keys, key_layer, key_table = _nested(cache["keys"], index, chunk.table_BP)
        words = index_topk.select_mask(
            query.q_BTIJ,
            query.w_BTI,
            _keys(keys),
            visible_BT,
            cfg.index_topk,
            layer=key_layer,
            table_BP=key_table,
            rounded=num.packed_cache,
            implementation=num.kernels,  # type: ignore[arg-type]
        )
    return sparse_attention.Compressed(
        _rows(rows), visible_BT, layer, words, table_BP, cfg.index_topk
    )


def _keys(keys: store.Rows) -> index_topk.FP4Keys | Array:
    if isinstance(keys, store.PackedKeys):
        return index_topk.FP4Keys(keys.codes, keys.scales)
    assert isinstance(keys, Array)
    return keys


def _rows(rows: store.Rows) -> sparse_attention.RowStore:
    if isinstance(rows, store.PackedRows):
        return sparse_attention.PackedRows(rows.values, rows.scales)
    assert isinstance(rows, Array)
    return rows


def _nested(rows: Any, index: Array, table_BP: Array | None) -> tuple[Any, Array, Array | None]:
    """Rows, layer and pages as a kernel takes them.

    Pages too small to be copied into part of a tile are laid side by side first. That moves every
    row a sequence may have, so real deployments give the rows of CSA layers pages large enough.
    """
    packed = not isinstance(rows, Array)
    if table_BP is None or store.num_rows(rows) % (PACKED_PAGE if packed else PLAIN_PAGE) == 0:
        return rows, index, table_BP
    size = store.row_unit(table_BP.shape[1] * store.num_rows(rows))

    def side_by_side(a: Array) -> Array:
        flat = a[index, table_BP].reshape(len(table_BP), -1, a.shape[3])
        return jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % size), (0, 0)))[None]

    return jax.tree.map(side_by_side, rows), jnp.int32(0), None
