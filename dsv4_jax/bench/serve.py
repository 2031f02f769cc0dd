"""A load client for a running server: when tokens arrive, seen from outside.

Closed loop: so many clients, each sends its next request when it has its answer. Open loop:
requests arrive at random at a given rate whether or not the server keeps up, and waiting counts
from the arrival.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

PERCENTILES = (50, 90, 99)
WORDS = "the of and to in is that for it as was with be by on not he his but at are this".split()
API_LINE = "API "


@dataclass(frozen=True)
class Load:
    """What to send: `requests` in all, from `clients` in a closed loop or at `rate` per second.

    Raises:
        ValueError: a number is not positive, or the address is no http:// one.
    """

    url: str
    requests: int = 64
    clients: int = 8
    rate: float | None = None
    prompt_chars: int = 200
    max_tokens: int = 64
    api_key: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "clients", "prompt_chars", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"rate={self.rate} must be positive")
        if urlsplit(self.url).scheme != "http" or not urlsplit(self.url).hostname:
            raise ValueError(f"url {self.url!r} must begin with http:// and name a host")


@dataclass
class Answer:
    """What came back: seconds on the client's clock, `outcome` "ok", a status or an error."""

    due: float
    outcome: str = "ok"
    events: list[float] = field(default_factory=list)  # that carried text
    end: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0


def make_prompt(load: Load, index: int) -> str:
    """Words that differ from the first one on, so that nothing is cached."""
    rng = random.Random(f"{load.seed} {index}")
    text = str(rng.random())
    while len(text) < load.prompt_chars:
        text += " " + rng.choice(WORDS)
    return text[: load.prompt_chars]


def send(load: Load, index: int, due: float) -> Answer:
    """Sends one request and reads its stream to the end."""
    answer, address = Answer(due), urlsplit(load.url)
    body = {
        "messages": [{"role": "user", "content": make_prompt(load, index)}],
        "thinking": {"type": "disabled"},
        "max_tokens": load.max_tokens,
        "seed": index,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"content-type": "application/json"}
    if load.api_key:
        headers["authorization"] = f"Bearer {load.api_key}"
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=600)
    try:
        path = address.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status == 200:
            _read(reply, answer)
        else:
            answer.outcome = f"status {reply.status}"
            reply.read()
    except (OSError, http.client.HTTPException) as error:
        answer.outcome = type(error).__name__
    finally:
        connection.close()
    answer.end = time.monotonic()
    return answer


def _read(reply: http.client.HTTPResponse, answer: Answer) -> None:
    for line in reply:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event, now = json.loads(line[6:]), time.monotonic()
        if "error" in event:
            answer.outcome = f"error {event['error'].get('code')}"
            return
        if usage := event.get("usage"):
            answer.tokens = usage["completion_tokens"]
            answer.prompt_tokens = usage["prompt_tokens"]
        deltas = [choice["delta"] for choice in event.get("choices", ())]
        if any(value for delta in deltas for name, value in delta.items() if name != "role"):
            answer.events.append(now)


def run(load: Load) -> tuple[list[Answer], float]:
    """Sends everything; returns the answers and the seconds it took."""
    begin = time.monotonic()
    if load.rate is None:
        with ThreadPoolExecutor(load.clients) as pool:
            jobs = range(load.requests)
            answers = list(pool.map(lambda i: send(load, i, time.monotonic()), jobs))
        return answers, time.monotonic() - begin
    rng, due, pause = random.Random(load.seed), begin, threading.Event()
    with ThreadPoolExecutor(load.requests) as pool:
        jobs = []
        for index in range(load.requests):
            pause.wait(max(due - time.monotonic(), 0))
            jobs.append(pool.submit(send, load, index, due))
            due += rng.expovariate(load.rate)
        answers = [job.result() for job in jobs]
    return answers, time.monotonic() - begin


def summary(load: Load, answers: Sequence[Answer], took_s: float) -> dict[str, Any]:
    """Percentiles in milliseconds and totals per second, of the answers that came whole."""
    good = [answer for answer in answers if answer.outcome == "ok" and answer.events]
    gaps = [gap for answer in good for gap in np.diff(answer.events).tolist()]
    return {
        "loop": "closed" if load.rate is None else "open",
        "clients": load.clients if load.rate is None else None,
        "rate": load.rate,
        "outcomes": dict(Counter(answer.outcome for answer in answers)),
        "seconds": took_s,
        "requests_per_s": len(good) / took_s,
        "output_tokens_per_s": sum(answer.tokens for answer in good) / took_s,
        "prompt_tokens_per_s": sum(answer.prompt_tokens for answer in good) / took_s,
        "first_token_ms": _percentiles([answer.events[0] - answer.due for answer in good]),
        "inter_token_ms": _percentiles(gaps),
        "request_ms": _percentiles([answer.end - answer.due for answer in good]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.percentile(np.asarray(seconds) * 1e3, PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}


def table(figures: dict[str, Any]) -> str:
    """The summary as Markdown."""
    names = [f"p{p}" for p in PERCENTILES]
    lines = ["| ms | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    labels = {
        "first_token_ms": "first token",
        "inter_token_ms": "between tokens",
        "request_ms": "whole request",
    }
    for key, label in labels.items():
        values = figures[key] or {}
        cells = [f"{values[name]:.1f}" if name in values else "–" for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    outcomes = ", ".join(f"{count} {name}" for name, count in figures["outcomes"].items())
    rates = (
        f"{figures['requests_per_s']:.2f} requests/s, "
        f"{figures['output_tokens_per_s']:.0f} output tokens/s, "
        f"{figures['prompt_tokens_per_s']:.0f} prompt tokens/s"
    )
    return "\n".join([*lines, "", f"{outcomes} in {figures['seconds']:.1f} s; {rates}"])


@contextmanager
def demo_server(*flags: str) -> Iterator[str]:
    """Runs `scripts/serve.py` on a free port and yields its address once it is ready.

    Raises:
        ValueError: it ended before.
    """
    command = [sys.executable, "-m", "scripts.serve", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = None
        try:
            for line in server.stdout:
                if line.startswith(API_LINE):
                    url = line.removeprefix(API_LINE).strip()
                    break
            if url is None:
                raise ValueError("the server ended before it was ready")
            reader = threading.Thread(target=server.stdout.read, daemon=True)
            reader.start()
            yield url
        finally:
            server.send_signal(signal.SIGINT)
