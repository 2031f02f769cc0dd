"""Plain version of the hyper-connection steps; float32 inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul.reference import round_bf16


def sinkhorn(logits_MMU: jax.Array, iters: int, eps: float) -> jax.Array:
    """Row softmax, then column and row normalisation in turn; ends on columns."""
    comb_MMU = jax.nn.softmax(logits_MMU, axis=1) + eps
    comb_MMU = comb_MMU / (comb_MMU.sum(0, keepdims=True) + eps)
    for _ in range(iters - 1):
        comb_MMU = comb_MMU / (comb_MMU.sum(1, keepdims=True) + eps)
        comb_MMU = comb_MMU / (comb_MMU.sum(0, keepdims=True) + eps)
    return comb_MMU


def mix(
    h_UMD: jax.Array,
    fn: jax.Array,
    scale_3: jax.Array,
    base: jax.Array,
    norm_D: jax.Array | None,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sublayer input `[U, D]`, post `[M, U]` and comb `[source, target, U]`."""
    tokens, m, dim = h_UMD.shape
    flat = h_UMD.reshape(tokens, m * dim).astype(jnp.float32)
    inverse_U = lax.rsqrt(jnp.mean(flat * flat, axis=-1) + norm_eps)
    product = lax.dot_general(fn, flat, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    logits = product * inverse_U[None]
    base = base[:, None]
    pre_MU = jax.nn.sigmoid(logits[:m] * scale_3[0] + base[:m]) + eps
    post_MU = 2 * jax.nn.sigmoid(logits[m : 2 * m] * scale_3[1] + base[m : 2 * m])
    comb = logits[2 * m :] * scale_3[2] + base[2 * m :]
    comb_MMU = sinkhorn(comb.reshape(m, m, tokens), iters, eps)
    x_UD = round_bf16((pre_MU.T[:, :, None] * h_UMD.astype(jnp.float32)).sum(1))
    if norm_D is not None:
        inverse_U1 = lax.rsqrt(jnp.mean(x_UD * x_UD, axis=-1, keepdims=True) + norm_eps)
        x_UD = norm_D[None].astype(jnp.float32) * (x_UD * inverse_U1)
    return x_UD.astype(h_UMD.dtype), post_MU, comb_MMU


def spread(a_UD: jax.Array, h_UMD: jax.Array, post_MU: jax.Array, comb_MMU: jax.Array) -> jax.Array:
    """Target k gets post[k] · a + Σ_j comb[j, k] · h[j]."""
    direct = post_MU.T[:, :, None] * a_UD.astype(jnp.float32)[:, None]
    streams = jnp.einsum(
        "jku,ujd->ukd", comb_MMU, h_UMD.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return (direct + streams).astype(h_UMD.dtype)
