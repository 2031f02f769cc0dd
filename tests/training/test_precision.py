"""QAT: rounding equals what is exported, gradients pass straight; the export is what trained."""

import io
import json
import struct
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from checkpoints.convert import convert
from checkpoints.export import export
from checkpoints.load import load_checkpoint
from checkpoints.store import save_checkpoint
from dsv4_jax import model
from dsv4_jax.numerics import Numerics
from dsv4_jax.quant import FP4_BLOCK, dequantize, quantize_weight, round_e2m1
from dsv4_jax.training.batch import unpacked
from dsv4_jax.training.forward import forward
from dsv4_jax.training.metrics import Reporter, read
from dsv4_jax.training.plot import draw
from dsv4_jax.training.precision import (
    Precision,
    fake_weight,
    round_activations,
    round_index,
    round_kv,
    round_weights,
    straight_through,
)
from dsv4_jax.training.program import Program
from dsv4_jax.training.restore import export_units
from tests.training.support import CONFIG, documents, random_params

QAT = Precision(experts="fp4", dense="fp8", activations=True, index=True, kv=True)


def test_every_fp4_code_at_every_scale_is_kept():
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    tile = np.resize(codes, FP4_BLOCK)
    scales = np.exp2(np.arange(-100, 101, dtype=np.float32))
    weight = jnp.asarray(scales[:, None] * tile[None])
    np.testing.assert_array_equal(fake_weight("fp4", weight), weight)
    np.testing.assert_array_equal(round_e2m1(jnp.asarray(codes)), codes)
    # exactly representable in bfloat16, so that a bfloat16 product sees the same weight
    np.testing.assert_array_equal(weight.astype(jnp.bfloat16).astype(jnp.float32), weight)


@pytest.mark.parametrize(
    "rounding",
    [
        partial(fake_weight, "fp4"),
        partial(fake_weight, "fp8"),
        lambda x: round_activations(x, QAT),
        lambda x: round_kv(x, 16, QAT),
    ],
)
def test_gradients_pass_straight(rounding):
    x = 3 * jax.random.normal(jax.random.key(0), (4, 64))
    g = jax.random.normal(jax.random.key(1), (4, 64))
    y, back = jax.vjp(partial(straight_through, rounding), x)
    np.testing.assert_array_equal(y, rounding(x))
    assert (np.asarray(y) != np.asarray(x)).any()
    np.testing.assert_array_equal(back(g)[0], g)


def test_index_rounding_keeps_scores_close_and_learns():
    q = jax.random.normal(jax.random.key(0), (2, 5, 2, 64))
    rounded, back = jax.vjp(lambda x: round_index(x, QAT), q)
    (g,) = back(rounded)
    # the rotation is orthogonal: turned back, the gradient is near q itself
    assert np.corrcoef(np.asarray(g).ravel(), np.asarray(q).ravel())[0, 1] > 0.98
    assert round_index(q, Precision()) is q


@pytest.mark.parametrize("fmt", ["fp4", "fp8"])
def test_trained_weights_are_the_exported_ones(fmt):
    """Bit for bit: what the step multiplied with is what the checkpoint decodes to."""
    cfg = CONFIG.replace(dense_format="fp8", expert_format=fmt)
    params = random_params()
    rounded = round_weights(params, CONFIG, Precision(experts=fmt, dense="fp8"))
    units = dict(export_units(cfg, params))
    for name, tree in units.items():
        if not name.startswith("layer"):
            continue
        ours = _unit(rounded, name)
        for path in (("ffn", "experts", "w2"), ("ffn", "shared", "w1"), ("attn", "wq_b")):
            stored, trained = tree, ours
            for step in path:
                stored, trained = stored[step], trained[step]
            np.testing.assert_array_equal(dequantize(stored, jnp.float32), trained)


def _unit(params, name):
    from dsv4_jax.schedule import layer_groups

    layer = int(name.split("_")[1])
    for group, weights in zip(layer_groups(CONFIG), params["groups"], strict=True):
        for offset in range(len(group.kinds)):
            if layer in group.layers(offset):
                return weights[offset]
    raise AssertionError(name)


@pytest.mark.parametrize("fmt", ["fp4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_export_converts_and_computes_the_same(fmt, tmp_path):
    """run parameters → official layout → converted → inference equals the training forward."""
    formats = {"fp4": ("fp8", "fp4"), "bf16": (None, None)}[fmt]
    cfg = CONFIG.replace(dense_format=formats[0], expert_format=formats[1])
    params = jax.tree.map(
        lambda a: a if a.dtype == jnp.int32 else a.astype(jnp.bfloat16).astype(jnp.float32),
        random_params(),
    )
    save_checkpoint(tmp_path / "units", cfg, export_units(cfg, params))
    export(tmp_path / "units", tmp_path / "official")
    raw = json.loads((tmp_path / "official" / "config.json").read_text())
    assert raw["model_type"] == "deepseek_v4"
    convert(tmp_path / "official", tmp_path / "converted")
    loaded_cfg, loaded = load_checkpoint(tmp_path / "converted")
    tokens = jnp.asarray(np.stack(documents([40])))
    served = jax.jit(partial(model.forward, loaded_cfg, Numerics("plain", "float32")))(
        loaded, tokens
    )
    precision = Precision(experts=formats[1], dense=formats[0])
    program = Program(CONFIG, precision, index_loss=False, mtp=False)

    def trained(params):
        rounded = round_weights(params, CONFIG, precision)
        hidden = forward(program, rounded, unpacked(tokens))
        return model.output_head(hidden.y_BTD, params["top"]["head"])

    expected = jax.jit(trained)(params)
    np.testing.assert_allclose(served, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_bad_precisions_are_refused():
    for fields in ({"experts": "int4"}, {"dense": "fp4"}, {"dtype": "float16"}):
        with pytest.raises(ValueError):
            Precision(**fields)


def test_scales_of_weights_are_powers_of_two():
    stored = quantize_weight(jnp.ones((130, 64)) * 3.3, "fp8", jnp.dtype("float32"))
    assert (np.log2(np.asarray(stored.scales)) % 1 == 0).all()


def test_reports_survive_a_kill_and_are_drawn(tmp_path, capsys):
    reporter = Reporter(tmp_path, 0, 2)
    for step in range(6):
        line = {"step": step, "phase": "p", "tokens": 10 * step, "loss": 5.0 - step, "load": 1.5}
        reporter.step(line)
    reporter.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "los')
    assert [line["step"] for line in read(tmp_path)] == list(range(6))
    assert capsys.readouterr().out.count("\n") == 4  # a heading and three of six lines
    Reporter(tmp_path, 3, 2).close()
    assert [line["step"] for line in read(tmp_path)] == [0, 1, 2]
    svg = draw({"a <b>": tmp_path}, panels=("loss", "load"))
    assert svg.count("<polyline") == 2 and "a &lt;b&gt;" in svg
    with pytest.raises(ValueError, match="no run reports 'mtp'"):
        draw({"a": tmp_path}, panels=("mtp",))


def test_tensorboard_gets_every_number(tmp_path):
    reporter = Reporter(tmp_path, 0, 10, io.StringIO())
    for step in range(3):
        reporter.step({"step": step, "phase": "p", "loss": 0.5 * step, "lr": 0.25})
    reporter.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    found, data = [], file.read_bytes()
    while data:  # records: length, its check sum, an event, its check sum
        (size,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[12 + size + 4 :]
    assert found == [(s, n, v) for s in range(3) for n, v in (("loss", 0.5 * s), ("lr", 0.25))]
