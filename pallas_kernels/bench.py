"""What kernels cost, as the TPU compiler and their block sizes say: no TPU needed, nothing timed.

Every case of every operation is compiled for every chip in a child process. A row says: VMEM of
the largest kernel, SMEM, bytes that cross HBM, FLOPs, the floor time and what sets it, and bytes
moved ÷ unavoidable bytes (every operand in use and every result once).
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from pallas_kernels import aot

HEADER = (
    "| case | chip | VMEM MiB | SMEM KiB | MB moved | ÷ unavoidable | GFLOP | floor µs | set by |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
FOLDED = ("smem_bytes", "moved_bytes", "unavoidable_bytes", "flops")


class Op(NamedTuple):
    """Where an operation's cases are. stages: parts of it that are compiled one by one."""

    module: str
    cases: str = "CASES"
    stages: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Every case, or every stage of every case."""
        names = list(getattr(importlib.import_module(self.module), self.cases))
        return [f"{n}:{s}" for n in names for s in self.stages] if self.stages else names

    def representative(self) -> list[str]:
        """The cases that tests compile too."""
        kept = importlib.import_module(self.module).REPRESENTATIVE
        return [name for name in self.names() if name.split(":")[0] in kept]

    def unavoidable(self, name: str) -> int:
        return importlib.import_module(self.module).unavoidable_bytes(name)


OPS = {
    "block_matmul": Op("pallas_kernels.block_matmul.shapes", "FULL"),
    "grouped_matmul": Op("pallas_kernels.grouped_matmul.shapes", "FULL", ("up", "down")),
    "mhc": Op("pallas_kernels.mhc.shapes", "FULL", ("mix", "spread")),
    "query_heads": Op("pallas_kernels.query_heads.shapes"),
    "compress_step": Op("pallas_kernels.compress_step.shapes"),
    "compress_chunk": Op("pallas_kernels.compress_chunk.shapes"),
    "index_topk": Op("pallas_kernels.index_topk.shapes"),
    "sparse_attention": Op("pallas_kernels.sparse_attention.shapes"),
    "row_update": Op("pallas_kernels.row_update.shapes"),
}


def select(ops: dict[str, Op], op: str, pattern: str | None) -> list[str]:
    """Cases of an operation: those that match, or the representative ones without a pattern.

    Raises:
        ValueError: there is no such operation.
    """
    if op not in ops:
        raise ValueError(f"{op!r} is no operation; there are {', '.join(ops)}")
    if pattern is None:
        return ops[op].representative()
    return fnmatch.filter(ops[op].names(), pattern)


def rows(
    ops: dict[str, Op],
    wanted: Sequence[str],
    chips: Sequence[str],
    pattern: str | None = None,
    timeout_s: float = 3600,
) -> Iterator[dict[str, Any]]:
    """One result per case and chip, as soon as its operation is compiled for the chip.

    Raises, before anything is compiled:
        ValueError: unknown operation or chip, no such case, or libtpu is missing.
    """
    if reason := aot.skip_reason():
        raise ValueError(reason)
    for chip in chips:
        if chip not in aot.CHIPS:
            raise ValueError(f"{chip!r} is no chip; there are {', '.join(aot.CHIPS)}")
    cases = {op: select(ops, op, pattern) for op in wanted}
    if not any(cases.values()):
        raise ValueError(f"no case of {', '.join(wanted)} is named like {pattern!r}")

    def compiled() -> Iterator[dict[str, Any]]:
        for op, names in cases.items():
            for chip in chips if names else ():
                target = f"{ops[op].module}:build"
                for report in aot.compile_isolated(target, names, [chip], timeout_s):
                    yield _row(op, report, ops[op].unavoidable)

    return compiled()


def _row(op: str, report: aot.Report, unavoidable: Callable[[str], int]) -> dict[str, Any]:
    row: dict[str, Any] = {"op": op, "case": report.case, "chip": report.chip}
    if report.error is not None:
        return row | {"error": report.error}
    chip = aot.CHIPS[report.chip]
    compute, memory = report.flops / chip.flops, report.hbm_bytes / chip.hbm_rate
    return row | {
        "vmem_bytes": report.vmem_bytes,
        "smem_bytes": report.smem_bytes,
        "moved_bytes": int(report.hbm_bytes),
        "unavoidable_bytes": unavoidable(report.case),
        "flops": report.flops,
        "floor_us": 1e6 * max(compute, memory),
        "limit": "compute" if compute > memory else "HBM",
        "argument_bytes": report.argument_bytes,
        "temp_bytes": report.temp_bytes,
        "copies": list(report.copies),
        "moved": report.moved,
        "buffers": list(report.buffers),
    }


def _failure(row: dict[str, Any]) -> str:
    return "exceeds HBM" if "HbmOom" in row["error"] else row["error"].splitlines()[0][:120]


def fold(rows: Iterable[dict[str, Any]]) -> str:
    """A table with one line per case: per chip VMEM (MiB), floor time, and what sets it.

    SMEM, bytes and FLOPs are the largest of all chips.
    """
    by_case: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault((row["op"], row["case"]), {})[row["chip"]] = row
    chips = list(dict.fromkeys(chip for row in by_case.values() for chip in row))
    head = ["case", "SMEM KiB", "MB moved", "÷ unavoidable", "GFLOP", *chips]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (op, case), found in by_case.items():
        good = [row for row in found.values() if "error" not in row]
        most = {name: max((row[name] for row in good), default=0) for name in FOLDED}
        ratio = most["moved_bytes"] / (most["unavoidable_bytes"] or 1)
        cells = [f"{op}: {case}", f"{most['smem_bytes'] / 2**10:.1f}"]
        cells += [f"{most['moved_bytes'] / 1e6:.4g}", f"{ratio:.2f}", f"{most['flops'] / 1e9:.4g}"]
        cells += [_chip_cell(found[chip]) if chip in found else "-" for chip in chips]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _chip_cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return _failure(row)
    return f"{row['vmem_bytes'] / 2**20:.1f}, {row['floor_us']:.4g} µs {row['limit']}"


def line(row: dict[str, Any]) -> str:
    """A row of the table under `HEADER`."""
    if "error" in row:
        return f"| {row['case']} | {row['chip']} | {_failure(row)} | | | | | | |"
    cells = [
        f"{row['vmem_bytes'] / 2**20:.1f}",
        f"{row['smem_bytes'] / 2**10:.1f}",
        f"{row['moved_bytes'] / 1e6:.4g}",
        f"{row['moved_bytes'] / row['unavoidable_bytes']:.2f}",
        f"{row['flops'] / 1e9:.4g}",
        f"{row['floor_us']:.4g}",
        row["limit"],
    ]
    return f"| {row['case']} | {row['chip']} | {' | '.join(cells)} |"
