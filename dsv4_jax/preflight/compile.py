"""Compiles a program for a slice that need not exist, and takes its costs."""

from __future__ import annotations

import dataclasses
import re
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsv4_jax.config import ModelConfig
from dsv4_jax.parallel import check, for_length
from dsv4_jax.preflight import kept, measure, slices
from dsv4_jax.preflight.programs import PROGRAMS, Program, Sizes, rules_of
from dsv4_jax.preflight.traffic import sent_bytes
from pallas_kernels import aot, hlo
from sharding.mesh import MeshShape, generation, make_mesh, num_chips, topology_devices
from sharding.shards import Shards


@dataclass
class Report:
    """What the compiler said of one program. Bytes, FLOPs and seconds are of one device and step.

    cache: of a train step, the optimizer's slots.
    floor: seconds that each resource needs at least, whatever the program (`slices.estimate`).
    sent: bytes by kind of collective; formula: the same by purpose, from sizes alone.
    moved: bytes across HBM by kind of operation; flops: of products and kernels. Both are what the
    program was compiled for: kernels count room for the worst routing and all visible rows.
    kernels: of `flops`, those of each kernel in the compiler's text.
    reused: the compiler was not asked again; compile_s and host_gb are of when it was.
    """

    model: str
    topology: str
    chips: int
    mesh: str
    program: str
    batch: int
    context: int
    new_tokens: int
    hbm_bytes: int
    weights: int
    cache: int
    fits: bool = False
    reason: str = ""
    other_arguments: int = 0
    temporaries: int = 0
    code: int = 0
    moved: dict[str, int] = field(default_factory=dict)
    flops: float = 0.0
    kernels: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    formula: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    compile_s: float = 0.0
    host_gb: float = 0.0
    reused: bool = False

    @property
    def used(self) -> int:
        """Bytes of HBM that the program needs."""
        parts = (self.weights, self.cache, self.other_arguments, self.temporaries, self.code)
        return sum(parts)

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        return max(self.floor, key=lambda name: self.floor[name]) if self.floor else ""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the whole slice if it ran at its floor."""
        slowest = max(self.floor.values(), default=0.0)
        return self.batch * self.new_tokens / slowest if slowest else 0.0

    def to_json(self) -> dict[str, Any]:
        """All fields and what follows from them."""
        more = {"used": self.used, "limit": self.limit, "tokens_per_s": self.tokens_per_s}
        return asdict(self) | more


def run(
    name: str,
    cfg: ModelConfig,
    topology: str,
    program: str,
    sizes: Sizes,
    mesh: MeshShape | None = None,
    exchange: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    cache: Path | None = None,
) -> Report:
    """Compiles `program` for `topology` and reports; without `mesh`, for the best of a few.

    A program whose weights and caches alone exceed the memory is not compiled. cache: see
    `measure_program`.

    Raises:
        ValueError: unknown topology or program, or a mesh that does not fit it or does not divide.
    """
    rules, kind = rules_of(program), generation(topology)
    fresh = 1 if program == "decode" else sizes.chunk
    if mesh is None:
        mesh = _best(cfg, kind, topology, program, sizes)
        say(f"mesh {mesh}: the lowest floor of a few by size alone")
    devices = topology_devices(topology)
    shards = Shards(make_mesh(mesh, devices), rules, exchange=exchange)
    check(cfg, shards, sizes.batch)
    placed = for_length(shards, fresh)
    size = slices.estimate(cfg, kind, mesh, program, sizes)
    report = Report(
        name,
        topology,
        num_chips(topology),
        str(mesh),
        program,
        sizes.batch,
        sizes.context,
        fresh,
        aot.CHIPS[kind].hbm_bytes,
        size.weights,
        size.cache,
        floor={"compute": size.compute_s, "HBM": size.hbm_s, "ICI": size.ici_s},
        formula=sent_bytes(cfg, placed, sizes, fresh),
    )
    if report.used > report.hbm_bytes:
        report.reason = "weights and caches alone exceed the memory of a device"
        return report
    say(f"compiling for {len(devices)} devices")
    measure_program(report, PROGRAMS[program].build(cfg, sizes, shards), shards, kind, cache)
    return report


def _best(cfg: ModelConfig, kind: str, topology: str, program: str, sizes: Sizes) -> MeshShape:
    found = slices.ranked(cfg, kind, slices.devices_of(topology), program, sizes)
    if not found:
        raise ValueError(
            f"no mesh of {slices.devices_of(topology)} devices divides this model and a batch of "
            f"{sizes.batch}: name one with --mesh to see why"
        )
    return found[0].mesh


def measure_program(
    report: Report, program: Program, shards: Shards, kind: str, cache: Path | None = None
) -> None:
    """Compiles and fills in what the compiler says; a refusal becomes the report's reason.

    cache: a folder of answers (`kept`); a program that has one there is not compiled again.
    """
    assert isinstance(shards.mesh, Mesh)
    with jax.set_mesh(shards.mesh):  # lets Pallas see the kind of TPU
        began = time.monotonic()
        jitted = jax.jit(program.run, donate_argnums=program.donated)
        traced = jitted.trace(*program.arguments)
        report.flops = measure.flops(traced.jaxpr.jaxpr)
        answer = _answer(traced.lower(), report, began, cache)
    report.compile_s, report.host_gb = answer.compile_s, answer.host_gb
    report.reason = answer.refusal
    if answer.refusal:
        return
    report.fits = True
    report.other_arguments = max(answer.arguments - report.weights - report.cache, 0)
    report.temporaries = answer.temporaries + answer.fresh_outputs
    report.code = answer.code
    report.moved = dict(hlo.moved(answer.text))
    report.kernels = dict(hlo.kernel_flops(answer.text))
    report.sent = dict(measure.collectives(answer.text))
    report.floor["ICI"] = sum(report.sent.values()) / slices.SENDS[kind]


def _answer(lowered: Any, report: Report, began: float, cache: Path | None) -> kept.Answer:
    key = kept.key_of(lowered, report.topology) if cache else ""
    if cache and (found := kept.find(cache, key)):
        report.reused = True
        return found
    answer = _compile(lowered, began)
    if cache:
        kept.keep(cache, key, answer)
    return answer


def _compile(lowered: Any, began: float) -> kept.Answer:
    try:
        compiled, text = aot.compile_with_text(lowered)
    except jax.errors.JaxRuntimeError as refused:
        answer = kept.Answer(refusal=_reason(str(refused)))
    else:
        memory = compiled.memory_analysis()
        answer = kept.Answer(
            text,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return dataclasses.replace(answer, compile_s=time.monotonic() - began, host_gb=peak)


def _reason(text: str) -> str:
    """The compiler's refusal in one line."""
    if "exceeds" in text or "RESOURCE_EXHAUSTED" in text:
        needed = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
        needed = needed or re.search(r"\(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)", text)
        if needed:
            return f"needs {needed[1]} of {needed[2]} HBM"
    line = next((part for part in text.splitlines() if part.strip()), "unknown")
    return f"the compiler refused: {line[:300]}"
