"""Measures loss and gradients of transformers' model: `PYTHON bench_peer.py CONFIG B T`.

A script for a Python with torch and transformers; float32 on one core, random weights. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

REPETITIONS = 3


def main(path: str, batch: int, length: int) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    import torch  # pyright: ignore[reportMissingImports]
    from case import cpu_s, peak_gb  # pyright: ignore[reportMissingImports]
    from peer import build  # pyright: ignore[reportMissingImports]

    config, model = build(path)
    model.train()
    tokens = torch.randint(2, config.vocab_size, (batch, length))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, config.vocab_size), tokens[:, 1:].reshape(-1)
        ).backward()

    step()
    best = float("inf")
    for _ in range(REPETITIONS):
        begin = cpu_s()
        step()
        best = min(best, cpu_s() - begin)
    print(json.dumps({"tokens_per_cpu_s": batch * length / best, "peak_gb": peak_gb()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
