"""Microbatches, guards and early routing of whole steps."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.training.batch import Batch
from dsv4_jax.training.guard import GuardConfig
from dsv4_jax.training.loop import Trainer
from dsv4_jax.training.losses import Weights
from dsv4_jax.training.program import Program
from dsv4_jax.training.run import load_run
from dsv4_jax.training.step import gradients, routing_pass
from tests.training.runs import ONE_LAYER, SPARSE_ONLY, write_config
from tests.training.support import CONFIG, documents, pack, random_params

WEIGHTS = Weights(0.3, 0.01, 1.0)


def batch_of(micro: int) -> Batch:
    rows = [[*documents([20, 9], seed)] for seed in range(8)]
    return jax.tree.map(lambda a: a.reshape(micro, -1, 32), pack(rows, 32))


def floats(tree):
    return [np.asarray(a) for a in jax.tree.leaves(tree) if a.dtype == jnp.float32]


@pytest.mark.slow
def test_microbatches_change_only_rounding():
    """Loads are the same integers, so router biases move by the same bits."""
    program, params = Program(CONFIG), random_params()
    whole = jax.jit(lambda p, b: gradients(program, WEIGHTS, p, b))(params, batch_of(1))
    cut = jax.jit(lambda p, b: gradients(program, WEIGHTS, p, b))(params, batch_of(4))
    for a, b in zip(jax.tree.leaves(whole[1].loads), jax.tree.leaves(cut[1].loads), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(whole[1].metrics, cut[1].metrics, rtol=1e-5)
    for a, b in zip(floats(whole[0]), floats(cut[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-9)


@pytest.mark.slow
def test_given_routes_are_used():
    """With its own choice given a step changes nothing; with another one loads follow it."""
    program, params, batch = Program(CONFIG), random_params(), batch_of(2)
    live = jax.jit(lambda p, b: gradients(program, WEIGHTS, p, b))(params, batch)
    routes = jax.jit(lambda p, b: routing_pass(program, p, b))(params, batch)
    run = jax.jit(lambda p, b, r: gradients(program, WEIGHTS, p, b, r))
    same = run(params, batch, routes)
    for a, b in zip(jax.tree.leaves(live[0]), jax.tree.leaves(same[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    first = jax.tree.map(lambda r: jnp.broadcast_to(jnp.array([0, 1]), r.shape), routes)
    loads = run(params, batch, first)[1].loads["groups"]
    scored = [load for group in loads for load in group][1:]
    assert all(not np.asarray(load)[..., 2:].any() for load in scored)


@pytest.mark.slow
def test_spikes_are_left_out_and_rolled_back(tmp_path):
    path = write_config(tmp_path, SPARSE_ONLY, model=ONE_LAYER)
    run = load_run(str(path), ["checkpoint_every=2"])
    guard = GuardConfig("rollback", window=2, sigmas=1.0, back=2, ahead=1, duration=3)
    object.__setattr__(run, "guard", guard)
    out = io.StringIO()
    trainer = Trainer(run, tmp_path / "run", out)
    trainer.train(until=4)
    before = jax.tree.map(np.asarray, trainer.state.params)
    trainer.guard.losses[:], trainer.guard.norms[:] = [1e-3, 1e-3], [1e-3, 1e-3]
    trainer._advance()  # beyond the limit: nothing may move, and the run goes back two steps
    assert "step 4 left out" in out.getvalue() and "back to step 2" in out.getvalue()
    assert trainer.step == 2 and trainer.guard.ahead_until == 7
    after = jax.tree.map(np.asarray, trainer.state.params)
    assert any((a != b).any() for a, b in zip(floats(before), floats(after), strict=True))
    trainer.guard.restore({"losses": [], "norms": [], "ahead_until": 7})
    trainer._advance()
    assert trainer.step == 3 and list(trainer.pending) == [3]  # chosen one step early
    trainer.close()


def test_batches_must_divide(tmp_path):
    path = write_config(tmp_path, SPARSE_ONLY, model=ONE_LAYER)
    with pytest.raises(ValueError, match="8 rows does not divide among 3 devices"):
        Trainer(load_run(str(path), ["mesh=data=3"]), tmp_path / "run")
    run = load_run(str(path), ["micro_rows=3"])
    assert run.microbatches(8, 1) == 4 and run.microbatches(9, 1) == 3
