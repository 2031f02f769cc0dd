"""Muon over a mesh: whoever owns a matrix, every stack comes back as one device computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv4_jax.preflight import measure
from dsv4_jax.training.muon import orthogonalise_tree
from dsv4_jax.training.owners import orthogonalise_owned
from dsv4_jax.training.partition import View
from dsv4_jax.training.placing import make_shards, named

WIDTH = 16
COUNTS = (1, 3, 9)  # eight devices: fewer and more


def owned(mesh, counts):
    """The jitted function of stacks of matrices, their shapes and placement."""
    shards = make_shards(mesh)
    specs = [P(None, None, "fsdp" if shards.size("fsdp") > 1 else None)] * len(counts)
    # of a stack of its own each: matrices of one shape would be one stack
    shapes = [(n, 4 + i, WIDTH) for i, n in enumerate(counts)]
    how = [View("muon", (shape[1],)) for shape in shapes]
    run = jax.jit(lambda x: orthogonalise_owned(x, how, specs, jnp.float32, shards))
    return run, how, shapes, named(shards, specs[0])


@pytest.mark.parametrize("mesh", ["fsdp=2,expert=4", "data=2,fsdp=2,expert=2", "data=2,expert=4"])
def test_stacks_of_any_size_come_back(mesh):
    run, how, shapes, where = owned(mesh, COUNTS)
    rng = np.random.default_rng(0)
    stacks = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    want = orthogonalise_tree(stacks, how, jnp.float32)
    for got, x in zip(run([jax.device_put(x, where) for x in stacks]), want, strict=True):
        for part in got.addressable_shards:
            np.testing.assert_allclose(part.data, x[part.index], atol=1e-5)


def test_nothing_is_filled_up_to_all_devices():
    """Three matrices over 2 x 4 devices: two groups share them out, and two know the same."""
    run, _, shapes, where = owned("fsdp=2,expert=4", (3,))
    stack = jax.ShapeDtypeStruct(shapes[0], jnp.float32, sharding=where)
    sent = measure.collectives(run.lower([stack]).compile().as_text())
    matrix = 4 * shapes[0][1] * WIDTH
    assert sent["all-gather"] == matrix  # this device's half of two, of its group of two
