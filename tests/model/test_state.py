"""Ourselves against ourselves: state, chunks, batches, padding, tiles; float32 without rounding.

The fixture checkpoint runs with the prompts of the fixture, and prefixes of the longest one at the
lengths where windows and compressed rows begin and end, each continued by four decoded tokens.
"""

from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import attention, indexer, presets
from dsv4_jax import cache as store
from dsv4_jax.cache import init_cache, init_paged_cache
from dsv4_jax.config import Yarn
from dsv4_jax.model import decode_step, forward, group_params, prefill
from dsv4_jax.numerics import Numerics
from tests.model.oracle import Oracle
from tests.model.support import CHUNKS, LENGTHS, PLAIN, REFERENCE, Runner, random_units, relative

MAX_RELATIVE = 1e-5


def rows_of(tree, row):
    """Arrays of one sequence; the batch is dimension 1 of a layer's arrays."""
    layers = jax.tree.map(lambda a: np.array(a[:, row]), (tree.groups, tree.mtp))
    return [np.array(tree.pos_B[row]), np.array(tree.mtp_pos_B[row]), *jax.tree.leaves(layers)]


def assert_same_state(got, want):
    """Equal to the bit, whatever the dtype."""
    for a, b in zip(got, want, strict=True):
        assert a.tobytes() == b.tobytes()


def state_error(got, want):
    return max(
        relative(a.astype(np.float64), b.astype(np.float64)) if np.any(b) else float(np.any(a))
        for a, b in zip(got, want, strict=True)
    )


# -- chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_equal_one_prefill(chunk, runs, within):
    """Logits at every position, and the state behind every prompt."""
    whole, parts = runs("checkpoint", PLAIN), runs("checkpoint", PLAIN, chunk)
    for row, prompt in enumerate(whole.prompts):
        size = len(prompt.tokens)
        for kind in ("main", "mtp"):
            got, want = (getattr(run, kind)[row, :size] for run in (parts, whole))
            case = f"state: chunks of {chunk} vs one prefill, {kind} logits, relative"
            within(case, relative(got, want), MAX_RELATIVE)
        error = state_error(rows_of(parts.prompt_cache, row), rows_of(whole.prompt_cache, row))
        within(f"state: chunks of {chunk} vs one prefill, state, relative", error, MAX_RELATIVE)


def test_decoding_across_every_boundary_equals_prefill(runs, within):
    """The tokens behind each prefix, one by one, give what the whole prompt gave there."""
    run = runs("checkpoint", PLAIN)
    names = [p.name for p in run.prompts]
    whole = run.main[names.index("p517")]
    for length in LENGTHS:
        row = names.index(f"first{length}")
        got, want = run.main[row, : len(run.prompts[row].ids)], whole[: len(run.prompts[row].ids)]
        within(
            "state: prefix and decoding vs whole prompt, relative",
            relative(got, want),
            MAX_RELATIVE,
        )


def test_any_schedule(runners, runs, within):
    """Random counts per sequence and step: all stand at different positions, some pause.

    Whoever pauses or has finished keeps its state to the bit.
    """
    runner, whole = runners("checkpoint", PLAIN), runs("checkpoint", PLAIN)
    rng = np.random.default_rng(0)
    size = np.array([len(p.tokens) for p in runner.prompts], np.int32)
    start, cache = np.zeros_like(size), runner.empty()
    while (start < size).any():
        count = np.minimum(size - start, rng.integers(1, 65, len(size)))
        count = np.where(rng.uniform(size=len(size)) < 0.3, 0, count).astype(np.int32)
        before = jax.tree.map(np.array, cache)
        main, _, cache = runner.feed(cache, start, count, 64)
        after = jax.tree.map(np.array, cache)
        for row in range(len(size)):
            if not count[row]:
                assert_same_state(rows_of(after, row), rows_of(before, row))
                continue
            got = np.asarray(main[row, : count[row]])
            want = whole.main[row, start[row] : start[row] + count[row]]
            error = np.abs(got - want).max() / np.abs(whole.main[row]).max()
            within("state: random schedules vs one prefill, relative", error, MAX_RELATIVE)
        start += count


# -- batches -------------------------------------------------------------------------------------


def test_a_prompt_alone_equals_the_prompt_in_a_batch(model, runs, within):
    whole = runs("checkpoint", PLAIN)
    (prompt,) = [p for p in model.prompts if p.name == "p130"]
    row = [p.name for p in whole.prompts].index(prompt.name)
    run = Runner(model, PLAIN, [prompt]).run(64, decode=False)
    size = len(prompt.tokens)
    error = relative(run.main[0, :size], whole.main[row, :size])
    within("state: alone vs in a batch, relative", error, MAX_RELATIVE)


def test_inactive_rows_keep_packed_state(runners, runs):
    """Nothing is written for sequences without new tokens, in prefill and in decoding."""
    runner, run = runners("checkpoint", REFERENCE), runs("checkpoint", REFERENCE)
    nothing = np.zeros(len(runner.prompts), np.int32)
    for width in (runner.longest, 1):
        cache = jax.tree.map(jnp.array, run.prompt_cache)
        _, _, cache = runner.feed(cache, nothing, nothing, width)
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(run.prompt_cache), strict=True):
            assert np.asarray(a).tobytes() == b.tobytes()


def test_slots_are_reused_without_clearing(runners, runs):
    """Position 0 is all a new sequence needs: nothing of the last one can be seen."""
    runner, dirty = runners("checkpoint", PLAIN), runs("checkpoint", PLAIN).prompt_cache
    zero = np.zeros(len(runner.prompts), np.int32)
    used = replace(jax.tree.map(jnp.array, dirty), pos_B=jnp.array(zero), mtp_pos_B=jnp.array(zero))
    others = replace(runner, prompts=runner.prompts[::-1])
    fresh, size = runner.empty(), np.array([len(p.tokens) for p in others.prompts], np.int32)
    start = np.zeros_like(size)
    for _ in range(3):
        count = np.clip(size - start, 0, 64).astype(np.int32)
        *got, used = others.feed(used, start, count, 64)
        *want, fresh = others.feed(fresh, start, count, 64)
        for a, b in zip(got, want, strict=True):
            for row in range(len(count)):
                np.testing.assert_array_equal(a[row, : count[row]], b[row, : count[row]])
        start += count


def test_padding_tokens_do_not_matter(runners):
    runner = runners("checkpoint", PLAIN)
    size = np.array([len(p.tokens) for p in runner.prompts], np.int32)
    start, count = np.zeros_like(size), np.minimum(size, 60).astype(np.int32)
    results = [runner.feed(runner.empty(), start, count, 64, junk) for junk in (3, 250)]
    (main, mtp, cache), (other_main, other_mtp, other_cache) = results
    for row in range(len(count)):
        np.testing.assert_array_equal(main[row, : count[row]], other_main[row, : count[row]])
        np.testing.assert_array_equal(mtp[row, : count[row] - 1], other_mtp[row, : count[row] - 1])
        assert_same_state(rows_of(cache, row), rows_of(other_cache, row))


def test_the_future_is_invisible(runners):
    """Another token at one place changes nothing in front of it, and something behind it."""
    runner = runners("checkpoint", PLAIN)
    (row,) = [i for i, p in enumerate(runner.prompts) if p.name == "p300"]
    prompt = runner.prompts[row]
    at = 77
    tokens = [*prompt.tokens[:at], (prompt.tokens[at] + 1) % 320, *prompt.tokens[at + 1 :]]
    changed = list(runner.prompts)
    changed[row] = replace(prompt, tokens=tokens)
    start = np.zeros(len(changed), np.int32)
    count = np.minimum([len(p.tokens) for p in changed], 128).astype(np.int32)
    main, mtp, _ = runner.feed(runner.empty(), start, count, 128)
    other, other_mtp, _ = replace(runner, prompts=changed).feed(runner.empty(), start, count, 128)
    np.testing.assert_array_equal(main[row, :at], other[row, :at])
    assert (np.asarray(main[row, at]) != np.asarray(other[row, at])).any()
    # row i of the MTP block sees token i + 1
    np.testing.assert_array_equal(mtp[row, : at - 1], other_mtp[row, : at - 1])
    assert (np.asarray(mtp[row, at - 1]) != np.asarray(other_mtp[row, at - 1])).any()


# -- tiles, scanning, selection: a narrow model with repeating layers ----------------------------


@pytest.fixture(scope="module")
def narrow():
    """Two kinds of layers, twice; 2 of up to 12 rows are selected; odd sizes throughout."""
    return presets.tiny().replace(
        vocab_size=50,
        dim=32,
        num_layers=4,
        num_mtp_layers=0,
        compress_ratios=(4, 6, 4, 6),
        num_heads=2,
        head_dim=24,
        rope_dim=8,
        q_rank=16,
        o_groups=1,
        o_rank=8,
        num_experts=4,
        expert_dim=32,
        num_hash_layers=0,
        window=5,
        index_heads=2,
        index_dim=8,
        index_topk=2,
        yarn=Yarn(original_len=16),
        dense_format=None,
        expert_format=None,
    )


@pytest.fixture(scope="module")
def tokens_BT(narrow):
    return jnp.asarray(np.random.default_rng(1).integers(0, narrow.vocab_size, (2, 48), np.int32))


def paged_cache(cfg):
    """Two sequences in slots 2 and 0 of three, their pages of 12 tokens in any order."""
    cache = init_paged_cache(cfg, slots=3, pages=11, page_tokens=12, num=PLAIN)
    zero = np.zeros(2, np.int32)
    return replace(
        cache,
        pos_B=jnp.array(zero),
        mtp_pos_B=jnp.array(zero),
        slots_B=jnp.int32([2, 0]),
        table_BP=jnp.int32([[7, 3, 10, 1, 0], [2, 9, 4, 8, 0]]),
    )


def narrow_logits(cfg, tokens_BT, num=PLAIN, scan=True, max_len=48, paged=False):
    """All logits of a prefill in two unequal chunks."""
    params = group_params(cfg, random_units(cfg).__getitem__, scan)
    cache = paged_cache(cfg) if paged else init_cache(cfg, 2, max_len, num, scan)
    run = jax.jit(partial(prefill, cfg, num, all_logits=True))
    logits = []
    for part in (tokens_BT[:, :29], tokens_BT[:, 29:]):
        count_B = jnp.full(2, part.shape[1], jnp.int32)
        padded = jnp.pad(part, ((0, 0), (0, 29 - part.shape[1])))
        out, cache = run(params, padded, cache, count_B)
        logits.append(np.asarray(out.logits[:, : part.shape[1]]))
    return np.concatenate(logits, axis=1)


@pytest.fixture(scope="module")
def narrow_reference(narrow, tokens_BT):
    """Whole sequences at once."""
    params = group_params(narrow, random_units(narrow).__getitem__)
    return np.asarray(jax.jit(partial(forward, narrow, PLAIN))(params, tokens_BT))


VARIANTS = {
    "layers unrolled, rows gathered": {"scan": False, "dense": 0, "tiles": (12, 3), "span": 6},
    "large caches, small tiles": {"max_len": 3000, "tiles": (4, 3)},
    "slots and pages": {"paged": True, "tiles": (4, 6)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_may_not_matter(variant, narrow, tokens_BT, narrow_reference, within):
    """Whether layers are scanned, what a cache could hold, how rows are read and where they lie."""
    options = dict(VARIANTS[variant])
    queries, rows = options.pop("tiles", (attention.QUERY_TILE, store.ROW_TILE))
    dense = options.pop("dense", attention.DENSE_FACTOR)
    span = options.pop("span", indexer.SPAN)
    with (
        mock.patch.object(indexer, "SPAN", span),
        mock.patch.object(attention, "QUERY_TILE", queries),
        mock.patch.object(store, "ROW_TILE", rows),
        mock.patch.object(attention, "DENSE_FACTOR", dense),
    ):
        got = narrow_logits(narrow, tokens_BT, **options)
    within(f"state: {variant}, relative", relative(got, narrow_reference), MAX_RELATIVE)


def test_selection_matters_in_the_narrow_model(narrow, tokens_BT, narrow_reference):
    """Else the test above would show nothing about it."""
    ids = np.asarray(tokens_BT[0])
    largest = np.abs(narrow_reference[0]).max()
    for keep, agrees in ((narrow.index_topk, True), (12, False)):
        want = Oracle(narrow.replace(index_topk=keep), random_units(narrow)).logits(ids)
        error = np.abs(narrow_reference[0] - want).max(axis=-1) / largest
        assert error[:11].max() < MAX_RELATIVE  # up to two rows are visible
        assert (error[12:].max() < MAX_RELATIVE) == agrees


def test_decoding_with_pauses(narrow, tokens_BT, narrow_reference, within):
    """Single tokens of active rows."""
    params = group_params(narrow, random_units(narrow).__getitem__)
    step = jax.jit(partial(decode_step, narrow, PLAIN), donate_argnames="cache")
    cache = init_cache(narrow, 2, 48, PLAIN)
    at, ids = np.zeros(2, np.int32), np.asarray(tokens_BT)
    for turn in range(40):
        active = np.array([True, turn % 3 != 1])
        tokens_B = jnp.asarray(ids[np.arange(2), at])
        out, cache = step(params, tokens_B, cache=cache, active_B=jnp.asarray(active))
        for row in np.flatnonzero(active):
            error = np.abs(np.asarray(out.logits[row]) - narrow_reference[row, at[row]]).max()
            error /= np.abs(narrow_reference).max()
            within("state: decoding with pauses, relative", error, MAX_RELATIVE)
        at += active
        assert cache.pos_B.tolist() == at.tolist()


@dataclass(frozen=True)
class Unpacked(Numerics):
    """Reference rounding with caches that hold plain bfloat16."""

    @property
    def packed_cache(self) -> bool:
        return False


def test_packed_caches_change_nothing(narrow, tokens_BT):
    """FP8 and FP4 codes give back what was rounded: logits are equal to the bit."""
    cfg = narrow.replace(num_layers=2, compress_ratios=(4, 6))
    caches = [init_cache(cfg, 1, 48, num).groups[0][0] for num in (REFERENCE, Unpacked())]
    assert isinstance(caches[0]["window"], store.PackedRows)
    assert not isinstance(caches[1]["keys"], store.PackedKeys)
    packed, unpacked = (narrow_logits(cfg, tokens_BT, num) for num in (REFERENCE, Unpacked()))
    np.testing.assert_array_equal(packed, unpacked)


def test_cache_lengths_are_checked(narrow):
    for wrong in (0, narrow.max_len + 1):
        with pytest.raises(ValueError, match=f"max_len={wrong}"):
            init_cache(narrow, 1, wrong, PLAIN)


# -- memory --------------------------------------------------------------------------------------


def shapes_in(jaxpr):
    """Shapes of every intermediate result, in all nested functions and loops."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


@pytest.mark.parametrize("num", [PLAIN, REFERENCE], ids=["plain", "reference"])
def test_no_array_of_all_queries_and_all_rows(num, model):
    """A prefill of 6,144 tokens forms nothing that grows with the square of the length."""
    cfg, size = model.cfg.replace(max_len=8192), 6144
    cache = jax.eval_shape(lambda: init_cache(cfg, 1, size, num))
    tokens = jax.ShapeDtypeStruct((1, size), jnp.int32)
    traced = jax.make_jaxpr(partial(prefill, cfg, num))(model.params, tokens, cache)
    shapes = set(shapes_in(traced.jaxpr))
    assert any(size in shape for shape in shapes)
    rows = size // 4  # of ratio 4, more than any width of the model
    for shape in shapes:
        large = [n for n in shape if n >= rows]
        assert len(large) < 2 or max(large) < size, f"an array of shape {shape}"
