"""A long prompt on a narrow model: prefilled in chunks, decoded behind, in a process of its own.

Run as `python -m tests.model.long_context TOKENS FILE.npz [pages]`. The file gets logits behind
each chunk and of each decoded token; what it took is printed as JSON. With `pages` the cache is one
as an engine has it, the pages in any order.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import presets
from dsv4_jax.cache import Cache, init_cache, init_paged_cache
from dsv4_jax.config import ModelConfig, Yarn
from dsv4_jax.generator import PREFILL_SIZES
from dsv4_jax.model import draft, group_params, prefill
from tests.model.support import PLAIN, random_units

CHUNK = PREFILL_SIZES[-1]
FIRST = 77  # tokens of the first chunk: later ones begin and end inside windows
STEPS = 16
PAGE = 128  # tokens


def narrow_config(tokens: int) -> ModelConfig:
    """Every kind of layer, few channels. Positions stretch as far as a released model's do.

    CSA comes last: whoever wants its output at few positions has to score the rows at few.
    """
    return presets.tiny().replace(
        dim=32,
        num_layers=3,
        compress_ratios=(0, presets.HCA_RATIO, 4, 0),
        num_heads=2,
        head_dim=32,
        rope_dim=8,
        q_rank=32,
        o_rank=16,
        num_experts=4,
        expert_dim=32,
        index_heads=2,
        index_dim=16,
        index_topk=32,
        dense_format=None,
        expert_format=None,
        yarn=Yarn(),
        max_len=tokens + STEPS,
    )


def token_ids(cfg: ModelConfig) -> np.ndarray:
    """Prompt, decoded tokens, and one more for the MTP block to look at."""
    return np.random.default_rng(0).integers(0, cfg.vocab_size, cfg.max_len + 1, np.int32)


def peak_bytes() -> int:
    """Largest resident size of this process; getrusage would count the one that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def paged_cache(cfg: ModelConfig) -> Cache:
    """For one sequence in slot 1 of two."""
    pages = -(-cfg.max_len // PAGE)
    cache = init_paged_cache(cfg, slots=2, pages=pages, page_tokens=PAGE, num=PLAIN)
    table = np.random.default_rng(1).permutation(pages).astype(np.int32)
    return replace(
        cache,
        pos_B=jnp.zeros(1, jnp.int32),
        mtp_pos_B=jnp.zeros(1, jnp.int32),
        slots_B=jnp.int32([1]),
        table_BP=jnp.asarray(table)[None],
    )


class Feeder:
    """Runs main model and MTP block; both keep their state in one donated cache."""

    def __init__(self, cfg: ModelConfig, params: Any, cache: Cache) -> None:
        self.params, self.cache = params, cache
        self._step = jax.jit(partial(_step, cfg), donate_argnames="cache")

    def feed(self, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the last token but one of `ids`, and what the MTP block says of the next."""
        count = len(ids) - 1
        row = np.zeros((1, size + 1), np.int32)
        row[0, : len(ids)] = ids
        real = jnp.array([count], jnp.int32)
        main, mtp, self.cache = self._step(
            self.params, row[:, :-1], row[:, 1:], real, cache=self.cache
        )
        return np.asarray(main[0]), np.asarray(mtp[0])


def _step(
    cfg: ModelConfig, params: Any, ids_BT: Any, next_BT: Any, count_B: Any, cache: Cache
) -> tuple[Any, Any, Cache]:
    out, cache = prefill(cfg, PLAIN, params, ids_BT, cache, count_B)
    guess, cache = draft(cfg, PLAIN, params, out.streams_BTMD, next_BT, cache, count_B)
    return out.logits, guess.logits, cache


def ends(tokens: int) -> list[int]:
    """Where chunks of a prompt end."""
    return [FIRST, *range(FIRST + CHUNK, tokens, CHUNK), tokens]


def main(tokens: int, target: str, paged: bool) -> None:
    cfg = narrow_config(tokens)
    cache = paged_cache(cfg) if paged else init_cache(cfg, 1, cfg.max_len, PLAIN)
    feeder = Feeder(cfg, group_params(cfg, random_units(cfg).__getitem__), cache)
    ids, at, found = token_ids(cfg), 0, []
    begin, cpu = time.perf_counter(), time.process_time()
    for end in ends(tokens):
        found.append((end - 1, *feeder.feed(ids[at : end + 1], CHUNK)))
        at = end
    prefilled = time.perf_counter()
    moments = []
    for at in range(tokens, tokens + STEPS):
        found.append((at, *feeder.feed(ids[at : at + 2], 1)))
        moments.append(time.perf_counter())
    positions, logits, mtp = (np.stack(column) for column in zip(*found, strict=True))
    np.savez(target, positions=positions, main=logits, mtp=mtp)
    result = {
        "tokens": tokens,
        "prefill_s": round(prefilled - begin, 1),
        "decode_s": round(moments[-1] - prefilled, 2),
        "decode_step_ms": round(1000 * float(np.median(np.diff(moments))), 2),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_bytes": peak_bytes(),
        "cache_bytes": sum(a.nbytes for a in jax.tree.leaves(feeder.cache)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["pages"])
