"""A long context on a narrow model, in a process of its own; prints what it took as JSON.

Run as `python -m tests.model.long_context [tokens]`. The prompt is prefilled in one call and in
chunks, and tokens are decoded behind 1,024 and behind all of it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import presets
from dsv4_jax.cache import init_cache
from dsv4_jax.model import decode_step, group_params, prefill
from tests.model.support import PLAIN, random_units, relative

CHUNK, SHORT, STEPS = 1024, 1024, 9


def narrow_config(tokens: int):
    """Every kind of layer, about as many rows per token as a released model."""
    return presets.tiny().replace(
        dim=64,
        num_layers=4,
        num_mtp_layers=0,
        compress_ratios=(0, 4, 128, 4),
        head_dim=32,
        rope_dim=16,
        index_topk=64,
        window=128,
        dense_format=None,
        expert_format=None,
        max_len=2 * tokens,
    )


def peak_bytes() -> int:
    """Largest resident size of this process; getrusage would count the one that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main(tokens: int) -> None:
    cfg = narrow_config(tokens)
    params = group_params(cfg, random_units(cfg).__getitem__)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, tokens + STEPS), np.int32)
    feed = jax.jit(partial(prefill, cfg, PLAIN), donate_argnames="cache")
    step = jax.jit(partial(decode_step, cfg, PLAIN), donate_argnames="cache")
    result: dict[str, float] = {"tokens": tokens}

    def decode(cache, start):
        logits, times = [], []
        for at in range(start, start + STEPS):
            begin = time.perf_counter()
            out, cache = step(params, jnp.asarray(ids[:, at]), cache=cache)
            logits.append(np.asarray(out.logits[0]))
            times.append(time.perf_counter() - begin)
        return np.stack(logits), statistics.median(times[1:])

    def chunked(end):
        cache = init_cache(cfg, 1, tokens + STEPS, PLAIN)
        for at in range(0, end, CHUNK):
            _, cache = feed(params, jnp.asarray(ids[:, at : at + CHUNK]), cache=cache)
        return cache

    _, result["decode_s_after_1k"] = decode(chunked(SHORT), SHORT)
    begin = time.perf_counter()
    cache = jax.block_until_ready(chunked(tokens))
    result["prefill_tokens_per_s"] = tokens / (time.perf_counter() - begin)
    got, result["decode_s_after_all"] = decode(cache, tokens)
    _, cache = feed(
        params, jnp.asarray(ids[:, :tokens]), cache=init_cache(cfg, 1, tokens + STEPS, PLAIN)
    )
    want, _ = decode(cache, tokens)
    result["error"] = relative(got, want)
    result["peak_bytes"] = peak_bytes()
    print(json.dumps(result))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32768)
