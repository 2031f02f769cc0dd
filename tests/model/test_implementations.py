"""The whole model through the kernels, interpreted, on the fixtures: the bars of test_logits.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache import init_cache, init_paged_cache
from dsv4_jax.model import prefill
from dsv4_jax.numerics import Numerics
from pallas_kernels.sparse_attention import tuning
from tests.model.support import Runner, relative, row_cosines

MAX_ABS = 2e-4  # of a spread of 2.5
MIN_COSINE = 0.97
MAX_RELATIVE = 1e-5  # between implementations, float32
SLOTS, SLOT = 3, 2


def prompts(model, *names):
    return [prompt for prompt in model.prompts if prompt.name in names]


@pytest.mark.slow
def test_plain_prefill(model, within):
    """All layer kinds in float32: attention kernels, with a real choice of the indexer."""
    (prompt,) = prompts(model, "p130")
    num = Numerics("plain", "float32", "interpret")
    tokens_BT = jnp.asarray([prompt.tokens], jnp.int32)
    cache = init_cache(model.cfg, 1, len(prompt.tokens), num)

    @jax.jit
    def run(params, tokens_BT, cache):
        return prefill(model.cfg, num, params, tokens_BT, cache, all_logits=True)[0].logits

    logits = np.asarray(run(model.params, tokens_BT, cache))[0]
    expected = model.expected("float32")
    rows, want = expected["p130/prefill_rows"], expected["p130/prefill"]
    error = np.abs(logits[rows] - want).max()
    within("checkpoint: plain float32 through kernels, p130 prefill, absolute", error, MAX_ABS)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint_base"])
@pytest.mark.parametrize("chunk", [0, 64])
def test_plain_logits(folder, chunk, models, within):
    """Prefill in any chunking and decoding, main and MTP; also beside the other implementation."""
    model = models(folder)
    few = prompts(model, "p3", "p130") or model.prompts[-2:]
    runs = {}
    for name in ("reference", "interpret"):
        runner = Runner(model, Numerics("plain", "float32", name), few)
        runs[name] = runner.run(chunk or runner.longest, decode=True)
    expected = model.expected("float32")
    for prompt in few:
        for part in ("prefill", "decode", "mtp_prefill", "mtp_decode"):
            key = f"{prompt.name}/{part}"
            rows, want = expected[f"{key}_rows"], expected[key]
            got, other = (run.part(prompt.name, part)[rows] for run in runs.values())
            case = f"{folder}: plain float32 through kernels, {part} in chunks of {chunk or 'all'}"
            within(f"{case}, absolute", np.abs(other - want).max(initial=0), MAX_ABS)
            if len(rows):
                within(f"{case}, beside reference, relative", relative(other, got), MAX_RELATIVE)


@pytest.mark.slow
def test_reading_only_groups_with_chosen_rows_changes_nothing(model, within, monkeypatch):
    """Prefill and decoding on both sides of the crossover, 2 groups of 128 rows for p517."""
    few = prompts(model, "p130", "p517")
    expected, runs = model.expected("float32"), []
    for group_ns in (0.0, 1e9):  # what a group costs beside its copies
        chip = tuning.Tuning(group_ns, most=1.0, least_groups=1)
        monkeypatch.setattr(tuning, "of_this_chip", lambda chip=chip: chip)
        runner = Runner(model, Numerics("plain", "float32", "interpret"), few)
        runs.append(runner.run(runner.longest, decode=True))
    for prompt in few:
        rows, want = (expected[f"{prompt.name}/decode{end}"] for end in ("_rows", ""))
        got = [run.part(prompt.name, "decode")[rows] for run in runs]
        case = "checkpoint: plain float32 through kernels, groups with chosen rows, decode"
        for other in got:
            within(f"{case}, absolute", np.abs(other - want).max(initial=0), MAX_ABS)
            within(f"{case}, beside all rows, relative", relative(other, got[0]), MAX_RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint_base"])
def test_rounded_logits(folder, models, within):
    """bfloat16 with the official rounding: every kernel, packed rows, FP4 keys and experts."""
    model = models(folder)
    few = prompts(model, "p130") or model.prompts[-1:]
    runner = Runner(model, Numerics("reference", "bfloat16", "interpret"), few)
    run, expected = runner.run(runner.longest, decode=True), model.expected("quantised")
    for part in ("prefill", "decode", "mtp_prefill", "mtp_decode"):
        pairs = []
        for prompt in few:
            rows = expected[f"{prompt.name}/{part}_rows"]
            want = expected[f"{prompt.name}/{part}"].astype(np.float32)
            pairs.append((run.part(prompt.name, part)[rows], want))
        got, want = (np.concatenate(column) for column in zip(*pairs, strict=True))
        case = f"{folder}: reference bfloat16 through kernels, {part}, 1 - mean row cosine"
        within(case, 1 - row_cosines(got, want).mean(), 1 - MIN_COSINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "num, name, page",
    [
        (Numerics("plain", "float32", "interpret"), "p517", 512),
        (Numerics("reference", "bfloat16", "interpret"), "p517", 512),
    ],
    ids=["plain", "packed"],
)
def test_slots_and_pages_change_nothing(num, name, page, model):
    """Pages in any order, a ring in any slot: prefill and a decoding step equal to the bit."""
    (prompt,) = prompts(model, name)
    cfg, ids = model.cfg, prompt.ids
    size = len(prompt.tokens)

    def two_steps(cache):
        @jax.jit
        def run(params, tokens_BT, cache):
            out, cache = prefill(cfg, num, params, tokens_BT, cache)
            return out.logits, cache

        first, cache = run(model.params, jnp.asarray(ids[None, :size]), cache)
        second, _ = run(model.params, jnp.asarray(ids[None, size : size + 1]), cache)
        return np.asarray(first), np.asarray(second)

    paged = init_paged_cache(cfg, SLOTS, 5, page, num)
    paged = dataclasses.replace(
        paged,
        pos_B=jnp.zeros(1, jnp.int32),
        slots_B=jnp.asarray([SLOT], jnp.int32),
        table_BP=jnp.asarray([[3, 1]], jnp.int32),
    )
    for got, want in zip(
        two_steps(paged), two_steps(init_cache(cfg, 1, 2 * page, num)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="implementation='mosaic' must be None or one of"):
        Numerics(implementation="mosaic")
    assert Numerics(implementation="reference").kernels is None
    assert Numerics().kernels is None  # on CPU
    assert Numerics("plain", "float32", "interpret").matrix_kernels is None
