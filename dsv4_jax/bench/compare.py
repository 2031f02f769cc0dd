"""Runs cases in child processes, ours and a peer's in turn, and makes the table."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsv4_jax.bench.case import MARK, Case

PEER_SCRIPT = Path(__file__).with_name("peer.py")
PEER_CHUNKS = (0, 512)  # the peer's prefill is measured both ways, the faster one counts
PEER_AT_ONCE = 4096  # longer prompts only in chunks: in one piece they take 9 GB, and longer
# Keeps freed buffers in the process: without it a third of torch's time is page faults.
# Huge pages: both read weights faster from them, where the system has them.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
JAX_FLAGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
# Binds this process to a core, then becomes the command: forking is not safe beside JAX's threads.
ON_CORE = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.execv(sys.argv[2], sys.argv[2:])
"""


class BenchError(ValueError):
    """A case that could not be measured."""


def cases(lengths: Iterable[int], decode_lengths: Iterable[int], batches: Iterable[int]):
    """Prefill of every length, then decode of every length and batch."""
    found = [Case("prefill", length, reps=2) for length in lengths]
    return found + [Case("decode", n, b) for n in decode_lengths for b in batches]


def run_ours(config: str, case: Case) -> dict[str, float]:
    """Our figures of a case, on one core."""
    command = [sys.executable, "-m", "dsv4_jax.bench.ours", config, case.to_json()]
    return _run(command, JAX_FLAGS)


def run_peer(python: str, config: str, case: Case) -> dict[str, float]:
    """The peer's figures of a case, on one core; the best of its ways to prefill."""
    found = []
    for chunk in _peer_chunks(case):
        one = dataclasses.replace(case, chunk=chunk)
        found.append(_run([python, str(PEER_SCRIPT), config, one.to_json()], {}))
    return max(found, key=lambda figures: figures["tokens_per_cpu_s"])


def _peer_chunks(case: Case) -> list[int]:
    """Chunks to measure the peer's prefill with; of a decode case they do not matter."""
    if case.kind != "prefill":
        return [0]
    fits = [chunk for chunk in PEER_CHUNKS if chunk < case.length]
    return [chunk for chunk in fits if chunk or case.length <= PEER_AT_ONCE]


def _run(command: list[str], extra: dict[str, str]) -> dict[str, float]:
    environment = os.environ | MALLOC | extra
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    core = str(max(os.sched_getaffinity(0)))
    launch = [sys.executable, "-c", ON_CORE, core]
    done = subprocess.run(launch + command, capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise BenchError(f"{' '.join(command[:3])} failed: {reason}")


def compare(config: str, wanted: list[Case], peer: str | None) -> Iterator[dict[str, Any]]:
    """Rows of the table: theirs, then ours, case by case."""
    for case in wanted:
        row: dict[str, Any] = {"case": case.name}
        if peer:
            row["peer"] = run_peer(peer, config, case)
        row["ours"] = run_ours(config, case)
        if peer:
            row["ratio"] = row["ours"]["tokens_per_cpu_s"] / row["peer"]["tokens_per_cpu_s"]
        yield row


def header(has_peer: bool) -> str:
    """Head of the Markdown table."""
    names = ["case", "ours tok/CPU-s", "ours peak GB"]
    if has_peer:
        names += ["peer tok/CPU-s", "peer peak GB", "ours ÷ peer"]
    return "| " + " | ".join(names) + " |\n| --- |" + " ---: |" * (len(names) - 1)


def line(row: dict[str, Any]) -> str:
    """One row of the Markdown table."""
    cells = [row["case"], *_cells(row["ours"])]
    if "peer" in row:
        cells += [*_cells(row["peer"]), f"{row['ratio']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def _cells(figures: dict[str, float]) -> list[str]:
    return [f"{figures['tokens_per_cpu_s']:.1f}", f"{figures['peak_gb']:.2f}"]
