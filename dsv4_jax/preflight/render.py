"""Reports as text, as one HTML page with bars, and as the table of placements."""

from __future__ import annotations

import html
from collections.abc import Iterable

from dsv4_jax.config import ModelConfig
from dsv4_jax.placement import Row, explain
from dsv4_jax.preflight.compile import Report
from sharding.shards import Shards

COLOURS = ("#3b6fb6", "#4fa37a", "#b9a13c", "#c4704b", "#7c6bb0", "#888888")
HEAD = ("parameter", "dims", "shape", "dtype", "placement", "MiB/device", "of MiB")
WIDTH, HEIGHT = 640, 26


def parts_of(report: Report) -> dict[str, int]:
    """Bytes of HBM by kind."""
    return {
        "weights": report.weights,
        "optimizer slots" if report.program == "train" else "cache": report.cache,
        "padding and other arguments": report.other_arguments,
        "temporaries and results": report.temporaries,
        "code": report.code,
    }


def text(report: Report) -> str:
    """A report for the terminal."""
    lines = [
        f"{report.model} {report.program} on {report.topology} ({report.chips} chips), "
        f"mesh {report.mesh}",
        f"batch {report.batch}, {report.new_tokens} new tokens each, room for {report.context}",
        "",
        f"fits: {'yes' if report.fits else 'NO'}{': ' + report.reason if report.reason else ''}",
        f"bytes per device, GiB of {report.hbm_bytes / 2**30:.2f}:",
    ]
    lines += [f"  {name:<28} {size / 2**30:8.3f}" for name, size in parts_of(report).items()]
    lines.append(f"  {'all':<28} {report.used / 2**30:8.3f}")
    if report.fits:
        lines += ["", "per device and step, at most:", f"  {report.flops / 1e9:,.1f} GFLOP"]
        lines.append(f"  {sum(report.moved.values()) / 1e9:.3f} GB moved across HBM")
        for kind, size in sorted(report.sent.items()):
            lines.append(f"  {kind:<28} {size / 1e6:10.3f} MB sent")
        if report.formula:
            formula = sum(report.formula.values())
            lines.append(f"  {'by the formula':<28} {formula / 1e6:10.3f} MB sent")
    if report.floor:
        lines += ["", "floor, ms:"]
        for name, seconds in report.floor.items():
            mark = "  <- limits" if name == report.limit else ""
            lines.append(f"  {name:<28} {1e3 * seconds:8.3f}{mark}")
        lines.append(f"  at most {report.tokens_per_s:,.0f} tokens/s on the whole slice")
    when = "compiled earlier" if report.reused else "compiled"
    lines.append(f"{when} in {report.compile_s:.0f} s, {report.host_gb:.1f} GB of host memory")
    return "\n".join(lines)


def placements(cfg: ModelConfig, shards: Shards) -> str:
    """Every parameter: its dimensions, where they go, bytes on each device."""
    rows = list(explain(cfg, shards))
    total = sum(row.device_bytes for row in rows)
    lines = columns([HEAD, *(cells(row) for row in rows)])
    return f"{lines}\n{total / 2**30:.3f} GiB of weights on each device"


def cells(row: Row) -> tuple[str, ...]:
    """A stored array as text."""
    where = ", ".join("-" if e is None else str(e) for e in row.placement)
    sizes = [f"{size / 2**20:,.3f}" for size in (row.device_bytes, row.total_bytes)]
    return (row.name, row.dims, "x".join(map(str, row.shape)), row.dtype, where, *sizes)


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells below each other."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines)


def page(reports: Iterable[Report]) -> str:
    """One HTML page, nothing loaded from elsewhere."""
    body = "\n".join(_section(report) for report in reports)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Preflight</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; color: #222 }}
table {{ border-collapse: collapse; margin: .5rem 0 1rem }}
td {{ padding: .1rem .8rem .1rem 0; font-variant-numeric: tabular-nums }}
td + td {{ text-align: right }} h2 {{ margin-top: 2.5rem }}
svg {{ display: block; margin: .4rem 0 }}
</style></head><body><h1>Preflight</h1>
{body}
</body></html>
"""


def _section(report: Report) -> str:
    title = f"{report.model}, {report.program}, {report.topology}, mesh {report.mesh}"
    about = (
        f"batch {report.batch}, {report.new_tokens} new tokens each, room for {report.context}; "
        f"{'fits' if report.fits else 'does not fit: ' + report.reason}"
    )
    memory = {name: size / 2**30 for name, size in parts_of(report).items()}
    floor = {name: 1e3 * seconds for name, seconds in report.floor.items()}
    sections = [
        f"<h2>{html.escape(title)}</h2><p>{html.escape(about)}</p>",
        f"<h3>Memory of a device, {report.hbm_bytes / 2**30:.1f} GiB</h3>",
        _stacked(memory, report.hbm_bytes / 2**30),
        _table(memory, "GiB"),
    ]
    if floor:
        sections += ["<h3>Floor of a step by resource</h3>", _bars(floor), _table(floor, "ms")]
        sent = {name: size / 1e6 for name, size in report.sent.items()}
        sections += ["<h3>Sent by a device in a step</h3>", _table(sent, "MB")]
    return "\n".join(sections)


def _svg(inner: str, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" role="img">'
        f"{inner}</svg>"
    )


def _rect(x: float, y: float, width: float, colour: str, label: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{HEIGHT - 6}" '
        f'fill="{colour}"><title>{html.escape(label)}</title></rect>'
    )


def _stacked(values: dict[str, float], limit: float) -> str:
    """One bar of all parts, and a line at the limit."""
    scale = WIDTH / (1.02 * max(limit, sum(values.values())))
    x, parts = 0.0, []
    for (name, value), colour in zip(values.items(), COLOURS, strict=False):
        parts.append(_rect(x, 3, value * scale, colour, f"{name}: {value:.3f}"))
        x += value * scale
    edge = limit * scale
    parts.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="{HEIGHT}" stroke="#c00"/>')
    return _svg("".join(parts), HEIGHT)


def _bars(values: dict[str, float]) -> str:
    scale = WIDTH / (max(values.values()) or 1.0)
    parts = [
        _rect(0, n * HEIGHT, value * scale, COLOURS[n % len(COLOURS)], f"{name}: {value:.4f}")
        for n, (name, value) in enumerate(values.items())
    ]
    return _svg("".join(parts), HEIGHT * len(values))


def _table(values: dict[str, float], unit: str) -> str:
    rows = []
    for n, (name, value) in enumerate(values.items()):
        colour = COLOURS[n % len(COLOURS)]
        label = f'<span style="color:{colour}">&#9632;</span> {html.escape(name)}'
        rows.append(f"<tr><td>{label}</td><td>{value:,.3f} {unit}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
