"""Runs one case of our model: `python -m dsv4_jax.bench.ours CONFIG CASE`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.bench.case import DECODE_CHUNK, Case, measure, peak_gb
from dsv4_jax.cache import Cache, init_cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.params import ParamSpec, is_spec, unit_specs

NUM = Numerics("plain", "float32")
SCAN = False  # stacked layers cost a copy of their weights per step on CPU


def build(path: str) -> tuple[ModelConfig, model.Params]:
    """Random float32 weights of a configuration, whatever formats it names.

    Made by NumPy: programs that make them would stay in memory, and they are not what is measured.
    """
    cfg = ModelConfig.from_hf(json.loads(Path(path).read_text()))
    cfg = cfg.replace(dense_format=None, expert_format=None)
    units = unit_specs(cfg)
    rng = np.random.default_rng(0)

    def value(spec: ParamSpec) -> jax.Array:
        if spec.init == "hash":
            table = rng.random((spec.shape[0], cfg.num_experts)).argsort(axis=1)
            return jnp.asarray(table[:, : spec.shape[1]].astype(np.int32))
        if spec.init in ("ones", "zeros"):
            return jnp.asarray(np.full(spec.shape, spec.init == "ones", np.float32))
        return jnp.asarray(rng.standard_normal(spec.shape, np.float32) * np.float32(cfg.init_std))

    def load(unit: str) -> Any:
        return jax.tree.map(value, units[unit], is_leaf=is_spec)

    return cfg, model.group_params(cfg, load, SCAN)


def run(path: str, case: Case) -> None:
    cfg, params = build(path)
    before_gb = peak_gb()
    shape = (case.batch, case.length)
    tokens_BT = jax.random.randint(jax.random.key(case.seed), shape, 2, cfg.vocab_size)
    prefill = jax.jit(partial(model.prefill, cfg, NUM), donate_argnums=2)

    def prompt(room: int, chunk: int) -> tuple[jax.Array, Cache]:
        cache, out = init_cache(cfg, case.batch, room, NUM, SCAN), None
        for start in range(0, case.length, chunk or case.length):
            part = tokens_BT[:, start : start + (chunk or case.length)]
            out, cache = prefill(params, part, cache)
        assert out is not None
        return out.logits, cache

    if case.kind == "prefill":
        measure(case, lambda: jax.block_until_ready(prompt(case.length, case.chunk)[0]), before_gb)
        return

    @partial(jax.jit, donate_argnums=2)
    def step(params: model.Params, token_B: jax.Array, cache: Cache):
        out, cache = model.decode_step(cfg, NUM, params, token_B, cache)
        return jnp.argmax(out.logits, axis=-1).astype(jnp.int32), cache

    room = case.length + case.new_tokens * (case.reps + 1)
    logits, cache = prompt(room, DECODE_CHUNK)
    token_B = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def repetition() -> None:
        nonlocal token_B, cache
        for _ in range(case.new_tokens):
            token_B, cache = step(params, token_B, cache)
        token_B.block_until_ready()

    measure(case, repetition, before_gb)


if __name__ == "__main__":
    run(sys.argv[1], Case(**json.loads(sys.argv[2])))
