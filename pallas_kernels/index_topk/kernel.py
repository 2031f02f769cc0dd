"""Index scores and exact top-k of them in one pass; scores never leave VMEM.

Grid: (sequence, block of Q queries). One step, for the n tiles that some query of it sees:

    HBM keys ──DMA, D in flight─► tile k ──FP4 → bf16──► K [J, tile]
    q [Q·I, J] @ K = dots ──relu, × w, Σ heads──► scores ──► int32 in score order
                                                    │
            VMEM  order[t] for t = 0 … n-1  ◄───────┘        (min and max kept on the way)

    bisection on the value   T: the largest value with at least k entries ≥ T
    bisection on the index   X: the first index such that ties below it fill up k
    chosen = order > T, or order == T and index < X

    Q = 8, 16, 32:  order[t] is [Q, tile]
    Q = 1:          order[t] is [8, 128], 1024 entries: one query fills whole registers

    mask form:  32 groups of 128 lanes make one word
    rows form:  Q = 1 only; ranks and one-hot matmuls on the MXU turn the mask into ascending
                row numbers

Entries from `visible` on hold the smallest int32, so no pass needs a second comparison. Sums over
heads follow one fixed tree, so a query scores the same in either form and in any block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging
from pallas_kernels.index_topk.choosing import Chosen, bisect
from pallas_kernels.index_topk.scoring import (
    LAST,
    channel_order,
    decode_columns,
    head_sum,
    score_order,
)

HIDDEN = -(2**31)  # below the order of every score, -inf included
LANES = 128
SPAN = 32 * LANES  # entries of one row of mask words
SCRATCH_BYTES = 16 << 20  # budget of the order array; decides the queries per block
f32, i32 = jnp.float32, jnp.int32


class Plan(NamedTuple):
    """Static sizes of one call."""

    packed: bool  # FP4 columns, else plain rows
    rounded: bool
    keep: int
    tile: int  # entries per step
    num_tiles: int  # capacity / tile
    queries: int  # per block
    heads: int
    channels: int
    capacity: int  # entries of a sequence, in whole tiles
    page: int = 0  # entries of a page; 0: not paged
    rows_form: bool = True  # else mask words

    @property
    def is_single(self) -> bool:
        """Whether one query fills the registers of a tile."""
        return self.queries == 1

    @property
    def tile_shape(self) -> tuple[int, int]:
        return (self.tile // LANES, LANES) if self.is_single else (self.queries, self.tile)

    @property
    def group(self) -> int:
        """Tiles that the output step reads together: whole spans, or 128 chunks."""
        return (LANES * LANES if self.rows_form else SPAN) // self.tile

    @property
    def scratch_tiles(self) -> int:
        return -(-self.num_tiles // self.group) * self.group

    @property
    def slots(self) -> int:
        """Row numbers written: `keep` in whole lanes."""
        return -(-self.keep // LANES) * LANES

    @property
    def depth(self) -> int:
        """Tiles of keys in VMEM: one at work, the others on their way. A power of two."""
        return 8 if self.is_single else 4


def pick_tile(capacity: int, is_single: bool) -> int:
    """Entries per step: a single query needs whole (8, 128) registers."""
    sizes = (1024,) if is_single else (512, 256, 128)
    return next((size for size in sizes if capacity % size == 0), 0)


def pick_queries(fresh: int, capacity: int) -> int:
    """Queries per block of the mask form."""
    fits = [n for n in (32, 16, 8) if n * capacity * 4 <= SCRATCH_BYTES and n <= max(fresh, 8)]
    return fits[0] if fits else 8


def _permuted(q: Array, plan: Plan) -> Array:
    """Queries `[n, J]` in the channel order of the decoded keys: a one-hot matmul, exact."""
    square = (plan.channels, plan.channels)
    source = lax.broadcasted_iota(i32, square, 0)
    target = channel_order(lax.broadcasted_iota(i32, square, 1), plan.channels)
    return _dot(q, jnp.where(source == target, 1.0, 0.0).astype(q.dtype)).astype(q.dtype)


def _dot(a: Array, b: Array, transposed: bool = False) -> Array:
    exact = lax.Precision.HIGHEST if a.dtype == f32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=f32)


class Block:
    """The step of one grid position: its refs, and the four stages in the order they run."""

    def __init__(self, plan: Plan, refs: tuple, program: Array):
        self.plan = plan
        stores = 2 if plan.packed else 1
        self.layer_ref, self.seen_ref, self.most_ref, self.q_ref, self.w_ref = refs[:5]
        refs = refs[5:]
        self.table_ref, refs = (refs[0], refs[1:]) if plan.page else (None, refs)
        self.key_refs, refs = refs[:stores], refs[stores:]
        self.out_ref, self.order_ref, self.range_ref, self.q_scratch, self.w_scratch = refs[:5]
        self.buffers, self.sem = refs[5 : 5 + stores], refs[5 + stores]
        self.batch, self.program = pl.program_id(0), program
        seen_most = self.most_ref[program]
        self.tiles = (seen_most + plan.tile - 1) // plan.tile
        self.groups = (self.tiles + plan.group - 1) // plan.group

    def copies(self, tile: Array, slot: Array) -> list:
        """DMA descriptors of one tile of keys."""
        plan, out = self.plan, []
        where = paging.pieces(tile, plan.tile, plan.page, self.batch, self.table_ref)
        for i, (ref, buffer) in enumerate(zip(self.key_refs, self.buffers, strict=True)):
            for piece in where:
                source = ref.at[self.layer_ref[0], piece.owner]
                target = buffer.at[slot]
                entries = pl.ds(piece.start, piece.size)
                place = pl.ds(piece.offset, piece.size)
                if plan.packed:
                    source, target = source.at[:, entries], target.at[:, place]
                else:
                    source, target = source.at[entries], target.at[place]
                out.append(pltpu.make_async_copy(source, target, self.sem.at[i, slot]))
        return out

    def prepare(self) -> None:
        """Queries in key order, weights as columns, numbers of visible entries."""
        plan = self.plan
        q = self.q_ref[...].reshape(plan.queries * plan.heads, plan.channels)
        self.q_scratch[...] = _permuted(q, plan) if plan.packed else q
        square = (plan.heads, plan.heads)
        diagonal = lax.broadcasted_iota(i32, square, 0) == lax.broadcasted_iota(i32, square, 1)
        row = lax.broadcasted_iota(i32, (plan.queries, LANES), 0)
        seen = jnp.zeros((plan.queries, LANES), i32)
        weights = self.w_ref[...].reshape(plan.queries, plan.heads).astype(f32)
        for n in range(plan.queries):
            column = jnp.where(diagonal, weights[n : n + 1], 0.0).sum(axis=1, keepdims=True)
            self.w_scratch[n] = jnp.broadcast_to(column, (plan.heads, LANES))
            seen = jnp.where(row == n, self.seen_ref[self.program * plan.queries + n], seen)
        self.range_ref[0] = jnp.full(self.range_ref.shape[1:], LAST, i32)
        self.range_ref[1] = jnp.full(self.range_ref.shape[1:], HIDDEN, i32)
        self.seen = seen[:, :1]

    def score(self) -> None:
        """Fills `order_ref` tile by tile while the next tiles are on their way."""

        ahead = self.plan.depth - 1

        def start(tile: Array) -> None:
            @pl.when(tile < self.tiles)
            def _():
                for copy in self.copies(tile, tile & ahead):
                    copy.start()

        def body(tile: Array, _: int) -> int:
            start(tile + ahead)
            for copy in self.copies(tile, tile & ahead):
                copy.wait()
            self.score_tile(tile, tile & ahead)
            return 0

        for tile in range(ahead):
            start(jnp.int32(tile))
        lax.fori_loop(0, self.tiles, body, 0)

        def hide(tile: Array, _: int) -> int:
            self.order_ref[tile] = jnp.full(self.plan.tile_shape, HIDDEN, i32)
            return 0

        lax.fori_loop(self.tiles, self.groups * self.plan.group, hide, 0)

    def score_tile(self, tile: Array, slot: Array) -> None:
        plan = self.plan
        if plan.packed:
            keys = decode_columns(self.buffers[0][slot], self.buffers[1][slot])
        else:
            keys = self.buffers[0][slot]
            keys = keys if keys.dtype == f32 else lax.bitcast_convert_type(keys, jnp.bfloat16)
        if plan.is_single:
            dots = _dot(self.q_scratch[...], keys, not plan.packed)
            self.put(tile, 0, self.one_score(dots, 0))
        else:
            self.score_eight(tile, keys)

    def score_eight(self, tile: Array, keys: Array) -> None:
        """Queries in groups of eight, one per sublane."""
        plan = self.plan
        sublane = lax.broadcasted_iota(i32, (8, plan.tile), 0)
        for first in range(0, plan.queries, 8):
            begin = first * plan.heads
            q = self.q_scratch[begin : begin + 8 * plan.heads]
            dots = _dot(q, keys, not plan.packed)
            scores = jnp.zeros((8, plan.tile), f32)
            for n in range(8):
                part = dots[n * plan.heads : (n + 1) * plan.heads]
                scores = jnp.where(sublane == n, self.one_score(part, first + n), scores)
            self.put(tile, first, scores)

    def one_score(self, dots: Array, query: int) -> Array:
        """Scores of one query: `[8, tile]` of equal rows, or `[8, 128]` in row order."""
        plan = self.plan
        weights = jnp.concatenate([self.w_scratch[query]] * (plan.tile // LANES), axis=1)
        total = head_sum(dots, weights, plan.rounded)
        if not plan.is_single:
            return total
        sublane = lax.broadcasted_iota(i32, (8, LANES), 0)
        out = total[:, :LANES]
        for n in range(1, 8):
            out = jnp.where(sublane == n, total[:, n * LANES : (n + 1) * LANES], out)
        return out

    def put(self, tile: Array, first: int, scores: Array) -> None:
        """Scores of queries first … first + 7 (or of the only one) into the order array."""
        plan = self.plan
        index = self.index(tile, scores.shape)
        seen = self.seen if plan.is_single else self.seen[first : first + 8]
        shown = index < seen
        order = score_order(scores, plan.rounded)
        hidden = jnp.where(shown, order, HIDDEN)
        self.order_ref[tile, first : first + 8] = hidden
        at = slice(first, first + 8)
        low, high = jnp.where(shown, order, LAST), hidden
        for begin in range(0, scores.shape[1], LANES):
            part = slice(begin, begin + LANES)
            self.range_ref[0, at] = jnp.minimum(self.range_ref[0, at], low[:, part])
            self.range_ref[1, at] = jnp.maximum(self.range_ref[1, at], high[:, part])

    def index(self, tile: Array, shape: tuple[int, ...]) -> Array:
        """Index of every entry of `shape`, the first one that of `tile`."""
        index = tile * self.plan.tile + lax.broadcasted_iota(i32, shape, 1)
        if self.plan.is_single:
            index = index + LANES * lax.broadcasted_iota(i32, shape, 0)
        return index

    def per_query(self, op: Callable[..., Array], x: Array) -> Array:
        """`[Q, 1]`, of a single query `[1, 1]`."""
        out = op(x, axis=1, keepdims=True)
        return op(out, axis=0, keepdims=True) if self.plan.is_single else out

    def count(self, bound: Array, end: Array | None) -> Array:
        """Entries ≥ bound, or equal to it with an index below `end`, of every query."""
        plan = self.plan
        rows = plan.tile_shape[0]
        bound = jnp.broadcast_to(bound, (rows, LANES))
        end = None if end is None else jnp.broadcast_to(end, (rows, LANES))

        def body(group: Array, total: Array) -> Array:
            first = group * plan.group
            for n in range(plan.group):
                for begin in range(0, plan.tile_shape[1], LANES):
                    order = self.order_ref[first + n, :, begin : begin + LANES]
                    if end is None:
                        hit = order >= bound
                    else:
                        index = self.index(first + n, order.shape) + begin
                        hit = (order == bound) & (index < end)
                    total = total + jnp.where(hit, 1.0, 0.0)
            return total

        total = lax.fori_loop(0, self.groups, body, jnp.zeros((rows, LANES), f32))
        return self.per_query(jnp.sum, total).astype(i32)

    def choose(self) -> Chosen:
        low = self.per_query(jnp.min, self.range_ref[0])
        high = self.per_query(jnp.max, self.range_ref[1])
        return bisect(self.count, low, high + 1, self.seen, self.plan.keep)

    def write_mask(self, chosen: Chosen) -> None:
        """32 lane groups of 128 entries become the bits of one row of words."""
        plan = self.plan
        self.out_ref[...] = jnp.zeros(self.out_ref.shape, i32)
        words_of = self.single_words if plan.is_single else self.words

        def body(group: Array, _: int) -> int:
            words = words_of(chosen, group)
            first = pl.multiple_of(group * LANES, LANES)
            self.out_ref[0, :, pl.ds(first, LANES)] = words
            return 0

        lax.fori_loop(0, self.groups, body, 0)

    def words(self, chosen: Chosen, group: Array) -> Array:
        plan, shape = self.plan, (self.plan.queries, LANES)
        words = jnp.zeros(shape, i32)
        for bit in range(32):
            tile = group * plan.group + bit * LANES // plan.tile
            begin = bit * LANES % plan.tile
            order = self.order_ref[tile, :, begin : begin + LANES]
            hit = chosen.mask(order, self.index(tile, shape) + begin)
            words = words | (jnp.where(hit, 1, 0) << bit)
        return words

    def single_words(self, chosen: Chosen, group: Array) -> Array:
        """Sublane n of tile t holds bit 8·t + n; bits of different sublanes add up."""
        plan, shape = self.plan, self.plan.tile_shape
        sublane = lax.broadcasted_iota(i32, shape, 0)
        total = jnp.zeros(shape, i32)
        for n in range(plan.group):
            tile = group * plan.group + n
            hit = chosen.mask(self.order_ref[tile], self.index(tile, shape))
            total = total | (jnp.where(hit, 1, 0) << (sublane + shape[0] * n))
        for shift in (4, 2, 1):
            total = total | pltpu.roll(total, shift, 0)
        return total[:1]

    def write_rows(self, chosen: Chosen) -> None:
        """Row numbers of the chosen entries in ascending order.

        Slot p belongs to the chunk of 128 entries whose running count passes p. A one-hot matmul
        brings that chunk's mask to the slot; the lane is the number of lanes before the hit.
        """
        plan = self.plan
        slots = (plan.slots, LANES)
        slot = lax.broadcasted_iota(i32, slots, 0).astype(f32)
        square = (LANES, LANES)
        upto = lax.broadcasted_iota(i32, square, 0) <= lax.broadcasted_iota(i32, square, 1)
        upto = jnp.where(upto, 1.0, 0.0).astype(jnp.bfloat16)
        ones = jnp.ones((8, LANES), jnp.bfloat16)
        lane = lax.broadcasted_iota(i32, (1, LANES), 1)

        def body(group: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            base, masks, rank, chunk = state
            first = group * plan.group
            order = self.order_ref[pl.ds(first, plan.group)]
            hit = chosen.mask(order.reshape(square), self.index(first, square))
            mask = jnp.where(hit, 1.0, 0.0).astype(jnp.bfloat16)
            hits = _dot(ones, mask, True)[:1]  # per chunk, along lanes
            after = base + _dot(jnp.broadcast_to(hits, (8, LANES)).astype(jnp.bfloat16), upto)[:1]
            before = after - hits
            here = (before <= slot) & (slot < after)
            number = (group * LANES + lane).astype(f32)
            masks = masks + _dot(jnp.where(here, 1.0, 0.0).astype(jnp.bfloat16), mask)
            rank = rank + jnp.where(here, slot - before, 0.0)
            chunk = chunk + jnp.where(here, number, 0.0)
            return after[:, LANES - 1 :], masks, rank, chunk

        zero = jnp.zeros(slots, f32)
        start = (jnp.zeros((1, 1), f32), zero, zero, zero)
        base, masks, rank, chunk = lax.fori_loop(0, self.groups, body, start)
        passed = _dot(masks.astype(jnp.bfloat16), upto)  # hits of the chunk up to each lane
        rank = rank.sum(axis=1, keepdims=True)
        inside = jnp.where(passed <= rank, 1.0, 0.0).sum(axis=1, keepdims=True)
        found = LANES * chunk.sum(axis=1, keepdims=True) + inside
        found = jnp.where(slot[:, :1] < base, found, 0.0)
        for n in range(plan.slots // LANES):
            column = jnp.broadcast_to(found[n * LANES : (n + 1) * LANES], square)
            self.out_ref[0, n : n + 1] = jnp.transpose(column)[:1].astype(i32)


def _body(plan: Plan, *refs) -> None:
    block = Block(plan, refs, pl.program_id(0) * pl.num_programs(1) + pl.program_id(1))
    block.prepare()
    block.score()
    chosen = block.choose()
    if plan.rows_form:
        block.write_rows(chosen)
    else:
        block.write_mask(chosen)


def index_topk(
    plan: Plan,
    layer_1: Array,
    seen_b: Array,
    q: Array,
    w: Array,
    table: Array | None,
    stores: tuple[Array, ...],
    interpret: bool | pltpu.InterpretParams,
) -> Array:
    """Words `[B, T, SPANS·128]` (mask form) or rows `[B·T, slots/128, 128]` (rows form), int32.

    seen_b: visible entries per query, sequences padded to whole blocks. q `[B, T, I, J]` and
    w `[B, T, I]`, in the rows form `[B·T, 1, …]`. table: pages `[B, 1, P]`. stores: layers of
    columns or plain rows.
    """
    batch = stores[0].shape[1] if table is None else table.shape[0]
    blocks = seen_b.size // (batch * plan.queries)
    most = seen_b.reshape(batch * blocks, plan.queries).max(axis=1)
    lanes = plan.heads, plan.channels
    if plan.rows_form:
        shape = (batch * blocks, plan.slots // LANES, LANES)
        out_spec = pl.BlockSpec((1, *shape[1:]), lambda b, t, *_: (b * blocks + t, 0, 0))
        q_spec = pl.BlockSpec((1, 1, *lanes), lambda b, t, *_: (b * blocks + t, 0, 0, 0))
        w_spec = pl.BlockSpec((1, 1, plan.heads), lambda b, t, *_: (b * blocks + t, 0, 0))
    else:
        words = -(-plan.capacity // SPAN) * LANES
        shape = (batch, q.shape[1], words)
        out_spec = pl.BlockSpec((1, plan.queries, words), lambda b, t, *_: (b, t, 0))
        q_spec = pl.BlockSpec((1, plan.queries, *lanes), lambda b, t, *_: (b, t, 0, 0))
        w_spec = pl.BlockSpec((1, plan.queries, plan.heads), lambda b, t, *_: (b, t, 0))
    if plan.packed:
        buffers = [(plan.depth, store.shape[2], plan.tile) for store in stores]
    else:
        buffers = [(plan.depth, plan.tile, plan.channels)]
    rows = plan.tile_shape[0]
    scratch = [
        pltpu.VMEM((plan.scratch_tiles, *plan.tile_shape), i32),
        pltpu.VMEM((2, rows, LANES), i32),
        pltpu.VMEM((plan.queries * plan.heads, plan.channels), q.dtype),
        pltpu.VMEM((plan.queries, plan.heads, LANES), f32),
        *(pltpu.VMEM(s, store.dtype) for s, store in zip(buffers, stores, strict=True)),
        pltpu.SemaphoreType.DMA((len(stores), plan.depth)),
    ]
    order_bytes = 4 * plan.scratch_tiles * rows * plan.tile_shape[1]
    entries = stores[0].shape[1] * stores[0].shape[3 if plan.packed else 2]
    row_bytes = sum(store[0].size // entries * store.dtype.itemsize for store in stores)
    tables, table_spec = [], []
    if table is not None:
        tables, width = [table], table.shape[2]
        spec = pl.BlockSpec((1, 1, width), lambda b, t, *_: (b, 0, 0), memory_space=pltpu.SMEM)
        table_spec = [spec]
    pairs = seen_b.size * plan.capacity
    return pl.pallas_call(
        partial(_body, plan),
        out_shape=jax.ShapeDtypeStruct(shape, i32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, blocks),
            in_specs=[
                q_spec,
                w_spec,
                *table_spec,
                *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in stores),
            ],
            out_specs=out_spec,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=order_bytes + (24 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * plan.heads * plan.channels,
            transcendentals=0,
            bytes_accessed=blocks * batch * plan.capacity * row_bytes
            + q.size * q.dtype.itemsize
            + w.size * w.dtype.itemsize
            + 4 * seen_b.size
            + 4 * shape[0] * shape[1] * shape[2],
        ),
        interpret=interpret,
        name="index_topk_rows" if plan.rows_form else "index_topk_mask",
    )(layer_1, seen_b, most, q, w, *tables, *paging.in_hbm(stores, interpret))
