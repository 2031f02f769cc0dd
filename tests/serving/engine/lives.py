"""An engine with a disk cache in a process of its own, which answers until it is killed.

Run as `python -m tests.serving.engine.lives FOLDER SEED`; the first life, seed 0, begins with every
prompt, nothing of which comes from a cache. Prints a JSON line for each answer: the
prompt's number, its length, what was said, how many tokens came from the cache, and files found
damaged so far.
"""

import itertools
import json
import random
import sys

import jax

from dsv4_jax import presets
from dsv4_jax.model import init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.serving.engine.loop import DiskCache, Engine
from dsv4_jax.serving.engine.sizing import plan_sizes
from tests.serving.engine.test_reuse import ask, make_prompt

MAX_LEN, ROOM = 1024, 256 << 20
LENGTHS = (200, 300, 513, 700)
ALL = [(number, length) for number in range(3) for length in LENGTHS]


def main(folder: str, seed: int) -> None:
    cfg = presets.tiny().replace(max_len=MAX_LEN)
    params = jax.device_put(init_params(cfg, jax.random.key(0)), jax.devices()[0])
    # room for one prompt, so that what is asked for again comes from the disk
    scheduling, sizes = plan_sizes(cfg, MAX_LEN, slots=1, cache_tokens=MAX_LEN)
    disk = DiskCache(folder, ROOM)
    engine = Engine(cfg, Numerics(), params, scheduling, sizes, "lives", disk_cache=disk)
    engine.warm_up()
    engine.start()
    rng = random.Random(seed)
    every = [] if seed else [(number, length, f"{number} {length}") for number, length in ALL]
    for number, length, tenant in itertools.chain(every, iter(lambda: (*rng.choice(ALL), ""), 0)):
        tokens, cached = ask(engine, make_prompt(number, LENGTHS[-1])[:length], tenant)
        damaged = _damaged(engine)
        print(json.dumps([number, length, repr(tokens), cached, damaged]), flush=True)


def _damaged(engine: Engine) -> float:
    lines = engine.metrics.text().decode().splitlines()
    found = (line for line in lines if line.startswith("dsv4:disk_cache_events_total{"))
    return sum(float(line.rsplit(" ", 1)[1]) for line in found if 'event="corrupt"' in line)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
