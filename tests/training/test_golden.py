"""Loss and gradients against transformers' autograd, float32, every parameter of the model.

The file is made by `transformers_gradients.py` from the fixture checkpoint, exported as bfloat16.
With DSV4_PARITY_PYTHON naming a Python that has torch and transformers, it is also made anew.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import store
from checkpoints.convert import convert
from checkpoints.export import export
from checkpoints.names import flatten
from dsv4_jax import model, presets
from dsv4_jax.training.batch import unpacked
from dsv4_jax.training.forward import forward
from dsv4_jax.training.losses import Weights, count, objective
from dsv4_jax.training.precision import Precision, round_weights
from dsv4_jax.training.program import Program
from dsv4_jax.training.restore import export_units
from tests.model.support import DATA
from tests.training import transformers_gradients as peer
from tests.training import transformers_logits
from tests.training.support import random_params

GOLDEN = DATA.parent / "training" / "gradients.npz"
MAX_RELATIVE = 1e-4  # of a gradient's root mean square, or of the loss
PARITY = os.environ.get("DSV4_PARITY_PYTHON")
needs_peer = pytest.mark.skipif(
    not PARITY, reason="DSV4_PARITY_PYTHON names no Python with transformers"
)
# Every compressed row is selected: with few heads many index scores are 0, and ties go either way.
EXPORTED = presets.tiny().replace(dense_format=None, expert_format=None, index_topk=64)
FORMATS = {"bf16": (None, None), "fp8": ("fp8", "fp8"), "fp4": ("fp8", "fp4")}


def load(folder: Path):
    """The fixture checkpoint as float32 units."""
    convert(DATA / "checkpoint", folder)
    cfg = store.load_config(folder)

    def wide(a):
        return a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a

    units = {
        name: jax.tree.map(wide, store.densify(tree, jnp.float32))
        for name, tree in store.load_units(folder, cfg)
    }
    return cfg.replace(dense_format=None, expert_format=None), units


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Loss, and gradients by the names of the golden file."""
    cfg, units = load(tmp_path_factory.mktemp("golden"))
    prompts = json.loads((DATA / "prompts.json").read_text())["prompts"]
    ids = next(p["tokens"] for p in prompts if p["name"] == peer.PROMPT)
    batch = unpacked(jnp.asarray([ids], jnp.int32))
    program = Program(cfg, index_loss=False, mtp=False)

    def loss(units):
        params = model.group_params(cfg, units.__getitem__, scan=False)
        return objective(program, Weights(0, 0, 0), count(batch), params, batch)[0]

    value, grads = jax.jit(jax.value_and_grad(loss, allow_int=True))(units)
    found = {
        f"{unit}/{leaf}": np.asarray(g)
        for unit, tree in grads.items()
        for leaf, g in flatten(tree).items()
        if g.dtype != jax.dtypes.float0
    }
    return float(value), found


def compare(ours, golden):
    value, found = ours
    assert abs(value - golden["loss"]) <= MAX_RELATIVE * golden["loss"]
    names = {key.split(":")[0] for key in golden.files if key != "loss"}
    learnt = {k for k, g in found.items() if not k.startswith("mtp") and np.abs(g).max() > 0}
    assert learnt <= names, learnt - names
    assert len(names) > 80
    for name in sorted(names):
        gradient, probes = found[name], golden[f"{name}:probes"]
        rms = np.sqrt(np.mean(np.square(gradient, dtype=np.float64)))
        error = np.abs(gradient.reshape(-1)[peer.positions(gradient.size)] - probes).max()
        size = np.abs(gradient).sum(dtype=np.float64)
        bound = max(rms, np.abs(probes).max())
        assert error <= MAX_RELATIVE * bound, (name, error, bound)
        assert abs(size - golden[f"{name}:size"]) <= MAX_RELATIVE * size, name


def test_equals_transformers(ours):
    with np.load(GOLDEN) as golden:
        compare(ours, golden)


@needs_peer
def test_equals_transformers_live(ours, tmp_path):
    convert(DATA / "checkpoint", tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "official", "bf16")
    script, out = Path(peer.__file__), tmp_path / "gradients.npz"
    prompts = DATA / "prompts.json"
    args = [str(PARITY), str(script), str(tmp_path / "official"), str(prompts), str(out)]
    subprocess.run(args, check=True)
    with np.load(out) as golden:
        compare(ours, golden)


@needs_peer
@pytest.mark.parametrize("fmt", FORMATS)
def test_transformers_loads_what_was_trained(fmt, tmp_path):
    """A run's export computes there what the step computes with its rounded weights."""
    assert PARITY is not None
    dense, experts = FORMATS[fmt]
    if (
        dense
        and subprocess.run(
            [PARITY, "-c", "import accelerate"], stderr=subprocess.DEVNULL
        ).returncode
    ):
        pytest.skip("transformers loads quantised checkpoints with accelerate only")
    params = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16).astype(a.dtype) if a.dtype == jnp.float32 else a,
        random_params(EXPORTED),
    )
    stored = EXPORTED.replace(dense_format=dense, expert_format=experts)
    store.save_checkpoint(tmp_path / "units", stored, export_units(stored, params))
    export(tmp_path / "units", tmp_path / "official")
    tokens_BT = np.random.default_rng(0).integers(2, EXPORTED.vocab_size, (1, 200), np.int32)
    np.save(tmp_path / "tokens.npy", tokens_BT)
    files = (tmp_path / name for name in ("official", "tokens.npy", "logits.npy"))
    subprocess.run([PARITY, transformers_logits.__file__, *map(str, files)], check=True)

    precision = Precision(experts=experts, dense=dense)
    program = Program(EXPORTED, precision, index_loss=False, mtp=False)

    @jax.jit
    def ours(params):
        rounded = round_weights(params, EXPORTED, precision)
        hidden = forward(program, rounded, unpacked(jnp.asarray(tokens_BT)))
        return model.output_head(hidden.y_BTD, params["top"]["head"])

    expected = np.asarray(ours(params))
    found = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
