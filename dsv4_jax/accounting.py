"""What a token costs: parameters, cache bytes, FLOPs, of V4 and of V3.2 beside it.

FLOPs count a multiply-add as two. They are those of a token decoded behind `context` others; what
is counted is explained in docs/accounting.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.cache import init_cache
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.params import count_params
from dsv4_jax.presets import PRESETS

MODELS = ("v4-flash", "v4-pro")
POINTS = 64  # of a curve
SERVED = Numerics("reference", "bfloat16", "reference")  # packed caches, as sequences own them
MILLION = 1 << 20
# What an operation of a format costs, in operations of FP8.
FP4, FP8, BF16 = 0.5, 1.0, 2.0


@dataclass(frozen=True)
class Flops:
    """Of one decoded token, by part.

    linears: quantised matrices of attention, indexer and experts. small: router, stream mixing,
    compressors, index weights. head: logits. index: scores of all visible index keys. csa:
    attention to the window and the selected rows (V3.2: to those alone). hca: to the window and
    all rows.
    """

    linears: float
    small: float
    head: float
    index: float
    csa: float
    hca: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def in_fp8(self) -> float:
        """Operations of FP8 that cost as much: FP4 half, bfloat16 twice."""
        wide = self.small + self.head + self.csa + self.hca
        return FP8 * self.linears + FP4 * self.index + BF16 * wide


def flops(cfg: ModelConfig, context: int) -> Flops:
    """Of V4, without the MTP block."""
    ratios = cfg.compress_ratios[: cfg.num_layers]
    csa = sum(ratio == CSA for ratio in ratios)
    rows = {ratio: context // ratio for ratio in ratios if ratio}
    attention = (
        cfg.dim * cfg.q_rank
        + cfg.q_rank * cfg.num_heads * cfg.head_dim
        + cfg.dim * cfg.head_dim
        + cfg.o_rank * cfg.num_heads * cfg.head_dim
        + cfg.o_groups * cfg.o_rank * cfg.dim
    )
    experts = (cfg.experts_per_token + 1) * 3 * cfg.dim * cfg.expert_dim
    queries = csa * cfg.q_rank * cfg.index_heads * cfg.index_dim
    mixing = 2 * cfg.hc_mix_dim * cfg.hc_mult * cfg.dim
    compressors = 0
    for ratio in ratios:
        wide = 2 * cfg.head_dim * (2 if ratio == CSA else 1) if ratio else 0
        keys = 2 * cfg.index_dim * 2 + cfg.index_heads if ratio == CSA else 0
        compressors += (wide + keys) * cfg.dim
    per_row = 2 * 2 * cfg.num_heads * cfg.head_dim  # scores and sums
    selected = cfg.window + min(cfg.index_topk, rows.get(CSA, 0))
    index = csa * 2 * cfg.index_heads * cfg.index_dim * rows.get(CSA, 0)
    hca = sum(cfg.window + rows[ratio] for ratio in ratios if ratio not in (0, CSA))
    windows = sum(ratio == 0 for ratio in ratios) * cfg.window
    return Flops(
        linears=2.0 * (cfg.num_layers * (attention + experts) + queries),
        small=2.0 * (cfg.num_layers * (cfg.num_experts * cfg.dim + mixing) + compressors),
        head=2.0 * cfg.vocab_size * cfg.dim,
        index=float(index),
        csa=float(per_row * csa * selected),
        hca=float(per_row * (hca + windows)),
    )


@dataclass(frozen=True)
class V32:
    """DeepSeek-V3.2 as published: latent attention to selected tokens, nothing compressed."""

    layers: int = 61
    dense_layers: int = 3
    dim: int = 7168
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    rope_dim: int = 64
    head_dim: int = 128  # without rotary channels, of keys and of values
    experts: int = 256
    experts_per_token: int = 8
    expert_dim: int = 2048
    dense_dim: int = 18432
    vocab: int = 129280
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 2048

    @property
    def bytes_per_token(self) -> float:
        """FP8 latent with four float32 scales, bfloat16 rotary key, FP8 index key with a scale."""
        row = self.kv_rank + 4 * 4 + 2 * self.rope_dim
        return self.layers * (row + self.index_dim + 4)

    def flops(self, context: int) -> Flops:
        """Of one decoded token; keys and values stay latent (absorbed projections)."""
        queries = self.heads * (self.head_dim + self.rope_dim)
        attention = (
            self.dim * self.q_rank
            + self.q_rank * queries
            + self.dim * (self.kv_rank + self.rope_dim)
            + 2 * self.heads * self.head_dim * self.kv_rank
            + self.heads * self.head_dim * self.dim
        )
        indexer = self.q_rank * self.index_heads * self.index_dim
        small = self.dim * (self.index_dim + self.index_heads)
        sparse = self.layers - self.dense_layers
        experts = (self.experts_per_token + 1) * 3 * self.dim * self.expert_dim
        dense = self.dense_layers * 3 * self.dim * self.dense_dim
        selected = min(self.index_topk, context)
        width = 2 * self.kv_rank + self.rope_dim
        return Flops(
            linears=2.0 * (self.layers * (attention + indexer) + sparse * experts + dense),
            small=2.0 * (self.layers * small + sparse * self.experts * self.dim),
            head=2.0 * self.vocab * self.dim,
            index=2.0 * self.layers * self.index_heads * self.index_dim * context,
            csa=2.0 * self.layers * self.heads * selected * width,
            hca=0.0,
        )

    def in_fp8(self, context: int) -> float:
        """As `Flops.in_fp8`, with index scores in FP8, as V3.2 computes them."""
        found = self.flops(context)
        return found.in_fp8 + (FP8 - FP4) * found.index


@dataclass(frozen=True)
class CacheBytes:
    """per_token: what grows with the context. constant: rings of a sequence of any length."""

    per_token: float
    constant: int

    def at(self, context: int) -> float:
        return self.constant + self.per_token * context


def cache_bytes(cfg: ModelConfig, num: Numerics = SERVED) -> CacheBytes:
    """Of the arrays that a sequence really gets, measured at two lengths (nothing is allocated)."""

    def size(length: int) -> int:
        state = jax.eval_shape(partial(init_cache, cfg, 1, length, num))
        leaves: list[Any] = jax.tree.leaves(state)
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)

    long, short = cfg.max_len, cfg.max_len // 2
    per_token = (size(long) - size(short)) / (long - short)
    return CacheBytes(per_token, round(size(long) - per_token * long))


def report(contexts: Sequence[int] = (MILLION,)) -> dict[str, Any]:
    """Parameters, cache bytes and FLOPs of Flash and Pro, and their ratios to V3.2."""
    old = V32()
    found: dict[str, Any] = {
        "v3.2": {
            "bytes_per_token": float(old.bytes_per_token),
            "flops": {str(n): _shown(old.flops(n), old.in_fp8(n)) for n in contexts},
        }
    }
    for name in MODELS:
        cfg = PRESETS[name]()
        count, cache = count_params(cfg), cache_bytes(cfg)
        costs, ratios = {}, {}
        for n in contexts:
            cost = flops(cfg, n)
            costs[str(n)] = _shown(cost, cost.in_fp8)
            ratios[str(n)] = {
                "cache": cache.at(n) / (old.bytes_per_token * n),
                "flops": cost.total / old.flops(n).total,
                "flops_in_fp8": cost.in_fp8 / old.in_fp8(n),
            }
        found[name] = {
            "parameters": {"main": count.main, "active": count.active, "mtp": count.mtp},
            "bytes_per_token": cache.per_token,
            "bytes_constant": cache.constant,
            "flops": costs,
            "ratio_to_v3.2": ratios,
        }
    return found


def _shown(cost: Flops, in_fp8: float) -> dict[str, float]:
    return asdict(cost) | {"total": cost.total, "in_fp8": in_fp8}


def table(found: dict[str, Any]) -> str:
    """A report as text."""
    lines = []
    for name in MODELS:
        counts = found[name]["parameters"]
        lines.append(
            f"{name}: {counts['main'] / 1e9:,.1f} B parameters, {counts['active'] / 1e9:,.1f} B "
            f"active, MTP block {counts['mtp'] / 1e9:,.1f} B; cache "
            f"{found[name]['bytes_per_token']:,.1f} bytes a token and "
            f"{found[name]['bytes_constant'] / 1e6:,.1f} MB a sequence"
        )
    lines += [f"v3.2: cache {found['v3.2']['bytes_per_token']:,.0f} bytes a token", ""]
    columns = [field.name for field in fields(Flops)]
    head = [f"{'GFLOP per decoded token':<26}", *(f"{c:>9}" for c in (*columns, "total", "in FP8"))]
    lines.append("".join(head) + "   of V3.2: cache  FLOPs  in FP8")
    for context in found["v3.2"]["flops"]:
        for name in (*MODELS, "v3.2"):
            cost = found[name]["flops"][context]
            cells = "".join(f"{cost[c] / 1e9:>9.1f}" for c in (*columns, "total", "in_fp8"))
            line = f"{name:<9} at {int(context):>12,}  {cells}"
            if ratio := found[name].get("ratio_to_v3.2", {}).get(context):
                parts = ("cache", "flops", "flops_in_fp8")
                line += "          " + "".join(f"{ratio[p]:>7.1%}" for p in parts)
            lines.append(line)
    return "\n".join(lines)


def draw(path: str | Path) -> None:
    """FLOPs of a decoded token and cache of a sequence over the context, as in the V4 report.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("drawing needs matplotlib: pip install 'dsv4_jax[plot]'") from missing
    points = [MILLION * i // POINTS for i in range(1, POINTS + 1)]
    old, figure = V32(), Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    thousands = [n / 1024 for n in points]
    left.plot(thousands, [old.in_fp8(n) / 1e9 for n in points], label="V3.2")
    right.plot(thousands, [old.bytes_per_token * n / 2**30 for n in points], label="V3.2")
    for name in MODELS:
        cfg = PRESETS[name]()
        cache = cache_bytes(cfg)
        left.plot(thousands, [flops(cfg, n).in_fp8 / 1e9 for n in points], label=name)
        right.plot(thousands, [cache.at(n) / 2**30 for n in points], label=name)
    left.set(title="FLOPs per decoded token", ylabel="GFLOP, in operations of FP8")
    right.set(title="cache of one sequence", ylabel="GiB")
    for axes in (left, right):
        axes.set(xlabel="context, 1,024 tokens", ylim=0, xlim=0)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
