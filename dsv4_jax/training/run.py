"""A run as data: model, phases, rates, precision, data and bookkeeping in one frozen object."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv4_jax.config import ModelConfig
from dsv4_jax.training.data.source import Source
from dsv4_jax.training.distill import Distill
from dsv4_jax.training.grpo import Grpo
from dsv4_jax.training.guard import GuardConfig
from dsv4_jax.training.init import InitConfig
from dsv4_jax.training.leaves import SIDES
from dsv4_jax.training.optimizer import OptimizerConfig
from dsv4_jax.training.precision import Precision
from dsv4_jax.training.program import Program
from dsv4_jax.training.schedules import Phase, Plan, Schedule
from sharding.shards import SINGLE, Shards

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on.

    data: packed datasets by the names phases use, each with its sources.
    precision: of phases as a rule; qat: of phases with `quantise`.
    micro_rows: rows that one device differentiates at once; batches are cut into as many
        microbatches as needed.
    mesh: devices by axis that share a step, such as "fsdp=4,expert=2"; "": one. scan: stack
        repeating layers (smaller programs; on CPU unrolled ones run faster). remat: see `Program`.
    checkpoint_every: steps between checkpoints, besides those at phase borders and the end.
    keep: newest checkpoints that are kept. log_every: steps between lines on the console.
    objective: what is learnt from text: `Grpo(…)` from rollouts and their rewards, `Distill(…)`
        from other models; None: to predict the next token.
    start_from: whose parameters begin this run, instead of random ones: a run's directory (the
        newest) or a converted checkpoint.

    Raises:
        ValueError: parts contradict each other.
    """

    name: str
    model: ModelConfig
    phases: tuple[Phase, ...]
    data: dict[str, tuple[Source, ...]]
    schedule: Schedule = Schedule()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = Precision()
    qat: Precision = Precision(experts="fp4", dense="fp8", activations=True, index=True, kv=True)
    objective: Grpo | Distill | None = None
    init: InitConfig = InitConfig()
    guard: GuardConfig = GuardConfig()
    micro_rows: int = 1 << 30
    mesh: str = ""
    scan: bool = True
    remat: str = "none"
    seed: int = 0
    checkpoint_every: int = 500
    keep: int = 3
    log_every: int = 10
    start_from: str | None = None

    def __post_init__(self) -> None:
        for phase in self.phases:
            if phase.data not in self.data:
                raise ValueError(
                    f"phase {phase.name!r} reads data {phase.data!r}, which is not given"
                )
            needs_mtp = phase.learn == "mtp" or phase.drafts > 1
            if needs_mtp and not self.model.num_mtp_layers:
                raise ValueError(
                    f"phase {phase.name!r}: learn='mtp' and drafts need a model with an MTP block"
                )
            if phase.seq_len > self.model.max_len:
                raise ValueError(
                    f"phase {phase.name!r}: seq_len={phase.seq_len} exceeds the model's "
                    f"max_len={self.model.max_len}"
                )
        for name in ("micro_rows", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        self._check_objective()
        if self.model.dense_format or self.model.expert_format:
            object.__setattr__(
                self, "model", self.model.replace(dense_format=None, expert_format=None)
            )

    def _check_objective(self) -> None:
        if self.objective is None:
            return
        for phase in self.phases:
            if phase.learn in ("indexer", "mtp"):
                raise ValueError(
                    f"phase {phase.name!r}: learn={phase.learn!r} has a loss of its own: leave "
                    "objective out"
                )
        if isinstance(self.objective, Grpo) and self.objective.kl and not self.others():
            raise ValueError(
                f"objective.kl={self.objective.kl} holds on to a reference: give "
                "objective.reference or start_from, or set it to 0"
            )

    def others(self) -> tuple[str, ...]:
        """Runs or converted checkpoints that run beside the model: the reference, or teachers."""
        match self.objective:
            case Grpo() as grpo:
                source = grpo.reference or self.start_from
                return (source,) if grpo.kl and source else ()
            case Distill() as distill:
                return tuple(teacher.path for teacher in distill.teachers)
            case _:
                return ()

    def plan(self) -> Plan:
        return Plan(self.phases, self.schedule)

    def program(self, phase: Phase, shards: Shards = SINGLE) -> Program:
        """The program of a phase, of one device or on a mesh."""
        return Program(
            self.model,
            self.qat if phase.quantise else self.precision,
            sparse=phase.attention == "sparse",
            index_loss="indexer" in SIDES[phase.learn],
            index_only=phase.learn == "indexer",
            mtp=self.model.num_mtp_layers > 0 and "mtp" in SIDES[phase.learn],
            mtp_only=phase.learn == "mtp",
            drafts=phase.drafts,
            objective=self.objective,
            remat=self.remat,
            shards=shards,
        )

    def microbatches(self, rows: int, devices: int) -> int:
        """Into how many a batch of `rows` is cut.

        Raises:
            ValueError: rows do not divide among devices and microbatches.
        """
        if rows % devices:
            raise ValueError(f"a batch of {rows} rows does not divide among {devices} devices")
        share = rows // devices
        count = -(-share // self.micro_rows)
        while share % count:
            count += 1
        return count


def load_run(name: str, overrides: list[str]) -> RunConfig:
    """The run that a configuration names, with `key=value` changes.

    name: of a file in `configs/` or a path to a Python file that defines `RUN` (a `RunConfig`).
    Keys are dotted (`schedule.lr=1e-3`, `phases.dense.tokens=1000`); values are Python literals or
    else text.

    Raises:
        ValueError: there is no such configuration, field or phase, or a value is refused.
    """
    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem != "__init__"))
        raise ValueError(f"{path} does not exist; configurations here: {known}")
    run = _import(path).RUN
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} must look like key=value")
        run = _replaced(run, key.split("."), _value(text), key)
    return run


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"run_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "RUN", None), RunConfig):
        raise ValueError(f"{path} must define RUN, a RunConfig")
    return module


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _replaced(node: Any, path: list[str], value: Any, key: str) -> Any:
    """A copy of nested frozen data with one field changed."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, tuple) and all(isinstance(p, Phase) for p in node):
        if head not in {p.name for p in node}:
            raise ValueError(f"{key}: there is no phase {head!r}")
        return tuple(_replaced(p, rest, value, key) if p.name == head else p for p in node)
    if isinstance(node, dict):
        if not isinstance(value, str) or rest:
            raise ValueError(f"{key}: a dataset is given as the path of its packed rows")
        return {**node, head: (Source(value),)}
    if not dataclasses.is_dataclass(node) or head not in {f.name for f in dataclasses.fields(node)}:
        raise ValueError(f"{key}: there is no such field")
    changed = _replaced(getattr(node, head), rest, value, key)
    return dataclasses.replace(node, **{head: changed})  # type: ignore[type-var]
