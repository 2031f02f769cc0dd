"""The MTP block over its own streams: as it drafts when served, and learning alone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import model
from dsv4_jax.model import is_scanned
from dsv4_jax.numerics import Numerics
from dsv4_jax.training.batch import unpacked
from dsv4_jax.training.forward import forward
from dsv4_jax.training.leaves import map_places
from dsv4_jax.training.losses import Weights, count, objective
from dsv4_jax.training.optimizer import OptimizerConfig
from dsv4_jax.training.precision import Precision
from dsv4_jax.training.program import Program
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase
from dsv4_jax.training.step import Knobs, init_state, make_step
from tests.training.support import CONFIG, documents, pack, random_params

PLAIN = Numerics("plain", "float32")
RUNS = 3
SMALL = CONFIG.replace(num_layers=1, compress_ratios=(4, 0), num_hash_layers=0)
ALONE = Program(SMALL, index_loss=False, mtp_only=True, drafts=RUNS)


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


def draft_logits(program, params, batch):
    """Float32 `[drafts, B, T, V]`."""

    def run(params, batch):
        found = forward(program, params, batch).drafts
        return jnp.stack([model.output_head(y, params["top"]["head"]) for y in found])

    return np.asarray(jax.jit(run)(params, batch))


def served_drafts(params, tokens_T):
    """What serving gives at every prefix: `[RUNS, T, V]`; run k of prefix t lies at t + k."""
    cfg, length = SMALL, len(tokens_T)
    prefill = jax.jit(partial(model.prefill, cfg, PLAIN, all_logits=True))
    draft = jax.jit(partial(model.draft, cfg, PLAIN))
    tokens_BT = jnp.asarray(tokens_T)[None]
    found = np.full((RUNS, length, cfg.vocab_size), np.nan, np.float32)
    cache = model.init_cache(cfg, 1, length + 8, PLAIN, is_scanned(cfg, params))
    out, cache = prefill(params, tokens_BT, cache)
    for t in range(length - RUNS):
        # the ring takes the last row back after each prefix, as verification does
        given, mine = out.streams_BTMD[:, t : t + 1], cache
        for k in range(RUNS):
            drafted, mine = draft(params, given, tokens_BT[:, t + k + 1][:, None], mine)
            found[k, t + k] = drafted.logits[0]
            given = drafted.streams_BTMD
            if k == 0:
                cache = mine
    return found


def test_equals_what_serving_drafts(params):
    """At every place of a text longer than the window, each run."""
    tokens_T = documents([20])[0]
    served = served_drafts(params, tokens_T)
    ours = draft_logits(ALONE, params, unpacked(jnp.asarray(tokens_T)[None]))[:, 0]
    bound = 2e-5 * np.nanmax(np.abs(served))
    for k in range(RUNS):
        places = slice(k, len(tokens_T) - RUNS + k)
        np.testing.assert_allclose(ours[k, places], served[k, places], rtol=0, atol=bound)
    assert np.abs(ours[1, 2:-1] - ours[0, 2:-1]).max() > 100 * bound


@pytest.mark.slow
def test_documents_of_a_row_do_not_meet(params):
    docs = documents([9, 2, 7])
    packed = draft_logits(ALONE, params, pack([docs], 20))[:, 0]
    start = 0
    for doc in docs:
        alone = draft_logits(ALONE, params, unpacked(jnp.asarray(doc)[None]))[:, 0]
        for k in range(RUNS):
            rows = slice(k, len(doc) - 1)
            a, b = packed[k, start : start + len(doc)][rows], alone[k][rows]
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(alone).max())
        start += len(doc)


def test_loss_is_the_mean_of_what_each_run_can_know(params):
    batch = pack([documents([9, 2, 7])], 20)
    counts, weights = count(batch), Weights(0.5, 0.0, 0.0)
    run = jax.jit(partial(objective, ALONE, weights))
    total, aux = run(counts, params, batch)
    logits = jax.nn.log_softmax(draft_logits(ALONE, params, batch)[:, 0])
    tokens, expected = np.asarray(batch.tokens_BT)[0], 0.0
    for start, size in ((0, 9), (9, 2), (11, 7)):
        for k in range(RUNS):
            for t in range(k, size - 2):
                expected -= float(logits[k, start + t, tokens[start + t + 2]])
    expected /= RUNS * float(counts.mtp_targets)
    np.testing.assert_allclose(aux.metrics.mtp, expected, rtol=1e-5)
    np.testing.assert_allclose(total, 0.5 * expected, rtol=1e-5)
    assert float(aux.metrics.loss) == 0.0


@pytest.mark.slow
def test_nothing_else_learns(params):
    """Neither weights nor slots nor router biases, after a step of everything."""
    opt, batch = OptimizerConfig(), pack([documents([9, 2, 7])], 20)
    batch = jax.tree.map(lambda a: a[None], batch)
    knobs = Knobs(*map(np.float32, (1e-2, 0.3, 0.1, 1.0, 1e-3, 1e9, 1e9)))
    everything = Program(SMALL)
    state = init_state(everything, opt, jax.tree.map(jnp.copy, params))
    state, _ = make_step(everything, opt, "all")(state, batch, knobs)
    before = jax.tree.map(np.asarray, state)
    after, metrics = make_step(ALONE, opt, "mtp")(state, batch, knobs)
    assert (float(metrics.loss), float(metrics.applied)) == (0.0, 1.0)
    assert float(metrics.mtp) > 0

    def moved(a, b):
        return map_places(
            lambda place, x, y: (place.side, bool((np.asarray(x) != np.asarray(y)).any())),
            SMALL,
            a,
            b,
        )

    flags = jax.tree.leaves(
        moved(before.params, after.params), is_leaf=lambda n: isinstance(n, tuple)
    )
    assert {side for side, has_moved in flags if has_moved} == {"mtp"}
    assert sum(has_moved for side, has_moved in flags if side == "mtp") > 15
    paths = jax.tree_util.tree_leaves_with_path(before.opt_state)
    for (path, old), new in zip(paths, jax.tree.leaves(after.opt_state), strict=True):
        keys = {getattr(key, "key", None) for key in path}
        if keys & {"top", "groups"}:
            np.testing.assert_array_equal(old, new, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_rounded_weights_learn_alone_too(params):
    """QAT as in a decay phase: gradients are finite and the MTP block's alone."""
    qat = Precision(experts="fp4", dense="fp8", activations=True, index=True, kv=True)
    program = dataclasses.replace(ALONE, precision=qat)
    batch = pack([documents([9, 2, 7])], 20)

    def loss(params):
        return objective(program, Weights(0.3, 0.1, 0.0), count(batch), params, batch)[0]

    grads = jax.jit(jax.grad(loss, allow_int=True))(params)
    seen = map_places(
        lambda place, g: (
            (place.side, bool(np.asarray(g).any()), bool(np.isfinite(g).all()))
            if jnp.issubdtype(g.dtype, jnp.floating)
            else ("none", False, True)
        ),
        SMALL,
        grads,
    )
    flags = jax.tree.leaves(seen, is_leaf=lambda n: isinstance(n, tuple))
    assert all(finite for _, _, finite in flags)
    assert {side for side, has_any, _ in flags if has_any} == {"mtp"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafts": 0}, "drafts=0"),
        ({"mtp": False}, "mtp_only needs mtp"),
        ({"index_loss": True}, "no index_loss"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ALONE, **change)


def test_a_model_without_the_block_is_refused():
    cfg = CONFIG.replace(num_mtp_layers=0, compress_ratios=CONFIG.compress_ratios[:-1])
    with pytest.raises(ValueError, match="MTP block"):
        RunConfig("x", cfg, (Phase("p", 64, 32, 1, learn="mtp"),), {"train": ()})
