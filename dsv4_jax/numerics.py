"""How the model computes: rounding mode and dtype, and the matrix products that obey them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.quant import ACT_BLOCK, QuantizedArray, dequantize, fake_fp8, round_to

FEW_ROWS = 32  # up to these many rows a product is bound by its weights
MODES = ("reference", "plain")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Numerics:
    """Static choice of arithmetic; hashable, so it may be a static argument of jit.

    mode: `reference` rounds where the official inference code rounds (FP8 activations in front of
        quantised matrices, FP8 keys and values, FP4 index keys); `plain` never does.
    dtype: of the tensors between operations.

    Raises:
        ValueError: unknown mode or dtype.
    """

    mode: str = "reference"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"numerics={self.mode!r} must be one of {MODES}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {DTYPES}")

    @property
    def rounds(self) -> bool:
        return self.mode == "reference"

    @property
    def packed_cache(self) -> bool:
        """Whether caches hold FP8/FP4 codes: exact when values were rounded to them in bfloat16."""
        return self.rounds and self.dtype == "bfloat16"

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def cast(self, x: Array) -> Array:
        """`x` in the activation dtype, really rounded."""
        return round_to(x, self.jnp_dtype)


def matmul(x: Array, w: Array) -> Array:
    """`x · wᵀ` over the last dimensions, `w` `[out, in]`; float32 result of exact products."""
    if w.ndim == 2 and 1 < math.prod(x.shape[:-1]) <= FEW_ROWS:
        return lax.platform_dependent(x, w, cpu=_weight_first, default=_dot)
    return _dot(x, w)


def _weight_first(x: Array, w: Array) -> Array:
    """The product the other way round: the CPU backend packs the second operand in every call."""
    flipped = _dot(w, x.reshape(-1, x.shape[-1]))
    return lax.optimization_barrier(flipped).T.reshape(*x.shape[:-1], -1)


def _dot(x: Array, w: Array) -> Array:
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (w.ndim - 1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def linear(x: Array, weight: Array | QuantizedArray, num: Numerics, rounded: bool = True) -> Array:
    """`x · Wᵀ` as the official code does it, in the activation dtype.

    With `rounded`, a quantised weight in reference mode sees its input rounded to FP8 per token and
    128 channels. Products of such codes are exact in bfloat16 while scales are powers of two;
    float32 scales (-Base) need float32 products.
    """
    if isinstance(weight, QuantizedArray):
        if num.rounds and rounded:
            x = fake_fp8(x, ACT_BLOCK)
        exact = weight.scales.dtype == jnp.float8_e8m0fnu
        work = num.jnp_dtype if exact else jnp.dtype(jnp.float32)
        return num.cast(matmul(x.astype(work), dequantize(weight, work)))
    work = num.jnp_dtype
    return num.cast(matmul(x.astype(work), weight.astype(work)))


def linear_f32(x: Array, weight: Array) -> Array:
    """`x · Wᵀ` entirely in float32: router, compressor, mixing, output head."""
    return matmul(x.astype(jnp.float32), weight.astype(jnp.float32))
