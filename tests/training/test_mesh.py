"""A training step on a mesh computes what one device computes; runs move from mesh to mesh."""

import dataclasses
import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.preflight import measure
from dsv4_jax.training import preflight
from dsv4_jax.training.loop import Trainer
from dsv4_jax.training.losses import Weights
from dsv4_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv4_jax.training.placing import (
    make_shards,
    named,
    place_rows,
    route_spec,
    row_spec,
    rows_here,
    state_shardings,
)
from dsv4_jax.training.precision import Precision
from dsv4_jax.training.program import Program
from dsv4_jax.training.run import load_run
from dsv4_jax.training.step import Knobs, gradients, init_state, routing_pass, update
from tests.sharding.support import Compiled, placed, worst
from tests.training.runs import EVERY_BORDER, ONE_LAYER, SPARSE_ONLY, lines_of, write_config
from tests.training.support import CONFIG, DEEP, documents, pack, random_params

WEIGHTS = Weights(0.3, 0.01, 1.0)
KNOBS = Knobs(*(np.float32(x) for x in (1e-2, 0.3, 0.01, 1.0, 1e-3, np.inf, np.inf)))
SMALL = CONFIG.replace(num_layers=1, compress_ratios=(0,), num_hash_layers=0, num_mtp_layers=0)
MESHES = ["fsdp=8", "expert=4", "fsdp=2,expert=4", "data=2,fsdp=2,expert=2", "data=2,fsdp=4"]
QUANTISED = Precision(experts="fp4", dense="fp8", activations=True, index=True, kv=True)
# Gradients that add terms of either sign over all tokens keep fewer digits of the largest entry:
# splitting rows over `data` alone, which computes the same terms, moves them by up to 9e-5.
CANCELLING = ("scale", "base", "sink")


def batch_of(micro):
    rows = [documents([20, 9], seed) for seed in range(16)]
    return jax.tree.map(lambda a: a.reshape(micro, -1, 32), pack(rows, 32))


class Case:
    """A program with its parameters, and what one device makes of them."""

    def __init__(self, cfg, **choices):
        mtp = cfg.num_mtp_layers > 0
        self.program = Program(cfg, mtp=mtp, index_loss=4 in cfg.compress_ratios, **choices)
        self.params, self.batch = random_params(cfg), self.make_batch()
        self.state = init_state(self.program, OptimizerConfig(), self.params)
        rng = np.random.default_rng(0)
        self.drawn = jax.tree.map(
            lambda a: rng.standard_normal(a.shape).astype(a.dtype), self.params
        )
        self.grads, self.aux = Compiled(partial(gradients, self.program, WEIGHTS))(
            self.params, self.batch
        )

    def make_batch(self):
        return batch_of(2)

    def on(self, mesh):
        """The program on a mesh, and a function that places trees there."""
        shards = make_shards(mesh)
        program = dataclasses.replace(self.program, shards=shards)

        def place(tree):
            return placed(tree, state_shardings(program.cfg, tree, shards, scan=True))

        rows = named(shards, row_spec(shards))
        return program, place, placed(self.batch, jax.tree.map(lambda _: rows, self.batch))

    def gradients_on(self, mesh):
        program, place, batch = self.on(mesh)
        return Compiled(partial(gradients, program, WEIGHTS))(place(self.params), batch)

    def check_gradients(self, mesh):
        grads, aux = self.gradients_on(mesh)
        assert_same(aux.loads, self.aux.loads)
        assert_same(aux.routes, self.aux.routes)
        np.testing.assert_allclose(aux.metrics, self.aux.metrics, rtol=1e-5)
        for (path, got), want in zip(
            jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(self.grads), strict=True
        ):
            bound = 1e-4 if path[-1].key in CANCELLING else 1e-5
            assert worst(got, want) <= bound, jax.tree_util.keystr(path)

    def check_update(self, mesh):
        """Random gradients have no directions that vanish, which Muon would blow up from noise."""
        opt = OptimizerConfig()

        def run(program, state, grads):
            return update(program, opt, "all", state, grads, self.aux, KNOBS)

        want, reported = Compiled(partial(run, self.program))(self.state, self.drawn)
        program, place, _ = self.on(mesh)
        got, found = Compiled(partial(run, program))(place(self.state), place(self.drawn))
        assert worst(got, want) <= 1e-5
        np.testing.assert_allclose(found, reported, rtol=1e-5)
        where = state_shardings(program.cfg, self.state, program.shards, scan=True)
        for leaf, at in zip(jax.tree.leaves(got), jax.tree.leaves(where), strict=True):
            assert leaf.sharding.is_equivalent_to(at, leaf.ndim)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def small():
    return Case(SMALL)


@pytest.fixture(scope="module")
def deep():
    return Case(DEEP, remat="group")


def test_gradients_equal_one_device(small):
    small.check_gradients("data=2,fsdp=2,expert=2")


def test_updates_equal_one_device(small):
    small.check_update("fsdp=2,expert=4")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_many_meshes_equal_one_device(mesh, deep):
    deep.check_gradients(mesh)
    deep.check_update(mesh)


@pytest.fixture(scope="module")
def even():
    """A vocabulary that divides, CSA and HCA, and the MTP block."""
    model = {"vocab_size": 64, "num_layers": 2, "compress_ratios": (4, 8, 0), "num_hash_layers": 0}
    return Case(CONFIG.replace(**model))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=2,tensor=2", "expert=2,context=2,tensor=2"])
def test_heads_that_the_compiler_splits(mesh, even):
    even.check_gradients(mesh)
    even.check_update(mesh)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="'heads' of size 2 does not divide into 3 parts"):
        state_shardings(CONFIG.replace(vocab_size=63), {}, make_shards("tensor=3"), scan=True)


@pytest.mark.slow
def test_rounding_equals_one_device():
    """Scales of what lies on several devices are those of the whole matrix."""
    weights = Precision(experts="fp4", dense="fp8")
    Case(CONFIG, precision=weights).check_gradients("fsdp=4,expert=2")


@pytest.mark.slow
def test_rounded_activations_stay_near():
    """An activation on the border of two codes may fall to either side: sums have another order."""
    case = Case(CONFIG, precision=QUANTISED)
    _, aux = case.gradients_on("fsdp=4,expert=2")
    assert_same(aux.loads, case.aux.loads)
    np.testing.assert_allclose(aux.metrics, case.aux.metrics, rtol=1e-3)


@pytest.mark.slow
def test_tokens_that_travel_give_the_same(small):
    shards = dataclasses.replace(make_shards("fsdp=2,expert=4"), exchange="padded")
    program, place, batch = small.on("fsdp=2,expert=4")
    run = partial(gradients, dataclasses.replace(program, shards=shards), WEIGHTS)
    grads, _ = Compiled(run)(place(small.params), batch)
    assert worst(grads, small.grads) <= 5e-5


@pytest.mark.slow
def test_routes_on_a_mesh(deep):
    program, place, batch = deep.on("fsdp=4,expert=2")
    routes = jax.jit(partial(routing_pass, program))(place(deep.params), batch)
    assert_same(routes, deep.aux.routes)
    given = jax.tree.map(lambda r: np.broadcast_to(np.arange(2, dtype=np.int32), r.shape), routes)
    shards = program.shards
    where = jax.tree.map(lambda r: named(shards, route_spec(shards, r.ndim)), routes)
    run = Compiled(partial(gradients, program, WEIGHTS))
    _, aux = run(place(deep.params), batch, placed(given, where))
    for group in aux.loads["groups"][1:]:
        assert not any(np.asarray(load)[..., 2:].any() for load in group)


def test_state_is_spread(small):
    program, place, _ = small.on("fsdp=2,expert=4")
    state = place(small.state)
    total = sum(a.nbytes for a in jax.tree.leaves(state))
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
    assert held < 0.4 * total  # experts in eight parts, matrices in two
    one = state.params["groups"][0][0]["ffn"]["experts"]["w1"]
    assert one.sharding.shard_shape(one.shape) == (1, 32, 16)


def test_rows_lie_where_the_mesh_says():
    shards = make_shards("data=2,expert=2")
    rows = np.arange(8 * 4 * 3, dtype=np.int32).reshape(4, 8, 3)
    batch = place_rows(shards, 2, 8, rows[:, rows_here(shards, 2, 8)])
    np.testing.assert_array_equal(batch.tokens_BT, rows[0].reshape(2, 4, 3))
    shapes = {part.data.shape for part in batch.tokens_BT.addressable_shards}
    assert shapes == {(2, 1, 3)}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("model=2", "an axis of data, fsdp"),
        ("fsdp=64", "64 devices"),
    ],
)
def test_meshes_that_do_not_train(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_shards(mesh)


def test_preflight_counts_what_muon_computes():
    """And bytes of one device, of a state that is only described."""
    params = random_params(CONFIG)
    rule = make_optimizer(OptimizerConfig(), CONFIG, params)
    update_rule = jax.make_jaxpr(lambda p: rule.update(p, rule.init(p), p)[0])
    floats = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    assert preflight.muon_flops(CONFIG) == measure.flops(update_rule(floats).jaxpr)
    program = Program(CONFIG, shards=make_shards("fsdp=2,expert=4"))
    state = preflight.state_of(program)
    experts = state.params["groups"][0][0]["ffn"]["experts"]
    assert preflight.local_bytes(experts) == 3 * 4 * 32 * 32 * 4 // 8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 64, 1), "--batch 0"), ((8, 513, 1), "--context 513"), ((12, 64, 1), "microbatches of 8")],
)
def test_preflight_refuses_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        preflight.microbatches(preflight.sizes_of(CONFIG, *sizes), 8)


def test_experts_must_divide(tmp_path):
    path = write_config(tmp_path, SPARSE_ONLY, model=ONE_LAYER)
    with pytest.raises(ValueError, match="'experts' of size 4 does not divide into 8 parts"):
        Trainer(load_run(str(path), ["mesh=expert=8"]), tmp_path / "run")


@pytest.mark.slow
def test_runs_move_between_meshes(tmp_path):
    """Stopped and resumed on its mesh a run is the same bit for bit; on another one, nearly."""
    path, quiet = write_config(tmp_path, SPARSE_ONLY, "fsdp=2,expert=4", ONE_LAYER), io.StringIO()
    run = load_run(str(path), [])
    straight = Trainer(run, tmp_path / "straight", quiet)
    assert straight.train()
    for name, changes in (("same", []), ("other", ["mesh=data=2,fsdp=4"]), ("one", ["mesh="])):
        first = Trainer(run, tmp_path / name, quiet)
        first._steps = straight._steps
        assert not first.train(until=5)
        first.close()
        second = Trainer(load_run(str(path), changes), tmp_path / name, quiet)
        assert second.step == 5
        assert_same(first.state, second.state)
        if not changes:
            second._steps = straight._steps
        assert second.train()
        if not changes:
            assert_same(straight.state, second.state)
        second.close()
    begun = Trainer(
        load_run(str(path), [f"start_from={tmp_path / 'straight'}"]), tmp_path / "begun", quiet
    )
    assert begun.step == 0
    assert_same(begun.state.params, straight.state.params)
    begun.close()
    losses = {
        name: [line["loss"] for line in lines_of(tmp_path / name)]
        for name in ("straight", "same", "other", "one")
    }
    assert losses["same"] == losses["straight"]
    for name in ("other", "one"):
        assert losses[name][:6] == pytest.approx(losses["straight"][:6], rel=1e-5)
        assert losses[name] == pytest.approx(losses["straight"], rel=1e-2)
    straight.close()


@pytest.mark.slow
def test_every_phase_runs_on_a_mesh(tmp_path):
    path = write_config(tmp_path, EVERY_BORDER, "fsdp=2,expert=2")
    trainer = Trainer(load_run(str(path), []), tmp_path / "mesh", io.StringIO())
    assert trainer.train()
    trainer.close()
    alone = Trainer(load_run(str(path), ["mesh="]), tmp_path / "one", io.StringIO())
    assert alone.train()
    alone.close()
    ours, theirs = (
        [line["loss"] for line in lines_of(tmp_path / name)] for name in ("mesh", "one")
    )
    assert ours[:4] == pytest.approx(theirs[:4], rel=1e-4)
    assert ours == pytest.approx(theirs, rel=5e-2)
