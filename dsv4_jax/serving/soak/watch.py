"""What a server holds at a quiet moment, and how much more that may become."""

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from dsv4_jax.serving.client import Client

MIB = 1 << 20
_SERIES = re.compile(r"^\w+:(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Held:
    """What the process holds; None where its metrics do not say. Shares are 0 to 1."""

    memory_mib: float
    threads: int
    files: int
    tasks: int | None
    running: int
    waiting: int
    slots: float
    pages: float

    @property
    def is_idle(self) -> bool:
        return not (self.running or self.waiting or self.slots or self.pages)


@dataclass(frozen=True)
class Bounds:
    """By how much each may grow between two quiet moments."""

    memory_mib: float = 64
    threads: int = 4
    files: int = 4
    tasks: int = 2


def held(client: Client, pid: int) -> Held:
    """Returns what the server holds now.

    Raises:
        ValueError: there is no such process, or this system has no /proc.
        ServerError: the server does not answer.
    """
    gauges = {name: float(value) for name, value in _SERIES.findall(client.metrics())}
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise ValueError(f"pid {pid}: {error.strerror} (this needs Linux's /proc)") from None
    numbers = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE))
    tasks = gauges.get("asyncio_tasks")
    return Held(
        memory_mib=round(int(numbers["VmRSS"]) * 1024 / MIB, 1),
        threads=int(numbers["Threads"]),
        files=files,
        tasks=None if tasks is None else int(tasks),
        running=int(gauges["num_requests_running"]),
        waiting=int(gauges["num_requests_waiting"]),
        slots=gauges["slot_usage_perc"],
        pages=gauges["kv_cache_usage_perc"],
    )


def growth(before: Held, after: Held, bounds: Bounds) -> list[str]:
    """Returns what grew beyond its bound, in words; empty if nothing did."""
    problems = []
    for name, most in asdict(bounds).items():
        first, last = getattr(before, name), getattr(after, name)
        if first is not None and last is not None and last - first > most:
            problems.append(f"{name} grew from {first} to {last}, allowed is {most} more")
    if not after.is_idle:
        problems.append(f"not idle without requests: {after}")
    return problems
