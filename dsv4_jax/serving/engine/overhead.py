"""How much of a bare decode loop's speed the engine keeps."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.cache import init_cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.decoded import decoded_if_small
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.sizing import page_for, plan_sizes
from dsv4_jax.serving.engine.units import UNIT

PROMPT = [5, 6, 7, 8]


class Rate(NamedTuple):
    """Tokens per second of the clock, and per second of this process's CPU time."""

    wall: float
    cpu: float


def measure(
    cfg: ModelConfig,
    num: Numerics,
    batch: int,
    tokens: int = 200,
    repeats: int = 9,
    burst: int = 1,
) -> dict[str, Any]:
    """Decoded tokens per second of `batch` sequences, greedy, with random weights.

    The bare loop is the jitted model step on a cache of its own, behind the same prompts, fed with
    its own argmax and never read until the end. Both run in turns; figures are medians, `ratio` of
    the ratios of the turns. `cpu_ratio` is the same per second of CPU time, in which the work of
    the host counts in full although it runs beside that of the device.

    Raises:
        ValueError: `tokens` or `repeats` is too small, or the model's context too short.
    """
    if tokens < 16 or repeats < 1:
        raise ValueError(f"tokens={tokens} must be at least 16, repeats={repeats} at least 1")
    max_len = -(-(len(PROMPT) + tokens + 1) // UNIT) * UNIT
    if max_len > cfg.max_len:
        raise ValueError(f"tokens={tokens} do not fit into the model's {cfg.max_len}")
    params = decoded_if_small(cfg, num, model.init_params(cfg, jax.random.key(0)))
    page = page_for(num)
    room = batch * -(-max_len // page) * page
    scheduling, sizes = plan_sizes(cfg, max_len, batch, room, page, burst=burst)
    engine = Engine(cfg, num, params, scheduling, sizes)
    engine.warm_up()
    engine.start()
    try:
        bare = _bare_loop(cfg, num, params, batch, max_len, tokens)
        next(bare)  # compiles
        turns = [(next(bare), engine_rate(engine, batch, tokens)) for _ in range(repeats)]
    finally:
        engine.stop()
    ratios = [ours.wall / theirs.wall for theirs, ours in turns]
    return {
        "batch": batch,
        "decode_steps": burst,
        "bare_tokens_per_s": statistics.median(theirs.wall for theirs, _ in turns),
        "engine_tokens_per_s": statistics.median(ours.wall for _, ours in turns),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(ours.cpu / theirs.cpu for theirs, ours in turns),
    }


def _bare_loop(
    cfg: ModelConfig, num: Numerics, params: Any, batch: int, max_len: int, tokens: int
) -> Iterator[Rate]:
    """A new run for each `next`."""

    def step(params: Any, last_B: jax.Array, cache: Any):
        out, cache = model.decode_step(cfg, num, params, last_B, cache)
        return jnp.argmax(out.logits, axis=-1).astype(jnp.int32), cache

    jitted = jax.jit(step, donate_argnums=2)
    new_cache = partial(init_cache, cfg, batch, max_len, num, model.is_scanned(cfg, params))
    while True:
        last_B, cache = jnp.zeros(batch, jnp.int32), new_cache()
        for token_B in _prompts(batch).T:
            last_B, cache = jitted(params, jax.device_put(token_B), cache)
        jax.block_until_ready((last_B, cache))
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            last_B, cache = jitted(params, last_B, cache)
        jax.block_until_ready((last_B, cache))
        wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
        yield Rate(batch * tokens / wall_s, batch * tokens / cpu_s)


def _prompts(batch: int) -> np.ndarray:
    """Each its own: rows that say the same choose the same experts, which costs less."""
    return np.array([[*PROMPT, index] for index in range(batch)], np.int32)


def engine_rate(engine: Engine, batch: int, tokens: int) -> Rate:
    """While all streams decode; each is read by a thread, as in the server."""
    moments: list[list[tuple[float, float]]] = [[] for _ in range(batch)]
    together = SamplingParams(tokens, temperature=0.0)

    def read(index: int) -> None:
        stream = engine.stream([*PROMPT, index], together, frozenset())
        for _ in stream:
            moments[index].append((time.perf_counter(), time.process_time()))

    threads = [threading.Thread(target=read, args=(index,)) for index in range(batch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin, begin_cpu = max(own[0] for own in moments)
    end, end_cpu = min(own[-1] for own in moments)
    count = sum(begin < moment <= end for own in moments for moment, _ in own)
    if end <= begin or not count:
        raise ValueError(f"with {tokens} tokens the first stream ends before the last begins")
    return Rate(count / (end - begin), count / (end_cpu - begin_cpu))


HEADER = (
    "| batch | steps a call | bare tok/s | engine tok/s | engine ÷ bare | per CPU-second "
    "| turns |\n" + "| ---: " * 7 + "|"
)


def line(figures: dict[str, Any]) -> str:
    """One row of the Markdown table."""
    turns = ", ".join(f"{ratio:.2f}" for ratio in figures["ratios"])
    return (
        f"| {figures['batch']} | {figures['decode_steps']} | {figures['bare_tokens_per_s']:.0f} | "
        f"{figures['engine_tokens_per_s']:.0f} | {figures['ratio']:.2f} | "
        f"{figures['cpu_ratio']:.2f} | {turns} |"
    )
