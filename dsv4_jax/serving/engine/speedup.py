"""Tokens per second with guesses of the MTP block and without, in turns of one run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from dsv4_jax import encoding
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.sizing import page_for, plan_sizes
from dsv4_jax.tokenizer import Tokenizer

MAX_LEN = 1024
QUESTIONS = (
    "Count from 3 to 30.",
    "Reverse: tiger raven letter cup window dove fence bowl train orange",
    "Say it backwards: 37 21 98 7 14 55 60 3",
    "How many times does orange occur in: orange fence bowl bowl train orange",
    "Sort: pear apple fig plum cherry",
    "Repeat: the boot by the river is cold and the drum is warm",
)


def prompts_of(folder: str, chats: str | None) -> list[list[int]]:
    """Token ids of chats: of each line of a file {"messages": …} up to its last question.

    Raises:
        ValueError: a line is no chat. OSError: the file cannot be read.
    """
    tokenizer, profile = Tokenizer.from_dir(folder), encoding.detect_profile_in(folder)
    items: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": question}]} for question in QUESTIONS
    ]
    if chats is not None:
        lines = Path(chats).read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines if line.strip()]
    prompts = []
    for item in items:
        messages = item["messages"]
        asked = [n for n, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            raise ValueError(f"{chats}: a chat has no question")
        mode = "thinking" if item.get("thinking") else "chat"
        segments = encoding.render_segments(messages[: asked[-1] + 1], mode, profile=profile)
        prompts.append(tokenizer.encode_segments(segments))
    return [prompt for prompt in prompts if len(prompt) < MAX_LEN // 2]


class Runs:
    """An engine, and what its streams did."""

    def __init__(self, folder: str, loaded: Any, num: Numerics, guesses: int, batch: int) -> None:
        cfg, params = loaded
        page = page_for(num)
        room = batch * -(-MAX_LEN // page) * page
        scheduling, sizes = plan_sizes(cfg, MAX_LEN, batch, room, page, guesses)
        self.engine = Engine(cfg, num, params, scheduling, sizes, folder, adapts=False)
        self.engine.warm_up()
        self.engine.start()
        self._batch = batch
        self._stop = frozenset({Tokenizer.from_dir(folder).eos_id})

    def rate(self, prompts: Sequence[Sequence[int]], tokens: int, temperature: float) -> float:
        """Tokens per second of a stream from its first token on, `batch` streams at a time."""

        def run(index: int) -> tuple[int, float]:
            sampling = SamplingParams(tokens, temperature=temperature, seed=index)
            stream = self.engine.stream(prompts[index], sampling, self._stop)
            for _ in stream:
                pass
            times = stream.request.times
            assert times.first_token is not None and times.last_token is not None
            return stream.request.num_generated - 1, times.last_token - times.first_token

        with ThreadPoolExecutor(self._batch) as pool:
            done = list(pool.map(run, range(len(prompts))))
        return sum(count for count, _ in done) / max(sum(seconds for _, seconds in done), 1e-9)

    def accepted(self) -> float:
        """Guesses that stood, of those that were verified."""
        totals = {"draft_tokens": 0.0, "accepted_tokens": 0.0}
        for line in self.engine.metrics.text().decode().splitlines():
            for name in totals:
                if line.startswith(f"dsv4:spec_decode_num_{name}_total{{"):
                    totals[name] = float(line.split()[-1])
        return totals["accepted_tokens"] / max(totals["draft_tokens"], 1)


def measure(
    folder: str,
    loaded: tuple[ModelConfig, Any],
    num: Numerics,
    guesses: int,
    batch: int,
    chats: str | None = None,
    requests: int = 24,
    tokens: int = 128,
    temperature: float = 0.0,
    repeats: int = 3,
) -> dict[str, Any]:
    """Runs the same chats with `guesses` and without, in turns; figures are medians.

    loaded: configuration and parameters of the checkpoint in `folder`.

    Raises:
        ValueError: the checkpoint has no MTP block, or a number is not positive.
    """
    if min(guesses, batch, requests, repeats) < 1 or tokens < 2:
        raise ValueError("guesses, batch, requests and repeats must be at least 1, tokens 2")
    prompts = list(islice(cycle(prompts_of(folder, chats)), requests))
    plain, ahead = (Runs(folder, loaded, num, count, batch) for count in (0, guesses))
    try:
        turns = [
            (plain.rate(prompts, tokens, temperature), ahead.rate(prompts, tokens, temperature))
            for _ in range(repeats)
        ]
        accepted = ahead.accepted()
    finally:
        plain.engine.stop()
        ahead.engine.stop()
    return {
        "batch": batch,
        "guesses": guesses,
        "plain_tokens_per_s": statistics.median(mine for mine, _ in turns),
        "tokens_per_s": statistics.median(theirs for _, theirs in turns),
        "ratio": statistics.median(theirs / mine for mine, theirs in turns),
        "ratios": [theirs / mine for mine, theirs in turns],
        "accepted": accepted,
    }


HEADER = (
    "| batch | guesses | stood | tok/s without | tok/s with | with ÷ without | turns |\n"
    + "| ---: " * 7
    + "|"
)


def line(figures: dict[str, Any]) -> str:
    """One row of the Markdown table."""
    turns = ", ".join(f"{ratio:.2f}" for ratio in figures["ratios"])
    return (
        f"| {figures['batch']} | {figures['guesses']} | {figures['accepted']:.0%} | "
        f"{figures['plain_tokens_per_s']:.0f} | {figures['tokens_per_s']:.0f} | "
        f"{figures['ratio']:.2f} | {turns} |"
    )
