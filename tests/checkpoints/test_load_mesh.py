"""Loading onto a mesh: the same values, each device holding its part."""

import jax
import numpy as np
import pytest

from checkpoints.load import load_checkpoint
from checkpoints.store import save_checkpoint
from dsv4_jax import model, presets
from dsv4_jax.placement import param_specs, shardings
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import SERVE, TRAIN
from sharding.shards import Shards
from tests.model.support import random_units

CFG = presets.tiny().replace(
    num_layers=5,
    compress_ratios=(0, 4, 128, 4, 128, 0),
    num_hash_layers=1,
    o_rank=128,
    expert_dim=256,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    units = random_units(CFG)
    save_checkpoint(path, CFG, units.items())
    return path, model.group_params(CFG, units.__getitem__)


@pytest.mark.parametrize("rules", [SERVE, TRAIN], ids=lambda rules: rules.name)
def test_a_mesh_gets_the_same_values(saved, rules):
    path, want = saved
    shards = Shards(make_mesh(MeshShape(fsdp=2, expert=2, tensor=2)), rules)
    cfg, params = load_checkpoint(path, shards=shards)
    assert cfg == CFG
    placed = shardings(param_specs(CFG, shards), shards)
    for got, value, where in zip(*map(jax.tree.leaves, (params, want, placed)), strict=True):
        assert got.sharding.is_equivalent_to(where, got.ndim)
        assert np.asarray(got).tobytes() == np.asarray(value).tobytes()


def test_what_does_not_divide_is_refused(saved):
    shards = Shards(make_mesh(MeshShape(tensor=8)))
    with pytest.raises(ValueError, match="does not divide into 8 parts"):
        load_checkpoint(saved[0], shards=shards)
