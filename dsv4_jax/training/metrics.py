"""What a run reports: a table on the console, JSON lines, and TensorBoard where installed."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, TextIO

FILE = "metrics.jsonl"
COLUMNS = (
    "step",
    "phase",
    "tokens",
    "loss",
    "mtp",
    "indexer",
    "captured",
    "grad_norm",
    "load",
    "lr",
)
HEAD_EVERY = 20


class Reporter:
    """Writes one line per step to `metrics.jsonl`, and some of them to the console.

    Lines of steps from `first_step` on are dropped when it opens: they belong to work that a
    resumed run does again.
    """

    def __init__(
        self, run_dir: Path, first_step: int, log_every: int, out: TextIO | None = None
    ) -> None:
        self.path = run_dir / FILE
        self._log_every, self._out, self._lines = log_every, out or sys.stdout, 0
        self._file: TextIO | None = None
        self.rewind(first_step)
        self._board = _tensorboard(run_dir)

    def rewind(self, step: int) -> None:
        """Forgets `step` and everything after it."""
        if self._file is not None:
            self._file.close()
        kept = [line for line in read(self.path.parent) if line["step"] < step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, self.path)
        self._file = open(self.path, "a", encoding="utf-8")

    def step(self, line: dict[str, Any]) -> None:
        """Reports one step."""
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, line["step"])
        if line["step"] % self._log_every == 0:
            self._print(line)

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        assert self._file is not None
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _print(self, line: dict[str, Any]) -> None:
        names = [*COLUMNS, "tokens_s"]
        if self._lines % HEAD_EVERY == 0:
            self.say(" ".join(f"{name:>9}" for name in names))
        self.say(" ".join(f"{_short(line.get(name)):>9}" for name in names))
        self._lines += 1


class Silence:
    """The reporter of all processes but the first."""

    def rewind(self, step: int) -> None:
        """Does nothing, as everything here."""

    def step(self, line: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return str(value)[:9]


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a run; a line cut off by a kill is left out."""
    path = Path(run_dir) / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _tensorboard(run_dir: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"))
