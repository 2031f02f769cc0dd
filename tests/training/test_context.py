"""Rows split along `context` compute what whole rows compute, wherever documents start."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv4_jax.training.halo import check_length, document_sums
from dsv4_jax.training.loop import Trainer
from dsv4_jax.training.placing import make_shards, named, route_spec
from dsv4_jax.training.run import load_run
from dsv4_jax.training.step import gradients, routing_pass
from sharding.shards import SINGLE
from tests.sharding.support import Compiled, placed
from tests.training.runs import EVERY_BORDER, ONE_LAYER, lines_of, write_config
from tests.training.support import CONFIG, documents, pack
from tests.training.test_mesh import QUANTISED, WEIGHTS, Case, assert_same

LENGTH = 32  # parts of 8 tokens on four devices: no more than a layer looks back


def rows_of(first: int) -> list[np.ndarray]:
    """Documents of which the second starts at `first`; a long one spans several parts."""
    sizes = [first, 3, LENGTH - first - 5] if first else [17, 1, 10]
    return documents([size for size in sizes if size], seed=first)


def every_offset() -> list[list[np.ndarray]]:
    """Rows whose documents start at every offset modulo 8; all but the last end with padding."""
    rows = [rows_of(first) for first in range(15)]
    return [*rows, documents([LENGTH])]


class Split(Case):
    """Rows that start everywhere, in two microbatches."""

    def make_batch(self):
        batch = pack(every_offset(), LENGTH)
        return jax.tree.map(lambda a: a.reshape(2, -1, LENGTH), batch)


@pytest.fixture(scope="module")
def small():
    cfg = CONFIG.replace(num_layers=1, compress_ratios=(4,), num_hash_layers=0, num_mtp_layers=0)
    return Split(cfg)


@pytest.fixture(scope="module")
def full():
    """Every kind of layer, and the MTP block."""
    return Split(CONFIG)


def test_split_rows_equal_whole_ones(small):
    small.check_gradients("context=4")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["context=2", "fsdp=2,context=4", "data=2,expert=2,context=2"])
def test_many_meshes_equal_one_device(mesh, full):
    full.check_gradients(mesh)
    full.check_update(mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [{"sparse": False}, {"remat": "group"}, {"precision": QUANTISED}],
    ids=["dense", "remat", "rounded"],
)
def test_every_program_splits(choices):
    Split(CONFIG, **choices).check_gradients("fsdp=2,context=4")


@pytest.mark.slow
def test_routes_of_split_rows(small):
    """What is chosen on one mesh can be used on another."""
    program, place, batch = small.on("context=4")
    params = place(small.params)
    routes = jax.jit(partial(routing_pass, program))(params, batch)
    assert_same(routes, small.aux.routes)
    given = jax.tree.map(lambda r: np.broadcast_to(np.arange(2, dtype=np.int32), r.shape), routes)
    where = named(program.shards, route_spec(program.shards, given[0][0].ndim))
    placed_given = placed(given, jax.tree.map(lambda _: where, given))
    _, aux = Compiled(partial(gradients, program, WEIGHTS))(params, batch, placed_given)
    for load in jax.tree.leaves(aux.loads["groups"]):
        assert not np.asarray(load)[..., 2:].any()


def test_sums_over_documents_that_cross_borders():
    batch = pack(every_offset(), LENGTH)
    x_BTn = np.random.default_rng(0).integers(0, 9, (*batch.tokens_BT.shape, 3))
    x_BTn = jnp.asarray(x_BTn, jnp.int32)
    same_BTT = np.asarray(batch.segment_BT[:, :, None] == batch.segment_BT[:, None])
    expected = np.einsum("BTS,BSn->BTn", same_BTT, x_BTn)
    for shards in (SINGLE, make_shards("context=8")):
        sums = partial(document_sums, shards=shards)
        if shards.mesh is not None:
            spec = PartitionSpec(None, "context")
            sums = jax.shard_map(
                sums, mesh=shards.mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
            )
        np.testing.assert_array_equal(sums(x_BTn, batch.segment_BT), expected)


@pytest.mark.parametrize(
    ("length", "message"),
    [(33, "33 tokens do not divide among context=4"), (24, "each part needs at least 7 tokens")],
)
def test_rows_too_short_to_split(length, message):
    check_length(CONFIG, SINGLE, length)
    with pytest.raises(ValueError, match=message):
        check_length(CONFIG, make_shards("context=4"), length)


@pytest.mark.slow
def test_runs_split_their_rows(tmp_path):
    """Every phase; stopped on one mesh, a run goes on without, and the other way round."""
    path, quiet = write_config(tmp_path, EVERY_BORDER, model=ONE_LAYER), io.StringIO()
    losses = {}
    for name, meshes in {
        "one": ["", ""],
        "split": ["context=4"] * 2,
        "both": ["", "context=4"],
    }.items():
        for mesh, until in zip(meshes, (22, None), strict=True):  # 22: with experts chosen ahead
            trainer = Trainer(load_run(str(path), [f"mesh={mesh}"]), tmp_path / name, quiet)
            trainer.train(until)
            trainer.close()
        losses[name] = [line["loss"] for line in lines_of(tmp_path / name)]
    assert losses["both"][:22] == losses["one"][:22]
    for name in ("split", "both"):
        assert losses[name][:6] == pytest.approx(losses["one"][:6], rel=1e-5)
        assert losses[name] == pytest.approx(losses["one"], rel=2e-2)
