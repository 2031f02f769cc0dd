"""A run that was killed and resumed equals one that was not: every leaf and metric, bit for bit."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.load import load_checkpoint
from checkpoints.store import save_checkpoint
from dsv4_jax.training.init import InitConfig, init_params
from dsv4_jax.training.loop import Trainer
from dsv4_jax.training.precision import Precision, round_weights
from dsv4_jax.training.restore import export_units, mean_params
from dsv4_jax.training.run import load_run
from tests.training.runs import EVERY_BORDER, ONE_LAYER, SPARSE_ONLY, lines_of, write_config

ROOT = Path(__file__).parents[2]


def final_state(path: Path, run_dir: Path):
    trainer = Trainer(load_run(str(path), []), run_dir, out=io.StringIO())
    try:
        assert trainer.step == trainer.plan.steps
        return jax.tree.map(np.asarray, trainer.state)
    finally:
        trainer.close()


def assert_same(a, b):
    flat = jax.tree_util.tree_leaves_with_path(a)
    for (path, x), y in zip(flat, jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_resumes_within_a_phase(tmp_path):
    path = write_config(tmp_path, SPARSE_ONLY, model=ONE_LAYER)
    quiet = io.StringIO()
    run = load_run(str(path), [])
    straight = Trainer(run, tmp_path / "straight", quiet)
    assert straight.train()
    stopped = Trainer(run, tmp_path / "stopped", quiet)
    stopped._steps = straight._steps  # the same compiled program
    assert not stopped.train(until=4)
    assert not stopped.train(until=5)
    stopped.close()
    resumed = Trainer(run, tmp_path / "stopped", quiet)
    resumed._steps = straight._steps
    assert resumed.step == 5 and resumed.train()
    assert_same(straight.state, resumed.state)
    assert lines_of(tmp_path / "straight") == lines_of(tmp_path / "stopped")
    losses = [line["loss"] for line in lines_of(tmp_path / "straight")]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="another model, seed or optimizer"):
        Trainer(load_run(str(path), ["seed=5"]), tmp_path / "stopped", quiet)
    for trainer in (straight, resumed):
        trainer.close()


@pytest.mark.slow
def test_resumes_across_every_border(tmp_path):
    """Stops at, and loses unsaved steps behind, each change of batch, phase, length and routing."""
    path = write_config(tmp_path, EVERY_BORDER, model=ONE_LAYER)
    run = load_run(str(path), [])
    straight = Trainer(run, tmp_path / "straight", io.StringIO())
    assert straight.train()
    borders = straight.plan.borders()
    assert len(borders) == 6
    for stop in sorted({s + d for s in borders for d in (0, 2)}):
        part = Trainer(run, tmp_path / "parts", io.StringIO())
        part._steps, part._routers = straight._steps, straight._routers
        while part.step < stop:
            part._advance()
            if part.step in borders or part.step % run.checkpoint_every == 0:
                part._save()
        part.close()  # without saving: what came after the last checkpoint is lost
    last = Trainer(run, tmp_path / "parts", io.StringIO())
    last._steps, last._routers = straight._steps, straight._routers
    assert last.train()
    assert_same(straight.state, last.state)
    assert lines_of(tmp_path / "straight") == lines_of(tmp_path / "parts")
    for trainer in (straight, last):
        trainer.close()


def start(path: Path, run_dir: Path, cache: Path, devices: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    args = [sys.executable, "scripts/train.py", "--config", str(path), "--run-dir", str(run_dir)]
    return subprocess.Popen(
        args, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "devices"), [("", 1), ("fsdp=2,expert=2", 4)])
def test_killed_at_every_border(mesh, devices, tmp_path):
    """SIGKILL shortly in front of, at, and behind each border; SIGTERM once."""
    path = write_config(tmp_path, EVERY_BORDER, mesh)
    cache = tmp_path / "cache"
    finish(start(path, tmp_path / "straight", cache, devices))
    kills = [2, 4, 9, 13, 17, 21, 24, 27]
    for number, step in enumerate(kills):
        process = start(path, tmp_path / "killed", cache, devices)
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:1] == [str(step)]:
                break
        process.send_signal(signal.SIGTERM if number == 4 else signal.SIGKILL)
        process.communicate()
        assert process.returncode == (0 if number == 4 else -signal.SIGKILL)
    finish(start(path, tmp_path / "killed", cache, devices))
    assert lines_of(tmp_path / "straight") == lines_of(tmp_path / "killed")
    assert_same(final_state(path, tmp_path / "straight"), final_state(path, tmp_path / "killed"))


@pytest.mark.parametrize("mesh", ["", pytest.param("fsdp=2,expert=2", marks=pytest.mark.slow)])
def test_starts_from_a_converted_checkpoint(mesh, tmp_path):
    path, quiet = write_config(tmp_path, SPARSE_ONLY, mesh, ONE_LAYER), io.StringIO()
    run = load_run(str(path), [])
    stored = run.model.replace(dense_format="fp8", expert_format="fp4")
    params = jax.tree.map(  # what is not quantised may be stored as bfloat16
        lambda a: a if a.dtype == "int32" else a.astype("bfloat16").astype("float32"),
        init_params(run.model, run.init, jax.random.key(3), run.scan),
    )
    save_checkpoint(tmp_path / "converted", stored, export_units(stored, params))
    changes = [f"start_from={tmp_path / 'converted'}"]
    begun = Trainer(load_run(str(path), changes), tmp_path / "begun", quiet, load_checkpoint)
    expected = round_weights(params, run.model, Precision(experts="fp4", dense="fp8"))
    assert_same(begun.state.params["groups"], expected["groups"])
    assert all(a.dtype in ("float32", "int32") for a in jax.tree.leaves(begun.state.params))
    begun.close()


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    path = write_config(tmp_path, SPARSE_ONLY, model=ONE_LAYER)
    model = load_run(str(path), []).model.replace(num_experts=16)
    params = init_params(model, InitConfig(), jax.random.key(3), False)
    save_checkpoint(tmp_path / "other", model, export_units(model, params))
    for where, message in (("other", "is \\(16,.*weights differ"), ("nowhere", "does not exist")):
        run = load_run(str(path), [f"start_from={tmp_path / where}"])
        with pytest.raises(ValueError, match=message):
            Trainer(run, tmp_path / "run", io.StringIO(), load_checkpoint)


def test_the_mean_of_two_models_keeps_integers():
    one, other = ({"w": jnp.full(3, x), "table": jnp.arange(3) + int(x)} for x in (1.0, 4.0))
    mean = mean_params(one, other)
    np.testing.assert_array_equal(mean["w"], [2.5] * 3)
    np.testing.assert_array_equal(mean["table"], one["table"])
