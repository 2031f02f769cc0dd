"""Curves of runs as one SVG file, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dsv4_jax.training.metrics import read

PANELS = ("loss", "mtp", "indexer", "captured", "recall", "load", "bias", "update_rms", "grad_norm")
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
WIDTH, HEIGHT, MARGIN, COLUMNS = 360, 220, 44, 3
LOG = {"grad_norm"}


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential mean over about `span` steps, without a bias towards the start."""
    mean = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            mean += (value - mean) / min(weight + 1, span)
            weight += 1
        result.append(mean)
    return result


def draw(runs: dict[str, str | Path], span: int = 10, panels: Sequence[str] | None = None) -> str:
    """SVG text: one panel per metric, one line per run (label: directory).

    panels: metrics; by default those of `PANELS` that are reported.

    Raises:
        ValueError: a run has no metrics, or none of them has the panel's metric.
    """
    lines = {label: read(folder) for label, folder in runs.items()}
    for label, found in lines.items():
        if not found:
            raise ValueError(f"{runs[label]} has no metrics")
    if panels is None:
        reported = {name for found in lines.values() for line in found for name in line}
        panels = [name for name in PANELS if name in reported]
    rows = -(-len(panels) // COLUMNS)
    size = (COLUMNS * WIDTH, rows * HEIGHT + 24)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
    ]
    for i, label in enumerate(lines):
        parts.append(
            f'<text x="{MARGIN + 150 * i}" y="16" fill="{COLORS[i % len(COLORS)]}">'
            f"{escape(label)}</text>"
        )
    for number, name in enumerate(panels):
        corner = (number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT + 24)
        parts += _panel(name, lines, corner, span)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    name: str, lines: dict[str, list[dict[str, Any]]], corner: tuple[int, int], span: int
) -> list[str]:
    curves = []
    for found in lines.values():
        kept = [line for line in found if name in line]
        values = smooth([line[name] for line in kept], span)
        if name in LOG:
            values = [math.log10(max(v, 1e-9)) for v in values]
        curves.append(([line["tokens"] for line in kept], values))
    every = [v for _, values in curves for v in values]
    if not every:
        raise ValueError(f"no run reports {name!r}")
    low, high = min(every), max(every)
    high = high if high > low else low + 1
    last = max(x for xs, _ in curves for x in xs) or 1
    left, top = corner[0] + MARGIN, corner[1] + 18
    width, height = WIDTH - MARGIN - 12, HEIGHT - 48

    def label(value: float) -> str:
        return f"{10**value:.3g}" if name in LOG else f"{value:.3g}"

    parts = [
        f'<text x="{left}" y="{top - 5}" font-weight="bold">{escape(name)}</text>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>',
        f'<text x="{left - 4}" y="{top + 9}" text-anchor="end">{label(high)}</text>',
        f'<text x="{left - 4}" y="{top + height}" text-anchor="end">{label(low)}</text>',
        f'<text x="{left + width}" y="{top + height + 14}" text-anchor="end">'
        f"{last:,} tokens</text>",
    ]
    for i, (xs, ys) in enumerate(curves):
        points = " ".join(
            f"{left + width * x / last:.1f},{top + height * (high - y) / (high - low):.1f}"
            for x, y in zip(xs, ys, strict=True)
        )
        color = COLORS[i % len(COLORS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
    return parts
