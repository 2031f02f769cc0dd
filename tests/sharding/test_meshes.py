"""Every mesh computes what one device computes: logits, greedy tokens, MTP logits and caches."""

import jax
import numpy as np
import pytest

from dsv4_jax.numerics import Numerics
from dsv4_jax.placement import param_specs, shardings
from sharding.rules import TRAIN
from sharding.shards import SINGLE
from tests.sharding.support import CFG, DEEP, PLAIN, WIDE, Case, in_order, shards_of, worst

MAX_RELATIVE = 1e-5
QUICK = "expert=2,context=2,tensor=2"
MESHES = [
    "expert=8",
    "context=8",
    "tensor=8",
    "fsdp=2,expert=4",
    "data=2,expert=2,context=2",
    "context=2,tensor=4",
]


@pytest.fixture(scope="module")
def cases():
    """Cases by configuration, with what one device gives."""
    done = {}

    def get(cfg, mtp):
        if (cfg, mtp) not in done:
            case = Case(cfg)
            done[cfg, mtp] = case, case.run(SINGLE, mtp=mtp)
        return done[cfg, mtp]

    return get


def compare(cases, cfg, shards, num=PLAIN, mtp=True):
    case, (want, want_cache) = cases(cfg, mtp)
    got, got_cache = case.run(shards, num, mtp)
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        if np.issubdtype(b.dtype, np.integer):
            np.testing.assert_array_equal(a, b, f"greedy tokens, result {n}")
        else:
            assert worst(a, b) <= MAX_RELATIVE, f"result {n}"
    assert worst(in_order(got_cache, shards), want_cache) <= MAX_RELATIVE


def test_a_mesh_equals_one_device(cases):
    compare(cases, CFG, shards_of(QUICK), mtp=False)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_many_meshes_equal_one_device(mesh, cases):
    compare(cases, DEEP, shards_of(mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["expert=8", "expert=4,tensor=2", "expert=2,context=2,tensor=2"])
def test_tokens_that_travel_give_the_same(mesh, cases):
    compare(cases, DEEP, shards_of(mesh, exchange="padded"))


@pytest.mark.slow
def test_weights_that_are_only_stored_apart_give_the_same(cases):
    compare(cases, DEEP, shards_of("fsdp=4,expert=2", TRAIN))


@pytest.mark.slow
def test_kernels_over_a_context_give_the_same(cases):
    shards = shards_of("context=2,tensor=2", row_block=128)
    compare(cases, WIDE, shards, Numerics("plain", "float32", "interpret"))


def test_experts_are_spread_evenly():
    shards, params = shards_of(QUICK), Case().params
    placed = jax.device_put(params, shardings(param_specs(CFG, shards), shards))
    experts = jax.tree.leaves([layer["ffn"]["experts"] for g in placed["groups"] for layer in g])
    total = sum(a.nbytes for a in experts)
    held = sum(a.addressable_shards[0].data.nbytes for a in experts)
    assert held <= 1.1 * total / 8
