"""Pieces that matmul kernels share: low-precision tiles decoded in VMEM, products, rounding.

All functions run inside a kernel body. Decoded weights are exact: a code times a power of two is a
bfloat16 number. Float32 scales are not powers of two, so they multiply partial sums instead.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # also the side of an FP8 weight block and the width of an activation block
FP4_LANES = 16  # packed bytes that share one FP4 scale
FP8_MAX = 448.0
FP8_MIN_AMAX = 1e-4

ScaleAt = Callable[[int, jax.Array | int], jax.Array]  # (row block, lane block) -> float32 scalar


def power_of_two(exponent_bits: jax.Array) -> jax.Array:
    """Float32 2^(e - 127) of int32 biased exponents e."""
    return lax.bitcast_convert_type(exponent_bits << 23, jnp.float32)


def round_bf16(x: jax.Array) -> jax.Array:
    """Float32 values rounded to the bfloat16 grid; unlike a pair of casts, never optimised away."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return jnp.where(x == x, lax.bitcast_convert_type(bits, jnp.float32), x)


def round_fp8(x: jax.Array) -> jax.Array:
    """One block `[rows, ≤128]` of float32 through FP8 and back, a power-of-two scale per row.

    The e4m3 grid comes from integer arithmetic, so no chip needs FP8 conversions for it.
    """
    amax = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), FP8_MIN_AMAX)
    bits = lax.bitcast_convert_type(amax * np.float32(1 / FP8_MAX), jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    scaled = jnp.clip(x * power_of_two(254 - exponent), -FP8_MAX, FP8_MAX)
    size = lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32) >> 23
    step = jnp.maximum(size, 127 - 6) - 3  # three mantissa bits; subnormals below 2^-6
    grid = jnp.round(scaled * power_of_two(254 - step)) * power_of_two(step)
    return grid * power_of_two(exponent)


def for_lane_blocks(size: int, body: Callable[[jax.Array | int, jax.Array | int, int], None]):
    """Calls `body(index, start, width)` for 128 lanes at a time; the ragged rest comes last."""
    whole, rest = divmod(size, LANES)

    def step(k: jax.Array, carry: int) -> int:
        body(k, pl.multiple_of(k * LANES, LANES), LANES)
        return carry

    if whole == 1:
        body(0, 0, LANES)
    elif whole:
        lax.fori_loop(0, whole, step, 0)
    if rest:
        body(whole, whole * LANES, rest)


def row_blocks(rows: int) -> list[slice]:
    """Slices of at most 128 rows."""
    return [slice(r, min(r + LANES, rows)) for r in range(0, rows, LANES)]


def round_rows(x_ref, out_ref) -> None:
    """`[rows, in]` through FP8 and back, one scale per row and 128 lanes."""

    def body(k, start, width):
        lanes = pl.ds(start, width)
        out_ref[:, lanes] = round_fp8(x_ref[:, lanes].astype(jnp.float32)).astype(out_ref.dtype)

    for_lane_blocks(x_ref.shape[1], body)


def decode_fp8(codes_ref, scale_at: ScaleAt | None, out_ref) -> None:
    """Bfloat16 values of e4m3 codes `[out, in]`; without `scale_at`, of the bare codes."""

    def body(k, start, width):
        lanes = pl.ds(start, width)
        for i, rows in enumerate(row_blocks(codes_ref.shape[0])):
            tile = codes_ref[rows, lanes].astype(jnp.float32)
            if scale_at is not None:
                tile = tile * scale_at(i, k)
            out_ref[rows, lanes] = tile.astype(jnp.bfloat16)

    for_lane_blocks(codes_ref.shape[1], body)


def split_nibbles(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 values / 64 of the low and the high nibbles of FP4 bytes, rows a multiple of four.

    Four bytes at a time: sign, exponent and mantissa of e2m1 move to their places in e4m3, which
    has the same subnormal 0.5 but a bias larger by six.
    """
    word = pltpu.bitcast(codes, jnp.int32)
    low = ((word & 0x07070707) << 2) | ((word & 0x08080808) << 4)
    high = ((word >> 2) & 0x1C1C1C1C) | (word & -0x7F7F7F80)  # 0x80808080

    def value(part: jax.Array) -> jax.Array:
        return pltpu.bitcast(part, jnp.float8_e4m3fn).astype(jnp.float32)

    return value(low), value(high)


def decode_fp4(codes_ref, scales_ref, out_ref, scales_across: bool) -> None:
    """Bfloat16 values `[2, out, in/2]` of FP4 bytes `[out, in/2]`: even inputs, then odd ones.

    Scales are float8_e8m0fnu `[out, in/32]`, or `[in/32, out]` with `scales_across`. One of them
    covers 16 neighbouring bytes, spread by a gather inside vector registers.
    """
    rows, width = codes_ref.shape
    count = width // FP4_LANES

    def scales_of(here, height: int) -> jax.Array:
        stored = scales_ref[:, here] if scales_across else scales_ref[here, :]
        exponents = pltpu.bitcast(stored, jnp.uint8).astype(jnp.int32)
        # the 64 that split_nibbles owes; from 2^122 on, products overflow anyway
        scales = power_of_two(jnp.minimum(exponents + 6, 254))
        if short := -count % LANES:
            shape = (short, height) if scales_across else (height, short)
            zeros = jnp.zeros(shape, jnp.float32)
            scales = jnp.concatenate([scales, zeros], axis=0 if scales_across else 1)
        return scales.T if scales_across else scales

    def decode_rows(start: jax.Array | int, height: int) -> None:
        here = pl.ds(start, height)
        scales = scales_of(here, height)
        lane = lax.broadcasted_iota(jnp.int32, (height, LANES), 1) // FP4_LANES
        for first in range(0, width, LANES):
            lanes = slice(first, min(first + LANES, width))
            block, offset = divmod(first // FP4_LANES, LANES)
            source = scales[:, block * LANES : (block + 1) * LANES]
            scale = jnp.take_along_axis(source, lane + offset, axis=1)
            scale = scale[:, : lanes.stop - lanes.start]
            for part, values in enumerate(split_nibbles(codes_ref[here, lanes])):
                out_ref[part, here, lanes] = (values * scale).astype(jnp.bfloat16)

    def step(i: jax.Array, carry: int) -> int:
        decode_rows(pl.multiple_of(i * LANES, LANES), LANES)
        return carry

    whole, rest = divmod(rows, LANES)
    if whole:
        lax.fori_loop(0, whole, step, 0)
    if rest:
        decode_rows(whole * LANES, rest)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x · wᵀ`, float32."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def native_dot(x_ref, codes_ref, scale_at: ScaleAt, scaled_ref) -> jax.Array:
    """`x · wᵀ` with bare codes as an operand of the matrix unit; `scaled_ref` is like `x`.

    Power-of-two scales multiply x, which is exact where the products are normal bfloat16 numbers.
    """
    parts = []
    for i, rows in enumerate(row_blocks(codes_ref.shape[0])):

        def body(k, start, width, i=i):
            lanes = pl.ds(start, width)
            x = x_ref[:, lanes].astype(jnp.float32) * scale_at(i, k)
            scaled_ref[:, lanes] = x.astype(scaled_ref.dtype)

        for_lane_blocks(x_ref.shape[1], body)
        parts.append(dot(scaled_ref[...], codes_ref[rows, :]))
    return jnp.concatenate(parts, axis=1)


def scaled_dot(x_ref, w_ref, scale_at: ScaleAt, acc_ref) -> jax.Array:
    """`x · wᵀ` of bare codes, each 128-wide partial sum times the float32 scale of its block."""
    blocks = row_blocks(w_ref.shape[0])
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def body(k, start, width):
        lanes = pl.ds(start, width)
        scales = [
            jnp.full((1, r.stop - r.start), scale_at(i, k), jnp.float32)
            for i, r in enumerate(blocks)
        ]
        acc_ref[...] += dot(x_ref[:, lanes], w_ref[:, lanes]) * jnp.concatenate(scales, axis=1)

    for_lane_blocks(x_ref.shape[1], body)
    return acc_ref[...]
