"""Sampling against NumPy, and rows against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.sampling import (
    EVERYTHING,
    MAX_BIASED,
    SamplingParams,
    count_uses,
    knobs_of,
    logprobs_of,
    mask_words,
    sample_rows,
)

VOCAB, POSITION = 70, 5  # not a multiple of 32
sample_jit = jax.jit(sample_rows)


def run(logits_BV, settings, words=None, uses=None, keys=None):
    """Draws a row for each of the settings."""
    keys = keys or [params.key_words() for params in settings]
    size = len(settings)
    words = np.full((size, mask_words(VOCAB)), EVERYTHING, np.uint32) if words is None else words
    uses = np.zeros((size, VOCAB), np.int32) if uses is None else uses
    knobs = knobs_of(list(zip(settings, keys, strict=True)), size)
    positions, slots = jnp.full(size, POSITION), jnp.arange(size)
    return np.asarray(sample_jit(jnp.asarray(logits_BV), positions, knobs, words, uses, slots))


def logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def greedy(**settings) -> SamplingParams:
    return SamplingParams(1, temperature=0.0, **settings)


def softmax(x):
    exp = np.exp(x - x.max())
    return exp / exp.sum()


def test_bias_and_masks_move_the_best_token():
    x_V = logits(1)[0]
    order = np.argsort(-x_V)
    bias = tuple((int(token), -100.0) for token in order[:3])
    assert run([x_V], [greedy(logit_bias=bias)]) == order[3]
    words = np.zeros((1, mask_words(VOCAB)), np.uint32)
    for token in (order[5], order[9]):
        words[0, token // 32] |= np.uint32(1 << (token % 32))
    assert run([x_V], [greedy()], words) == order[5]
    assert run([x_V], [SamplingParams(1, seed=3)], words)[0] in (order[5], order[9])


def test_as_many_biased_ids_as_allowed_and_a_neighbour_without():
    size = MAX_BIASED + 100
    x_BV = np.random.default_rng(0).normal(0, 2, (2, size)).astype(np.float32)
    best = np.argsort(-x_BV[0])
    down = greedy(logit_bias=tuple((int(token), -100.0) for token in best[:MAX_BIASED]))
    plain = greedy()
    knobs = knobs_of([(down, down.key_words()), (plain, plain.key_words())], 2)
    words = np.full((2, mask_words(size)), EVERYTHING, np.uint32)
    uses = np.zeros((2, size), np.int32)
    drawn = sample_jit(x_BV, jnp.full(2, POSITION), knobs, words, uses, jnp.arange(2))
    assert drawn.tolist() == [best[MAX_BIASED], np.argmax(x_BV[1])]


def test_batches_without_bias_share_their_arrays():
    plain, biased = greedy(), greedy(logit_bias=((3, 1.0),))
    first, second = (knobs_of([(plain, plain.key_words())], 2) for _ in range(2))
    assert first.bias_BJ is second.bias_BJ and first.bias_ids_BJ is second.bias_ids_BJ
    assert not first.bias_BJ.flags.writeable
    third = knobs_of([(biased, biased.key_words())], 2)
    assert third.bias_BJ[0, 0] == 1 and not first.bias_BJ.any()


@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.4, "frequency_penalty": -1.0, "presence_penalty": 2.0},
    ],
)
def test_penalties_against_numpy(settings):
    rng = np.random.default_rng(1)
    prompt, generated = rng.integers(0, VOCAB, 12).tolist(), rng.integers(0, VOCAB, 9).tolist()
    uses = count_uses(prompt, generated, VOCAB)
    params = greedy(**settings)
    for seed in range(20):
        x_V = logits(1, seed)[0]
        want_V = x_V.copy()
        for token in {*prompt, *generated}:
            r = params.repetition_penalty
            want_V[token] = want_V[token] / r if want_V[token] > 0 else want_V[token] * r
        for token in generated:
            want_V[token] -= params.frequency_penalty
        for token in set(generated):
            want_V[token] -= params.presence_penalty
        assert run([x_V], [params], uses=uses[None]) == want_V.argmax()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}]
    + [{"top_k": 8, "min_p": 0.1, "top_p": 0.8, "temperature": 1.4}],
)
def test_frequencies_against_numpy(settings):
    params, draws = SamplingParams(1, **settings), 4000
    x_V = logits(1, seed=2)[0] / 2
    probs = softmax(x_V.astype(np.float64) / params.temperature)
    order = np.argsort(-probs)
    ranked = probs[order]
    ranked[params.top_k or VOCAB :] = 0
    ranked[ranked < params.min_p * ranked[0]] = 0
    ranked /= ranked.sum()
    ranked[(np.cumsum(ranked) - ranked) >= params.top_p] = 0
    ranked /= ranked.sum()
    keys = [SamplingParams(1, seed=seed).key_words() for seed in range(draws)]
    drawn = run(np.tile(x_V, (draws, 1)), [params] * draws, keys=keys)
    counts = np.bincount(drawn, minlength=VOCAB)[order]
    assert counts[ranked == 0].sum() == 0
    expected = draws * ranked
    likely = expected >= 5
    rest = counts[~likely].sum() - expected[~likely].sum()
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    chi2 += rest**2 / max(expected[~likely].sum(), 1)
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum() + 2)


ALL = [
    SamplingParams(1, seed=1),
    greedy(),
    SamplingParams(1, seed=2, top_p=0.5),
    SamplingParams(1, seed=3, top_k=5, min_p=0.1),
    SamplingParams(1, seed=4, presence_penalty=1.0, repetition_penalty=1.3),
    SamplingParams(1, seed=5, logit_bias=((3, 5.0), (60, -4.0)), logprobs=2),
]


def test_a_row_does_not_depend_on_what_its_neighbours_ask_for():
    rng = np.random.default_rng(0)
    uses = rng.integers(0, 4, (6, VOCAB)).astype(np.int32)
    masks = np.full((6, mask_words(VOCAB)), EVERYTHING, np.uint32)
    masks[1] = 0x0F0F0F0F
    for seed in range(20):
        x = logits(6, seed) * 3
        together = run(x, ALL, masks, uses)
        plain = [greedy()] * 6
        for i, params in enumerate(ALL):
            settings, words = list(plain), np.full_like(masks, EVERYTHING)
            settings[i], words[i] = params, masks[i]
            assert run(x, settings, words, uses)[i] == together[i]


def test_logprobs_against_numpy():
    x = logits(3)
    tokens = jnp.array([4, 0, 69])
    found = jax.device_get(logprobs_of(jnp.asarray(x), tokens))
    want = np.log(np.stack([softmax(row.astype(np.float64)) for row in x]))
    np.testing.assert_allclose(found.chosen, want[range(3), tokens], atol=1e-5)
    assert (found.top_ids == np.argsort(-x, axis=1)[:, :20]).all()
    np.testing.assert_allclose(found.top, -np.sort(-want, axis=1)[:, :20], atol=1e-5)


def test_keys_are_a_matter_of_the_seed():
    def words(seed):
        return SamplingParams(1, seed=seed).key_words().tolist()

    assert words(7) == words(7)
    assert len({tuple(words(seed)) for seed in (0, 1, -1, 2**31, 2**63 - 1, -(2**63))}) == 6
    assert words(None) != words(None)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": -1, "prompt_logprobs": 1}, "max_tokens=-1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1"),
        ({"logit_bias": tuple((i, 1.0) for i in range(MAX_BIASED + 1))}, "1025 ids"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "twice"),
        ({"logit_bias": ((1, float("inf")),)}, "must be finite"),
        ({"logit_bias": ((-1, 1.0),)}, "not negative"),
    ],
)
def test_bad_settings_are_named(settings, problem):
    with pytest.raises(ValueError, match=problem):
        SamplingParams(**({"max_tokens": 1} | settings))


def test_a_prompt_may_be_judged_without_an_answer():
    assert SamplingParams(0, prompt_logprobs=0).max_tokens == 0
