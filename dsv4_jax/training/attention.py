"""Attention over whole packed rows, made to be differentiated.

The formulas of `dsv4_jax.attention` without its state: the window comes in tiles of neighbouring
tokens, compressed rows are masked by document, and a slice of queries at a time bounds memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from dsv4_jax import indexer
from dsv4_jax.attention import per_head
from dsv4_jax.config import CSA
from dsv4_jax.norm import head_norm, rms_norm
from dsv4_jax.numerics import linear
from dsv4_jax.rope import Rotation, rotate
from dsv4_jax.training.batch import Batch
from dsv4_jax.training.halo import from_left, own_part, rows_before
from dsv4_jax.training.index_loss import IndexTerms, index_terms, no_terms
from dsv4_jax.training.precision import dense, round_index, round_kv
from dsv4_jax.training.program import Program
from dsv4_jax.training.windows import Extent, Windows, compress_windows, visible

NO_SCORE = -1e30
MIN_TILE, MAX_TILE = 16, 256
SCORE_BUDGET = 1 << 25  # elements of one slice's score array


class Layout(NamedTuple):
    """What all layers of a batch share.

    whole: the batch with all tokens of its rows, of which this device may hold a part.
    windows: by compress ratio, those that end in this part, as indices of tokens that begin
    `rows_before` in front of it. extents: of the windows of whole rows.
    """

    batch: Batch
    whole: Batch
    rope_window: Rotation
    rope_rows: Rotation
    windows: dict[int, Windows]
    extents: dict[int, Extent]


class Memory(NamedTuple):
    """Compressed rows of a layer and, where an indexer runs, its queries and keys.

    Rows and keys are those of all devices with a part of the same tokens' rows.
    """

    rows_BCH: Array
    extent: Extent
    index_q_BTIJ: Array | None = None
    index_w_BTI: Array | None = None
    keys_BCJ: Array | None = None


def attention(
    weights: dict[str, Any], x_BTD: Array, layout: Layout, ratio: int, program: Program
) -> tuple[Array, IndexTerms]:
    """Output `[B, T, D]` of one attention layer, and what its indexer has to learn from."""
    cfg, w, precision = program.cfg, weights, program.precision
    turn = layout.rope_rows if ratio else layout.rope_window
    latent_BTQ, q_BTNH, kv_BTH = project_in(w, x_BTD, turn, program)
    memory = None
    if ratio:
        near_BSD = _with_left(x_BTD, rows_before(program.shards, ratio), program)
        rows_BCH = _compressed(w["compressor"], near_BSD, layout, ratio, program)
        memory = Memory(round_kv(rows_BCH, cfg.rope_dim, precision), layout.extents[ratio])
        if ratio == CSA and (program.sparse or program.index_loss):
            keys_BCJ = _compressed(
                w["indexer"]["compressor"], lax.stop_gradient(near_BSD), layout, ratio, program
            )
            memory = memory._replace(keys_BCJ=round_index(keys_BCJ, precision))
            memory = _with_queries(w["indexer"], x_BTD, latent_BTQ, memory, turn, program)
    out_BTNH, terms = attend(q_BTNH, kv_BTH, w["sink"], memory, layout, program)
    return project_out(w, out_BTNH, turn, program), terms


def project_in(
    w: dict[str, Any], x_BTD: Array, turn: Rotation, program: Program
) -> tuple[Array, Array, Array]:
    """The query's latent `[B, T, Q]`, queries `[B, T, N, H]` and rows `[B, T, H]`, rotated."""
    cfg, num, precision = program.cfg, program.num, program.precision
    low_BTQ = dense(x_BTD, w["wq_a"], precision)
    latent_BTQ = rms_norm(low_BTQ, w["q_norm"], cfg.norm_eps, num)
    q_BTx = dense(latent_BTQ, w["wq_b"], precision)
    q_BTNH = q_BTx.reshape(*q_BTx.shape[:2], cfg.num_heads, cfg.head_dim)
    q_BTNH = rotate(head_norm(q_BTNH, cfg.norm_eps, num), per_head(turn), num)
    kv_BTH = rms_norm(dense(x_BTD, w["wkv"], precision), w["kv_norm"], cfg.norm_eps, num)
    kv_BTH = round_kv(rotate(kv_BTH, turn, num), cfg.rope_dim, precision)
    return latent_BTQ, q_BTNH, kv_BTH


def _with_left(x: Array, rows: int, program: Program) -> Array:
    """Own tokens behind the last `rows` of the left neighbour."""
    return jnp.concatenate([from_left(program.shards, x, rows), x], axis=1) if rows else x


def _compressed(
    w: dict[str, Any], near_BSD: Array, layout: Layout, ratio: int, program: Program
) -> Array:
    """Compressed rows of all devices; each makes those that end in its part."""
    found = compress_windows(w, near_BSD, layout.windows[ratio], program.cfg, program.num)
    return program.shards.join(found, "context", 1)


def _with_queries(
    w: dict[str, Any],
    x_BTD: Array,
    latent_BTQ: Array,
    memory: Memory,
    turn: Rotation,
    program: Program,
) -> Memory:
    """Adds the indexer's queries. It sees inputs as constants and learns from its own loss."""
    cfg, num, precision = program.cfg, program.num, program.precision
    x_BTD, latent_BTQ = lax.stop_gradient((x_BTD, latent_BTQ))
    q_BTy = dense(latent_BTQ, w["wq_b"], precision)
    q_BTIJ = q_BTy.reshape(*q_BTy.shape[:2], cfg.index_heads, cfg.index_dim)
    q_BTIJ = round_index(rotate(q_BTIJ, per_head(turn), num), precision)
    scale = cfg.index_dim**-0.5 * cfg.index_heads**-0.5
    w_BTI = num.cast(linear(x_BTD, w["weights_proj"], num).astype(jnp.float32) * scale)
    return memory._replace(index_q_BTIJ=q_BTIJ, index_w_BTI=w_BTI)


def project_out(w: dict[str, Any], out_BTNH: Array, turn: Rotation, program: Program) -> Array:
    """Turned back, then the grouped low-rank output; its first product sees nothing rounded."""
    cfg, num = program.cfg, program.num
    out_BTNH = rotate(out_BTNH, per_head(turn), num, inverse=True)
    out_BTGg = out_BTNH.reshape(*out_BTNH.shape[:2], cfg.o_groups, cfg.group_dim)
    wo_a_GOg = w["wo_a"].astype(num.jnp_dtype).reshape(cfg.o_groups, cfg.o_rank, cfg.group_dim)
    low = [_rows_times(out_BTGg[:, :, g], wo_a_GOg[g]) for g in range(cfg.o_groups)]
    low_BTz = num.cast(jnp.concatenate(low, axis=-1))
    return dense(low_BTz, w["wo_b"], program.precision)


def _rows_times(x: Array, weight: Array) -> Array:
    """`x · weightᵀ` over the last dimensions, float32."""
    return lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


class _Part(NamedTuple):
    """A slice of queries, with leading dimension B and second dimension the slice's tiles n."""

    q_BntNH: Array
    kv_BnSH: Array
    near_BntS: Array
    seen_BtC: Array | None
    index_q_BtIJ: Array | None
    index_w_BtI: Array | None
    real_Bt: Array
    recent_BntRH: Array | None


def attend(
    q_BTNH: Array,
    kv_BTH: Array,
    sink_N: Array,
    memory: Memory | None,
    layout: Layout,
    program: Program,
    recent_BTRH: Array | None = None,
) -> tuple[Array, IndexTerms]:
    """Attention output `[B, T, N, H]`, still rotated, and the indexer's terms.

    recent_BTRH: rows that each query sees in place of the newest R of `kv_BTH`, its own among them;
    of layers with a window only.
    """
    cfg = program.cfg
    rows, length = q_BTNH.shape[:2]
    tile = min(max(MIN_TILE, min(cfg.window, MAX_TILE)), length)
    behind = -(-(cfg.window - 1) // tile)
    width = (behind + 1) * tile + (memory.rows_BCH.shape[1] if memory else 0)
    per = max(SCORE_BUDGET // (rows * tile * cfg.num_heads * width), 1)
    tiles = -(-length // tile)
    slices = -(-tiles // per)
    per = -(-tiles // slices)
    sizes = (tile, behind, per, slices)
    parts = _cut(q_BTNH, kv_BTH, memory, layout, program, sizes, recent_BTRH)
    attend_part = partial(_attend_part, sink_N=sink_N, memory=memory, program=program)
    if slices == 1:
        out, terms = attend_part(jax.tree.map(lambda a: a[0], parts))
        return out.reshape(rows, -1, *out.shape[3:])[:, :length], terms

    def body(total: IndexTerms, part: _Part) -> tuple[IndexTerms, Array]:
        out, terms = attend_part(part)
        return jax.tree.map(jnp.add, total, terms), out

    terms, out = lax.scan(jax.checkpoint(body), no_terms(), parts)
    out = jnp.moveaxis(out, 0, 1).reshape(rows, -1, *out.shape[4:])
    return out[:, :length], terms


def _cut(
    q_BTNH: Array,
    kv_BTH: Array,
    memory: Memory | None,
    layout: Layout,
    program: Program,
    sizes: tuple[int, int, int, int],
    recent_BTRH: Array | None,
) -> _Part:
    """All slices, stacked along a new first dimension."""
    tile, behind, per, slices = sizes
    batch, shards, window = layout.batch, program.shards, program.cfg.window
    rows, length = q_BTNH.shape[:2]
    total = per * slices * tile
    halo = window - 1 if shards.count("context") > 1 else 0

    def tiled(a: Array, fill: int = 0) -> Array:
        edges = [(0, 0), (0, total - length)] + [(0, 0)] * (a.ndim - 2)
        return jnp.pad(a, edges, constant_values=fill).reshape(rows, -1, tile, *a.shape[2:])

    def with_history(a: Array, left: Array, fill: int = 0) -> Array:
        """Every tile behind those in front of it; `left`: the last tokens before the first."""
        edges = [(0, 0), (behind * tile - halo, 0)] + [(0, 0)] * (left.ndim - 2)
        front = jnp.pad(left, edges, constant_values=fill).reshape(rows, behind, *a.shape[2:])
        front = jnp.concatenate([front, a], axis=1)
        return jnp.concatenate([front[:, i : i + a.shape[1]] for i in range(behind + 1)], axis=2)

    def sliced(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(rows, slices, -1, *a.shape[2:]), 1, 0)

    def queries(a: Array) -> Array:
        """Per query, without tiles."""
        cut = sliced(tiled(a))
        return cut.reshape(*cut.shape[:2], -1, *cut.shape[4:])

    segment_Bnt = tiled(batch.segment_BT, -1)
    ago_tS = behind * tile + jnp.arange(tile)[:, None] - jnp.arange((behind + 1) * tile)[None]
    # -2: nothing in front of the row; padding sees padding, so that no softmax is empty
    left_BS = own_part(shards, layout.whole.segment_BT, length, halo, -2)[:, :halo]
    near_BntS = segment_Bnt[..., None] == with_history(segment_Bnt, left_BS, -2)[:, :, None]
    replaced = 0 if recent_BTRH is None else recent_BTRH.shape[2]
    near_BntS &= ((ago_tS >= replaced) & (ago_tS < window))[None, None]
    return _Part(
        sliced(tiled(q_BTNH)),
        sliced(with_history(tiled(kv_BTH), from_left(shards, kv_BTH, halo))),
        sliced(near_BntS),
        queries(visible(memory.extent, batch)) if memory else None,
        queries(memory.index_q_BTIJ) if memory and memory.index_q_BTIJ is not None else None,
        queries(memory.index_w_BTI) if memory and memory.index_w_BTI is not None else None,
        queries(batch.segment_BT > 0),
        None if recent_BTRH is None else sliced(tiled(recent_BTRH)),
    )


def _einsum(expression: str, a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(expression, a, b, precision=precision, preferred_element_type=jnp.float32)


def _attend_part(
    part: _Part, sink_N: Array, memory: Memory | None, program: Program
) -> tuple[Array, IndexTerms]:
    """Output `[B, n, t, N, H]` of a slice: one softmax over window, compressed rows and sink."""
    num, scale = program.num, program.cfg.head_dim**-0.5
    q_BntNH = part.q_BntNH
    shape = q_BntNH.shape[:4]
    near = _einsum("BntNH,BnSH->BntNS", q_BntNH, part.kv_BnSH) * scale
    near = jnp.where(part.near_BntS[:, :, :, None], near, NO_SCORE)
    peak = lax.stop_gradient(near.max(axis=-1, keepdims=True))
    sink_N1 = sink_N.astype(jnp.float32).reshape(1, 1, 1, -1, 1)
    if part.recent_BntRH is not None:
        newest = _einsum("BntNH,BntRH->BntNR", q_BntNH, part.recent_BntRH) * scale
        peak = jnp.maximum(peak, lax.stop_gradient(newest.max(axis=-1, keepdims=True)))
        near, newest = jnp.exp(near - peak), jnp.exp(newest - peak)
        total = near.sum(axis=-1, keepdims=True) + newest.sum(axis=-1, keepdims=True)
        out = _einsum("BntNS,BnSH->BntNH", num.cast(near), part.kv_BnSH)
        out = out + _einsum("BntNR,BntRH->BntNH", num.cast(newest), part.recent_BntRH)
        return num.cast(out / (total + jnp.exp(sink_N1 - peak))), no_terms()
    if memory is None:
        near = jnp.exp(near - peak)
        total = near.sum(axis=-1, keepdims=True) + jnp.exp(sink_N1 - peak)
        out = _einsum("BntNS,BnSH->BntNH", num.cast(near), part.kv_BnSH)
        return num.cast(out / total), no_terms()
    assert part.seen_BtC is not None
    scores_BtC = _index_scores(part, memory, program)
    seen_BtC = _selected(scores_BtC, part.seen_BtC, program)
    seen = seen_BtC.reshape(*shape[:3], 1, -1)
    far = _einsum("BntNH,BCH->BntNC", q_BntNH, memory.rows_BCH) * scale
    far = jnp.where(seen, far, NO_SCORE)
    peak = jnp.maximum(peak, lax.stop_gradient(far.max(axis=-1, keepdims=True)))
    near, far = jnp.exp(near - peak), jnp.exp(far - peak)
    total = near.sum(axis=-1, keepdims=True) + far.sum(axis=-1, keepdims=True)
    total = total + jnp.exp(sink_N1 - peak)
    out = _einsum("BntNS,BnSH->BntNH", num.cast(near), part.kv_BnSH)
    out = out + _einsum("BntNC,BCH->BntNH", num.cast(far), memory.rows_BCH)
    terms = no_terms()
    if program.index_loss and scores_BtC is not None:
        mass_BtC = lax.stop_gradient((far / total).sum(axis=3)).reshape(seen_BtC.shape)
        terms = index_terms(scores_BtC, mass_BtC, seen_BtC, part.real_Bt, program.cfg.index_topk)
    return num.cast(out / total), terms


def _index_scores(part: _Part, memory: Memory, program: Program) -> Array | None:
    """The indexer's scores of all rows, float32 `[B, t, C]`; None where it does not run."""
    if part.index_q_BtIJ is None:
        return None
    assert part.index_w_BtI is not None and memory.keys_BCJ is not None
    if not program.index_loss and memory.rows_BCH.shape[1] <= program.cfg.index_topk:
        return None
    query = indexer.IndexQuery(part.index_q_BtIJ, part.index_w_BtI)
    scores_BtC = indexer.score_tile(query, memory.keys_BCJ, program.num)
    return _shuffled(scores_BtC) if program.random_index else scores_BtC


def _shuffled(scores: Array) -> Array:
    """Numbers in [0, 1) that are decided by the scores but know nothing of their order."""
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
    column_C = jnp.arange(scores.shape[-1], dtype=jnp.uint32)
    bits = ((bits ^ (bits >> 13)) + column_C[None, None]) * jnp.uint32(0xC2B2AE35)
    return (bits ^ (bits >> 16)).astype(jnp.float32) / 2.0**32


def _selected(scores_BtC: Array | None, seen_BtC: Array, program: Program) -> Array:
    """Which compressed rows take part: what is visible or, if sparse, the best of it."""
    keep = program.cfg.index_topk
    if not program.sparse or scores_BtC is None or seen_BtC.shape[-1] <= keep:
        return seen_BtC
    scores = lax.stop_gradient(jnp.where(seen_BtC, scores_BtC, -jnp.inf))
    return checkpoint_name(indexer.selection_mask(scores, keep), "decision")
