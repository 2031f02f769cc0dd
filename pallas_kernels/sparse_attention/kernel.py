"""Attention over window rows and compressed rows in one online softmax; keys are values.

Grid: (sequence, block of Q queries). One step, with M = Q·N rows of queries and heads:

    m = sink, l = 1, acc = 0                                        VMEM, never in HBM
    window tiles of 128 rows that some query of the block sees ─┐
    compressed tiles of 512 rows, or those of 128 with chosen ──┤   DMA, D tiles in flight
                                                                ▼
       packed columns ── FP8 × scale, rope ──► K [H, tile]      (or plain rows K [tile, H])
       S = q·K · H^-1/2, masked      [M, tile]                  one tile feeds both products
       m, l, acc ← online softmax with p·K
    out = acc / l ── inverse RoPE of the last channels ──► HBM, once

Masks are per query: window rows [start, stop), compressed rows below `visible`, and where the
indexer has chosen, the bits of its words. Packed rows arrive as columns (entries along lanes):
that is how the TPU keeps arrays whose last dimension is not a multiple of 128, and it makes a
block scale one row that broadcasts over sublanes.

Two ways to the same rows: all tiles below the largest `visible`, 512 rows at a time, or only the
tiles of 128 rows in which a query of the block has a chosen row, four of them at a time. The
caller says per block which: `live` counts the tiles of the second way, or is 0 for the first. Their
numbers are listed in SMEM from one bit each. 128 rows are the least that can be copied of columns.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging

LANES = 128
NOWHERE = 1 << 30  # number of a row that nobody sees
NO_SCORE = -1e30  # finite: the running maximum starts at the sink, so exp gives exactly 0
SPAN_TILES = 32  # lane groups in one row of mask words
MAX_ROWS = 1024  # query-head pairs per block
f32, i32 = jnp.float32, jnp.int32


class Store(NamedTuple):
    """Static form of one array of rows."""

    packed: bool
    channels: int
    tile: int
    depth: int  # tiles in VMEM, a power of two
    num_arrays: int
    page: int = 0  # rows of a page; 0: not paged


class Plan(NamedTuple):
    """Static sizes of one call."""

    queries: int  # per block
    heads: int
    channels: int
    window: Store
    rows: Store | None
    masked: bool
    listed: bool  # blocks may read only the tiles with chosen rows
    turned: bool  # undo the rotation of the output
    expected: int = 0  # compressed rows that a block reads, for the cost estimate
    part: bool = False  # also write the logarithm of the denominator


def pick_queries(fresh: int, heads: int) -> int:
    """Queries per block: all of a short chunk, else a multiple of eight."""
    return fresh if fresh < 8 else max(min(MAX_ROWS // heads, fresh) // 8 * 8, 8)


def decode_columns(values: Array, scales: Array, channels: int) -> Array:
    """Packed rows as exact bfloat16 columns `[H, S]`: FP8 times a power of two, then the rest.

    A column's bytes 2i and 2i+1 lie where a 16-bit value i lies, so the rest needs no movement.
    """
    still = 2 * channels - values.shape[0]  # the others take two bytes
    powers = lax.bitcast_convert_type(scales.astype(i32) << 23, f32)
    floats = lax.bitcast_convert_type(values[:still], jnp.float8_e4m3fn).astype(f32)
    blocks = []
    for n in range(still // 64):
        part = floats[64 * n : 64 * (n + 1)] * powers[n : n + 1]
        blocks.append(part.astype(jnp.bfloat16))
    return jnp.concatenate([*blocks, pltpu.bitcast(values[still:], jnp.bfloat16)], axis=0)


def _floats(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _dot(a: Array, b: Array, transposed: bool) -> Array:
    exact = lax.Precision.HIGHEST if a.dtype == f32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=f32)


class Stream:
    """Tiles of one store, `depth - 1` of them on their way while one is at work."""

    def __init__(
        self, store: Store, refs, buffers, sem, layer: Array, owner: Any, first: Array, end: Array
    ):
        self.store, self.refs, self.buffers, self.sem = store, refs, buffers, sem
        self.layer, self.first, self.end = layer, first, end  # tiles first … end - 1
        self.owner = owner  # the sequence, or the SMEM table of its pages

    def pieces(self, tile: Array) -> list[paging.Piece]:
        store = self.store
        table_ref = self.owner if store.page else None
        return paging.pieces(tile, store.tile, store.page, self.owner, table_ref)

    def groups(self, tile: Array) -> list[Array]:
        """Numbers of the groups of 128 rows in a tile; ~n: n stands there again, not to be seen."""
        parts = self.store.tile // LANES
        return [tile * parts + n for n in range(parts)]

    def copies(self, tile: Array) -> list:
        store, out = self.store, []
        slot = tile & (store.depth - 1)
        where = self.pieces(tile)
        for n, (ref, buffer) in enumerate(zip(self.refs, self.buffers, strict=True)):
            for piece in where:
                source, target = ref.at[self.layer, piece.owner], buffer.at[slot]
                rows, place = pl.ds(piece.start, piece.size), pl.ds(piece.offset, piece.size)
                if store.packed:
                    source, target = source.at[:, rows], target.at[:, place]
                else:
                    source, target = source.at[rows], target.at[place]
                out.append(pltpu.make_async_copy(source, target, self.sem.at[n, slot]))
        return out

    def start(self, tile: Array) -> None:
        @pl.when(tile < self.end)
        def _():
            for copy in self.copies(tile):
                copy.start()

    def begin(self) -> None:
        for ahead in range(self.store.depth - 1):
            self.start(self.first + ahead)

    def take(self, tile: Array) -> Array:
        """Columns `[H, tile]` of packed rows, else rows `[tile, H]`."""
        self.start(tile + self.store.depth - 1)
        for copy in self.copies(tile):
            copy.wait()
        slot = tile & (self.store.depth - 1)
        if self.store.packed:
            values, scales = self.buffers
            return decode_columns(values[slot], scales[slot], self.store.channels)
        return _floats(self.buffers[0][slot])


class Listed(Stream):
    """Tiles made of the groups of 128 rows that a list in SMEM names."""

    def __init__(self, list_ref, *args):
        super().__init__(*args)
        self.list_ref = list_ref

    def groups(self, tile: Array) -> list[Array]:
        parts = self.store.tile // LANES
        return [self.list_ref[tile * parts + n] for n in range(parts)]

    def pieces(self, tile: Array) -> list[paging.Piece]:
        page, owner, out = self.store.page, self.owner, []
        for n, group in enumerate(self.groups(tile)):
            (piece,) = paging.pieces(_number(group), LANES, page, owner, owner if page else None)
            out.append(piece._replace(offset=n * LANES))
        return out


def _list_groups(bits_ref, list_ref, parts: int) -> None:
    """Numbers of the set bits, ascending; the first, inverted, fills up the last tile."""

    def word(n: Array, count: Array) -> Array:
        def one(state: tuple[Array, Array]) -> tuple[Array, Array]:
            bits, count = state
            lowest = bits & -bits
            list_ref[count] = n * SPAN_TILES + 31 - lax.clz(lowest)
            return bits ^ lowest, count + 1

        return lax.while_loop(lambda state: state[0] != 0, one, (bits_ref[0, 0, n], count))[1]

    count = lax.fori_loop(0, bits_ref.shape[2], word, jnp.int32(0))
    for n in range(parts - 1):
        list_ref[count + n] = ~list_ref[0]


def _number(group: Array) -> Array:
    return jnp.where(group < 0, ~group, group)


class Softmax:
    """Running maximum, denominator and sum of `[Q·N]` rows, in VMEM."""

    def __init__(self, plan: Plan, q_ref, sink_ref, peak_ref, total_ref, sum_ref):
        self.plan, self.sum_ref = plan, sum_ref
        self.peak_ref, self.total_ref = peak_ref, total_ref
        self.q = q_ref[...].reshape(plan.queries * plan.heads, plan.channels)
        square = (plan.heads, plan.heads)
        diagonal = lax.broadcasted_iota(i32, square, 0) == lax.broadcasted_iota(i32, square, 1)
        column = jnp.where(diagonal, sink_ref[...], 0.0).sum(axis=1, keepdims=True)
        column = jnp.broadcast_to(column, (plan.heads, LANES))
        peak_ref[...] = jnp.concatenate([column] * plan.queries, axis=0)
        total_ref[...] = jnp.ones(total_ref.shape, f32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, f32)

    def absorb(self, keys: Array, columns: bool, masks: list[Array]) -> None:
        """Adds a tile; masks: per query, `[1 or N, tile]`."""
        plan = self.plan
        scores = _dot(self.q, keys, not columns) * plan.channels**-0.5
        parts = []
        for n, mask in enumerate(masks):
            part = scores[n * plan.heads : (n + 1) * plan.heads]
            parts.append(jnp.where(jnp.broadcast_to(mask, part.shape), part, NO_SCORE))
        scores = jnp.concatenate(parts, axis=0)
        before = self.peak_ref[:, :1]
        peak = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        probs, decay = jnp.exp(scores - peak), jnp.exp(before - peak)
        total = self.total_ref[:, :1] * decay + probs.sum(axis=1, keepdims=True)
        self.peak_ref[...] = jnp.broadcast_to(peak, self.peak_ref.shape)
        self.total_ref[...] = jnp.broadcast_to(total, self.total_ref.shape)
        added = _dot(probs.astype(self.q.dtype), keys, columns)
        self.sum_ref[...] = self.sum_ref[...] * decay + added

    def finish(self, out_ref, cos_ref, sin_ref, log_ref) -> None:
        """Writes the output, the last 128 channels turned back if asked."""
        plan, dtype = self.plan, self.q.dtype
        if log_ref is not None:
            log = self.peak_ref[...] + jnp.log(self.total_ref[...])
            log_ref[...] = log.reshape(log_ref.shape)
        out = (self.sum_ref[...] / self.total_ref[:, :1]).astype(dtype)
        if plan.turned:
            still, last = out[:, : plan.channels - LANES], out[:, plan.channels - LANES :]
            x = last.astype(f32)
            even = (lax.broadcasted_iota(i32, x.shape, 1) & 1) == 0
            other = jnp.where(even, pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1))
            cos, sin = self.per_head(cos_ref), self.per_head(sin_ref)
            out = jnp.concatenate([still, (x * cos + other * sin).astype(dtype)], axis=1)
        out_ref[...] = out.reshape(out_ref.shape)

    def per_head(self, ref) -> Array:
        """`[Q·N, 128]` of a block `[1, Q, 128]`."""
        plan = self.plan
        rows = ref[...].reshape(plan.queries, LANES)
        shape = (plan.heads, LANES)
        return jnp.concatenate(
            [jnp.broadcast_to(rows[n : n + 1], shape) for n in range(plan.queries)], axis=0
        )


class Limits(NamedTuple):
    """Scalars in SMEM. Per query: window rows [start, stop), visible rows. Per block: tiles."""

    layers: Array  # of the window, of the rows
    slots: Array  # of the window, per sequence
    start: Array
    stop: Array
    visible: Array
    window_first: Array
    window_end: Array
    rows_end: Array  # 0 where groups are listed
    live: Array  # groups of 128 rows that are listed


def _body(plan: Plan, *refs) -> None:
    limits, refs = Limits(*refs[: len(Limits._fields)]), list(refs[len(Limits._fields) :])
    q_ref, sink_ref = refs.pop(0), refs.pop(0)
    cos_ref, sin_ref = (refs.pop(0), refs.pop(0)) if plan.turned else (None, None)
    words_ref = refs.pop(0) if plan.masked else None
    bits_ref = refs.pop(0) if plan.listed else None
    table_ref = refs.pop(0) if plan.rows and plan.rows.page else None
    window_refs = [refs.pop(0) for _ in range(plan.window.num_arrays)]
    rows_refs = [refs.pop(0) for _ in range(plan.rows.num_arrays)] if plan.rows else []
    out_ref, log_ref = refs.pop(0), refs.pop(0) if plan.part else None
    peak_ref, total_ref, sum_ref = (refs.pop(0) for _ in range(3))
    window_buffers = [refs.pop(0) for _ in window_refs]
    window_sem = refs.pop(0)
    block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)

    window = Stream(
        plan.window,
        window_refs,
        window_buffers,
        window_sem,
        limits.layers[0],
        limits.slots[pl.program_id(0)],
        limits.window_first[block],
        limits.window_end[block],
    )
    window.begin()
    streams: list[Stream] = []
    if plan.rows:
        store, buffers, sem = plan.rows, [refs.pop(0) for _ in rows_refs], refs.pop(0)
        owner = table_ref if store.page else pl.program_id(0)
        layer, first = limits.layers[1], jnp.int32(0)
        args = (store, rows_refs, buffers, sem, layer, owner, first)
        streams.append(Stream(*args, limits.rows_end[block]))
        if plan.listed:
            list_ref, parts, live = refs.pop(0), store.tile // LANES, limits.live[block]
            pl.when(live > 0)(lambda: _list_groups(bits_ref, list_ref, parts))
            streams.append(Listed(list_ref, *args, (live + parts - 1) // parts))
    for rows in streams:  # of two, one has no tiles
        rows.begin()
    softmax = Softmax(plan, q_ref, sink_ref, peak_ref, total_ref, sum_ref)
    _window(plan, limits, block, softmax, window)
    for rows in streams:
        _visible(plan, limits, block, words_ref, softmax, rows)
    softmax.finish(out_ref, cos_ref, sin_ref, log_ref)


def _window(plan: Plan, limits: Limits, block: Array, softmax: Softmax, window: Stream) -> None:
    def body(tile: Array, _: int) -> int:
        keys = window.take(tile)
        size = plan.window.tile
        index = tile * size + lax.broadcasted_iota(i32, (1, size), 1)
        masks = []
        for n in range(plan.queries):
            at = block * plan.queries + n
            masks.append((index >= limits.start[at]) & (index < limits.stop[at]))
        softmax.absorb(keys, plan.window.packed, masks)
        return 0

    lax.fori_loop(window.first, window.end, body, 0)


def _visible(
    plan: Plan, limits: Limits, block: Array, words_ref, softmax: Softmax, rows: Stream
) -> None:
    """Compressed rows below `visible`, and in the mask words if there are any."""

    def body(tile: Array, _: int) -> int:
        keys = rows.take(tile)
        groups = rows.groups(tile)
        lane = lax.broadcasted_iota(i32, (1, LANES), 1)
        index = [jnp.where(group < 0, NOWHERE, group * LANES) + lane for group in groups]
        index = jnp.concatenate(index, axis=1)
        bits = _chosen(words_ref, groups) if plan.masked else None
        masks = []
        for n in range(plan.queries):
            mask = index < limits.visible[block * plan.queries + n]
            masks.append(mask if bits is None else mask & (bits[n : n + 1] > 0))
        softmax.absorb(keys, rows.store.packed, masks)
        return 0

    lax.fori_loop(0, rows.end, body, 0)


def _chosen(words_ref, groups: list[Array]) -> Array:
    """0 or 1 per query and row of groups, `[Q, rows]`; for the order of bits see index_topk."""
    out = []
    for group in groups:
        group = _number(group)
        first = pl.multiple_of((group >> 5) * LANES, LANES)
        out.append((words_ref[0, :, pl.ds(first, LANES)] >> (group & (SPAN_TILES - 1))) & 1)
    return jnp.concatenate(out, axis=1)


def _buffers(store: Store, arrays: tuple[Array, ...]) -> list:
    """VMEM for the tiles of a store, and its semaphores."""
    shapes = []
    for array in arrays:
        width = array.shape[2] if store.packed else array.shape[3]
        tile = (width, store.tile) if store.packed else (store.tile, width)
        shapes.append(pltpu.VMEM((store.depth, *tile), array.dtype))
    return [*shapes, pltpu.SemaphoreType.DMA((len(arrays), store.depth))]


def _row_bytes(store: Store, arrays: tuple[Array, ...]) -> int:
    rows = [a.shape[0] * a.shape[1] * a.shape[3 if store.packed else 2] for a in arrays]
    return sum(a.size // n * a.dtype.itemsize for a, n in zip(arrays, rows, strict=True))


def sparse_attention(
    plan: Plan,
    limits: Limits,
    q_BTNH: Array,
    sink_N: Array,
    turn: tuple[Array, ...],
    words: Array | None,
    bits: Array | None,
    table: Array | None,
    window: tuple[Array, ...],
    rows: tuple[Array, ...],
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Array, ...]:
    """Output `[B, T, N, H]`, and of a part the denominators' logarithms, float32 `[B, T, N, 128]`.

    turn: cos and signed sin `[B, T, 128]`. words: mask words `[B, T, W]`. bits: of each block one
    per group of 128 rows, `[B·blocks, 1, W/128]`. table: pages `[B, 1, P]`. window, rows: columns
    or rows.
    """
    batch, fresh, heads, channels = q_BTNH.shape
    blocks = limits.window_end.size // batch
    m = plan.queries * heads
    in_specs = [
        pl.BlockSpec((1, plan.queries, heads, channels), lambda b, t, *_: (b, t, 0, 0)),
        pl.BlockSpec((1, heads), lambda b, t, *_: (0, 0)),
        *(pl.BlockSpec((1, plan.queries, LANES), lambda b, t, *_: (b, t, 0)) for _ in turn),
    ]
    attended = batch * fresh * plan.window.tile
    read = batch * blocks * 2 * plan.window.tile * _row_bytes(plan.window, window)
    inputs: list[Array] = [q_BTNH, sink_N.reshape(1, heads), *turn]
    scratch = [
        pltpu.VMEM((m, LANES), f32),
        pltpu.VMEM((m, LANES), f32),
        pltpu.VMEM((m, channels), f32),
        *_buffers(plan.window, window),
    ]
    if words is not None:
        inputs.append(words)
        read += 4 * words.size
        words_spec = (1, plan.queries, words.shape[2])
        in_specs.append(pl.BlockSpec(words_spec, lambda b, t, *_: (b, t, 0)))
    if bits is not None:
        inputs.append(bits)
        read += 4 * bits.size
        shape = (1, 1, bits.shape[2])
        in_specs.append(
            pl.BlockSpec(shape, lambda b, t, *_: (b * blocks + t, 0, 0), memory_space=pltpu.SMEM)
        )
    if plan.rows:
        scratch += _buffers(plan.rows, rows)
        attended += batch * fresh * plan.expected
        read += blocks * batch * plan.expected * _row_bytes(plan.rows, rows)
    if bits is not None:
        assert plan.rows is not None
        scratch.append(pltpu.SMEM((bits.shape[2] * SPAN_TILES + plan.rows.tile // LANES,), i32))
    if table is not None:
        pages = table.shape[2]
        spec = pl.BlockSpec((1, 1, pages), lambda b, t, *_: (b, 0, 0), memory_space=pltpu.SMEM)
        in_specs.append(spec)
        inputs.append(table)
        read += 4 * table.size
    in_specs += [pl.BlockSpec(memory_space=pltpu.HBM)] * (len(window) + len(rows))
    outputs = [(q_BTNH.shape, q_BTNH.dtype)]
    if plan.part:
        outputs.append(((*q_BTNH.shape[:3], LANES), jnp.dtype(f32)))
    return pl.pallas_call(
        partial(_body, plan),
        out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(limits),
            grid=(batch, blocks),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, plan.queries, heads, shape[-1]), lambda b, t, *_: (b, t, 0, 0))
                for shape, _ in outputs
            ],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=56 << 20
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * attended * heads * channels,
            transcendentals=attended * heads,
            bytes_accessed=read + 2 * q_BTNH.size * q_BTNH.dtype.itemsize,
        ),
        interpret=interpret,
        name="sparse_attention",
    )(*limits, *inputs, *paging.in_hbm((*window, *rows), interpret))
