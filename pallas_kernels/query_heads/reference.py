"""Plain version of the query heads, step by step as the official code rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.reference import round_bf16


def query_heads(
    y_UNH: jax.Array, cos_Ur: jax.Array, sin_Ur: jax.Array, eps: float, rounds: bool
) -> jax.Array:
    """Heads normed without a weight, then the last channels turned; bfloat16."""
    step = round_bf16 if rounds else lambda x: x
    x = y_UNH.astype(jnp.float32)
    mean = step(jnp.mean(step(x * x), axis=-1, keepdims=True))
    x = round_bf16(x * step(lax.rsqrt(step(mean + eps))))
    still = x.shape[-1] - 2 * cos_Ur.shape[-1]
    a, b = x[..., still::2], x[..., still + 1 :: 2]
    cos, sin = cos_Ur[:, None], sin_Ur[:, None]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turned = turned.reshape(*x.shape[:2], x.shape[-1] - still)
    return jnp.concatenate([x[..., :still], round_bf16(turned)], axis=-1).astype(jnp.bfloat16)
