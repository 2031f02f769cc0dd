"""Compiles kernels for TPU generations on a machine without a TPU: needs `libtpu`, nothing else.

In this process, after `prepare_environment()` (before JAX meets a device):

    report = compile_for("v5p", fn, [((8, 128), jnp.bfloat16), ...])

As a table of every case of an operation's `shapes.CASES` (or of those named) for all chips:

    python -m pallas_kernels.aot pallas_kernels.index_topk.shapes:build --table

In a child process with a timeout, because some bad kernels abort the process that compiles them:

    reports = compile_isolated("pallas_kernels.index_topk.shapes:build", ["flash_decode"], CHIPS)

where `build(name)` returns the function, its arguments as (shape, dtype) pairs and, if it may
overwrite some, their numbers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels import hlo

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not look for a real TPU
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # silences a warning; the topology decides
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
}


class Chip(NamedTuple):
    """One JAX device of a generation: a whole chip, but half a chip for TPU7x."""

    topology: str
    flops: float  # bfloat16 per second
    hbm_rate: float  # bytes per second
    vmem_bytes: int
    hbm_bytes: int


CHIPS = {
    "v5e": Chip("v5e:1x1", 197e12, 819e9, 128 << 20, int(15.75 * 2**30)),
    "v5p": Chip("v5p:1x1x1", 459e12, 2765e9, 64 << 20, int(95.73 * 2**30)),
    "v6e": Chip("v6e:1x1", 918e12, 1638e9, 128 << 20, int(31.24 * 2**30)),
    "TPU7x": Chip("TPU7x:1x1x1", 2307e12 / 2, 7380e9 / 2, 64 << 20, int(94.74 * 2**30)),
}

Args = Sequence[tuple[tuple[int, ...], Any]]


class Report(NamedTuple):
    """What the compiler said. Byte counts are of one device."""

    case: str
    chip: str
    error: str | None = None
    argument_bytes: int = 0
    output_bytes: int = 0
    temp_bytes: int = 0
    vmem_bytes: int = 0  # scoped VMEM of the largest kernel
    flops: float = 0.0  # as the kernels' cost estimates say
    hbm_bytes: float = 0.0  # of the whole program, see `hlo.moved`
    copies: tuple[str, ...] = ()  # HLO copies of a mebibyte or more
    smem_bytes: int = 0  # prefetched scalars and blocks of the largest kernel
    moved: dict[str, int] = {}  # hbm_bytes by kernel and kind of operation
    buffers: tuple[str, ...] = ()  # the largest arrays in HBM that are not passed in or through

    def floor_us(self) -> float:
        """No run can be faster: the larger of compute and memory time, microseconds."""
        chip = CHIPS[self.chip]
        return 1e6 * max(self.flops / chip.flops, self.hbm_bytes / chip.hbm_rate)


def prepare_environment() -> None:
    """Settings that libtpu reads when it is loaded; variables already set win."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def skip_reason() -> str | None:
    """Why this machine cannot compile for TPUs, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'dsv4_jax[tpu]'"
    return None


def single_device_mesh(chip: str) -> Any:
    """A mesh of one described (not present) device of `chip`."""
    from jax.experimental import topologies
    from jax.sharding import Mesh

    devices = topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices
    return Mesh(np.array(devices[:1]), ("x",))


def compile_for(
    chip: str, fn: Callable[..., Any], args: Args, case: str = "", donate: tuple[int, ...] = ()
) -> Report:
    """Compiles `fn` at shapes `args`; what the compiler refuses raises."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = single_device_mesh(chip)
    here = NamedSharding(mesh, PartitionSpec())
    avals = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in args]
    with jax.set_mesh(mesh):  # lets Pallas see the kind of TPU
        traced = jax.jit(fn, donate_argnums=donate).trace(*avals)
        compiled, text = compile_with_text(traced.lower())
    memory = compiled.memory_analysis()
    assert memory is not None
    moved = hlo.moved(text)
    return Report(
        case,
        chip,
        None,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        scoped_vmem(text),
        sum(times * estimate.flops for times, estimate in kernel_costs(traced.jaxpr.jaxpr)),
        float(moved.total()),
        tuple(large_copies(text)),
        max(smem(traced.jaxpr.jaxpr), default=0),
        dict(moved),
        tuple(hlo.largest(text, 20)),
    )


def compile_with_text(lowered: Any) -> tuple[Any, str]:
    """The compiled program and its HLO text, from the compiler's own dump.

    `as_text()` of a program whose gathers moved to the SparseCore fails: RET_CHECK … async-update.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=dump)
        files = sorted(Path(folder).glob("*after_codegen.txt"))
        return compiled, files[-1].read_text() if files else compiled.as_text() or ""


def _kernels(jaxpr: Any, times: int = 1) -> Iterator[tuple[int, Any]]:
    """Every kernel call, and how often it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield times, equation
            continue
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from _kernels(part, inner)


def kernel_costs(jaxpr: Any) -> Iterator[tuple[int, Any]]:
    """The cost estimates of all kernels, and how often each runs."""
    for times, equation in _kernels(jaxpr):
        if (estimate := equation.params["cost_estimate"]) is not None:
            yield times, estimate


def smem(jaxpr: Any) -> Iterator[int]:
    """SMEM bytes of each kernel: scalars it prefetches, and blocks, of which there are two."""
    for _, equation in _kernels(jaxpr):
        grid = equation.params["grid_mapping"]
        scalars = grid.num_dynamic_grid_bounds + grid.num_index_operands
        total = sum(v.aval.size * v.aval.dtype.itemsize for v in equation.invars[:scalars])
        for block in grid.block_mappings:
            ref = block.transformed_block_aval
            if str(ref.memory_space) == "smem":
                total += 2 * ref.size * ref.dtype.itemsize
        yield total


def scoped_vmem(text: str) -> int:
    """Largest VMEM scope of a kernel in an optimised HLO text, bytes."""
    used = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', text)
    sizes = [int(n) for part in used for n in re.findall(r'"size":"(\d+)"', part)]
    return max(sizes, default=0)


def large_copies(text: str, at_least: int = 1 << 20) -> Iterable[str]:
    """Shapes of the HLO copies of `at_least` bytes: relayouts that a good kernel does not need."""
    for kind, shape in re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* copy(?:-start)?\(", text):
        bits = re.search(r"\d+", kind)
        size = int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
        if size * int(bits[0] if bits else 8) // 8 >= at_least:
            yield f"{kind}[{shape}]"


def compile_isolated(
    target: str, cases: Sequence[str], chips: Iterable[str], timeout_s: float = 300
) -> list[Report]:
    """Reports of every case on every chip, from a child process; failures are reports too."""
    wanted = [(case, chip) for chip in chips for case in cases]
    command = [sys.executable, "-m", "pallas_kernels.aot", target]
    command += [f"{case}@{chip}" for case, chip in wanted]
    environment = {**os.environ, **ENVIRONMENT}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
        lines, end = done.stdout, f"compiler process ended with {done.returncode}: {done.stderr}"
    except subprocess.TimeoutExpired as late:
        raw = late.stdout or b""
        lines = raw.decode() if isinstance(raw, bytes) else raw
        end = f"no answer after {timeout_s} s"
    found = {}
    for line in lines.splitlines():
        if line.startswith("{"):
            fields = json.loads(line)
            for name in ("copies", "buffers"):
                fields[name] = tuple(fields[name])
            report = Report(**fields)
            found[report.case, report.chip] = report
    lost = f"no report; {end[-2000:]}"
    return [found.get(pair, Report(*pair, error=lost)) for pair in wanted]


def table(reports: Iterable[Report]) -> str:
    """Markdown: one line per case, VMEM and floor of every chip, or why it does not compile."""
    lines = [
        "| case | arguments MiB | HBM MiB moved | GFLOP | " + " | ".join(CHIPS) + " |",
        "|---" * (4 + len(CHIPS)) + "|",
    ]
    by_case: dict[str, dict[str, Report]] = {}
    for report in reports:
        by_case.setdefault(report.case, {})[report.chip] = report
    for case, row in by_case.items():
        good = next((r for r in row.values() if r.error is None), None)
        sizes = ["-"] * 3
        if good:
            mib = [n / 2**20 for n in (good.argument_bytes, good.hbm_bytes)]
            sizes = [f"{n:,.1f}" for n in (*mib, good.flops / 1e9)]
        cells = [_cell(row[chip]) if chip in row else "-" for chip in CHIPS]
        lines.append(f"| {case} | {' | '.join([*sizes, *cells])} |")
    return "\n".join(lines)


def _cell(report: Report) -> str:
    if report.error is not None:
        out_of_memory = "HbmOom" in report.error
        return "exceeds HBM" if out_of_memory else f"refused: {report.error[:60]}"
    copies = f", copies {' '.join(report.copies)}" if report.copies else ""
    return f"{report.vmem_bytes / 2**20:.1f} MiB, {report.floor_us():,.1f} µs{copies}"


def main(argv: Sequence[str] | None = None) -> int:
    """The child process: one JSON line per case and chip; with --table, its parent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="module:function that builds a case by its name")
    parser.add_argument("pairs", nargs="*", help="case@chip; with --table, case")
    parser.add_argument("--table", action="store_true", help="compile for all chips, print a table")
    options = parser.parse_intermixed_args(argv)
    prepare_environment()
    module, name = options.target.split(":")
    if options.table:
        cases = options.pairs or list(importlib.import_module(module).CASES)
        print(table(compile_isolated(options.target, cases, CHIPS, 3600)))
        return 0
    build = getattr(importlib.import_module(module), name)
    for pair in options.pairs:
        case, chip = pair.split("@")
        try:
            fn, args, *donate = build(case)
            report = compile_for(chip, fn, args, case, *donate)
        except Exception as refused:  # the compiler's refusals have many types
            report = Report(case, chip, f"{type(refused).__name__}: {refused}"[:3000])
        print(json.dumps(report._asdict()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
