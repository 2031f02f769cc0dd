"""New columns into stores of columns, in place: read a tile of 128 entries, replace, write back.

    work items (sequence b, tile t of its entries), those without new entries are skipped

      HBM tile [K, 128] ──DMA, 8 in flight──► old ─┐
      new bytes [X, S] in VMEM ── one-hot matmul ──┴─► where(written, new, old) ──DMA──► HBM

The one-hot product moves source columns to their lanes: bytes are exact in bfloat16, so the matrix
unit shifts them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging

LANES = 128
DEPTH = 8  # tiles in VMEM, a power of two
MAX_SOURCES = 1 << 13  # new entries of one call; their bytes lie in VMEM
i32, f32 = jnp.int32, jnp.float32


class Plan(NamedTuple):
    """Static sizes of one call."""

    batch: int
    fresh: int  # new entries per sequence
    blocks: int  # owners per sequence
    size: int  # entries per owner
    sources: int  # columns of the new bytes

    @property
    def tiles(self) -> int:
        """Tiles that the new entries of a sequence may touch."""
        return -(-(self.fresh - 1) // LANES) + 1

    @property
    def span(self) -> int:
        """Source columns that hold the new entries of a tile."""
        return min(2 * LANES, self.sources)


def check(stores: tuple[Array, ...], new: tuple[Array, ...]) -> None:
    """Raises NotImplementedError for sizes the kernel does not cover."""
    size, sources = stores[0].shape[2], new[0].shape[0] * new[0].shape[1]
    if size % LANES:
        raise NotImplementedError(f"{size} entries are not whole tiles of {LANES}")
    if any(store.shape[3] % 4 for store in stores):
        widths = [store.shape[3] for store in stores]
        raise NotImplementedError(f"entries of {widths} values: whole words only")
    if sources > MAX_SOURCES:
        raise NotImplementedError(f"{sources} new entries in one call, limit {MAX_SOURCES}")


def padding(sources: int) -> int:
    """Columns to add to the new bytes: whole tiles, and one more behind the last."""
    whole = -sources % LANES
    return whole if sources + whole == LANES else whole + LANES


def _body(plan: Plan, num: int, *refs) -> None:
    layer_ref, owner_ref, first_ref, count_ref, new_ref = refs[:5]
    stores, buffers = refs[5 + num : 5 + 2 * num], refs[5 + 2 * num : 5 + 3 * num]
    read_sem, write_sem = refs[5 + 3 * num :]

    def place(item: Array):
        """Sequence, number of the tile among its entries, whether it gets new ones."""
        b, j = lax.div(item, plan.tiles), lax.rem(item, plan.tiles)
        first, count = first_ref[b], count_ref[b]
        tile = lax.div(first, LANES) + j
        return b, tile, (count > 0) & (tile * LANES < first + count)

    def copies(item: Array, write: bool) -> list:
        b, tile, _ = place(item)
        per_block = plan.size // LANES
        owner = owner_ref[b * plan.blocks + lax.div(tile, per_block)]
        lanes = pl.ds(pl.multiple_of(lax.rem(tile, per_block) * LANES, LANES), LANES)
        slot, out = item & (DEPTH - 1), []
        for n, (store, buffer) in enumerate(zip(stores, buffers, strict=True)):
            far, near = store.at[layer_ref[0], owner, :, lanes], buffer.at[slot]
            source, target = (near, far) if write else (far, near)
            sem = (write_sem if write else read_sem).at[n, slot]
            out.append(pltpu.make_async_copy(source, target, sem))
        return out

    items, half = plan.batch * plan.tiles, DEPTH // 2

    def whenever(item: Array, action) -> None:
        @pl.when((item >= 0) & (item < items))
        def _():
            at = jnp.clip(item, 0, items - 1)

            @pl.when(place(at)[2])
            def _():
                action(at)

    def start_read(item: Array) -> None:
        for copy in copies(item, False):
            copy.start()

    def wait_write(item: Array) -> None:
        for copy in copies(item, True):
            copy.wait()

    def work(item: Array) -> None:
        for copy in copies(item, False):
            copy.wait()
        b, tile, _ = place(item)
        first, count = first_ref[b], count_ref[b]
        _replace(plan, new_ref, buffers, item & (DEPTH - 1), b, tile * LANES - first, count)
        for copy in copies(item, True):
            copy.start()

    def step(item: Array, carry: int) -> int:
        whenever(item - half, wait_write)  # frees the slot of the read that begins now
        whenever(item + half, start_read)
        whenever(item, work)
        return carry

    for item in range(half):
        whenever(jnp.int32(item), start_read)
    lax.fori_loop(0, items + half, step, 0)


def _replace(plan: Plan, new_ref, buffers, slot: Array, b: Array, begin: Array, count: Array):
    """Puts new columns into a tile in VMEM; its lane 0 stands at new entry `begin` (or before)."""
    origin = b * plan.fresh + begin  # source column of lane 0; negative where it has none
    last = plan.sources - plan.span
    base = jnp.clip(lax.div(jnp.maximum(origin, 0), LANES) * LANES, 0, last)
    base = pl.multiple_of(base, LANES)
    shape = (plan.span, LANES)
    source = base + lax.broadcasted_iota(i32, shape, 0)
    lane = lax.broadcasted_iota(i32, shape, 1)
    pick = jnp.where(source == origin + lane, 1.0, 0.0).astype(jnp.bfloat16)
    columns = new_ref[:, pl.ds(base, plan.span)].astype(i32).astype(f32).astype(jnp.bfloat16)
    moved = lax.dot_general(columns, pick, (((1,), (0,)), ((), ())), preferred_element_type=f32)
    moved = moved.astype(i32)
    entry = begin + lax.broadcasted_iota(i32, (1, LANES), 1)
    written = (entry >= 0) & (entry < count)
    at = 0
    for buffer in buffers:
        width = buffer.shape[1]
        fresh = moved[at : at + width]
        at += width
        old = buffer[slot].astype(i32)
        buffer[slot] = jnp.where(written, fresh, old).astype(buffer.dtype)


def update_rows(
    columns: tuple[Array, ...],
    source_XS: Array,
    owner_BJ: Array,
    first_B: Array,
    count_B: Array,
    layer_1: Array,
    fresh: int,
    every: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Array, ...]:
    """Columns `[L, O, K, C]` with the new ones in place. source_XS: their bytes, sequence by
    sequence, padded as `padding` says. every: of so many sequences one has any, on average."""
    batch, blocks = owner_BJ.shape
    plan = Plan(batch, fresh, blocks, columns[0].shape[3], source_XS.shape[1])
    num, hbm = len(columns), pl.BlockSpec(memory_space=pltpu.HBM)
    touched = -(-batch * plan.tiles // every)
    tile_bytes = sum(a.shape[2] * LANES for a in columns)
    return pl.pallas_call(
        partial(_body, plan, num),
        out_shape=tuple(paging.hbm_shape(a, interpret) for a in columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[pl.BlockSpec(source_XS.shape, lambda i, *_: (0, 0)), *[hbm] * num],
            out_specs=(hbm,) * num,
            scratch_shapes=[
                *(pltpu.VMEM((DEPTH, a.shape[2], LANES), a.dtype) for a in columns),
                pltpu.SemaphoreType.DMA((num, DEPTH)),
                pltpu.SemaphoreType.DMA((num, DEPTH)),
            ],
        ),
        input_output_aliases={5 + n: n for n in range(num)},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=32 << 20),
        cost_estimate=pl.CostEstimate(
            flops=2 * touched * source_XS.shape[0] * plan.span * LANES,
            transcendentals=0,
            bytes_accessed=source_XS.size + 2 * touched * tile_bytes,
        ),
        interpret=interpret,
        name="row_update",
    )(
        layer_1,
        owner_BJ.reshape(-1),
        first_B,
        count_B,
        source_XS,
        *paging.in_hbm(columns, interpret),
    )
