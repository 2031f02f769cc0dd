"""Values of one tile: FP4 keys, scores of a query, and integers in the order of scores."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

LAST = 2**31 - 1
f32, i32 = jnp.float32, jnp.int32


def decode_columns(codes: Array, scales: Array) -> Array:
    """FP4 bytes `[J/2, S]` and scale bytes `[J/32, S]` as exact bfloat16 `[J, S]`.

    Works on 32-bit words, two codes at a time. Channels come out in the order of `channel_order`.
    A code is eem: 2^(e-1)·(1+m/2), or m/2 for e = 0. Scales of 2^-125 … 2^125 are exact.
    """
    words = pltpu.bitcast(codes, i32)  # [J/8, S]: byte b of word i is byte row 4i + b
    row = lax.broadcasted_iota(i32, words.shape, 0)
    packed_scales = pltpu.bitcast(scales, i32)
    base = jnp.zeros_like(words)
    for block in range(scales.shape[0]):
        scale = (packed_scales[block // 4][None] >> (8 * (block % 4))) & 255
        field = jnp.broadcast_to((scale - 1) << 7, words.shape)  # exponent of 2^(scale - 128)
        base = jnp.where(row >= 4 * block, field, base)
    base = base | (base << 16)
    parts = []
    for nibble in range(4):
        code = (words >> (4 * nibble)) & 0x000F000F
        size = code & 0x00070007
        normal = ((size >> 1) | (size >> 2)) & 0x00010001
        some = (size & 0x00010001) | normal
        size = size & (0x00060006 | normal)  # 0.5 is a power of two: its mantissa bit goes
        bits = (base + (size << 6)) & ((some << 16) - some)
        parts.append(pltpu.bitcast(bits | ((code & 0x00080008) << 12), jnp.bfloat16))
    return jnp.concatenate(parts, axis=0)


def channel_order(position: Array, channels: int) -> Array:
    """The channel that `decode_columns` leaves in row `position`."""
    nibble = position >> ((channels // 4).bit_length() - 1)  # channels is a power of two
    inside = position - nibble * (channels // 4)
    byte = 4 * (inside >> 1) + (nibble >> 1) + 2 * (inside & 1)
    return 2 * byte + (nibble & 1)


def round_bf16(x: Array) -> Array:
    """Float32 to the nearest bfloat16 and back, in integers: no compiler may drop it."""
    bits = lax.bitcast_convert_type(x, i32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return lax.bitcast_convert_type(bits, f32)


def head_sum(dots: Array, weights: Array, rounded: bool) -> Array:
    """Σ relu(dots) · weights over the heads `[I, S]`: `[8, S]`, all rows the same."""
    if rounded:
        dots = round_bf16(dots)
    terms = jnp.maximum(dots, 0) * weights
    if rounded:
        terms = round_bf16(terms)
    total = terms[:8]
    for first in range(8, terms.shape[0], 8):
        total = total + terms[first : first + 8]
    for shift in (4, 2, 1):
        total = total + pltpu.roll(total, shift, 0)
    return round_bf16(total) if rounded else total


def score_order(scores: Array, rounded: bool) -> Array:
    """Int32 in the order of the scores; -0.0 and 0.0 are the same."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), i32)
    order = bits ^ ((bits >> 31) & LAST)
    return order >> 16 if rounded else order  # bfloat16 fills the upper half only
