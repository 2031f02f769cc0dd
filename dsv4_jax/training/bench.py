"""Measures loss and gradients of our model: `python -m dsv4_jax.training.bench CONFIG B T`.

Random float32 weights, no MTP block and no indexer loss, as the peer has neither. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

REPETITIONS = 3


def main(path: str, batch: int, length: int) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before jax counts its cores
    import jax

    from dsv4_jax.bench.case import cpu_s, peak_gb
    from dsv4_jax.config import ModelConfig
    from dsv4_jax.training.batch import unpacked
    from dsv4_jax.training.init import InitConfig, init_params
    from dsv4_jax.training.losses import Weights
    from dsv4_jax.training.program import Program
    from dsv4_jax.training.step import gradients

    cfg = ModelConfig.from_hf(json.loads(Path(path).read_text()))
    cfg = cfg.replace(dense_format=None, expert_format=None)
    params = init_params(cfg, InitConfig(), jax.random.key(0), scan=False)
    tokens_BT = jax.random.randint(jax.random.key(1), (batch, length), 2, cfg.vocab_size)
    micro = jax.tree.map(lambda a: a[None], unpacked(tokens_BT))
    program = Program(cfg, index_loss=False, mtp=False)
    step = jax.jit(lambda p, b: gradients(program, Weights(0.0, 0.0, 0.0), p, b)[0])
    started = cpu_s()
    jax.block_until_ready(step(params, micro))
    compiled, best = cpu_s() - started, float("inf")
    for _ in range(REPETITIONS):
        begin = cpu_s()
        jax.block_until_ready(step(params, micro))
        best = min(best, cpu_s() - begin)
    found = {"tokens_per_cpu_s": batch * length / best, "peak_gb": peak_gb()}
    print(json.dumps(found | {"first_call_cpu_s": compiled}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
