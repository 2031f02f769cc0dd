"""One measured case, and how its figures are taken: the same for us and for a peer.

Imports neither jax nor torch: the peer's runner is a script for another Python.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

MARK = "RESULT "
DECODE_CHUNK = 512  # prompts of decode cases are computed in chunks of this size


@dataclass(frozen=True)
class Case:
    """kind: "prefill" or "decode". length: tokens of the prompt. chunk: 0 computes it at once."""

    kind: str
    length: int
    batch: int = 1
    chunk: int = 0
    new_tokens: int = 16
    reps: int = 3
    seed: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.length:,}"
        return f"decode batch {self.batch} at {self.length:,}"

    @property
    def tokens(self) -> int:
        """Tokens that one repetition computes."""
        return self.batch * (self.length if self.kind == "prefill" else self.new_tokens)


def cpu_s() -> float:
    """CPU seconds of this process so far, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(case: Case, repetition: Callable[[], Any], before_gb: float) -> None:
    """Prints the best of `case.reps` repetitions after a warm-up as one line of JSON."""
    repetition()
    best_cpu = best_wall = float("inf")
    for _ in range(case.reps):
        wall, cpu = time.perf_counter(), cpu_s()
        repetition()
        best_wall = min(best_wall, time.perf_counter() - wall)
        best_cpu = min(best_cpu, cpu_s() - cpu)
    found = {
        "tokens_per_cpu_s": case.tokens / best_cpu,
        "tokens_per_s": case.tokens / best_wall,
        "model_gb": before_gb,
        "peak_gb": peak_gb(),
    }
    print(MARK + json.dumps(found), flush=True)
