"""How the model computes: rounding mode and dtype, and the matrix products that obey them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.quant import (
    ACT_BLOCK,
    DecodedWeight,
    QuantizedArray,
    StackedWeight,
    dequantize,
    fake_fp8,
    round_to,
)
from pallas_kernels.block_matmul.api import block_matmul
from sharding.shards import Shards

FEW_ROWS = 32  # up to these many rows a product is bound by its weights
APART = 3  # up to these many rows, each is a product of its own
ONE_BY_ONE = 4  # the same where there is a matrix for each part of a row
MODES = ("reference", "plain")
DTYPES = ("float32", "bfloat16")
IMPLEMENTATIONS = ("reference", "pallas", "interpret")


@dataclass(frozen=True)
class Numerics:
    """Static choice of arithmetic; hashable, so it may be a static argument of jit.

    mode: `reference` rounds where the official inference code rounds (FP8 activations in front of
        quantised matrices, FP8 keys and values, FP4 index keys); `plain` never does.
    dtype: of the tensors between operations.
    implementation: what computes the hot path. `pallas`: the kernels; `interpret`: the same,
        interpreted (slow, for tests); `reference`: no kernels. None: `pallas` where JAX's default
        backend is a TPU and the kernels cover the sizes, `reference` otherwise. Kernels of matrix
        products and hyper-connections are for bfloat16; those of attention also for float32.

    Raises:
        ValueError: unknown mode, dtype or implementation.
    """

    mode: str = "reference"
    dtype: str = "bfloat16"
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"numerics={self.mode!r} must be one of {MODES}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {DTYPES}")
        if self.implementation is not None and self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={self.implementation!r} must be None or one of {IMPLEMENTATIONS}"
            )

    @property
    def rounds(self) -> bool:
        return self.mode == "reference"

    @property
    def packed_cache(self) -> bool:
        """Whether caches hold FP8/FP4 codes: exact when values were rounded to them in bfloat16."""
        return self.rounds and self.dtype == "bfloat16"

    @property
    def kernels(self) -> str | None:
        """`pallas` or `interpret`, or None where no kernel runs.

        Programs compiled for a TPU on a machine without one name `pallas` themselves.
        """
        if self.implementation is None:
            return "pallas" if jax.default_backend() == "tpu" else None
        return None if self.implementation == "reference" else self.implementation

    @property
    def matrix_kernels(self) -> str | None:
        """`kernels` where tensors are bfloat16."""
        return self.kernels if self.dtype == "bfloat16" else None

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def cast(self, x: Array) -> Array:
        """`x` in the activation dtype, really rounded."""
        return round_to(x, self.jnp_dtype)


def matmul(x: Array, w: Array) -> Array:
    """`x · wᵀ` over the last dimensions, `w` `[out, in]`; float32 result of exact products."""
    rows = math.prod(x.shape[:-1])
    if w.ndim == 2 and 1 < rows <= FEW_ROWS:
        by_cpu = _apart if rows <= APART else _weight_first
        return lax.platform_dependent(x, w, cpu=by_cpu, default=_dot)
    return _dot(x, w)


def _apart(x: Array, w: Array) -> Array:
    """Row by row: the CPU backend reads the weights of one row as they lie, fast, else packs."""
    rows = x.reshape(-1, x.shape[-1])
    out = jnp.concatenate([_dot(rows[r : r + 1], w) for r in range(len(rows))])
    return out.reshape(*x.shape[:-1], -1)


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


def matmul_each(x: Array, w: Array) -> Array:
    """Part e of `x` `[..., E, in]` · matrix e of `w` `[E, out, in]`ᵀ: float32 `[..., E, out]`."""
    rows = x.reshape(-1, *x.shape[-2:])

    def all_at_once(x_RE: Array, w: Array) -> Array:
        out = lax.dot_general(
            x_RE,
            w,
            (((2,), (2,)), ((1,), (0,))),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        return jnp.moveaxis(out, 0, 1)

    def row_by_row(x_RE: Array, w: Array) -> Array:
        return jnp.concatenate([all_at_once(x_RE[r : r + 1], w) for r in range(len(rows))])

    if 1 < len(rows) <= ONE_BY_ONE:  # the CPU backend is slow at such small batches of products
        out = lax.platform_dependent(rows, w, cpu=row_by_row, default=all_at_once)
    else:
        out = all_at_once(rows, w)
    return out.reshape(*x.shape[:-1], -1)


Weight = Array | QuantizedArray | StackedWeight | DecodedWeight


def linear(
    x: Array, weight: Weight, num: Numerics, rounded: bool = True, wide: bool = False
) -> Array:
    """`x · Wᵀ` as the official code does it, in the activation dtype.

    With `wide` the float32 sums stay as they are, for more to be added.

    With `rounded`, a quantised weight in reference mode sees its input rounded to FP8 per token and
    128 channels. Products of such codes are exact in bfloat16 while scales are powers of two;
    float32 scales (-Base) need float32 products.
    """
    if isinstance(weight, DecodedWeight):
        x = fake_fp8(x, ACT_BLOCK) if num.rounds and rounded else x
        out = matmul(x.astype(jnp.float32), weight.values)
        return out if wide else num.cast(out)
    if num.matrix_kernels and not isinstance(weight, Array) and is_fp8(weight):
        return fp8_matmul(x, weight, num, rounded=num.rounds and rounded, wide=wide)
    if isinstance(weight, StackedWeight):
        weight = weight.cut()
    work = num.jnp_dtype
    if isinstance(weight, QuantizedArray):
        if num.rounds and rounded:
            x = fake_fp8(x, ACT_BLOCK)
        exact = weight.scales.dtype == jnp.float8_e8m0fnu
        work = work if exact else jnp.dtype(jnp.float32)
    out = matmul(x.astype(work), dequantize(weight, work))
    return out if wide else num.cast(out)


def linear_over(
    x: Array, weight: Weight, num: Numerics, shards: Shards, name: str, rounded: bool = True
) -> Array:
    """`linear` whose input dimension `name` is split over devices: Σ of their float32 parts."""
    if shards.count(name) == 1:
        return linear(x, weight, num, rounded)
    return num.cast(shards.total(linear(x, weight, num, rounded, wide=True), name))


def is_fp8(weight: QuantizedArray | StackedWeight) -> bool:
    return (weight.stack if isinstance(weight, StackedWeight) else weight).fmt == "fp8"


def fp8_matmul(
    x: Array,
    weight: QuantizedArray | StackedWeight,
    num: Numerics,
    rounded: bool,
    groups: int = 1,
    wide: bool = False,
) -> Array:
    """`linear` by its kernel; with `groups`, part g of the outputs sees part g of `x` only."""
    stacked = isinstance(weight, StackedWeight)
    stored = weight.stack if stacked else weight
    return block_matmul(
        x,
        stored.codes,
        stored.scales,
        layer=weight.layer if stacked else None,
        groups=groups,
        round_activations=rounded,
        out_dtype=jnp.float32 if wide else jnp.bfloat16,
        implementation=num.matrix_kernels,
    )


def linear_f32(x: Array, weight: Array) -> Array:
    """`x · Wᵀ` entirely in float32: router, compressor, mixing, output head."""

    def wide(x: Array, weight: Array) -> Array:
        return matmul(x.astype(jnp.float32), weight.astype(jnp.float32))

    if x.dtype == weight.dtype == jnp.bfloat16:  # exact products either way
        return lax.platform_dependent(x, weight, tpu=_dot, default=wide)
    return wide(x, weight)
