"""GRPO by hand: advantages, clipping, KL and the mask of sequences; and through the model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.training.grpo import (
    Drawn,
    Grpo,
    group_advantages,
    sequence_mean,
    token_terms,
)

LOG2 = math.log(2)


def test_advantages_of_a_group():
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1]), [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(
        group_advantages([3, 0, 0], True), [2**0.5, -(0.5**0.5)] + [-(0.5**0.5)]
    )
    np.testing.assert_array_equal(group_advantages([2, 2], True), [0, 0])


def hand(log_p, old, advantage, reference=None, drawn=None, segment=None, **config):
    """Terms of one row, its sequences given by `segment`."""
    shape = (1, len(log_p))
    segment = np.asarray(segment or [1] * len(log_p))
    same = jnp.asarray(segment[:, None] == segment[None], jnp.float32)

    def row(x):
        return jnp.asarray(x, jnp.float32).reshape(shape)

    noted = Drawn(
        jnp.ones(shape, bool) if drawn is None else jnp.asarray(drawn, bool).reshape(shape),
        row(old),
        None if reference is None else row(reference),
        row(advantage),
    )
    rule = Grpo(**{"kl": 0.0, **config})
    return lambda x: token_terms(rule, row(x), noted, lambda s: jnp.einsum("st,btn->bsn", same, s))


def test_ratios_and_clipping():
    """rho = 2, 1/2, 2, 1/2 with advantages 1, 1, -1, -1 and eps = 0.2.

    A good token's gain stops at 1.2, a bad one's at 0.8 · -1; the others are not held back.
    """
    log_p, advantage = [LOG2, -LOG2, LOG2, -LOG2], [1, 1, -1, -1]
    find = hand(log_p, [0] * 4, advantage, segment=[1, 2, 3, 4], clip=0.2)
    terms = find(jnp.asarray(log_p))
    np.testing.assert_allclose(terms.loss[0], [-1.2, -0.5, 2.0, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(terms.clipped[0], [1, 0, 0, 1])
    g = jax.grad(lambda x: find(x).loss.sum())(jnp.asarray(log_p))
    np.testing.assert_allclose(g, [0, -0.5, 2.0, 0], rtol=1e-6)


def test_the_kl_term():
    """u = 2 and rho = 1/2: rho (u - log u - 1) = (1 - log 2) / 2; its slope is rho · -log u."""
    find = hand([-2 * LOG2], [-LOG2], [0.0], reference=[-LOG2], kl=0.3)
    terms = find(jnp.asarray([-2 * LOG2]))
    np.testing.assert_allclose(terms.kl[0, 0], (1 - LOG2) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms.loss[0, 0], 0.3 * (1 - LOG2) / 2, rtol=1e-6)
    g = jax.grad(lambda x: find(x).loss.sum())(jnp.asarray([-2 * LOG2]))
    np.testing.assert_allclose(g, [0.3 * 0.5 * -LOG2], rtol=1e-6)


def test_the_kl_term_and_its_slope_are_right_on_average():
    """Over tokens drawn from p_old their means are KL(p ‖ p_ref) and its gradient by the logits."""
    rng = np.random.default_rng(0)
    logits, old, ref = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(3))
    old_p = jax.nn.softmax(old)

    def mean(logits):  # every token once, weighted by its probability
        log_p = jax.nn.log_softmax(logits)
        find = hand(
            np.zeros(5),
            jax.nn.log_softmax(old),
            np.zeros(5),
            jax.nn.log_softmax(ref),
            segment=[1, 2, 3, 4, 5],
            kl=1.0,
        )
        return (old_p * find(log_p).loss[0]).sum()

    def kl(logits):
        log_p = jax.nn.log_softmax(logits)
        return (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(ref))).sum()

    np.testing.assert_allclose(mean(logits), kl(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(mean)(logits), jax.grad(kl)(logits), atol=1e-6)


def test_bad_sequences_far_from_the_model_are_left_out():
    """log(p_old / p) is 1 and 3 in the first two sequences (means 2), 0.5 in the third.

    With delta = 1 the first, which was good, stays; the second, which was bad, goes (M = 0); the
    third stays. The KL term of a sequence that goes stays.
    """
    old = [0.0] * 6
    log_p = [-1.0, -3.0, -1.0, -3.0, -0.5, -0.5]
    advantage = [1.0, 1.0, -1.0, -1.0, -1.0, -1.0]
    segment = [1, 1, 2, 2, 3, 3]
    find = hand(log_p, old, advantage, segment=segment, mask_above=1.0)
    terms = find(jnp.asarray(log_p))
    e = np.exp(log_p)
    np.testing.assert_array_equal(terms.masked[0], [0, 0, 1, 1, 0, 0])
    np.testing.assert_allclose(terms.loss[0], [-e[0], -e[1], 0, 0, e[4], e[5]], rtol=1e-6)
    g = jax.grad(lambda x: find(x).loss.sum())(jnp.asarray(log_p))
    np.testing.assert_array_equal(g[2:4], [0, 0])
    assert np.abs(g[jnp.asarray([0, 1, 4, 5])]).min() > 0
    # two tokens each: the mean of a sequence, then of three
    loss = sequence_mean(terms, terms.loss, jnp.float32(3))
    np.testing.assert_allclose(loss, (-(e[0] + e[1]) + e[4] + e[5]) / 2 / 3, rtol=1e-6)
    at_the_border = hand(log_p, old, advantage, segment=segment, mask_above=2.0)
    assert not at_the_border(jnp.asarray(log_p)).masked.any()
    held = hand(
        log_p, old, advantage, reference=np.zeros(6), segment=segment, mask_above=1.0, kl=1.0
    )(jnp.asarray(log_p))
    np.testing.assert_allclose(held.loss[0, 2], np.exp(-1) * (np.e - 1 - 1), rtol=1e-5)


def test_what_was_not_drawn_has_no_part_and_nothing_overflows():
    drawn = [1, 1, 0, 0]
    log_p = jnp.asarray([-1.0, 300.0, -50.0, -jnp.inf])
    find = hand(log_p, [-1.0, -300.0, 7.0, 0.0], [1.0] * 4, [-1.0, -900.0, 0.0, 0.0], drawn, kl=0.1)
    terms, g = find(log_p), jax.grad(lambda x: find(x).loss.sum())(log_p)
    assert all(np.isfinite(x).all() for x in (*terms, g))
    assert not any(np.asarray(x)[0, 2:].any() for x in terms) and not g[2:].any()
    np.testing.assert_allclose(terms.share[0], [0.5, 0.5, 0, 0])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"clip": 0}, "objective.clip=0 must be positive"),
        ({"kl": -1.0}, "objective.kl=-1.0"),
        ({"mask_above": math.nan}, "mask_above=nan"),
        ({"kl": 0.0, "reference": "runs/x"}, "reference is for the KL term"),
    ],
)
def test_impossible_settings(fields, said):
    with pytest.raises(ValueError, match=said):
        Grpo(**fields)
