"""Flags for the TPU compiler, and what they are for."""

import gzip
import json
import os
import re
import subprocess
import sys

import pytest

from pallas_kernels import aot
from sharding.tpu import FLAGS, VARIABLE, overlap_messages

REASON = aot.skip_reason()
COMPILE = """
import json, sys
from pathlib import Path
from pallas_kernels import aot
from sharding.tpu import overlap_messages
aot.prepare_environment()
overlap_messages()
from dsv4_jax import presets
from dsv4_jax.preflight.compile import run
from dsv4_jax.preflight.programs import Sizes
from sharding.mesh import MeshShape
cfg = presets.v4_flash().replace(num_layers=1, compress_ratios=(0, 0), num_hash_layers=0)
mesh, cache = MeshShape.parse("expert=8"), Path(sys.argv[1])
report = run("short", cfg, "v6e:2x4", "prefill", Sizes(8, 8192, 512), mesh, cache=cache)
assert report.fits, report.reason
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--xla_tpu_enable_async_all_to_all=true"),
        ("--other=1", "--other=1 --xla_tpu_enable_async_all_to_all=true"),
        ("--xla_tpu_enable_async_all_to_all=false", "--xla_tpu_enable_async_all_to_all=false"),
    ],
)
def test_flags_that_are_given_win(before, after):
    assert set(FLAGS) == {"xla_tpu_enable_async_all_to_all"}
    environ = {VARIABLE: before} if before else {}
    overlap_messages(environ)
    assert environ == {VARIABLE: after}
    overlap_messages(environ)
    assert environ == {VARIABLE: after}


@pytest.mark.tpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_the_shared_expert_computes_while_results_travel(tmp_path):
    """In a process of its own, since libtpu reads its flags once."""
    environ = {k: v for k, v in os.environ.items() if k != VARIABLE}
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    (answer,) = tmp_path.iterdir()
    lines = json.loads(gzip.decompress(answer.read_bytes()))["text"].splitlines()
    start = next(i for i, line in enumerate(lines) if re.search(r"%all-to-all-start\S* = ", line))
    end = next(i for i in range(start, len(lines)) if "%all-to-all-done" in lines[i])
    between = [line for line in lines[start:end] if "custom-call(" in line]
    assert sum("ffn._shared/block_matmul" in line for line in between) == 3
