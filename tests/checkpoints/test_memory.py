"""Peak memory of a conversion, measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from dsv4_jax.config import ModelConfig
from tests.checkpoints.support import BASE, ROOT, write_synthetic

MEASURE = """
import json, sys
from checkpoints.convert import convert
from checkpoints.export import export

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))

warm, src, dst, back, experts, workers = sys.argv[1:]
convert(warm, dst + "_warm")  # imports and thread pools belong to the constant
before = status("VmRSS:")
manifest = convert(src, dst, experts=experts, workers=int(workers), verify=True)
converted = status("VmHWM:")
export(dst, back)
units = [sum(leaf.nbytes for leaf in unit.values()) for unit in manifest.units.values()]
print(json.dumps({"convert": converted - before, "export": status("VmHWM:") - before,
                  "unit": max(units), "total": sum(units)}))
"""
CONSTANT = 192 << 20  # write buffers of one Orbax data file, tables, temporaries of one expert


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    cfg = ModelConfig(
        vocab_size=1024,
        dim=1024,
        num_layers=6,
        compress_ratios=(0, 4, 128, 4, 128, 4, 0),
        num_heads=4,
        head_dim=128,
        rope_dim=64,
        q_rank=128,
        o_groups=2,
        o_rank=64,
        num_experts=64,
        experts_per_token=2,
        expert_dim=1024,
        num_hash_layers=0,
        routed_scale=1.5,
    )
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "src", cfg)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("experts, workers", [("keep", 1), ("keep", 2), ("fp8", 1)])
def test_memory_stays_below_two_units_per_worker(synthetic, tmp_path, experts, workers):
    paths = [BASE, synthetic, tmp_path / "dst", tmp_path / "back"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths), experts, str(workers)],
        cwd=ROOT,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    peak = json.loads(done.stdout)
    print({name: f"{size / 2**20:.0f} MB" for name, size in peak.items()})
    bound = 2 * peak["unit"] * workers + CONSTANT
    assert peak["total"] > bound, "the checkpoint must be larger than the bound to prove it"
    assert peak["convert"] < bound
    assert peak["export"] < bound
