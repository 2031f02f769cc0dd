"""From the model's arrays to the kernels' and back. Which implementation runs is the caller's word.

Functions here raise NotImplementedError for sizes that a kernel does not cover; `Numerics.kernels`
says when they are asked at all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dsv4_jax import cache as store
from dsv4_jax.compress import Chunk
from dsv4_jax.config import ModelConfig
from dsv4_jax.indexer import IndexQuery
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import Rotation
from pallas_kernels.index_topk import api as index_topk
from pallas_kernels.sparse_attention import api as sparse_attention

PACKED_PAGE, PLAIN_PAGE = 128, 16  # rows of a page that can be copied into part of a tile


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

    recent_BSH: the window before the chunk, then the chunk; None: one token, in the ring already.
    """
    ring, fresh = cache["window"], q_BTNH.shape[1]
    if recent_BSH is None:
        bounds = sparse_attention.window_bounds(chunk.pos_B, 1, store.num_rows(ring), cfg.window)
        window = sparse_attention.Window(_rows(ring), *bounds, index, chunk.slots_B)
    else:
        size = recent_BSH.shape[1]
        bounds = sparse_attention.window_bounds(chunk.pos_B, fresh, size, cfg.window)
        window = sparse_attention.Window(recent_BSH[None], *bounds)
    compressed = _compressed(chunk, fresh, cache, index, query, ratio, cfg, num) if ratio else None
    return sparse_attention.sparse_attention(
        q_BTNH,
        sink_N.astype(jnp.float32),
        window,
        compressed,
        rotation=(turn.cos, turn.sin),
        implementation=num.kernels,  # type: ignore[arg-type]
    )


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
    steps = jnp.arange(fresh)[None]
    visible_BT = (chunk.pos_B[:, None] + steps + 1) // ratio
    visible_BT = jnp.where(steps < chunk.count_B[:, None], visible_BT, 0)
    rows, layer, table_BP = _nested(cache["rows"], index, chunk.table_BP)
    words = None
    if query is not None and store.row_room(cache["rows"], chunk.place(index)) > cfg.index_topk:
        keys, key_layer, key_table = _nested(cache["keys"], index, chunk.table_BP)
        words = index_topk.select_mask(
            query.q_BTIJ,
            query.w_BTI,
            index_topk.FP4Keys(keys.codes, keys.scales)
            if isinstance(keys, store.PackedKeys)
            else keys,
            visible_BT,
            cfg.index_topk,
            layer=key_layer,
            table_BP=key_table,
            rounded=num.packed_cache,
            implementation=num.kernels,  # type: ignore[arg-type]
        )
    return sparse_attention.Compressed(_rows(rows), visible_BT, layer, words, None, table_BP)


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
