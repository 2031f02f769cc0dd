"""FLOPs of the decoding step as it is compiled for a TPU, beside what the formula says it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from dsv4_jax.accounting import MILLION, V32, flops
from dsv4_jax.config import ModelConfig
from dsv4_jax.preflight.command import compile_one
from dsv4_jax.preflight.programs import Sizes
from dsv4_jax.presets import PRESETS
from sharding.mesh import MeshShape

# Slices that hold a model and, on every device, one sequence of a million tokens.
SLICES = {"v4-flash": ("v5p:2x2x1", "expert=4"), "v4-pro": ("v5p:2x2x4", "expert=16")}
KERNELS = {
    "sparse_attention": "attention",
    "index_topk_mask": "index",
    "grouped_swiglu": "experts",
    "grouped_combine": "experts",
}
PARTS: tuple[str, ...] = ("attention", "index", "experts", "other")


class DecodeCost(NamedTuple):
    """FLOPs of one decoded token behind `context` others, by part and in all."""

    name: str
    where: str
    context: int
    formula: dict[str, float]
    compiled: dict[str, float]

    def to_json(self) -> dict[str, object]:
        """All fields, sums, and ratios to V3.2's formula."""
        old = V32().flops(self.context).total
        sums = {"formula": sum(self.formula.values()), "compiled": sum(self.compiled.values())}
        ratios = {name: total / old for name, total in sums.items()}
        return self._asdict() | {"total": sums, "ratio_to_v3.2": ratios}


def formula_parts(cfg: ModelConfig, context: int) -> dict[str, float]:
    """`accounting.flops` in the parts that kernels have. experts: the routed ones."""
    cost = flops(cfg, context)
    experts = 6.0 * cfg.num_layers * cfg.experts_per_token * cfg.dim * cfg.expert_dim
    known = {"attention": cost.csa + cost.hca, "index": cost.index, "experts": experts}
    return known | {"other": cost.total - sum(known.values())}


def compiled_parts(total: float, kernels: Mapping[str, float]) -> dict[str, float]:
    """FLOPs of a program and of its kernels, in the same parts."""
    parts: dict[str, float] = {part: 0.0 for part in PARTS}
    for name, count in kernels.items():
        parts[KERNELS.get(name, "other")] += count
    parts["other"] += total - sum(kernels.values())
    return parts


def compiled_step(name: str, say: Callable[[str], None]) -> DecodeCost:
    """Compiles the decoding step of a released model; takes minutes.

    Raises:
        ValueError: the compiler refused.
    """
    cfg, (topology, mesh) = PRESETS[name](), SLICES[name]
    shape = MeshShape.parse(mesh)
    sizes = Sizes(shape.num_devices, MILLION, 1)
    report = compile_one(name, cfg, topology, "decode", sizes, shape, say=say)
    if not report.fits:
        raise ValueError(f"{name} on {topology}: {report.reason}")
    compiled = compiled_parts(report.flops, report.kernels)
    return DecodeCost(name, f"{topology}, {mesh}", MILLION, formula_parts(cfg, MILLION), compiled)


def table(cost: DecodeCost) -> str:
    """As text."""
    shown = cost.to_json()
    lines = [
        f"{cost.name}, a decoded token behind {cost.context:,}, compiled for {cost.where}",
        f"{'GFLOP':<12}{'formula':>10}{'compiled':>10}",
    ]
    for part in PARTS:
        lines.append(
            f"{part:<12}{cost.formula[part] / 1e9:>10.1f}{cost.compiled[part] / 1e9:>10.1f}"
        )
    for label, unit, form in (("total", 1e9, ".1f"), ("ratio_to_v3.2", 1.0, ".1%")):
        pair: dict[str, float] = shown[label]  # type: ignore[assignment]
        cells = "".join(f"{pair[kind] / unit:>10{form}}" for kind in ("formula", "compiled"))
        lines.append(f"{label.replace('ratio_to_v3.2', '÷ V3.2'):<12}{cells}")
    return "\n".join(lines)
