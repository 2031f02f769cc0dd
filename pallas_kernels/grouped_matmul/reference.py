"""Plain version of the expert matmuls: every row meets every expert, and the right one is kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.reference import (
    dequantize_fp8,
    round_activations,
    round_bf16,
)

FP4_BLOCK = 32


def dequantize_fp4(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Float32 values `[..., out, in]` of packed bytes `[..., out, in/2]`, low nibble first."""
    table = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], jnp.float32)
    nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    values = jnp.concatenate([table, -table])[nibbles]
    return values * jnp.repeat(scales.astype(jnp.float32), FP4_BLOCK, axis=-1)


def dequantize(weight: Any) -> jax.Array:
    """Float32 values of a weight with `codes` and `scales`; bytes are FP4."""
    decode = dequantize_fp4 if weight.codes.dtype == jnp.uint8 else dequantize_fp8
    return decode(weight.codes, weight.scales)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x · wᵀ` in float32, rounded to bfloat16."""
    y = lax.dot_general(
        x.astype(jnp.float32),
        w,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    return round_bf16(y).astype(jnp.bfloat16)


def _select_experts(one_expert, owner_Y: jax.Array, num_experts: int, out: jax.Array) -> jax.Array:
    def step(e, out):
        return jnp.where((owner_Y == e)[:, None], one_expert(e), out)

    return lax.fori_loop(0, num_experts, step, out)


def _pick(weight: Any, e: jax.Array) -> jax.Array:
    return dequantize(
        jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, e, keepdims=False), weight)
    )


def grouped_matmul(x_YK: jax.Array, owner_Y: jax.Array, weight: Any, round_x: bool) -> jax.Array:
    """Row r is `x[r] · W[owner[r]]ᵀ`; zero for rows of no expert."""
    x_YK = round_activations(x_YK) if round_x else x_YK
    experts, out_dim = weight.codes.shape[:2]
    zero = jnp.zeros((x_YK.shape[0], out_dim), jnp.bfloat16)
    return _select_experts(lambda e: product(x_YK, _pick(weight, e)), owner_Y, experts, zero)


def expert_rows(
    x_YD: jax.Array,
    owner_Y: jax.Array,
    scale_Y: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    limit: float,
    round_x: bool,
) -> jax.Array:
    """silu(clamped gate) · clamped up · routing weight, then down; bfloat16 `[Y, D]`."""
    maybe_round = round_activations if round_x else lambda x: x
    x_YD = maybe_round(x_YD)

    def one_expert(e: jax.Array) -> jax.Array:
        gate_YF = product(x_YD, _pick(w1, e)).astype(jnp.float32)
        up_YF = product(x_YD, _pick(w3, e)).astype(jnp.float32)
        if limit:
            gate_YF = jnp.minimum(gate_YF, limit)
            up_YF = jnp.clip(up_YF, -limit, limit)
        hidden_YF = round_bf16(jax.nn.silu(gate_YF) * up_YF * scale_Y[:, None])
        return product(maybe_round(hidden_YF.astype(jnp.bfloat16)), _pick(w2, e))

    zero = jnp.zeros(x_YD.shape, jnp.bfloat16)
    return _select_experts(one_expert, owner_Y, w1.codes.shape[0], zero)
