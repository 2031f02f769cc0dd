"""FP8 block matmul `y = x · Wᵀ` with the weight read once, as codes.

    grid (core, weight tile, row tile); the row tile moves fastest

                     in                        x [rows, in]: tile u, all of `in`
           ┌──────────────────────┐
     out   │ W tile n: [TN, in]   │  ── e4m3 codes; decoded to bfloat16 scratch at the first
           ├──────────────────────┤     row tile, then used by every row tile
           │ W tile n+1: prefetch │
           └──────────────────────┘            y tile (u, n) = x tile · scratchᵀ, float32 inside

`native`, for chips whose matrix unit takes e4m3 codes: nothing is decoded, scales multiply x.

With few rows there is one row tile: x stays in VMEM and the weights stream past it. Scales sit in
SMEM. Power-of-two scales go into the decoded weight (exact); float32 scales multiply the partial
sums of 128 channels.

Weights are one layer of a stack, read where it lies. With G groups the rows of W fall into G equal
parts, each with its own lanes of x: a weight tile belongs to one group and picks that part of x.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging, tiles

MIB = 1 << 20
MAX_ROW_TILE = 512
WEIGHT_TILE_BYTES = 8 * MIB  # of codes, when many row tiles share a decoded weight tile
VMEM_BUDGET = 56 * MIB  # the smallest chips have 64
STREAM_TILE_BYTES = 1 * MIB  # of codes, when weights only stream past: more, smaller steps
CORES = 2  # v5p splits this dimension over its cores; elsewhere it is a loop


def tile_sizes(rows: int, out_dim: int, in_dim: int, groups: int = 1) -> tuple[int, int]:
    """Rows of x and rows of W (multiple of 128) of one step; the latter divide a group's."""
    row_limit = max(128, min(MAX_ROW_TILE, (2 * MIB // in_dim) // 128 * 128))
    row_tile = min(-(-rows // 16) * 16, row_limit)
    target = STREAM_TILE_BYTES if rows <= row_tile else WEIGHT_TILE_BYTES
    weight_tile = max(128, target // in_dim // 128 * 128)
    weight_tile = min(weight_tile, 2048, -(-out_dim // 128) * 128)
    while weight_tile > 128 and vmem_bytes(row_tile, weight_tile, in_dim) > VMEM_BUDGET:
        weight_tile -= 128
    while groups > 1 and out_dim // groups % weight_tile:
        weight_tile -= 128
    return row_tile, weight_tile


def _body(
    layer_ref,
    scales_ref,
    x_ref,
    codes_ref,
    y_ref,
    w_scr,
    *scratch,
    tiles_per_core,
    lane_blocks,
    exact,
    rounds,
    native,
):
    del layer_ref  # only the block specs need it
    core, step, u = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tile = core * tiles_per_core + step
    blocks_per_tile = codes_ref.shape[0] // tiles.LANES
    last = scales_ref.shape[0] // lane_blocks - 1

    def scale_at(i, k):
        row = jnp.minimum(tile * blocks_per_tile + i, last)  # blocks past the end: any scale
        return scales_ref[row * lane_blocks + k]

    if not native:

        @pl.when(u == 0)
        def _():
            tiles.decode_fp8(codes_ref, scale_at if exact else None, w_scr)

    if rounds:
        rounded_scr = scratch[-1]

        @pl.when(step == 0)
        def _():
            tiles.round_rows(x_ref, rounded_scr)

        x_ref = rounded_scr
    if native:
        y = tiles.native_dot(x_ref, codes_ref, scale_at, w_scr)
    elif exact:
        y = tiles.dot(x_ref[...], w_scr[...])
    else:
        y = tiles.scaled_dot(x_ref, w_scr, scale_at, scratch[0])
    y_ref[...] = y.astype(y_ref.dtype)


def block_matmul(
    x_UK: jax.Array,
    codes_LNK: jax.Array,
    scales_nk: jax.Array,
    layer_1: jax.Array,
    round_x: bool,
    groups: int,
    out_dtype,
    native: bool,
    interpret=False,
) -> jax.Array:
    """See `api.block_matmul`; scales are those of the layer. `round_x` needs all rows in one tile,
    and one group. `native` needs power-of-two scales."""
    rows = x_UK.shape[0]
    _, out_dim, in_dim = codes_LNK.shape
    exact = scales_nk.dtype == jnp.float8_e8m0fnu
    row_tile, weight_tile = tile_sizes(rows, out_dim, in_dim, groups)
    row_tiles, weight_tiles = pl.cdiv(rows, row_tile), pl.cdiv(out_dim, weight_tile)
    assert not round_x or (row_tiles == 1 and groups == 1)
    cores = CORES if weight_tiles % CORES == 0 else 1
    per_core, per_group = weight_tiles // cores, weight_tiles // groups
    assert exact or not native
    scratch = [pltpu.VMEM((row_tile if native else weight_tile, in_dim), jnp.bfloat16)]
    if not exact:
        scratch.append(pltpu.VMEM((row_tile, weight_tile), jnp.float32))
    if round_x:
        scratch.append(pltpu.VMEM((row_tile, in_dim), jnp.bfloat16))
    out_bytes = jnp.dtype(out_dtype).itemsize
    x_reads = 1 if row_tiles == 1 else per_group

    def x_block(c, n, u, at):
        return u, 0 if groups == 1 else (c * per_core + n) // per_group

    return pl.pallas_call(
        functools.partial(
            _body,
            tiles_per_core=per_core,
            lane_blocks=scales_nk.shape[1],
            exact=exact,
            rounds=round_x,
            native=native,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, out_dim), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, per_core, row_tiles),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((row_tile, in_dim), x_block),
                pl.BlockSpec(
                    (None, weight_tile, in_dim), lambda c, n, u, at: (at[0], c * per_core + n, 0)
                ),
            ],
            out_specs=pl.BlockSpec(
                (row_tile, weight_tile), lambda c, n, u, at: (u, c * per_core + n)
            ),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(row_tile, weight_tile, in_dim),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * out_dim * in_dim,
            transcendentals=0,
            bytes_accessed=out_dim * in_dim
            + 4 * scales_nk.size
            + 2 * rows * in_dim * groups * x_reads
            + out_bytes * rows * out_dim,
        ),
        interpret=interpret,
        name="block_matmul",
    )(
        layer_1,
        scales_nk.astype(jnp.float32).reshape(-1),
        x_UK,
        *paging.in_hbm((codes_LNK,), interpret),
    )


def vmem_bytes(row_tile: int, weight_tile: int, in_dim: int) -> int:
    """Upper bound of a step: double-buffered blocks, scratch, and the compiler's temporaries."""
    lanes = -(-in_dim // 128) * 128
    weights = weight_tile * lanes * (2 + 2)
    activations = max(row_tile, 32) * lanes * 2 * 3
    outputs = row_tile * weight_tile * (2 * 4 + 2 * 4)
    return max(16 * MIB, weights + activations + outputs + 6 * MIB)
