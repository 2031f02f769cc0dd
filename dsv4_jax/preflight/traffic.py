"""The formula: bytes that a device sends in one step, from the sizes of model and mesh alone.

docs/scale.md explains the terms. A ring of n devices sends (n-1)/n of what it gathers or exchanges,
and twice that of what it adds up for all.
"""

from __future__ import annotations

import math

from dsv4_jax.cache import row_capacity
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.context import can_split
from dsv4_jax.exchange import MAX_GATHERED
from dsv4_jax.preflight.programs import Sizes
from sharding.rules import BATCH
from sharding.shards import Shards

WIDE, NARROW = 4, 2  # bytes of float32 and bfloat16
LANES = 128


def _ring(count: int) -> float:
    return (count - 1) / count


def sent_bytes(cfg: ModelConfig, shards: Shards, sizes: Sizes, fresh: int) -> dict[str, float]:
    """Bytes by purpose for one step of `fresh` new tokens per sequence, all main layers."""
    context = shards.count("context")
    split = can_split(fresh, context)
    batch = sizes.batch // shards.count("batch")
    tokens = batch * fresh // (context if split else 1)
    layers = [cfg.ratio(n) for n in range(cfg.num_layers)]
    found = {
        "experts": cfg.num_layers * _experts(cfg, shards, tokens, split),
        "heads": _heads(cfg, shards, tokens),
    }
    if context > 1:
        part = _split_layer if split else _shared_layer
        found["context"] = sum(part(cfg, shards, sizes, batch, tokens, ratio) for ratio in layers)
    return found


def _experts(cfg: ModelConfig, shards: Shards, tokens: int, split: bool) -> float:
    axes = shards.axes("experts")
    own = [a for a in axes if a in BATCH or (a == "context" and split)]
    mine = math.prod(shards.size(a) for a in own)
    rest = shards.count("experts") // mine
    row, per_token = cfg.dim, cfg.experts_per_token
    form = shards.exchange or ("gather" if mine <= MAX_GATHERED else "ragged")
    if form == "gather":
        there = (mine - 1) * tokens * (NARROW * row + 2 * WIDE * per_token)
        back = (mine - 1) * tokens * WIDE * row
        return there + back + 2 * _ring(rest) * tokens * WIDE * row
    group, share = mine * rest, -(-tokens // rest)
    rows = share * per_token
    if form == "padded":
        rows = group * share * min(per_token, cfg.num_experts // group)
        about = _ring(group) * (rows * 2 + group) * WIDE
    else:  # the expert and weight of a row fill a whole line of lanes; counts go to all
        about = _ring(group) * (rows * LANES + 2 * group * group) * WIDE
    messages = _ring(group) * rows * 2 * NARROW * row
    return messages + about + _ring(rest) * share * rest * WIDE * row


def _heads(cfg: ModelConfig, shards: Shards, tokens: int) -> float:
    """Sums over heads and over the width of the shared expert, and rows of the embedding."""
    ring = 2 * _ring(shards.count("heads"))
    return ring * tokens * cfg.dim * (2 * WIDE * cfg.num_layers + NARROW)


def _row_bytes(cfg: ModelConfig) -> int:
    """Of a packed KV row with its scales."""
    still = cfg.head_dim - cfg.rope_dim
    return still + -(-still // 256) * 4 + NARROW * cfg.rope_dim


def _key_bytes(cfg: ModelConfig) -> int:
    return cfg.index_dim // 2 + -(-cfg.index_dim // 32)


def _split_layer(
    cfg: ModelConfig, shards: Shards, sizes: Sizes, batch: int, tokens: int, ratio: int
) -> float:
    """Prefill: halos and rings, new rows, and all rows of the context joined."""
    count = shards.count("context")
    all_of = _ring(count)
    rings = cfg.window * cfg.head_dim * NARROW
    if not ratio:
        return batch * rings * (1 + 2 * all_of)
    widths = [cfg.head_dim] + ([cfg.index_dim] if ratio == CSA else [])
    overlap = 2 if ratio == CSA else 1
    for width in widths:
        rings += 2 * WIDE * overlap * ratio * overlap * width  # values and scores
    new = sum(-(-tokens // batch // ratio) * width * NARROW for width in widths)
    rows = row_capacity(sizes.context, ratio)
    stored = _row_bytes(cfg) + (_key_bytes(cfg) if ratio == CSA else 0)
    return batch * (rings * (1 + 2 * all_of) + (count - 1) * new + all_of * rows * stored)


def _shared_layer(
    cfg: ModelConfig, shards: Shards, sizes: Sizes, batch: int, tokens: int, ratio: int
) -> float:
    """Decoding: softmaxes merged, and candidates of the indexer."""
    count, heads = shards.count("context"), cfg.num_heads // shards.count("heads")
    merged = 2 * _ring(count) * tokens * heads * (cfg.head_dim + 2) * WIDE
    if ratio != CSA:
        return merged
    kept = min(cfg.index_topk, row_capacity(sizes.context, ratio) // count)
    return merged + (count - 1) * tokens * kept * 2 * WIDE
