"""One of several processes that share a mesh: `python -m tests.sharding.process ADDRESS N ID FILE`.

Runs prompts and some greedy steps; the first process writes the logits.
"""

from __future__ import annotations

import os
import sys

import jax
import numpy as np

DEVICES = 8


def main(address: str, count: int, index: int, target: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    jax.distributed.initialize(address, count, index)
    from tests.sharding.support import Case, shards_of

    assert jax.device_count() == DEVICES and jax.process_count() == count
    logits, _ = Case().run(shards_of("expert=2,context=2,tensor=2"), mtp=False)
    if index == 0:
        np.savez(target, *logits)
    jax.distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
