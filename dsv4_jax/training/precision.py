"""Precision of training: compute dtype, and which numbers are rounded as they will be served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dsv4_jax.numerics import Numerics, linear
from dsv4_jax.quant import (
    ACT_BLOCK,
    KV_BLOCK,
    dequantize,
    fake_fp4,
    fake_fp8,
    hadamard,
    quantize_weight,
)
from dsv4_jax.training.leaves import map_leaves

FORMATS = (None, "fp8", "fp4")


@dataclass(frozen=True)
class Precision:
    """What is rounded on the way; master weights and optimizer state stay float32.

    dtype: of activations and matrix operands.
    experts: "fp4" or "fp8": routed experts are rounded to that format (QAT); None: not.
    dense: "fp8": other quantised matrices are rounded to 128×128 blocks.
    activations: what enters such a matrix is rounded to FP8 in blocks of 128 channels.
    index: index queries and keys are rotated by Hadamard and rounded to FP4.
    kv: the non-rotary channels of key/value rows are rounded to FP8.
    All rounding passes gradients straight through.

    Raises:
        ValueError: an unknown dtype or format.
    """

    dtype: str = "float32"
    experts: str | None = None
    dense: str | None = None
    activations: bool = False
    index: bool = False
    kv: bool = False

    def __post_init__(self) -> None:
        Numerics("plain", self.dtype)
        if self.experts not in FORMATS:
            raise ValueError(f"precision.experts={self.experts!r} must be one of {FORMATS}")
        if self.dense not in (None, "fp8"):
            raise ValueError(f"precision.dense={self.dense!r} must be None or 'fp8'")

    def format_of(self, role: str) -> str | None:
        """To which format weights of a role (see `ParamSpec`) are rounded, if at all."""
        return {"expert": self.experts, "dense": self.dense}.get(role)

    @property
    def num(self) -> Numerics:
        """How the model's own functions compute; they never round by themselves here."""
        return Numerics("plain", self.dtype, "reference")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight(rounding: Callable[[Array], Array], x: Array) -> Array:
    return rounding(x)


_straight.defvjp(
    lambda rounding, x: (rounding(x), None),
    lambda rounding, _, g: (g,),
)


def straight_through(rounding: Callable[[Array], Array], x: Array) -> Array:
    """`rounding(x)`, with the gradient of `x` itself."""
    out: Any = _straight(rounding, x)
    return out


def fake_weight(fmt: str, weight: Array) -> Array:
    """A matrix `[..., out, in]` as its exported codes say, in its own dtype."""
    stored = quantize_weight(weight, fmt, jnp.dtype("float32"))
    return dequantize(stored, weight.dtype)


def round_weights(params: Any, cfg: Any, precision: Precision) -> Any:
    """Parameters as they will be exported: the values that forward and backward use."""
    if not (precision.experts or precision.dense):
        return params

    def rounded(spec: Any, leaf: Array) -> Array:
        fmt = precision.format_of(spec.role)
        return straight_through(partial(fake_weight, fmt), leaf) if fmt else leaf

    return map_leaves(rounded, cfg, params)


def dense(x: Array, weight: Array, precision: Precision) -> Array:
    """`linear` of a matrix that is stored quantised."""
    return linear(round_activations(x, precision), weight, precision.num)


def round_activations(x: Array, precision: Precision) -> Array:
    """What enters a quantised matrix, rounded to FP8 if wanted."""
    if not precision.activations:
        return x
    return straight_through(partial(fake_fp8, block=ACT_BLOCK), x)


def round_kv(rows: Array, rope_dim: int, precision: Precision) -> Array:
    """Key/value rows `[..., H]` as the cache keeps them."""
    if not precision.kv:
        return rows
    still = rows.shape[-1] - rope_dim
    low = straight_through(partial(fake_fp8, block=KV_BLOCK), rows[..., :still])
    return jnp.concatenate([low, rows[..., still:]], axis=-1)


def round_index(x: Array, precision: Precision) -> Array:
    """Index queries or keys: rotated, then FP4. Without rounding the rotation would cancel."""
    if not precision.index:
        return x
    return straight_through(fake_fp4, precision.num.cast(hadamard(x)))
