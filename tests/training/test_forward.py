"""The training forward pass against the inference path, packed against alone, and its gradients."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import store
from checkpoints.convert import convert
from dsv4_jax import model
from dsv4_jax.numerics import Numerics
from dsv4_jax.training.batch import unpacked
from dsv4_jax.training.forward import forward
from dsv4_jax.training.losses import Weights, count, objective
from dsv4_jax.training.program import Program
from tests.model.support import DATA, load_npz
from tests.training.support import CONFIG, DEEP, documents, pack, random_params

PLAIN = Numerics("plain", "float32")
WEIGHTS = Weights(0.3, 0.5, 1.0)


def logits(program, params, batch):
    """Main and MTP logits of every position."""

    def run(params, batch):
        hidden = forward(program, params, batch)
        head = params["top"]["head"]
        return model.output_head(hidden.y_BTD, head), model.output_head(hidden.drafts[0], head)

    return jax.jit(run)(params, batch)


@pytest.mark.parametrize(
    "cfg", [CONFIG, pytest.param(DEEP, marks=pytest.mark.slow)], ids=["one of each", "scanned"]
)
def test_equals_inference(cfg):
    params = random_params(cfg)
    tokens = jnp.asarray(np.stack(documents([50, 50])))
    main, mtp = logits(Program(cfg), params, unpacked(tokens))
    cache = model.init_cache(cfg, 2, 50, PLAIN, model.is_scanned(cfg, params))
    out, cache = jax.jit(partial(model.prefill, cfg, PLAIN, all_logits=True))(params, tokens, cache)
    np.testing.assert_allclose(main, out.logits, rtol=0, atol=1e-5 * np.abs(out.logits).max())
    drafted, _ = jax.jit(partial(model.draft, cfg, PLAIN, all_logits=True))(
        params, out.streams_BTMD[:, :-1], tokens[:, 1:], cache
    )
    bound = 1e-5 * np.abs(drafted.logits).max()
    np.testing.assert_allclose(mtp[:, :-1], drafted.logits, rtol=0, atol=bound)


@pytest.mark.slow
def test_equals_the_fixtures(tmp_path):
    convert(DATA / "checkpoint", tmp_path)
    cfg = store.load_config(tmp_path)
    units = {
        name: store.densify(tree, jnp.float32) for name, tree in store.load_units(tmp_path, cfg)
    }
    units = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, units)
    cfg = cfg.replace(dense_format=None, expert_format=None)
    params = model.group_params(cfg, units.__getitem__)
    prompts = json.loads((DATA / "prompts.json").read_text())["prompts"]
    expected = load_npz("logits_float32.npz")
    program, length = Program(cfg), max(len(p["tokens"]) for p in prompts)
    for prompt in prompts:
        ids, name = prompt["tokens"], prompt["name"]
        if len(ids) < 100:
            continue
        batch = pack([[np.array(ids, np.int32)]], length)
        main, mtp = logits(program, params, batch)
        for got, part in ((main, "prefill"), (mtp, "mtp_prefill")):
            rows = expected[f"{name}/{part}_rows"]
            np.testing.assert_allclose(
                got[0][rows], expected[f"{name}/{part}"], rtol=0, atol=2e-4, err_msg=name
            )


@pytest.mark.parametrize("sparse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_packed_equals_alone(sparse):
    """Documents that start at every offset modulo 8, in rows with padding."""
    program = Program(CONFIG, sparse=sparse)
    params = random_params()
    docs = documents([9, 10, 11, 7, 20, 2, 2, 19, 30])
    rows = [docs[:5], docs[5:]]
    starts = {sum(len(d) for d in row[:i]) % 8 for row in rows for i in range(len(row))}
    assert starts == set(range(8))
    main, mtp = logits(program, params, pack(rows, 60))
    alone_main, alone_mtp = logits(program, params, pack([[d] for d in docs], 40))
    number = 0
    for r, row in enumerate(rows):
        begin = 0
        for doc in row:
            size = len(doc)
            for packed, alone, last in ((main, alone_main, size), (mtp, alone_mtp, size - 1)):
                np.testing.assert_allclose(
                    packed[r, begin : begin + last], alone[number, :last], rtol=0, atol=1e-5
                )
            begin, number = begin + size, number + 1


def grads(program, params, batch, weights=WEIGHTS):
    def loss(params):
        return objective(program, weights, count(batch), params, batch)

    found = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(params)
    return found


def floats(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in flat if v.dtype != jax.dtypes.float0}


@pytest.mark.slow
def test_every_parameter_learns():
    params = random_params()
    batch = pack([documents([40, 24]), documents([64], 1)], 64)
    (_, aux), g = grads(Program(CONFIG), params, batch)
    dead = [k for k, v in floats(g).items() if not np.abs(v).max() > 0]
    assert all(np.isfinite(v).all() for v in floats(g).values())
    assert all(k.endswith("['bias']") for k in dead), dead
    assert aux.metrics.loss > 0


@pytest.mark.slow
def test_indexer_learns_from_its_loss_alone():
    """Nothing else moves with it, and it moves with nothing else."""
    params = random_params()
    batch = pack([documents([40, 24]), documents([64], 1)], 64)
    program = Program(CONFIG)
    (_, _), both = grads(program, params, batch)
    (_, _), without = grads(program, params, batch, WEIGHTS._replace(indexer=0.0))
    (_, _), only = grads(dataclasses.replace(program, index_only=True), params, batch)
    both, without, only = floats(both), floats(without), floats(only)
    for key in both:
        if "indexer" in key:
            assert np.abs(both[key]).max() > 0 and not without[key].any(), key
            np.testing.assert_allclose(only[key], both[key], rtol=1e-5, atol=1e-8)
        else:
            assert not only[key].any(), key
            np.testing.assert_array_equal(both[key], without[key], err_msg=key)


@pytest.mark.slow
def test_packing_changes_no_gradient():
    params = random_params()
    docs = documents([9, 26, 17, 12])
    program = Program(CONFIG)
    (packed, a), g = grads(program, params, pack([docs], 64))
    (alone, b), h = grads(program, params, pack([[d] for d in docs], 26))
    np.testing.assert_allclose(packed, alone, rtol=1e-6)
    np.testing.assert_allclose(a.metrics, b.metrics, rtol=1e-5)
    h = floats(h)
    for key, value in floats(g).items():
        np.testing.assert_allclose(
            value, h[key], rtol=0, atol=1e-5 * np.abs(value).max() + 1e-9, err_msg=key
        )


# Fused otherwise, the same sums round otherwise. Scales of hyper-connections move most, up to 1e-5
# of the largest entry: they add terms of either sign over all tokens. The median of leaves is 1e-6.
ROUNDING = 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("change", ["remat", "unrolled", "slices"])
def test_how_it_is_computed_changes_nothing(change, monkeypatch):
    program, params = Program(DEEP), random_params(DEEP)
    batch = pack([documents([40, 24]), documents([50], 1)], 64)
    (loss, aux), g = grads(program, params, batch)
    if change == "remat":
        program = dataclasses.replace(program, remat="group")
    elif change == "slices":
        from dsv4_jax.training import attention, cross_entropy

        monkeypatch.setattr(attention, "SCORE_BUDGET", 2000)
        monkeypatch.setattr(cross_entropy, "LOGIT_BUDGET", 1000)
    else:
        params = random_params(DEEP, scan=False)
    (loss2, aux2), h = grads(program, params, batch)
    np.testing.assert_allclose(loss, loss2, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics, aux2.metrics, rtol=1e-5)
    if change == "unrolled":
        g = jax.tree.map(lambda a: a[1], g["groups"][1][0])
        h = h["groups"][3][0]
    h = floats(h)
    for key, value in floats(g).items():
        np.testing.assert_allclose(
            value, h[key], rtol=0, atol=ROUNDING * np.abs(value).max() + 1e-9, err_msg=key
        )


@pytest.mark.slow
def test_no_token_sees_the_future_or_another_document():
    params = random_params()
    docs = documents([20, 20])
    batch = pack([docs], 40)
    program = Program(CONFIG, mtp=False)

    def read(embed, t):
        changed = {**params, "top": {**params["top"], "embed": embed}}
        return forward(program, changed, batch).y_BTD[0, t].sum()

    # tokens of a document are all different here, so an embedding row is a position
    unique = jnp.arange(2, 42, dtype=jnp.int32)[None]
    batch = batch._replace(tokens_BT=unique)

    def slope(t):
        return jax.grad(read)(params["top"]["embed"], t)

    g = jax.jit(partial(jax.lax.map, slope))(jnp.array([7, 19, 25, 39]))
    for t, moved in zip((7, 19, 25, 39), np.abs(np.asarray(g)).max(-1) > 0, strict=True):
        seen = {int(i) - 2 for i in np.flatnonzero(moved)}
        assert seen == set(range(0 if t < 20 else 20, t + 1)), t
