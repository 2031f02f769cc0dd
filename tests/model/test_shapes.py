"""Other sizes and schedules than the fixture's, against the float64 oracle.

Every number comes from the configuration; these have windows, ratios, stream counts, ranks and
limits that no released model has. Prompts run in uneven chunks, so state is used as well.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import presets
from dsv4_jax.cache import init_cache
from dsv4_jax.config import Yarn
from dsv4_jax.model import draft, group_params, prefill
from tests.model.oracle import Oracle
from tests.model.support import PLAIN, random_units, relative

MAX_RELATIVE = 1e-5
SLOW = pytest.mark.slow
LENGTH, WIDTH = 41, 16
COUNTS = (16, 7, 16, 2)  # 7 and 2 are padded

SMALL = presets.tiny().replace(
    vocab_size=40,
    dim=24,
    num_layers=2,
    compress_ratios=(4, 6),
    num_heads=4,
    head_dim=12,
    rope_dim=4,
    q_rank=10,
    o_groups=2,
    o_rank=6,
    num_experts=5,
    experts_per_token=2,
    expert_dim=20,
    num_hash_layers=1,
    num_mtp_layers=0,
    window=5,
    index_heads=3,
    index_dim=8,
    index_topk=3,
    swiglu_limit=1.0,
    hc_iters=7,
    yarn=Yarn(original_len=32),
    dense_format=None,
    expert_format=None,
)
MTP = SMALL.replace(num_mtp_layers=1, compress_ratios=(4, 6, 0))
CASES = {
    "odd sizes, three streams, MTP": MTP.replace(hc_mult=3),
    "one stream, one iteration, ratios 1 and 3": SMALL.replace(
        hc_mult=1, hc_iters=1, compress_ratios=(1, 3), num_hash_layers=0
    ),
    "window 1, ratio beyond the prompt, all hash, no clamp, no YaRN": SMALL.replace(
        window=1, compress_ratios=(4, 50), num_hash_layers=2, swiglu_limit=0.0, yarn=None
    ),
    "long window, all channels rotate, one index head, one row kept": SMALL.replace(
        window=64, head_dim=4, index_dim=4, index_heads=1, index_topk=1, compress_ratios=(4, 4)
    ),
    "FP8 and FP4 with ragged tiles": SMALL.replace(
        dim=160, expert_dim=96, q_rank=136, dense_format="fp8", expert_format="fp4", num_heads=2
    ),
    "FP8 with float32 scales, all experts, one output group, MTP": MTP.replace(
        dim=130,
        expert_dim=30,
        dense_format="fp8",
        expert_format="fp8",
        scale_dtype="float32",
        experts_per_token=5,
        o_groups=1,
        hc_eps=1e-2,
        norm_eps=1e-2,
        index_topk=40,
    ),
}


def run(cfg, units, ids):
    """Main and MTP logits at every position."""
    params = group_params(cfg, units.__getitem__)
    cache = init_cache(cfg, 1, LENGTH, PLAIN)

    @partial(jax.jit, donate_argnames="cache")
    def step(params, tokens_BT, next_BT, count_B, mtp_count_B, cache):
        out, cache = prefill(cfg, PLAIN, params, tokens_BT, cache, count_B, all_logits=True)
        if not cfg.num_mtp_layers:
            return out.logits[0], out.logits[0], cache
        mtp, cache = draft(
            cfg, PLAIN, params, out.streams_BTMD, next_BT, cache, mtp_count_B, all_logits=True
        )
        return out.logits[0], mtp.logits[0], cache

    logits, mtp_logits, start = [], [], 0
    for count in COUNTS:
        part = np.full(WIDTH + 1, 1, np.int32)
        known = ids[start : start + count + 1]
        part[: len(known)] = known
        counts = (jnp.full(1, n, jnp.int32) for n in (count, len(known) - 1))
        tokens = (jnp.asarray(part[None, :-1]), jnp.asarray(part[None, 1:]))
        main, mtp, cache = step(params, *tokens, *counts, cache=cache)
        logits.append(np.asarray(main[:count]))
        mtp_logits.append(np.asarray(mtp[: len(known) - 1]))
        start += count
    return np.concatenate(logits), np.concatenate(mtp_logits)


BY_DEFAULT = ("odd sizes", "FP8 and FP4")  # compiling takes the time


@pytest.mark.parametrize(
    "case",
    [case if case.startswith(BY_DEFAULT) else pytest.param(case, marks=SLOW) for case in CASES],
)
def test_sizes_come_from_the_configuration(case, within):
    cfg = CASES[case]
    units = random_units(cfg)
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, LENGTH).astype(np.int32)
    logits, mtp_logits = run(cfg, units, ids)
    oracle = Oracle(cfg, units)
    within(f"shapes: {case}, relative", relative(logits, oracle.logits(ids)), MAX_RELATIVE)
    if cfg.num_mtp_layers:
        error = relative(mtp_logits, oracle.mtp_logits(ids))
        within(f"shapes: {case}, MTP, relative", error, MAX_RELATIVE)


def test_the_oracle_agrees_with_the_recordings(model):
    """So that it may judge where nothing was recorded."""
    (prompt,) = [p for p in model.prompts if p.name == "p130"]
    expected, oracle = model.expected("float32"), Oracle(model.cfg, model.units)
    ids = np.array(prompt.tokens)
    got = oracle.logits(ids)[expected["p130/prefill_rows"]]
    assert np.abs(got - expected["p130/prefill"]).max() < 2e-5
    got = oracle.mtp_logits(ids)[expected["p130/mtp_prefill_rows"]]
    assert np.abs(got - expected["p130/mtp_prefill"]).max() < 2e-5
