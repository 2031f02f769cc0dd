"""One layer: attention and MoE, each behind a norm and a hyper-connection. And the MTP block."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dsv4_jax.attention import Attention
from dsv4_jax.cache import LayerCache
from dsv4_jax.compress import Chunk, last_of
from dsv4_jax.config import ModelConfig
from dsv4_jax.mhc import HyperConnection, HyperHead, spread
from dsv4_jax.moe import MoE
from dsv4_jax.norm import rms_norm
from dsv4_jax.numerics import Numerics, linear
from dsv4_jax.params import block_specs, declare, mtp_specs
from dsv4_jax.schedule import LayerKind
from sharding.shards import SINGLE, Shards


class Block(nn.Module):
    """Streams in, streams out."""

    cfg: ModelConfig
    num: Numerics
    kind: LayerKind
    shards: Shards = SINGLE

    def setup(self) -> None:
        cfg, num, (ratio, is_hash) = self.cfg, self.num, self.kind
        specs = block_specs(cfg, ratio, is_hash)
        norms = {name: specs[name] for name in ("attn_norm", "ffn_norm")}
        self.norms: dict[str, Any] = declare(self, cfg, norms, self.shards)
        self.hc_attn, self.hc_ffn = HyperConnection(cfg), HyperConnection(cfg)
        self.attn = Attention(cfg, num, ratio, self.shards)
        self.ffn = MoE(cfg, num, is_hash, self.shards)

    def __call__(
        self, h_BTMD: Array, chunk: Chunk, cache: LayerCache, index: Array
    ) -> tuple[Array, LayerCache]:
        x_BTD, mix = self.hc_attn.feed(h_BTMD, self.norms["attn_norm"], self.num)
        a_BTD, cache = self.attn(x_BTD, chunk, cache, index)
        return self._transform(spread(a_BTD, h_BTMD, mix, self.num), chunk), cache

    def newest(
        self, h_BTMD: Array, chunk: Chunk, cache: LayerCache, index: Array
    ) -> tuple[Array, LayerCache]:
        """Streams of each sequence's last real token only: `[B, 1, M, D]`; all fill the cache.

        For a layer that has a window only, and tokens that are not split.
        """
        norm_D, num = self.norms["attn_norm"], self.num
        x_BTD, _ = self.hc_attn.feed(h_BTMD, norm_D, num)
        cache = self.attn.remember(x_BTD, chunk, cache, index)
        h_B1MD, chunk = last_of(h_BTMD, chunk.count_B), chunk.last()
        x_B1D, mix = self.hc_attn.feed(h_B1MD, norm_D, num)
        a_B1D = self.attn.recall(x_B1D, chunk, cache, index)
        return self._transform(spread(a_B1D, h_B1MD, mix, num), chunk), cache

    def _transform(self, h_BTMD: Array, chunk: Chunk) -> Array:
        x_BTD, mix = self.hc_ffn.feed(h_BTMD, self.norms["ffn_norm"], self.num)
        real_BT = jnp.arange(x_BTD.shape[1])[None] < chunk.count_B[:, None]
        f_BTD = self.ffn(x_BTD, chunk.tokens_BT, real_BT)
        return spread(f_BTD, h_BTMD, mix, self.num)


class MTPBlock(nn.Module):
    """Drafts token i+2 from the main streams of token i and the embedding of token i+1.

    Its inputs are two projections that add up (not one of a concatenation), per stream; then a
    window-only block, and its own collapse and norm in front of the shared output head.
    """

    cfg: ModelConfig
    num: Numerics
    shards: Shards = SINGLE

    def setup(self) -> None:
        names = ("e_proj", "h_proj", "enorm", "hnorm", "norm")
        specs = mtp_specs(self.cfg)
        self.weights: dict[str, Any] = declare(
            self, self.cfg, {n: specs[n] for n in names}, self.shards
        )
        self.hc_head = HyperHead(self.cfg, self.num)
        self.block = Block(self.cfg, self.num, LayerKind(0, False), self.shards)
        nn.share_scope(self, self.block)  # the official tensors of the block stand beside e_proj

    def __call__(
        self,
        h_BTMD: Array,
        next_BTD: Array,
        chunk: Chunk,
        cache: LayerCache,
        index: Array,
        newest: bool = False,
    ) -> tuple[Array, Array, LayerCache]:
        """Normed hidden `[B, T, D]` for the head, the block's streams, the cache.

        newest: of each sequence's last real token only, T = 1; see `Block.newest`.
        """
        cfg, num, w = self.cfg, self.num, self.weights
        e_BTD = linear(rms_norm(next_BTD, w["enorm"], cfg.norm_eps, num), w["e_proj"], num)
        s_BTMD = linear(rms_norm(h_BTMD, w["hnorm"], cfg.norm_eps, num), w["h_proj"], num)
        x_BTMD = num.cast(e_BTD.astype(jnp.float32)[:, :, None] + s_BTMD.astype(jnp.float32))
        run = self.block.newest if newest else self.block
        x_BTMD, cache = run(x_BTMD, chunk, cache, index)
        y_BTD = rms_norm(self.hc_head(x_BTMD), w["norm"], cfg.norm_eps, num)
        return y_BTD, x_BTMD, cache
