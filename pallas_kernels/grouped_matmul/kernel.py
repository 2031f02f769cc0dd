"""Expert matmuls over tiles of rows, one expert per tile, weights decoded once per use.

    grid (weight tile n, row tile t); t moves fastest and stops at the tiles in use

      rows, by expert                      weights of expert e, as stored
     ┌─────────┐ t=0  expert 3   ──────►  ┌───────────────┐
     │ x tile  │                          │ rows n·TN ... │ ─ FP4 bytes or FP8 codes + scales
     ├─────────┤ t=1  expert 3  (same:    └───────────────┘
     │         │       nothing is read            │ decoded to bfloat16 scratch
     ├─────────┤       or decoded again)          ▼
     │         │ t=2  expert 17  ──────►   y tile (t, n) = x tile · scratchᵀ, float32 inside
     └─────────┘

Weights are one layer of a stack `[L, E, …]`, read where they lie. Each active expert's weights
cross HBM once, experts without rows never. FP4 bytes hold an even and an odd input; instead of
interleaving weights, activations come as two halves `[2, rows, in/2]`: even inputs, odd inputs.
`swiglu` multiplies w1 and w3 in one pass and writes its result rounded and already in the halves
that w2 wants.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paging, tiles
from pallas_kernels.grouped_matmul.plan import MAX_TILE, RowPlan

MIB = 1 << 20
DECODED_TILE_BYTES = 4 * MIB
PREFILL_FACTOR = 2  # larger weight tiles when experts have many rows: rows are read less often
PREPARE_ROWS = 64
ROWS = 16  # of a bfloat16 register
PAIR = 2 * tiles.LANES  # lanes whose even and odd halves fill whole registers


class Format(NamedTuple):
    """Static facts of one layer `[E, out, in]` of a packed weight."""

    is_fp4: bool
    exact: bool  # power-of-two scales
    experts: int
    out_dim: int
    in_dim: int
    out_tile: int

    @property
    def parts(self) -> int:
        return 2 if self.is_fp4 else 1

    @property
    def scales_across(self) -> bool:
        """Whether FP4 scales are read as `[in/32, out]`.

        XLA lays an array out like that by itself when the last size does not fill its lanes, so
        the transposed view is free where the plain one would copy all scales in every call.
        """
        return self.is_fp4 and self.in_dim // 32 % tiles.LANES != 0

    @property
    def out_tiles(self) -> int:
        return pl.cdiv(self.out_dim, self.out_tile)

    @property
    def lane_blocks(self) -> int:
        return pl.cdiv(self.in_dim, tiles.LANES)

    @property
    def expert_bytes(self) -> int:
        """HBM bytes of one expert."""
        if self.is_fp4:
            return self.out_dim * (self.in_dim // 2 + self.in_dim // 32)
        return self.out_dim * self.in_dim + 4 * pl.cdiv(self.out_dim, 128) * self.lane_blocks


def describe(weight: Any, row_tile: int = 0) -> Format:
    """Facts of `weight` when row tiles have `row_tile` rows."""
    is_fp4 = weight.codes.dtype == jnp.uint8
    experts, out_dim, stored = weight.codes.shape[-3:]
    in_dim = stored * (2 if is_fp4 else 1)
    exact = weight.scales.dtype == jnp.float8_e8m0fnu
    return Format(is_fp4, exact, experts, out_dim, in_dim, weight_tile(out_dim, in_dim, row_tile))


def weight_tile(out_dim: int, in_dim: int, row_tile: int) -> int:
    """Rows of a weight tile: a multiple of 256, dividing `out_dim` if one near the limit does."""
    target = DECODED_TILE_BYTES * (PREFILL_FACTOR if row_tile == MAX_TILE else 1)
    limit = max(PAIR, target // (2 * in_dim) // PAIR * PAIR)
    limit = min(limit, -(-out_dim // PAIR) * PAIR)
    return next((t for t in range(limit, limit // 2, -PAIR) if out_dim % t == 0), limit)


def pick_halves(size: int) -> jax.Array:
    """One-hot `[size, size]`: column j takes lane 2j, column size/2 + j lane 2j + 1."""
    source = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    half = size // 2
    wanted = jnp.where(column < half, 2 * column, 2 * (column - half) + 1)
    return (source == wanted).astype(jnp.float32).astype(jnp.bfloat16)


def decode(fmt: Format, codes_ref, scales_ref, w_scr) -> None:
    if fmt.is_fp4:
        tiles.decode_fp4(codes_ref.at[0], scales_ref.at[0], w_scr, fmt.scales_across)
    else:
        scale_at = _scale_at(fmt, scales_ref) if fmt.exact else None
        tiles.decode_fp8(codes_ref.at[0], scale_at, w_scr.at[0])


def _scale_at(fmt: Format, scales_ref) -> tiles.ScaleAt:
    return lambda i, k: scales_ref[0, 0, 0, i * fmt.lane_blocks + k]


def multiply(fmt: Format, x_ref, w_scr, scales_ref, acc_scr) -> jax.Array:
    """`x · wᵀ` of one tile, float32, rounded to the bfloat16 grid."""
    if fmt.is_fp4:
        y = tiles.dot(x_ref[0], w_scr[0]) + tiles.dot(x_ref[1], w_scr[1])
    elif fmt.exact:
        y = tiles.dot(x_ref[0], w_scr[0])
    else:
        y = tiles.scaled_dot(x_ref.at[0], w_scr.at[0], _scale_at(fmt, scales_ref), acc_scr)
    return tiles.round_bf16(y)


def is_new_expert(expert_ref) -> jax.Array:
    """Whether this step's expert differs from the previous step's: its weights need decoding."""
    t = pl.program_id(1)
    return (t == 0) | (expert_ref[t] != expert_ref[jnp.maximum(t - 1, 0)])


def _product_body(
    expert_ref, layer_ref, start_ref, x_ref, codes_ref, scales_ref, y_ref, w_scr, acc_scr, *, fmt
):
    del layer_ref, start_ref  # only the block specs need the layer

    @pl.when(is_new_expert(expert_ref))
    def _():
        decode(fmt, codes_ref, scales_ref, w_scr)

    y_ref[...] = multiply(fmt, x_ref, w_scr, scales_ref, acc_scr).astype(y_ref.dtype)


def swiglu_body(
    expert_ref,
    layer_ref,
    start_ref,
    x_ref,
    weight_ref,
    codes1_ref,
    scales1_ref,
    codes3_ref,
    scales3_ref,
    hidden_ref,
    w1_scr,
    acc1_scr,
    w3_scr,
    acc3_scr,
    *,
    fmt1,
    fmt3,
    limit,
    rounds,
):
    del layer_ref, start_ref  # only the block specs need the layer

    @pl.when(is_new_expert(expert_ref))
    def _():
        decode(fmt1, codes1_ref, scales1_ref, w1_scr)
        decode(fmt3, codes3_ref, scales3_ref, w3_scr)

    gate = multiply(fmt1, x_ref, w1_scr, scales1_ref, acc1_scr)
    up = multiply(fmt3, x_ref, w3_scr, scales3_ref, acc3_scr)
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    hidden = gate * jax.nn.sigmoid(gate) * up * weight_ref[0].T
    hidden = tiles.round_bf16(hidden)
    if fmt1.out_dim % fmt1.out_tile:  # rows of W past its end: anything, even NaN
        lane = lax.broadcasted_iota(jnp.int32, hidden.shape, 1) + pl.program_id(0) * fmt1.out_tile
        hidden = jnp.where(lane < fmt1.out_dim, hidden, 0.0)
    _store_rows(hidden, hidden_ref, rounds)


def _store_rows(x: jax.Array, out_ref, rounds: bool) -> None:
    """Writes `[rows, n]` as `[1, rows, n]`, or even and odd lanes apart as `[2, rows, n/2]`."""
    for start in range(0, x.shape[1], PAIR):
        stop = min(start + PAIR, x.shape[1])
        blocks = [x[:, s : min(s + tiles.LANES, stop)] for s in range(start, stop, tiles.LANES)]
        if rounds:
            blocks = [tiles.round_fp8(block.astype(jnp.float32)) for block in blocks]
        block = jnp.concatenate(blocks, axis=1).astype(jnp.bfloat16)
        if out_ref.shape[0] == 1:
            out_ref[0, :, start:stop] = block
            continue
        halves = lax.dot_general(
            block,
            pick_halves(stop - start),
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        ).astype(jnp.bfloat16)
        half, lanes = (stop - start) // 2, slice(start // 2, stop // 2)
        out_ref[0, :, lanes] = halves[:, :half]
        out_ref[1, :, lanes] = halves[:, half:]


def _prepare_body(x_ref, out_ref, *, rounds):
    _store_rows(x_ref[...], out_ref, rounds)


def prepare(x_UK: jax.Array, rounds: bool, halves: bool, interpret=False) -> jax.Array:
    """Activations `[1, U, K]`, or `[2, U, K/2]` with `halves`; `rounds` as in `swiglu`."""
    rows, in_dim = x_UK.shape
    if not (rounds or halves):
        return x_UK[None]
    parts = 2 if halves else 1
    tile = min(-(-rows // ROWS) * ROWS, PREPARE_ROWS)
    return pl.pallas_call(
        functools.partial(_prepare_body, rounds=rounds),
        out_shape=jax.ShapeDtypeStruct((parts, rows, in_dim // parts), jnp.bfloat16),
        grid=(pl.cdiv(rows, tile),),
        in_specs=[pl.BlockSpec((tile, in_dim), lambda u: (u, 0))],
        out_specs=pl.BlockSpec((parts, tile, in_dim // parts), lambda u: (0, u, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * in_dim * PAIR * (parts - 1),
            transcendentals=0,
            bytes_accessed=4 * rows * in_dim,
        ),
        interpret=interpret,
        name="prepare_rows",
    )(x_UK)


def _weight_operands(
    fmt: Format, weight: Any, layer_1: jax.Array
) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    def index(n, t, expert_ref, layer_ref, start_ref):
        return layer_ref[0], expert_ref[t], n, 0

    codes = pl.BlockSpec((None, 1, fmt.out_tile, weight.codes.shape[3]), index)
    if fmt.is_fp4:
        count = weight.scales.shape[3]
        if not fmt.scales_across:
            return [weight.codes, weight.scales], [
                codes,
                pl.BlockSpec((None, 1, fmt.out_tile, count), index),
            ]
        across = pl.BlockSpec(
            (None, 1, count, fmt.out_tile), lambda n, t, e, at, *_: (at[0], e[t], 0, n)
        )
        return [weight.codes, jnp.swapaxes(weight.scales, 2, 3)], [codes, across]
    # scalars of one (expert, weight tile) side by side
    scales = lax.dynamic_index_in_dim(weight.scales, layer_1[0], keepdims=False)
    short = fmt.out_tiles * fmt.out_tile // tiles.LANES - scales.shape[1]
    scales = jnp.pad(scales.astype(jnp.float32), ((0, 0), (0, short), (0, 0)))
    scales = scales.reshape(fmt.experts, fmt.out_tiles, 1, -1)
    block = (1, 1, 1, scales.shape[-1])
    return [weight.codes, scales], [
        codes,
        pl.BlockSpec(block, lambda n, t, e, at, *_: (e[t], n, 0, 0), memory_space=pltpu.SMEM),
    ]


def _scratch(fmt: Format, tile: int) -> list:
    acc = (8, tiles.LANES) if fmt.exact else (tile, fmt.out_tile)
    return [
        pltpu.VMEM((fmt.parts, fmt.out_tile, fmt.in_dim // fmt.parts), jnp.bfloat16),
        pltpu.VMEM(acc, jnp.float32),
    ]


def call(
    body,
    plan: RowPlan,
    layer_1: jax.Array,
    rows: list[tuple[jax.Array, pl.BlockSpec]],
    row_bytes: int,
    weights: list[Any],
    out_shape: jax.ShapeDtypeStruct,
    out_block: pl.BlockSpec,
    scratch: list[Any],
    name: str,
    interpret,
) -> jax.Array:
    """One pass over (weight tile, row tile).

    rows: operands in front of the weights. row_bytes: what of them and of the result crosses HBM.
    scratch: VMEM besides the weights' own.
    """
    tile = plan.tile
    formats = [describe(weight, tile) for weight in weights]
    fmt, slots = formats[0], plan.source_Z.shape[0]
    operands, specs = [array for array, _ in rows], [spec for _, spec in rows]
    for each, weight in zip(formats, weights, strict=True):
        (codes, scales), blocks = _weight_operands(each, weight, layer_1)
        operands += paging.in_hbm((codes, scales) if each.is_fp4 else (codes,), interpret)
        operands += [] if each.is_fp4 else [scales]
        specs += blocks
    active = min(fmt.experts, slots // tile)
    blocks = [(spec, array.dtype) for array, spec in rows] + [(out_block, out_shape.dtype)]
    return pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(fmt.out_tiles, plan.num_tiles),
            in_specs=specs,
            out_specs=out_block,
            scratch_shapes=[s for each in formats for s in _scratch(each, tile)] + scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(formats, tile) + sum(_block_bytes(*b) for b in blocks),
        ),
        # of every slot in use; unused tiles cost nothing
        cost_estimate=pl.CostEstimate(
            flops=2 * slots * fmt.out_dim * fmt.in_dim * len(weights),
            transcendentals=slots * fmt.out_dim * (len(weights) - 1),
            bytes_accessed=active * sum(f.expert_bytes for f in formats) + row_bytes,
        ),
        interpret=interpret,
        name=name,
    )(plan.expert_T, layer_1, plan.start_T, *operands)


def _block_bytes(spec: pl.BlockSpec, dtype: Any) -> int:
    """VMEM of an operand's block: two copies unless it says one."""
    assert spec.block_shape is not None
    *lead, rows, lanes = (size for size in spec.block_shape if isinstance(size, int))
    tiled = -(-rows // 32) * 32 * -(-lanes // tiles.LANES) * tiles.LANES
    copies = spec.pipeline_mode.buffer_count if spec.pipeline_mode else 2
    return copies * math.prod(lead) * tiled * jnp.dtype(dtype).itemsize


def product(
    x_PZK: jax.Array, weight: Any, plan: RowPlan, layer_1: jax.Array, interpret=False
) -> jax.Array:
    """`x · W[expert]ᵀ` of every slot in use, bfloat16 `[Z, out]`; other slots are undefined."""
    fmt = describe(weight, plan.tile)
    slots = x_PZK.shape[1]
    return call(
        functools.partial(_product_body, fmt=fmt),
        plan,
        layer_1,
        [(x_PZK, _row_block(x_PZK, plan.tile))],
        2 * slots * (fmt.in_dim + fmt.out_tile) * fmt.out_tiles,
        [weight],
        jax.ShapeDtypeStruct((slots, fmt.out_dim), jnp.bfloat16),
        pl.BlockSpec((plan.tile, fmt.out_tile), lambda n, t, *_: (t, n)),
        [],
        "grouped_matmul",
        interpret,
    )


class SwiGLU(NamedTuple):
    """What lies in front of an expert's last product.

    limit: of gate and up, 0 for none. rounds: to FP8 per slot and 128 channels, as the last product
    wants its input. halves: even and odd channels apart, for FP4 weights.
    """

    w1: Any
    w3: Any
    limit: float
    rounds: bool
    halves: bool

    @property
    def parts(self) -> int:
        return 2 if self.halves else 1

    def sizes(self, tile: int) -> tuple[Format, int, dict[str, Any]]:
        """The form of w1, channels of a part that one step makes, and what the body must know."""
        fmt1, fmt3 = describe(self.w1, tile), describe(self.w3, tile)
        facts = {"fmt1": fmt1, "fmt3": fmt3, "limit": self.limit, "rounds": self.rounds}
        return fmt1, fmt1.out_tile // self.parts, facts


def swiglu(
    x_PZK: jax.Array,
    scale_Z: jax.Array,
    up: SwiGLU,
    plan: RowPlan,
    layer_1: jax.Array,
    interpret=False,
) -> jax.Array:
    """silu(clamped x·W1ᵀ) · clamped x·W3ᵀ · scale, bfloat16 `[1 or 2, Z, F or F/2]`."""
    slots, (fmt1, width, facts) = x_PZK.shape[1], up.sizes(plan.tile)
    hidden = call(
        functools.partial(swiglu_body, **facts),
        plan,
        layer_1,
        [(x_PZK, _row_block(x_PZK, plan.tile)), per_slot(scale_Z, plan.tile)],
        2 * slots * (fmt1.in_dim + fmt1.out_tile) * fmt1.out_tiles,
        [up.w1, up.w3],
        jax.ShapeDtypeStruct((up.parts, slots, width * fmt1.out_tiles), jnp.bfloat16),
        pl.BlockSpec((up.parts, plan.tile, width), lambda n, t, *_: (0, t, n)),
        [],
        "grouped_swiglu",
        interpret,
    )
    return hidden[:, :, : fmt1.out_dim // up.parts]


def per_slot(values_Z: jax.Array, tile: int) -> tuple[jax.Array, pl.BlockSpec]:
    """One number per slot as an operand: a tile's in the lanes of one row."""
    spec = pl.BlockSpec((1, 1, tile), lambda n, t, *_: (t, 0, 0))
    return values_Z.reshape(-1, 1, tile), spec


def _row_block(x_PZK: jax.Array, tile: int) -> pl.BlockSpec:
    parts, _, width = x_PZK.shape
    return pl.BlockSpec((parts, tile, width), lambda n, t, *_: (0, t, 0))


def vmem_bytes(formats: list[Format], tile: int) -> int:
    """Upper bound of a step without its rows: weights, scratch, the compiler's temporaries."""
    total = 6 * MIB
    for fmt in formats:
        lanes = -(-fmt.in_dim // PAIR) * PAIR
        stored = lanes // 2 + max(lanes // 32, tiles.LANES) if fmt.is_fp4 else lanes
        total += fmt.out_tile * (2 * stored + 2 * lanes)
        total += 4 * tile * fmt.out_tile * 4
    return max(16 * MIB, total)
