"""An engine that is killed again and again, whose files are damaged meanwhile."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.serving.engine.lives import ALL
from tests.serving.engine.test_disk import files_of

ROOT = Path(__file__).parents[3]
LIVES = int(os.environ.get("DSV4_LIVES", "3"))


@pytest.mark.slow
def test_no_life_says_anything_wrong(tmp_path):
    right, damaged, rng, counts = {}, {}, random.Random(5), Counter()
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    folder = tmp_path / "disk"
    for life in range(LIVES):
        for number, length, said, cached, found in _answers(folder, life, environment, rng):
            assert said == right.setdefault((number, length), said), (life, number, length, cached)
            counts.update(answers=1, resumed=cached > 0)
            damaged[life] = found
        files = files_of(folder)
        for path in rng.sample(files, min(3, len(files))):
            _damage(path, rng)
    print(f"{LIVES} lives: {dict(counts)}, damaged files {sum(damaged.values()):.0f}")
    assert counts["resumed"] and len(right) == len(ALL)


def _answers(folder, life, environment, rng):
    """What an engine says until it is killed, somewhere in the next answer."""
    command = [sys.executable, "-m", "tests.serving.engine.lives", str(folder), str(life)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        try:
            for _ in range(rng.randint(2, 12) + (0 if life else len(ALL))):
                yield json.loads(process.stdout.readline())
        finally:
            process.kill()


def _damage(path, rng):
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        os.truncate(path, rng.randrange(len(data) + 1))
    elif data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
