"""Guesses: tokens that are taken back leave nothing behind, and judging keeps the distribution."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import cache as store
from dsv4_jax import presets
from dsv4_jax.cache import init_cache
from dsv4_jax.config import Yarn
from dsv4_jax.model import draft, group_params, last_of, prefill
from dsv4_jax.sampling import SamplingParams, knobs_of, mask_words, sample_rows
from dsv4_jax.speculation import EMPTY, Guesses, check_rings, guess, judge
from tests.model.support import PLAIN, random_units

GUESSES, LENGTH, MAX_LEN = 3, 40, 48


@pytest.fixture(scope="module")
def narrow():
    """Every kind of layer; windows of 5, 8 and 6 tokens end at all kinds of positions."""
    return presets.tiny().replace(
        vocab_size=50,
        dim=16,
        num_layers=3,
        compress_ratios=(0, 4, 6, 0),
        num_heads=2,
        head_dim=8,
        rope_dim=4,
        q_rank=8,
        o_groups=1,
        o_rank=8,
        num_experts=4,
        expert_dim=8,
        window=5,
        index_heads=2,
        index_dim=8,
        index_topk=2,
        yarn=Yarn(original_len=16),
        dense_format=None,
        expert_format=None,
    )


@pytest.fixture(scope="module")
def params(narrow):
    return group_params(narrow, random_units(narrow).__getitem__, False)


@pytest.fixture(scope="module")
def step(narrow):
    return jax.jit(partial(prefill, narrow, PLAIN, all_logits=True))


def run_steps(step, params, cache, tokens_T, counts, junk):
    """Verifies `tokens_T` in steps of so many that stand; what is taken back is `junk`, if any.

    Returns logits `[tokens, V]` of those that stand, and the state.
    """
    logits, at = [], 0
    for count in counts:
        row = np.zeros((1, GUESSES + 1), np.int32)
        row[0, :count] = tokens_T[at : at + count]
        computed = count
        if junk is not None:
            row[0, count:], computed = junk[at : at + GUESSES + 1 - count], GUESSES + 1
        here = jnp.full(1, at, jnp.int32)
        out, cache = step(params, row, replace(cache, pos_B=here), jnp.int32([computed]))
        logits.append(np.asarray(out.logits[0, :count]))
        at += count
    return np.concatenate(logits), replace(cache, pos_B=jnp.full(1, at, jnp.int32))


def visible(cfg, cache):
    """All that the token at `pos_B` may still read, in order of positions."""
    end, seen = int(cache.pos_B[0]), []
    zero = store.Place(jnp.int32(0))
    for ratio, [layer] in zip(cfg.compress_ratios, cache.groups, strict=False):
        pieces = [(layer["window"], cfg.window - 1)]
        rings = [layer[name] for name in ("ring", "key_ring") if name in layer]
        for ring in rings:
            kept = end % ratio + store.pooled_tokens(ratio) - ratio
            pieces += [(ring[name], kept) for name in ring]
        for ring, count in pieces:
            if count:
                seen.append(store.ring_history(ring, zero, cache.pos_B, count, jnp.float32))
        seen += [layer[name][0, :, : end // ratio] for name in ("rows", "keys") if name in layer]
    return [np.asarray(a) for a in seen]


def test_what_is_taken_back_leaves_nothing_behind(narrow, params, step):
    """To the bit what it is where wrong guesses were never computed; and as one by one."""
    rng = np.random.default_rng(0)
    tokens, junk = rng.integers(0, 50, (2, LENGTH), np.int32)
    counts = [*rng.integers(1, GUESSES + 2, 100)]
    ends = np.cumsum(counts)
    counts = counts[: int(np.searchsorted(ends, LENGTH - GUESSES))]

    def empty(spare):
        return init_cache(narrow, 1, MAX_LEN, PLAIN, False, spare=spare)

    logits, cache = run_steps(step, params, empty(GUESSES), tokens, counts, junk)
    clean_logits, clean = run_steps(step, params, empty(GUESSES), tokens, counts, None)
    np.testing.assert_array_equal(logits, clean_logits)
    for a, b in zip(visible(narrow, cache), visible(narrow, clean), strict=True):
        np.testing.assert_array_equal(a, b)
    whole = np.zeros((1, LENGTH), np.int32)
    whole[0, : len(logits)] = tokens[: len(logits)]
    out, _ = step(params, whole, empty(0), jnp.int32([len(logits)]))
    np.testing.assert_allclose(logits, out.logits[0, : len(logits)], rtol=0, atol=2e-5)


def test_a_place_in_a_step_changes_no_bit(narrow, params, step):
    """So what a token is does not depend on which guesses stood before it."""
    tokens = np.random.default_rng(1).integers(0, 50, LENGTH, np.int32)
    results = []
    for counts in ([1] * 36, [2] * 18, [4] * 9, [3, 1] * 9):
        cache = init_cache(narrow, 1, MAX_LEN, PLAIN, False, spare=GUESSES)
        results.append(run_steps(step, params, cache, tokens, counts, tokens[::-1])[0])
    for logits in results[1:]:
        np.testing.assert_array_equal(logits, results[0])


@pytest.mark.parametrize("fresh", [1, 4, 20])
def test_the_block_computes_the_last_token_as_it_would_all(narrow, params, fresh):
    """Its logits and streams, and a cache with all of them in it; rows of no token stay as is."""
    rng, batch = np.random.default_rng(2), 3
    count_B = jnp.int32([0, fresh // 2 + 1, fresh])
    cache = init_cache(narrow, batch, MAX_LEN, PLAIN, False, spare=GUESSES)
    run = jax.jit(partial(draft, narrow, PLAIN), static_argnames="all_logits")

    def inputs(length):
        shape = batch, length
        streams = rng.normal(size=(*shape, narrow.hc_mult, narrow.dim)).astype(np.float32)
        return streams, rng.integers(0, 50, shape, np.int32)

    _, cache = run(params, *inputs(7), cache, jnp.int32([7, 3, 6]))
    new = inputs(fresh)
    last, cache_of_last = run(params, *new, cache, count_B)
    out, cache = run(params, *new, cache, count_B, all_logits=True)
    assert last.streams_BTMD.shape == (batch, 1, narrow.hc_mult, narrow.dim)
    for got, every in ((last.logits[:, None], out.logits), last[1:] + out[1:]):
        want = last_of(every, count_B)
        np.testing.assert_allclose(got[1:], want[1:], rtol=0, atol=2e-5)
    for a, b in zip(jax.tree.leaves(cache_of_last), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_rings_that_are_too_short_are_refused(narrow):
    check_rings(narrow, init_cache(narrow, 1, MAX_LEN, PLAIN, False, spare=GUESSES), 8)
    exact = init_cache(narrow, 1, MAX_LEN, PLAIN, False)
    check_rings(narrow, exact, 0)
    with pytest.raises(ValueError, match="a window of 5 entries is too short for 1 guesses.* 6"):
        check_rings(narrow, exact, 1)
    spared = init_cache(narrow, 1, MAX_LEN, PLAIN, False, spare=GUESSES)
    layers = [[dict(layer) for layer in group] for group in spared.groups]
    layers[2][0]["ring"] = exact.groups[2][0]["ring"]
    with pytest.raises(ValueError, match="a ring of 6 entries is too short for 2 guesses"):
        check_rings(narrow, replace(spared, groups=layers), 2)


# Judging, over a vocabulary of six.

P = np.array([0.35, 0.25, 0.2, 0.1, 0.07, 0.03])
AFTER = np.array([0.05, 0.1, 0.4, 0.3, 0.1, 0.05])  # of the second token
Q = np.array([0.1, 0.3, 0.05, 0.25, 0.2, 0.1])
DRAWS = 20_000
CHI_SQUARE_5 = 20.5  # exceeded by 0.1 % of samples with 5 degrees of freedom


@partial(jax.jit, static_argnums=0)
def both(rejects, knobs, counts):
    """A guess from Q for each row, what becomes of it, and the token without guesses."""
    words = jnp.full((DRAWS, mask_words(6)), 0xFFFFFFFF, jnp.uint32)
    uses, slots = jnp.zeros((DRAWS, 6), jnp.int32), jnp.arange(DRAWS)
    pos, ones = jnp.full(DRAWS, 7, jnp.int32), jnp.ones(DRAWS, jnp.int32)
    q_logits = jnp.broadcast_to(jnp.log(jnp.float32(Q)), (DRAWS, 6))
    token, q = guess(q_logits, pos + 1, knobs, words, uses, slots, rejects)
    logits = jnp.log(jnp.float32(np.stack([P, AFTER])))
    logits = jnp.broadcast_to(logits, (DRAWS, 2, 6))
    guesses = Guesses(token[:, None], None if q is None else q[:, None])
    judged = judge(logits, guesses, pos, counts, ones, knobs, words, uses, slots)
    return judged, token, sample_rows(logits[:, 0], pos + 1, knobs, words, uses, slots)


def drawn(rejects, temperature=1.0, count=2):
    """`both`, each row with its own seed."""
    settings = SamplingParams(1, temperature=temperature)
    knobs = knobs_of([(settings, np.zeros(2, np.uint32))], 1)
    knobs = knobs._replace(bias_ids_BJ=knobs.bias_ids_BJ[:, :1], bias_BJ=knobs.bias_BJ[:, :1])
    knobs = jax.tree.map(lambda a: np.repeat(a, DRAWS, axis=0), knobs)
    keys = np.random.default_rng(0).integers(0, 1 << 32, (DRAWS, 2), np.uint32)
    return jax.device_get(
        both(rejects, knobs._replace(keys_B2=keys), np.full(DRAWS, count, np.int32))
    )


def chi_square(tokens, chances):
    wanted = len(tokens) * chances
    return (((np.bincount(tokens, minlength=6) - wanted) ** 2) / wanted).sum()


def test_rejection_keeps_the_distribution():
    judged, token, _ = drawn(rejects=True)
    assert chi_square(token, Q) < CHI_SQUARE_5
    first, second = judged.tokens_BT.T
    assert chi_square(first, P) < CHI_SQUARE_5
    stood = judged.count_B == 2
    np.testing.assert_array_equal(first[stood], token[stood])
    assert chi_square(second[stood], AFTER) < CHI_SQUARE_5
    assert (second[~stood] == EMPTY).all()
    share = np.minimum(P, Q).sum()
    assert abs(stood.mean() - share) < 4 * np.sqrt(share * (1 - share) / DRAWS)
    # what stands and what is drawn anew are right given each guess, too
    for n in range(6):
        mine = token == n
        chance = min(1, P[n] / Q[n])
        spread = 4 * np.sqrt(chance * (1 - chance) / mine.sum())
        assert abs(stood[mine].mean() - chance) <= spread + 1e-9


def test_a_row_that_may_have_one_token_draws_it_as_it_is():
    judged, _, _ = drawn(rejects=True, count=1)
    assert (judged.count_B == 1).all()
    assert chi_square(judged.tokens_BT[:, 0], P) < CHI_SQUARE_5


def test_coupled_guesses_change_no_token():
    judged, token, plain = drawn(rejects=False)
    np.testing.assert_array_equal(judged.tokens_BT[:, 0], plain)
    stood = judged.count_B == 2
    np.testing.assert_array_equal(stood, token == plain)
    least = np.minimum(P, Q).sum()  # no way to judge can keep more
    assert 0.8 * least < stood.mean() < least + 0.01
    assert chi_square(judged.tokens_BT[stood, 1], AFTER) < CHI_SQUARE_5
    np.testing.assert_array_equal(
        judged.uses_SV[np.arange(DRAWS), judged.tokens_BT[:, 0]] >= 2, True
    )


@pytest.mark.parametrize("rejects", [False, True])
def test_without_temperature_only_the_best_guess_stands(rejects):
    judged, token, _ = drawn(rejects, temperature=0.0)
    assert (token == Q.argmax()).all() and (judged.count_B == 1).all()
    assert (judged.tokens_BT[:, 0] == P.argmax()).all()
