"""Reverse KL over the vocabulary: closed form, autodiff of a plain version, tiles and weights."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.training import distill
from dsv4_jax.training.distill import reverse_kl, token_kl

TOKENS, VOCAB, DIM, OTHER_DIM = 11, 37, 8, 6


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((TOKENS, DIM), (VOCAB, DIM), (TOKENS, OTHER_DIM), (VOCAB, OTHER_DIM))
    found = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    weight = rng.uniform(size=TOKENS) * (np.arange(TOKENS) % 3 > 0)
    return [*found, jnp.asarray(weight, jnp.float32)]


def plain(y, head, other, other_head, weight):
    log_p = jax.nn.log_softmax(y @ head.T)
    log_q = jax.nn.log_softmax(other @ other_head.T)
    return (weight * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)).sum()


@pytest.mark.parametrize("budget, smallest", [(1 << 24, 64), (1, 64), (30, 2)])
def test_equals_autodiff_of_a_plain_version(budget, smallest, monkeypatch):
    """Whole, in tiles that do not divide the vocabulary, and in slices of few tokens."""
    monkeypatch.setattr(distill, "LOGIT_BUDGET", budget)
    monkeypatch.setattr(distill, "SMALLEST", smallest)
    monkeypatch.setattr(distill, "LEAST_TILE", 10)
    args = arrays()
    expected, wanted = jax.value_and_grad(plain, argnums=(0, 1))(*args)
    for scale in (1, 2):
        found, got = jax.value_and_grad(
            lambda *a, s=scale: s * reverse_kl(*a), argnums=(0, 1, 2, 3)
        )(*args)
        np.testing.assert_allclose(found, scale * expected, rtol=1e-5)
        for a, b in zip(got[:2], wanted, strict=True):
            np.testing.assert_allclose(a, scale * b, atol=2e-5)
        assert not any(np.asarray(g).any() for g in got[2:])  # the teacher does not learn
    np.testing.assert_allclose(reverse_kl(*args), expected, rtol=1e-5)


def test_gradient_is_the_closed_form():
    """∂KL/∂logit = p · (log p − log q − KL), in float64 by numpy."""
    y, head, other, other_head, weight = (np.asarray(a, np.float64) for a in arrays(1))

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(y @ head.T), log_softmax(other @ other_head.T)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1, keepdims=True)
    g = np.exp(log_p) * (log_p - log_q - kl) * weight[:, None]
    got = jax.grad(reverse_kl, argnums=(0, 1))(*arrays(1))
    np.testing.assert_allclose(got[0], g @ head, atol=2e-5)
    np.testing.assert_allclose(got[1], g.T @ y, atol=2e-5)
    np.testing.assert_allclose(token_kl(*arrays(1)[:4]), kl[:, 0], rtol=1e-4)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    y, head, _, _, weight = arrays()
    loss, grads = jax.value_and_grad(reverse_kl, argnums=(0, 1))(y, head, y, head, weight)
    np.testing.assert_allclose(loss, 0, atol=1e-5)
    assert max(np.abs(g).max() for g in grads) < 1e-5


def test_tokens_without_a_weight_are_not_read(monkeypatch):
    monkeypatch.setattr(distill, "SMALLEST", 2)
    y, head, other, other_head, _ = arrays()
    weight = jnp.asarray(np.isin(np.arange(TOKENS), (1, 4)), jnp.float32)
    hidden = jnp.where(weight[:, None] > 0, y, jnp.nan)
    loss, g = jax.value_and_grad(reverse_kl)(hidden, head, other, other_head, weight)
    np.testing.assert_allclose(loss, plain(y, head, other, other_head, weight), rtol=1e-5)
    assert np.isfinite(g).all() and not np.asarray(g)[weight == 0].any()


def test_logits_of_whole_rows_never_exist(monkeypatch):
    """Nothing in the program is as large as tokens × vocabulary."""
    monkeypatch.setattr(distill, "LOGIT_BUDGET", 1)
    monkeypatch.setattr(distill, "LEAST_TILE", 5)
    monkeypatch.setattr(distill, "SMALLEST", 1)
    program = jax.make_jaxpr(jax.value_and_grad(reverse_kl, argnums=(0, 1)))(*arrays())

    found = [
        math.prod(map(int, size.split(",")))
        for size in re.findall(r"f32\[([0-9,]+)\]", str(program))
    ]
    assert VOCAB * DIM in found and max(found) < TOKENS * VOCAB


def test_bfloat16_states_have_float32_sums():
    args = arrays()
    rounded = [args[0].astype(jnp.bfloat16), args[1], args[2].astype(jnp.bfloat16), *args[3:]]
    loss, grads = jax.value_and_grad(reverse_kl, argnums=(0, 1))(*rounded)
    assert (loss.dtype, grads[0].dtype, grads[1].dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(loss, plain(*args), rtol=0.02)


def test_vocabularies_must_agree():
    y, head, other, other_head, weight = arrays()
    with pytest.raises(ValueError, match="vocabulary of 36 cannot teach a student with one of 37"):
        reverse_kl(y, head, other, other_head[:-1], weight)
