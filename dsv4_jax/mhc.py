"""Manifold-constrained hyper-connections: how M residual streams feed and absorb a sublayer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from dsv4_jax.config import ModelConfig
from dsv4_jax.norm import rms_norm
from dsv4_jax.numerics import Numerics, linear_f32
from dsv4_jax.params import declare, hyper_head_specs, hyper_specs
from pallas_kernels.mhc import api as kernel


class Mixing(NamedTuple):
    """Float32 coefficients of one sublayer; tokens come last so that they fill vector lanes."""

    pre_MBT: Array | None  # None where a kernel has used them already
    post_MBT: Array
    comb_MMBT: Array  # [source stream, target stream]


def _mix_logits(h_BTMD: Array, fn: Array, eps: float) -> Array:
    """One float32 number per row of `fn`: `[rows, B, T]`. Scaled by the norm after the product."""
    u_BTm = h_BTMD.reshape(*h_BTMD.shape[:2], -1).astype(jnp.float32)
    scale_BT1 = lax.rsqrt(jnp.mean(u_BTm * u_BTm, axis=-1, keepdims=True) + eps)
    return jnp.moveaxis(linear_f32(u_BTm, fn) * scale_BT1, -1, 0)


def _column(x: Array) -> Array:
    """A vector of coefficients `[rows]` as `[rows, 1, 1]`."""
    return x.astype(jnp.float32)[:, None, None]


def sinkhorn(logits_MMBT: Array, iters: int, eps: float) -> Array:
    """Row softmax, then alternating column and row normalisation that ends on columns.

    `iters` counts column normalisations. The epsilons are the official ones: after the softmax and
    in every denominator.
    """

    def columns(c: Array) -> Array:
        return c / (c.sum(axis=0, keepdims=True) + eps)

    def rows_then_columns(_, c: Array) -> Array:
        return columns(c / (c.sum(axis=1, keepdims=True) + eps))

    first = columns(jax.nn.softmax(logits_MMBT, axis=1) + eps)
    return lax.fori_loop(0, iters - 1, rows_then_columns, first)


def split_mixing(mix_hBT: Array, scale_3: Array, base_h: Array, cfg: ModelConfig) -> Mixing:
    """Turns the mixing logits into pre, post and the doubly stochastic comb."""
    m, eps = cfg.hc_mult, cfg.hc_eps
    base = _column(base_h)
    pre = jax.nn.sigmoid(mix_hBT[:m] * scale_3[0] + base[:m]) + eps
    post = 2 * jax.nn.sigmoid(mix_hBT[m : 2 * m] * scale_3[1] + base[m : 2 * m])
    comb = (mix_hBT[2 * m :] * scale_3[2] + base[2 * m :]).reshape(m, m, *mix_hBT.shape[1:])
    return Mixing(pre, post, sinkhorn(comb, cfg.hc_iters, eps))


def weigh_streams(h_BTMD: Array, weights_MBT: Array, num: Numerics) -> Array:
    """Σ_m weights[m] · h[m], in float32, rounded once: `[B, T, D]`."""
    parts = [
        weights_MBT[m][..., None] * h_BTMD[:, :, m].astype(jnp.float32)
        for m in range(h_BTMD.shape[2])
    ]
    return num.cast(sum(parts[1:], parts[0]))


def spread(a_BTD: Array, h_BTMD: Array, mix: Mixing, num: Numerics) -> Array:
    """New streams: target k gets post[k] · a + Σ_j comb[j, k] · h[j]. The sum runs over sources."""
    if num.matrix_kernels:
        m, (batch, fresh, _, dim) = len(mix.post_MBT), h_BTMD.shape
        h_UMD = kernel.spread(
            a_BTD.reshape(batch * fresh, dim),
            h_BTMD.reshape(batch * fresh, m * dim),
            mix.post_MBT.reshape(m, -1),
            mix.comb_MMBT.reshape(m, m, -1),
            implementation=num.matrix_kernels,
        )
        return h_UMD.reshape(h_BTMD.shape)
    post_BTM1 = jnp.moveaxis(mix.post_MBT, 0, -1)[..., None]
    comb_BTMM1 = jnp.moveaxis(mix.comb_MMBT, (0, 1), (2, 3))[..., None]
    total = post_BTM1 * a_BTD.astype(jnp.float32)[:, :, None]
    h32 = h_BTMD.astype(jnp.float32)
    terms = [comb_BTMM1[:, :, j] * h32[:, :, j, None] for j in range(h_BTMD.shape[2])]
    return num.cast(total + sum(terms[1:], terms[0]))


class HyperConnection(nn.Module):
    """Coefficients for one sublayer, from the streams in front of it."""

    cfg: ModelConfig

    def setup(self) -> None:
        self.weights = declare(self, self.cfg, hyper_specs(self.cfg))

    def __call__(self, h_BTMD: Array) -> Mixing:
        w = self.weights
        mix_hBT = _mix_logits(h_BTMD, w["fn"], self.cfg.norm_eps)
        return split_mixing(mix_hBT, w["scale"], w["base"], self.cfg)

    def feed(self, h_BTMD: Array, norm_D: Array, num: Numerics) -> tuple[Array, Mixing]:
        """The normed input `[B, T, D]` of the sublayer, and the coefficients."""
        cfg, w = self.cfg, self.weights
        if not num.matrix_kernels:
            mix = self(h_BTMD)
            assert mix.pre_MBT is not None
            x_BTD = weigh_streams(h_BTMD, mix.pre_MBT, num)
            return rms_norm(x_BTD, norm_D, cfg.norm_eps, num), mix
        batch, fresh, m, dim = h_BTMD.shape
        mixed = kernel.mix(
            h_BTMD.reshape(batch * fresh, m * dim),
            w["fn"],
            w["scale"],
            w["base"],
            iters=cfg.hc_iters,
            eps=cfg.hc_eps,
            norm_eps=cfg.norm_eps,
            norm_D=norm_D,
            implementation=num.matrix_kernels,
        )
        post_MBT = mixed.post_MU.reshape(m, batch, fresh)
        comb_MMBT = mixed.comb_MMU.reshape(m, m, batch, fresh)
        return mixed.x_UD.reshape(batch, fresh, dim), Mixing(None, post_MBT, comb_MMBT)


class HyperHead(nn.Module):
    """Collapses the streams into one vector per token; no Sinkhorn."""

    cfg: ModelConfig
    num: Numerics

    def setup(self) -> None:
        self.weights: dict[str, Any] = declare(self, self.cfg, hyper_head_specs(self.cfg))

    def __call__(self, h_BTMD: Array) -> Array:
        w = self.weights
        mix_MBT = _mix_logits(h_BTMD, w["fn"], self.cfg.norm_eps)
        pre_MBT = jax.nn.sigmoid(mix_MBT * w["scale"][0] + _column(w["base"])) + self.cfg.hc_eps
        return weigh_streams(h_BTMD, pre_MBT, self.num)
