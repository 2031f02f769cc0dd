"""Configurations of the released models, and a tiny one with every layer kind.

Values are those of the published `config.json` files. V4-Pro-Base was not published in a form we
could read: its formats follow V4-Flash-Base.
"""

from __future__ import annotations

from dsv4_jax.config import CSA, SWA, ModelConfig, Yarn

HCA_RATIO = 128


def v4_flash() -> ModelConfig:
    """V4-Flash: 284B parameters, 13B active; FP8 matrices, FP4 experts."""
    return ModelConfig(
        vocab_size=129280,
        dim=4096,
        num_layers=43,
        compress_ratios=(SWA, SWA, *(CSA, HCA_RATIO) * 20, CSA, SWA),
        num_heads=64,
        head_dim=512,
        rope_dim=64,
        q_rank=1024,
        o_groups=8,
        o_rank=1024,
        num_experts=256,
        experts_per_token=6,
        expert_dim=2048,
        num_hash_layers=3,
        routed_scale=1.5,
        index_topk=512,
    )


def v4_pro() -> ModelConfig:
    """V4-Pro: 1.6T parameters, 49B active; FP8 matrices, FP4 experts."""
    return v4_flash().replace(
        dim=7168,
        num_layers=61,
        compress_ratios=(HCA_RATIO, HCA_RATIO, *(CSA, HCA_RATIO) * 29, CSA, SWA),
        num_heads=128,
        q_rank=1536,
        o_groups=16,
        num_experts=384,
        expert_dim=3072,
        routed_scale=2.5,
        index_topk=1024,
    )


def v4_flash_base() -> ModelConfig:
    """V4-Flash-Base: FP8 everywhere, float32 scales."""
    return v4_flash().replace(expert_format="fp8", scale_dtype="float32")


def v4_pro_base() -> ModelConfig:
    """V4-Pro-Base: FP8 everywhere, float32 scales."""
    return v4_pro().replace(expert_format="fp8", scale_dtype="float32")


def tiny() -> ModelConfig:
    """Every layer kind at sizes that run in seconds on a CPU."""
    return ModelConfig(
        vocab_size=320,
        dim=128,
        num_layers=4,
        compress_ratios=(SWA, CSA, HCA_RATIO, CSA, SWA),
        num_heads=4,
        head_dim=64,
        rope_dim=32,
        q_rank=64,
        o_groups=2,
        o_rank=64,
        num_experts=8,
        experts_per_token=2,
        expert_dim=64,
        num_hash_layers=1,
        routed_scale=1.5,
        window=32,
        index_heads=4,
        index_dim=32,
        index_topk=16,
        yarn=Yarn(original_len=256),
        max_len=8192,
    )


PRESETS = {
    "v4-flash": v4_flash,
    "v4-pro": v4_pro,
    "v4-flash-base": v4_flash_base,
    "v4-pro-base": v4_pro_base,
    "tiny": tiny,
}
