"""Plain version of the FP8 block matmul, and of the number formats it rests on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 128
FP8_MAX, FP8_MIN_AMAX = 448.0, 1e-4


def round_bf16(x: jax.Array) -> jax.Array:
    """Float32 values on the bfloat16 grid; XLA may drop a pair of casts, but not this."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def round_activations(x: jax.Array) -> jax.Array:
    """`x` through FP8 (e4m3) and back per 128 channels of the last dimension, same dtype.

    Scales are 2^ceil(log2(amax / 448)); exact in bfloat16.
    """
    pad = -x.shape[-1] % BLOCK
    wide = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    blocks = wide.reshape(*x.shape[:-1], wide.shape[-1] // BLOCK, BLOCK)
    amax = jnp.maximum(jnp.abs(blocks).max(-1, keepdims=True), FP8_MIN_AMAX)
    fraction, exponent = jnp.frexp(amax * np.float32(1 / FP8_MAX))
    scale = jnp.ldexp(jnp.float32(1), exponent - (fraction == 0.5).astype(jnp.int32))
    codes = jnp.clip(blocks / scale, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    values = (codes.astype(jnp.float32) * scale).reshape(wide.shape)
    return values[..., : x.shape[-1]].astype(x.dtype)


def dequantize_fp8(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Float32 values `[..., out, in]` of codes and their 128×128 block scales."""
    rows = jnp.repeat(scales.astype(jnp.float32), BLOCK, axis=-2)
    full = jnp.repeat(rows, BLOCK, axis=-1)
    return codes.astype(jnp.float32) * full[..., : codes.shape[-2], : codes.shape[-1]]


def block_matmul(
    x_UK: jax.Array,
    codes_NK: jax.Array,
    scales_nk: jax.Array,
    round_x: bool,
    groups: int,
    out_dtype,
) -> jax.Array:
    """`x · Wᵀ` in float32, rounded once; W is block diagonal with `groups` blocks."""
    x_UGK = x_UK.reshape(len(x_UK), groups, codes_NK.shape[1])
    x_UGK = round_activations(x_UGK) if round_x else x_UGK
    w_NK = dequantize_fp8(codes_NK, scales_nk)
    y_GUO = lax.dot_general(
        x_UGK.astype(jnp.float32),
        w_NK.reshape(groups, len(w_NK) // groups, -1),
        (((2,), (2,)), ((1,), (0,))),
        precision=lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(y_GUO, 0, 1).reshape(len(x_UK), len(w_NK)).astype(out_dtype)
