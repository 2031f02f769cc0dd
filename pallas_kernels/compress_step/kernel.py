"""One token per sequence into the rings in HBM, in place; rings that it completes are pooled.

sequence b:  tile of 8 entries (or, if complete, the whole ring) ──DMA, 2 ahead──► VMEM
             ──► new entry put in ──DMA──► the same tile
             complete: softmax over entries, per channel, × values, Σ ──► row b of the output
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

LANES, TILE = 128, 8
DEPTH = 4  # rings in VMEM, a power of two
VMEM_LIMIT = 48 << 20
i32, f32 = jnp.int32, jnp.float32


class Plan(NamedTuple):
    """Static sizes of a call. length: entries of a ring, one window of `ratio` tokens or two."""

    batch: int
    length: int
    width: int
    ratio: int

    @property
    def overlaps(self) -> bool:
        return self.length > self.ratio

    @property
    def row_dim(self) -> int:
        return self.width // 2 if self.overlaps else self.width

    @property
    def padded(self) -> int:
        """Sequences in whole tiles."""
        return -(-self.batch // TILE) * TILE

    @property
    def vmem_bytes(self) -> int:
        rings = 2 * DEPTH * self.length * self.width
        return 4 * (rings + self.padded * (2 * self.width + self.row_dim))


def check(plan: Plan) -> None:
    """Raises NotImplementedError for sizes the kernel does not cover."""
    if plan.length % TILE:
        raise NotImplementedError(f"rings of {plan.length} entries, in {TILE}s only")
    if plan.row_dim % LANES:
        raise NotImplementedError(f"rows of {plan.row_dim} channels, in {LANES}s only")
    if plan.vmem_bytes > VMEM_LIMIT // 2:
        raise NotImplementedError(f"{plan.batch} sequences need {plan.vmem_bytes >> 20} MiB VMEM")


class _Work(NamedTuple):
    """What sequence b has to do."""

    active: Array
    done: Array  # its row is complete
    entry: Array  # of the ring
    pos: Array


def _body(plan: Plan, *refs) -> None:
    layer_ref, slots_ref, pos_ref, count_ref, new_values_ref, new_scores_ref = refs[:6]
    rows_ref, values_ref, scores_ref, buffers, read_sem, write_sem = refs[8:]  # 6, 7: the inputs
    stores, news = (values_ref, scores_ref), (new_values_ref, new_scores_ref)

    def work_of(b: Array) -> _Work:
        pos, active = pos_ref[b], count_ref[b] > 0
        done = active & (lax.rem(pos + 1, plan.ratio) == 0)
        return _Work(active, done, lax.rem(pos, plan.length), pos)

    def tile_of(entry: Array):
        return pl.ds(pl.multiple_of(lax.div(entry, TILE) * TILE, TILE), TILE)

    def copies(b: Array, entries, write: bool) -> list:
        slot, out = b & (DEPTH - 1), []
        for n, store in enumerate(stores):
            far, near = store.at[layer_ref[0], slots_ref[b], entries], buffers.at[n, slot, entries]
            source, target = (near, far) if write else (far, near)
            sem = (write_sem if write else read_sem).at[n, slot]
            out.append(pltpu.make_async_copy(source, target, sem))
        return out

    def reads(b: Array, act: Callable) -> None:
        work = work_of(b)

        @pl.when(work.done)
        def _():
            for copy in copies(b, slice(None), False):
                act(copy)

        @pl.when(work.active & ~work.done)
        def _():
            for copy in copies(b, tile_of(work.entry), False):
                act(copy)

    def writes(b: Array, act: Callable) -> None:
        work = work_of(b)

        @pl.when(work.active)
        def _():
            for copy in copies(b, tile_of(work.entry), True):
                act(copy)

    def inside(b: Array, action: Callable[[Array], None]) -> None:
        @pl.when((b >= 0) & (b < plan.batch))
        def _():
            action(jnp.clip(b, 0, plan.batch - 1))

    def update(b: Array) -> None:
        work, slot, tile = work_of(b), b & (DEPTH - 1), tile_of(b)
        own = lax.broadcasted_iota(i32, (TILE, 1), 0) == lax.rem(b, TILE)

        @pl.when(work.active)
        def _():
            place = lax.broadcasted_iota(i32, (TILE, 1), 0) == lax.rem(work.entry, TILE)
            for n, new_ref in enumerate(news):
                new_1W = jnp.where(own, new_ref[tile], 0).sum(axis=0, keepdims=True)
                old = buffers[n, slot, tile_of(work.entry)]
                buffers[n, slot, tile_of(work.entry)] = jnp.where(place, new_1W, old)

        @pl.when(work.done)
        def _():
            row_1d = _pool(plan, buffers[0, slot], buffers[1, slot], work)
            rows_ref[tile] = jnp.where(own, row_1d, rows_ref[tile])

    def step(b: Array, carry: int) -> int:
        inside(b - DEPTH // 2, lambda b: writes(b, lambda copy: copy.wait()))
        inside(b + DEPTH // 2, lambda b: reads(b, lambda copy: copy.start()))

        def one(b: Array) -> None:
            reads(b, lambda copy: copy.wait())
            update(b)
            writes(b, lambda copy: copy.start())

        inside(b, one)
        return carry

    rows_ref[...] = jnp.zeros_like(rows_ref)
    for b in range(DEPTH // 2):
        inside(jnp.int32(b), lambda b: reads(b, lambda copy: copy.start()))
    lax.fori_loop(0, plan.batch + DEPTH // 2, step, 0)


def _pool(plan: Plan, values_RW: Array, scores_RW: Array, work: _Work) -> Array:
    """Σ softmax(scores) · values over the entries of a row, per channel: `[1, d]`."""
    if not plan.overlaps:
        return _weighted([(values_RW, scores_RW)])
    half = plan.row_dim
    window = lax.broadcasted_iota(i32, (plan.length, 1), 0) // plan.ratio
    own = window == lax.div(work.entry, plan.ratio)
    before = ~own & (work.pos >= plan.ratio)
    parts = ((before, slice(None, half)), (own, slice(half, None)))
    return _weighted(
        [(values_RW[:, at], jnp.where(seen, scores_RW[:, at], -jnp.inf)) for seen, at in parts]
    )


def _weighted(parts: list[tuple[Array, Array]]) -> Array:
    peaks = [scores.max(axis=0, keepdims=True) for _, scores in parts]
    peak = peaks[0] if len(peaks) == 1 else jnp.maximum(*peaks)
    total, mean = jnp.zeros_like(peak), jnp.zeros_like(peak)
    for values, scores in parts:
        weights = jnp.exp(scores - peak)
        total += weights.sum(axis=0, keepdims=True)
        mean += (weights * values).sum(axis=0, keepdims=True)
    return mean / total


def compress_step(
    plan: Plan,
    values: Array,
    scores: Array,
    new_values_BW: Array,
    new_scores_BW: Array,
    slots_B: Array,
    pos_B: Array,
    count_B: Array,
    layer_1: Array,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Array, Array, Array]:
    """Rows `[B, d]` and both stores, overwritten. New entries come in whole tiles of sequences."""
    hbm, vmem = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.VMEM)
    tile_bytes = 2 * 4 * TILE * plan.width
    ring_bytes = 2 * 4 * plan.length * plan.width
    rows, values, scores = pl.pallas_call(
        partial(_body, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[vmem, vmem, hbm, hbm],
            out_specs=[vmem, hbm, hbm],
            scratch_shapes=[
                pltpu.VMEM((2, DEPTH, plan.length, plan.width), f32),
                pltpu.SemaphoreType.DMA((2, DEPTH)),
                pltpu.SemaphoreType.DMA((2, DEPTH)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((plan.padded, plan.row_dim), f32),
            paging.hbm_shape(values, interpret),
            paging.hbm_shape(scores, interpret),
        ],
        input_output_aliases={6: 1, 7: 2},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(  # one sequence in `ratio` completes a row
            flops=4 * plan.batch * plan.length * plan.width // plan.ratio,
            transcendentals=plan.batch * plan.length * plan.width // plan.ratio,
            bytes_accessed=plan.batch * (2 * tile_bytes + ring_bytes // plan.ratio)
            + 4 * plan.padded * (2 * plan.width + plan.row_dim),
        ),
        interpret=interpret,
        name="compress_step",
    )(
        layer_1,
        slots_B,
        pos_B,
        count_B,
        new_values_BW,
        new_scores_BW,
        *paging.in_hbm((values, scores), interpret),
    )
    return rows[: plan.batch], values, scores
