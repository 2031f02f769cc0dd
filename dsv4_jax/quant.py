"""Low-precision numbers: power-of-two scales, FP8 and FP4 rounding, quantised weights.

Rules are those of the official inference kernels: a scale is 2^ceil(log2(amax / largest)) taken
from the bit pattern, codes round to nearest with ties to even.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

FP8_MAX, FP4_MAX = 448.0, 6.0
FP8_MIN_AMAX = 1e-4  # smallest amax of the activation quantiser: scales stay above 2^-22
FP4_MIN_AMAX = 6.0 * 2.0**-126
ACT_BLOCK, KV_BLOCK, FP4_BLOCK, WEIGHT_BLOCK = 128, 64, 32, 128


@struct.dataclass
class QuantizedArray:
    """A weight `[..., out, in]` kept exactly as its checkpoint stores it; value = code × scale.

    fp8: codes float8_e4m3fn `[..., out, in]`, scales `[..., ⌈out/128⌉, ⌈in/128⌉]`.
    fp4: codes uint8 `[..., out, in/2]`, low nibble = even input, scales `[..., out, in/32]`.
    Scales are float8_e8m0fnu, or float32 in -Base checkpoints.
    """

    codes: Array
    scales: Array
    fmt: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `[..., out, in]`."""
        *lead, last = self.codes.shape
        return (*lead, last * 2 if self.fmt == "fp4" else last)


@struct.dataclass
class StackedWeight:
    """Entry `layer` of quantised weights `[L, …]`, not cut out: kernels read it where it lies."""

    stack: QuantizedArray
    layer: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the entry, `[..., out, in]`."""
        return self.stack.shape[1:]

    def cut(self) -> QuantizedArray:
        return index_expert(self.stack, self.layer)


@struct.dataclass
class DecodedWeight:
    """Float32 values `[..., out, in]` of a quantised weight, decoded once instead of in every step.

    Products round their inputs as they do for the stored form, so results are the same.
    """

    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def bf16_grid(x: Array) -> Array:
    """Float32 values rounded to bfloat16; unlike a pair of casts, no compiler may drop it."""
    return lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


def round_to(x: Array, dtype: jnp.dtype) -> Array:
    """Cast that really rounds, also where XLA would keep excess precision inside a fusion."""
    if jnp.dtype(dtype) == jnp.bfloat16 and x.dtype != jnp.bfloat16:
        return bf16_grid(x).astype(jnp.bfloat16)
    return x.astype(dtype)


def pow2_at_least(x: Array) -> Array:
    """2^ceil(log2 x) of positive normal float32 values, from the bits: exact powers stay put."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def decode_e8m0(scales: Array) -> Array:
    """Float32 value of float8_e8m0fnu or float32 scales."""
    return scales.astype(jnp.float32)


def _blocks(x: Array, block: int) -> Array:
    """`[..., n]` as `[..., n/block, block]`; a short last block is filled, a single one stays."""
    block = min(block, x.shape[-1])
    pad = -x.shape[-1] % block
    if pad:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    return x.reshape(*x.shape[:-1], -1, block)


def quantize_fp8(x: Array, block: int) -> tuple[Array, Array]:
    """Codes `[..., n]` float8_e4m3fn and float32 power-of-two scales `[..., ⌈n/block⌉]`."""
    parts = _blocks(x.astype(jnp.float32), block)
    amax = jnp.maximum(jnp.abs(parts).max(-1, keepdims=True), FP8_MIN_AMAX)
    scale = pow2_at_least(amax * np.float32(1 / FP8_MAX))
    codes = jnp.clip(parts / scale, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    codes = codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return codes, scale[..., 0]


def dequantize_fp8(codes: Array, scales: Array, block: int) -> Array:
    """Float32 values `[..., n]` of `quantize_fp8`'s results."""
    parts = _blocks(codes.astype(jnp.float32), block) * decode_e8m0(scales)[..., None]
    return parts.reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]]


def fake_fp8(x: Array, block: int) -> Array:
    """`x` through FP8 and back, same dtype. Exact in bfloat16: scales are powers of two."""
    return dequantize_fp8(*quantize_fp8(x, block), block).astype(x.dtype)


def round_e2m1(x: Array) -> Array:
    """Float32 values in [-6, 6] to the nearest e2m1 value, ties to the even code."""
    size = jnp.abs(x)
    step = jnp.where(size < 2.0, 0.5, jnp.where(size < 4.0, 1.0, 2.0))
    return jnp.round(x / step) * step


def quantize_fp4(x: Array) -> tuple[Array, Array]:
    """Float32 e2m1 values `[..., n]` (not yet scaled) and scales `[..., n/32]`."""
    parts = _blocks(x.astype(jnp.float32), FP4_BLOCK)
    amax = jnp.maximum(jnp.abs(parts).max(-1, keepdims=True), FP4_MIN_AMAX)
    scale = pow2_at_least(amax * np.float32(1 / FP4_MAX))
    values = round_e2m1(jnp.clip(parts / scale, -FP4_MAX, FP4_MAX))
    return values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scale[..., 0]


def fake_fp4(x: Array) -> Array:
    """`x` through FP4 in blocks of 32 and back, same dtype."""
    values, scale = quantize_fp4(x)
    parts = _blocks(values, FP4_BLOCK) * scale[..., None]
    return parts.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(x.dtype)


def pack_fp4(values: Array) -> Array:
    """Bytes `[..., n/2]` of e2m1 values `[..., n]`; the low nibble holds the even channel."""
    size = jnp.abs(values)
    code = jnp.where(size < 2, 2 * size, jnp.where(size < 4, size + 2, size / 2 + 4))
    nibbles = code.astype(jnp.uint8) | (jnp.signbit(values).astype(jnp.uint8) << 3)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_fp4(codes: Array) -> Array:
    """Float32 e2m1 values `[..., n]` of bytes `[..., n/2]`, without a table look-up."""
    byte = codes.astype(jnp.int32)
    nibble = jnp.stack([byte & 15, byte >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    exponent, mantissa = (nibble >> 1) & 3, nibble & 1
    # exponent 0 is subnormal: 0 or 0.5; otherwise (1 + mantissa/2) * 2^(exponent-1)
    normal = ((exponent + 126) << 23) | (mantissa << 22)
    size = jnp.where(
        exponent == 0,
        0.5 * mantissa.astype(jnp.float32),
        lax.bitcast_convert_type(normal, jnp.float32),
    )
    return jnp.where(nibble >= 8, -size, size)


def hadamard(x: Array) -> Array:
    """Walsh–Hadamard transform of the last dimension in natural order, times n^-1/2, float32.

    Raises:
        ValueError: the dimension is no power of two.
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"index_dim={n} must be a power of two for the Hadamard rotation")
    matrix = jnp.asarray(_hadamard_matrix(n))
    return jnp.matmul(x.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST)


def _hadamard_matrix(n: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * np.float32(n**-0.5)


def dequantize(
    weight: Array | QuantizedArray | StackedWeight | DecodedWeight, dtype: jnp.dtype
) -> Array:
    """Dense values `[..., out, in]`; a plain array is only cast."""
    if isinstance(weight, StackedWeight):
        weight = weight.cut()
    if isinstance(weight, DecodedWeight):
        weight = weight.values
    if not isinstance(weight, QuantizedArray):
        return weight.astype(dtype)
    scales = decode_e8m0(weight.scales)
    if weight.fmt == "fp4":
        values = unpack_fp4(weight.codes)
        values = _blocks(values, FP4_BLOCK) * scales[..., None]
        return values.reshape(weight.shape).astype(dtype)
    out_dim, in_dim = weight.shape[-2:]
    rows = jnp.repeat(scales, WEIGHT_BLOCK, axis=-2)[..., :out_dim, :]
    full = jnp.repeat(rows, WEIGHT_BLOCK, axis=-1)[..., :in_dim]
    return (weight.codes.astype(jnp.float32) * full).astype(dtype)


def quantize_weight(values: Array, fmt: str, scale_dtype: jnp.dtype) -> QuantizedArray:
    """Rounds a float32 weight `[..., out, in]` to `fmt` with power-of-two scales."""
    if fmt == "fp4":
        codes, scales = quantize_fp4(values)
        return QuantizedArray(pack_fp4(codes), scales.astype(scale_dtype), fmt)
    out_dim, in_dim = values.shape[-2:]
    pads = [(0, 0)] * (values.ndim - 2) + [(0, -n % WEIGHT_BLOCK) for n in (out_dim, in_dim)]
    padded = jnp.pad(values.astype(jnp.float32), pads)
    lead, (rows, cols) = padded.shape[:-2], padded.shape[-2:]
    grid = (*lead, rows // WEIGHT_BLOCK, WEIGHT_BLOCK, cols // WEIGHT_BLOCK, WEIGHT_BLOCK)
    tiles = padded.reshape(grid)
    amax = jnp.maximum(jnp.abs(tiles).max((-3, -1), keepdims=True), FP8_MIN_AMAX)
    scale = pow2_at_least(amax * np.float32(1 / FP8_MAX))
    codes = jnp.clip(tiles / scale, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    codes = codes.reshape(padded.shape)[..., :out_dim, :in_dim]
    return QuantizedArray(codes, scale[..., :, 0, :, 0].astype(scale_dtype), fmt)


def index_expert(weights: Any, index: Array) -> Any:
    """Entry `index` of weights stacked along their first dimension, still quantised."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), weights)
