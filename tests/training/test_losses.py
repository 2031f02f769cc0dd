"""Losses against numpy, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.gather import take
from dsv4_jax.training import cross_entropy as ce
from dsv4_jax.training.balance import load_ratio, move_biases
from dsv4_jax.training.batch import ahead, target_mask
from dsv4_jax.training.experts import balance_loss, router_scores
from dsv4_jax.training.index_loss import index_terms
from dsv4_jax.training.losses import count
from dsv4_jax.training.windows import find_windows
from tests.training.support import CONFIG, documents, pack, random_params


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("budget", [1 << 24, 70])
def test_cross_entropy(budget, monkeypatch):
    monkeypatch.setattr(ce, "LOGIT_BUDGET", budget)
    rng = np.random.default_rng(0)
    y, head = rng.normal(size=(11, 8)), rng.normal(size=(17, 8))
    target, weight = rng.integers(0, 17, 11), rng.uniform(size=11) * (np.arange(11) % 3 > 0)
    p = softmax(y @ head.T)
    losses = -np.log(p[np.arange(11), target])
    g = (p - np.eye(17)[target]) * weight[:, None]
    args = [jnp.asarray(a, jnp.float32) for a in (y, head)]
    args += [jnp.asarray(target, jnp.int32), jnp.asarray(weight, jnp.float32)]
    np.testing.assert_allclose(ce.token_losses(*args[:3]), losses, rtol=1e-5)
    np.testing.assert_allclose(ce.cross_entropy(*args), (losses * weight).sum(), rtol=1e-5)
    loss, (gy, gh) = jax.value_and_grad(
        lambda y, h: 2 * ce.cross_entropy(y, h, *args[2:]), argnums=(0, 1)
    )(*args[:2])
    np.testing.assert_allclose(loss, 2 * (losses * weight).sum(), rtol=1e-5)
    np.testing.assert_allclose(gy, 2 * g @ head, atol=1e-5)
    np.testing.assert_allclose(gh, 2 * g.T @ y, atol=1e-5)


def test_cross_entropy_never_reads_slices_that_are_not_learnt(monkeypatch):
    monkeypatch.setattr(ce, "SMALLEST", 2)
    rng = np.random.default_rng(0)
    y, head = rng.normal(size=(12, 8)), rng.normal(size=(17, 8))
    target, learnt = rng.integers(0, 17, 12), np.isin(np.arange(12), (1, 4, 5, 10))
    p = softmax(y[learnt] @ head.T)
    g = p - np.eye(17)[target[learnt]]
    hidden = np.where(learnt[:, None], y, np.nan)
    loss, (gy, gh) = jax.value_and_grad(
        lambda y, h: ce.cross_entropy(y, h, jnp.asarray(target), jnp.asarray(learnt, jnp.float32)),
        argnums=(0, 1),
    )(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))
    np.testing.assert_allclose(loss, -np.log(p[np.arange(4), target[learnt]]).sum(), rtol=1e-5)
    np.testing.assert_allclose(gy[learnt], g @ head, atol=1e-5)
    assert not np.asarray(gy)[~learnt].any()
    np.testing.assert_allclose(gh, g.T @ y[learnt], atol=1e-5)


def test_targets_stay_inside_documents_and_mask():
    batch = pack([documents([4, 3])], 9)
    batch = batch._replace(learn_BT=batch.learn_BT.at[0, 2].set(0))
    assert target_mask(batch, 1)[0].tolist() == [1, 0, 1, 0, 1, 1, 0, 0, 0]
    assert target_mask(batch, 2)[0].tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0]
    assert ahead(batch.tokens_BT, 2)[0, -2:].tolist() == [0, 0]
    counts = count(batch)
    assert [int(c) for c in counts] == [4, 2, 7, 1, 0]


def test_balance_loss_by_document():
    batch = pack([documents([7, 5]), documents([12], 1)], 14)
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.1, 2, (2, 14, 4)).astype(np.float32)
    expected = 0.0
    for r, s in ((0, 1), (0, 2), (1, 1)):
        mine = scores[r][np.asarray(batch.segment_BT[r]) == s]
        chosen = np.argsort(-mine, axis=1, kind="stable")[:, :2]
        f = np.bincount(chosen.ravel(), minlength=4) * 4 / (2 * len(mine))
        share = (mine / mine.sum(1, keepdims=True)).mean(0)
        expected += len(mine) * (f * share).sum()
    found, g = jax.value_and_grad(balance_loss)(jnp.asarray(scores.reshape(-1, 4)), batch, CONFIG)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(g).max() > 0 and not np.asarray(g).reshape(2, 14, 4)[:, 12:].any()


def test_balanced_experts_cost_one_per_token():
    batch = pack([documents([8])], 8)
    scores = jnp.asarray(np.tile([[2, 2, 1, 1], [1, 1, 2, 2]], (4, 1)), jnp.float32)
    np.testing.assert_allclose(balance_loss(scores, batch, CONFIG), 8.0, rtol=1e-6)


def test_router_scores_have_finite_slopes_everywhere():
    x = jnp.array([[-200.0], [-100.0], [-87.6], [-87.0], [-50.0], [0.0], [50.0]])
    w = jnp.ones((1, 1))
    values, g = jax.vjp(lambda x: router_scores(x, w), x)
    (slope,) = g(jnp.ones_like(values))
    assert np.isfinite(slope).all() and np.isfinite(values).all()
    np.testing.assert_allclose(values[4:, 0], np.sqrt(np.log1p(np.exp([-50.0, 0, 50]))), rtol=1e-5)


def test_index_terms():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1, 5, 6)).astype(np.float32)
    mass = rng.uniform(size=(1, 5, 6)).astype(np.float32)
    seen = np.arange(6)[None, None] < np.array([0, 1, 3, 6, 6])[None, :, None]
    real = np.array([[True, True, True, True, False]])
    kl = uniform = 0.0
    expected_g = np.zeros_like(scores)
    for t in (1, 2, 3):
        n = seen[0, t].sum()
        p, q = mass[0, t, :n] / mass[0, t, :n].sum(), softmax(scores[0, t, :n])
        kl += (p * np.log(p / q)).sum()
        uniform += (p * np.log(p * n)).sum()
        expected_g[0, t, :n] = q - p

    def loss(scores):
        terms = index_terms(scores, jnp.asarray(mass), jnp.asarray(seen), jnp.asarray(real), 2)
        return terms.kl, terms

    (found, terms), g = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(scores))
    np.testing.assert_allclose(found, kl, rtol=1e-5)
    np.testing.assert_allclose(terms.uniform, uniform, rtol=1e-5)
    np.testing.assert_allclose(g, expected_g, atol=1e-6)
    assert int(terms.queries) == 3
    hits = 0
    for t in (2, 3):  # those that see more than two rows
        n = seen[0, t].sum()
        best = [set(np.argsort(-a[0, t, :n])[:2].tolist()) for a in (scores, mass)]
        hits += len(best[0] & best[1])
    assert (int(terms.hits), int(terms.wanted)) == (hits, 4)


def test_biases_follow_the_sign_of_the_load():
    params = random_params(scan=False)
    loads = {
        "groups": [[jnp.array([3, 3, 3, 3])], [jnp.array([9, 1, 2, 0])], [jnp.array([4, 2, 3, 3])]],
        "mtp": [jnp.array([0, 0, 8, 4])],
    }
    speed = jnp.float32(2**-10)
    moved = move_biases(CONFIG, params, loads, speed)
    signs = {
        ("groups", 1, 0): [-1, 1, 1, 1],
        ("groups", 2, 0): [-1, 1, 0, 0],
        ("mtp", 0): [1, 1, -1, -1],
    }
    for path, sign in signs.items():
        old, new = params, moved
        for step in path:
            old, new = old[step], new[step]
        old, new = (np.asarray(w["ffn"]["gate"]["bias"]) for w in (old, new))
        np.testing.assert_array_equal(new, old + np.float32(2**-10) * np.float32(sign))
    unmoved = move_biases(CONFIG, params, {**loads, "mtp": []}, speed)
    np.testing.assert_array_equal(
        unmoved["mtp"][0]["ffn"]["gate"]["bias"], params["mtp"][0]["ffn"]["gate"]["bias"]
    )
    assert float(load_ratio(loads)) == 3.0


def test_windows_restart_with_every_document():
    batch = pack([documents([6, 9, 3]), documents([18], 1)], 20)
    windows = find_windows(batch, 4)
    assert windows.end_BC.tolist() == [[3, 9, 13, 20, 20], [3, 7, 11, 15, 20]]
    assert windows.segment_BC.tolist() == [[1, 2, 2, -1, -1], [1, 1, 1, 1, -1]]
    assert windows.start_BC.tolist() == [[0, 0, 4, 0, 0], [0, 4, 8, 12, 0]]
    assert windows.has_before_BC.tolist() == [[0, 0, 1, 0, 0], [0, 1, 1, 1, 0]]
    # the inverse of each gather: entry i of token t means that window entry i holds t
    for index, inverse in (
        (windows.own_Bn, windows.own_BT),
        (windows.before_Bn, windows.before_BT),
    ):
        for row in range(2):
            forward = {int(t): i for i, t in enumerate(index[row]) if t < 20}
            backward = {t: int(i) for t, i in enumerate(inverse[row]) if i < 20}
            assert forward == backward


def test_gather_has_a_gather_for_gradient():
    x = jnp.arange(12.0).reshape(4, 3)
    index, inverse = jnp.array([2, 9, 0]), jnp.array([2, 9, 0, 9])
    np.testing.assert_array_equal(take(x, index, inverse), [x[2], [0, 0, 0], x[0]])
    g = jax.grad(lambda x: (take(x, index, inverse) * jnp.arange(3.0)[:, None]).sum())(x)
    np.testing.assert_array_equal(g[:, 0], [2, 0, 0, 0])


@pytest.mark.parametrize("budget, smallest", [(1 << 24, 64), (70, 2)])
def test_log_probabilities_over_a_support(budget, smallest, monkeypatch):
    """Forward and gradient equal autodiff of a plain version; without ids all of them count."""
    monkeypatch.setattr(ce, "LOGIT_BUDGET", budget)
    monkeypatch.setattr(ce, "SMALLEST", smallest)
    rng = np.random.default_rng(0)
    y, head = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (7, 17))
    support = np.array([rng.choice(17, 5, replace=False) for _ in range(7)])
    target = jnp.asarray(support[:, 1], jnp.int32)
    support[2, 2:], support[4] = -1, -1
    kept = np.zeros((7, 17), bool)
    for row, ids in zip(kept, support, strict=True):
        row[ids[ids >= 0] if (ids >= 0).any() else slice(None)] = True
    weight = jnp.asarray(rng.normal(size=7) * (np.arange(7) != 3), jnp.float32)

    def plain(y, head, kept):
        logits = jnp.where(kept, y @ head.T, -1e30)
        return jax.nn.log_softmax(logits)[jnp.arange(7), target]

    for ids, mask in ((jnp.asarray(support, jnp.int32), kept), (None, np.ones_like(kept))):
        np.testing.assert_allclose(
            ce.log_probs(y, head, target, ids), plain(y, head, mask), rtol=1e-5, atol=1e-6
        )
        found = jax.grad(lambda *a, i=ids: (weight * ce.log_probs(*a, target, i)).sum(), (0, 1))
        wanted = jax.grad(lambda *a, m=mask: (weight * plain(*a, m)).sum(), (0, 1))
        for a, b in zip(found(y, head), wanted(y, head), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
