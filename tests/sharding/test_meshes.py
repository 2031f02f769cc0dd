"""Every mesh computes what one device computes: logits, greedy tokens, MTP logits and caches."""

import jax
import numpy as np
import pytest

from sharding.rules import TRAIN
from sharding.shards import SINGLE
from tests.sharding.support import BATCH, Case, in_order, shards_of, worst

MAX_RELATIVE = 1e-5
QUICK = ["expert=2,context=2,tensor=2"]
SLOW = [
    "expert=8",
    "context=8",
    "tensor=8",
    "fsdp=2,expert=4",
    "data=2,expert=2,context=2",
    "context=2,tensor=4",
    "data=2,fsdp=2,expert=2",
]
MESHES = QUICK + [pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW]
EXCHANGES = [None, pytest.param("padded", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def single(case):
    return case.run(SINGLE)


def compare(case, single, shards):
    (want, want_cache), (got, got_cache) = single, case.run(shards)
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        if np.issubdtype(b.dtype, np.integer):
            np.testing.assert_array_equal(a, b, f"greedy tokens, result {n}")
        else:
            assert worst(a, b) <= MAX_RELATIVE, f"result {n} (prompts: the first {BATCH})"
    assert worst(in_order(got_cache, shards), want_cache) <= MAX_RELATIVE


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_equals_one_device(mesh, exchange, case, single):
    compare(case, single, shards_of(mesh, exchange=exchange))


@pytest.mark.slow
def test_weights_that_are_only_stored_apart_equal_one_device(case, single):
    compare(case, single, shards_of("fsdp=4,expert=2", TRAIN))


def test_experts_are_spread_evenly(case):
    shards = shards_of("expert=2,context=2,tensor=2")
    from dsv4_jax.placement import param_specs, shardings
    from tests.sharding.support import CFG

    placed = jax.device_put(case.params, shardings(param_specs(CFG, shards), shards))
    experts = jax.tree.leaves([layer["ffn"]["experts"] for g in placed["groups"] for layer in g])
    total = sum(a.nbytes for a in experts)
    held = sum(a.addressable_shards[0].data.nbytes for a in experts)
    assert held <= 1.1 * total / 8
