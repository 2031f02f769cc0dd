"""What a run does when: phases as data, compiled into stages; rates by tokens consumed.

Everything here is a pure function of the run's configuration and the step number, on the host.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import NamedTuple

from dsv4_jax.training.leaves import SIDES

ATTENTION = ("dense", "sparse")


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one program.

    tokens: its length. seq_len: tokens of a packed row. rows: rows of a full batch.
    ramp: (rows, tokens) stages in front of the full batch; their tokens count towards `tokens`.
    attention: "dense" (CSA layers see every compressed row) or "sparse".
    learn: "trunk" (everything but indexers), "indexer" (nothing else; dense distillation), "mtp"
    (the MTP block alone) or "all".
    drafts: tokens that the MTP block learns to guess in a row, each from what it gave before.
    data: which packed dataset is read, by name. lr: a constant rate instead of the run's schedule.
    quantise: rounds weights and index keys as they will be exported (the run's `qat`).
    route_ahead: steps between choosing experts and using them; 0: at once.

    Raises:
        ValueError: a value is out of range, or indexers would be needed but never learn.
    """

    name: str
    tokens: int
    seq_len: int
    rows: int
    ramp: tuple[tuple[int, int], ...] = ()
    attention: str = "sparse"
    learn: str = "all"
    drafts: int = 1
    data: str = "train"
    lr: float | None = None
    quantise: bool = False
    route_ahead: int = 0

    def __post_init__(self) -> None:
        where = f"phase {self.name!r}"
        for field in ("tokens", "seq_len", "rows", "drafts"):
            if getattr(self, field) < 1:
                raise ValueError(f"{where}: {field}={getattr(self, field)} must be positive")
        if self.attention not in ATTENTION:
            raise ValueError(f"{where}: attention={self.attention!r} must be one of {ATTENTION}")
        if self.learn not in SIDES:
            raise ValueError(f"{where}: learn={self.learn!r} must be one of {tuple(SIDES)}")
        if self.learn == "indexer" and self.attention == "sparse":
            raise ValueError(f"{where}: learn='indexer' distils from attention='dense'")
        if self.learn == "trunk" and self.attention == "sparse":
            raise ValueError(f"{where}: attention='sparse' needs indexers that learn (learn='all')")
        if self.route_ahead < 0:
            raise ValueError(f"{where}: route_ahead={self.route_ahead} must not be negative")
        if sum(tokens for _, tokens in self.ramp) > self.tokens:
            raise ValueError(f"{where}: the ramp is longer than the phase")


@dataclass(frozen=True)
class Schedule:
    """Rates over the run, by tokens consumed.

    lr, end_lr: peak and final learning rate. warmup_steps: linear start. decay_from: share of the
    run's tokens after which the rate falls as a cosine and λ becomes `mtp_decayed`.
    mtp, mtp_decayed: λ. balance: α. indexer: μ. bias_speed: γ. bias_freeze_from: share of the run
    after which γ is 0.
    """

    lr: float = 2.7e-4
    end_lr: float = 2.7e-5
    warmup_steps: int = 2000
    decay_from: float = 0.85
    mtp: float = 0.3
    mtp_decayed: float = 0.1
    balance: float = 1e-4
    indexer: float = 1.0
    bias_speed: float = 1e-3
    bias_freeze_from: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.decay_from <= 1:
            raise ValueError(f"schedule.decay_from={self.decay_from} must lie in (0, 1]")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps={self.warmup_steps} must not be negative")
        for name in ("lr", "end_lr", "mtp", "mtp_decayed", "balance", "indexer", "bias_speed"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name}={getattr(self, name)} must not be negative")


class Stage(NamedTuple):
    """Steps of one phase with one batch size; first_row counts rows of the phase's dataset."""

    phase: Phase
    rows: int
    first_step: int
    steps: int
    first_token: int
    first_row: int


class Moment(NamedTuple):
    """One step: where it stands, what it reads, and its rates."""

    step: int
    stage: Stage
    tokens: int
    first_row: int
    lr: float
    mtp: float
    balance: float
    indexer: float
    bias_speed: float


class Plan:
    """All stages of a run, and every step's numbers."""

    def __init__(self, phases: tuple[Phase, ...], schedule: Schedule) -> None:
        if not phases:
            raise ValueError("a run needs at least one phase")
        self.schedule = schedule
        self.stages: list[Stage] = []
        read: dict[tuple[str, int], int] = {}
        step = token = 0
        for phase in phases:
            left = phase.tokens - sum(tokens for _, tokens in phase.ramp)
            for rows, tokens in (*phase.ramp, (phase.rows, left)):
                steps = math.ceil(tokens / (rows * phase.seq_len))
                if not steps:
                    continue
                source = (phase.data, phase.seq_len)
                first_row = read.get(source, 0)
                self.stages.append(Stage(phase, rows, step, steps, token, first_row))
                read[source] = first_row + steps * rows
                step, token = step + steps, token + steps * rows * phase.seq_len
        self.steps, self.tokens = step, token

    def borders(self) -> list[int]:
        """Steps at which a new stage begins, the first one left out."""
        return [stage.first_step for stage in self.stages[1:]]

    def at(self, step: int) -> Moment:
        """Numbers of a step, 0 ≤ step < `steps`."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} lies outside the run's {self.steps}")
        index = bisect.bisect_right([s.first_step for s in self.stages], step) - 1
        stage, s = self.stages[index], self.schedule
        done = step - stage.first_step
        tokens = stage.first_token + done * stage.rows * stage.phase.seq_len
        decays = tokens >= s.decay_from * self.tokens
        frozen = tokens >= s.bias_freeze_from * self.tokens
        return Moment(
            step,
            stage,
            tokens,
            stage.first_row + done * stage.rows,
            self._lr(step, tokens) if stage.phase.lr is None else stage.phase.lr,
            s.mtp_decayed if decays else s.mtp,
            s.balance,
            s.indexer,
            0.0 if frozen else s.bias_speed,
        )

    def _lr(self, step: int, tokens: int) -> float:
        s = self.schedule
        if step < s.warmup_steps:
            return s.lr * (step + 1) / s.warmup_steps
        start = s.decay_from * self.tokens
        if tokens < start or start >= self.tokens:
            return s.lr
        part = (tokens - start) / (self.tokens - start)
        return s.end_lr + (s.lr - s.end_lr) * 0.5 * (1 + math.cos(math.pi * part))
