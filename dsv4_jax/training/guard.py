"""Spikes of loss or gradient: what counts as one, and what is done about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

POLICIES = ("none", "skip", "rollback")


@dataclass(frozen=True)
class GuardConfig:
    """policy: "skip" leaves a spiking step's update out; "rollback" also goes back to a checkpoint
    at least `back` steps old and routes `ahead` steps early for `duration` steps; "none": only
    steps that are not finite are left out.

    A spike is a loss or gradient norm above mean + sigmas · deviation of the last `window` good
    steps; before there are that many, nothing counts as one.

    Raises:
        ValueError: an unknown policy, or numbers that make no sense.
    """

    policy: str = "none"
    window: int = 128
    sigmas: float = 6.0
    back: int = 50
    ahead: int = 4
    duration: int = 500

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"guard.policy={self.policy!r} must be one of {POLICIES}")
        for name in ("window", "back", "ahead", "duration"):
            if getattr(self, name) < 1:
                raise ValueError(f"guard.{name}={getattr(self, name)} must be positive")


class Guard:
    """The window of good steps. Its state is plain data, kept in checkpoints."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.ahead_until = 0  # step at which early routing ends

    def limits(self) -> tuple[float, float]:
        """Largest loss and gradient norm of a good step."""
        if self.config.policy == "none" or len(self.losses) < self.config.window:
            return math.inf, math.inf
        return _limit(self.losses, self.config.sigmas), _limit(self.norms, self.config.sigmas)

    def record(self, loss: float, norm: float) -> None:
        """Notes a good step."""
        for values, new in ((self.losses, loss), (self.norms, norm)):
            values.append(new)
            del values[: -self.config.window]

    def state(self) -> dict[str, object]:
        return {"losses": self.losses, "norms": self.norms, "ahead_until": self.ahead_until}

    def restore(self, state: dict[str, object]) -> None:
        self.losses = list(state["losses"])  # type: ignore[arg-type]
        self.norms = list(state["norms"])  # type: ignore[arg-type]
        self.ahead_until = int(state["ahead_until"])  # type: ignore[arg-type]


def _limit(values: list[float], sigmas: float) -> float:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return mean + sigmas * math.sqrt(variance)
