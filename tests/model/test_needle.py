"""Needles in a long prompt: rows that the indexer keeps are those that an exact scorer would."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache import init_cache
from dsv4_jax.config import CSA
from dsv4_jax.model import group_params, prefill
from tests.model.capture import recording
from tests.model.long_context import narrow_config
from tests.model.oracle import Oracle
from tests.model.support import PLAIN, REFERENCE, random_units

DEPTHS = (0.02, 0.25, 0.5, 0.75, 0.98)
LENGTH = 48  # of a needle and of a question: longer than the window, so that context is far away
CHUNK = 256
ASKING = 8.0  # weight of the head that looks for the needle


def needle_config(tokens):
    """Keys wide enough to tell tens of thousands of rows apart."""
    return narrow_config(tokens + LENGTH).replace(
        num_mtp_layers=0, compress_ratios=(0, 128, CSA), index_dim=32
    )


def plain_keys(cfg, num, keys):
    """Cached keys in the channels of the weights: rounded ones are stored rotated by Hadamard."""
    if not num.rounds:
        return np.float64(keys)
    numbers = np.arange(cfg.index_dim)
    signs = (-1.0) ** np.bitwise_count(numbers[:, None] & numbers)
    return np.float64(keys) @ signs * cfg.index_dim**-0.5


def ask(cfg, num, params, ids, cache):
    """What the last layer's indexer sees and keeps: its inputs, all keys, rows that tokens keep."""
    with recording() as log:
        prefill(cfg, num, params, ids[None], cache)
    return {name: log[name][-1] for name in ("attn_in", "index_keys", "index_picks")}


def latent_of(oracle, x):
    w = oracle.units["layer_02"]["attn"]
    return oracle.rms(x @ w["wq_a"].T, w["q_norm"])


def taught(cfg, units, x_QD, keys_QJ):
    """Weights of the last layer whose index queries from inputs `x_QD` ask for the keys `keys_QJ`.

    They look for channels that do not turn with the position. No cached row depends on them.
    """
    still, latent_QL = cfg.index_dim - cfg.rope_dim, latent_of(Oracle(cfg, units), x_QD)
    wanted = np.zeros((len(x_QD), cfg.index_heads * cfg.index_dim))
    wanted[:, :still] = keys_QJ[:, :still]
    weights = np.zeros((len(x_QD), cfg.index_heads))
    weights[:, 0] = ASKING
    layer = units["layer_02"]
    index = dict(layer["attn"]["indexer"])
    for name, inputs, outputs in (
        ("wq_b", latent_QL, wanted),
        ("weights_proj", x_QD, weights),
    ):
        old = np.asarray(index[name], np.float64)
        new = old + (np.linalg.pinv(inputs) @ (outputs - inputs @ old.T)).T
        index[name] = jnp.asarray(new.astype(np.float32)).astype(index[name].dtype)
    return {**units, "layer_02": {**layer, "attn": {**layer["attn"], "indexer": index}}}


def empty(cfg, tokens, num):
    return init_cache(cfg, 1, tokens, num, scan=False)


def prefilled(cfg, num, params, ids):
    feed = jax.jit(partial(prefill, cfg, num), donate_argnums=2)
    cache = empty(cfg, len(ids) + LENGTH, num)
    for begin in range(0, len(ids), CHUNK):
        _, cache = feed(params, ids[None, begin : begin + CHUNK], cache)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("num", [PLAIN, REFERENCE], ids=["plain", "reference"])
@pytest.mark.parametrize("tokens", [16_384, 262_144])
def test_needles_are_kept_where_a_dense_scorer_keeps_them(tokens, num):
    """Five needles in one prompt. Behind all of it, a question for each.

    The scorer is float64, with the keys of the cache and queries of its own; without rounding, all
    rows it keeps are the same.
    """
    cfg, rng = needle_config(tokens), np.random.default_rng(1)
    needles, questions = rng.integers(0, cfg.vocab_size, (2, len(DEPTHS), LENGTH), np.int32)
    ids = rng.integers(0, cfg.vocab_size, tokens, np.int32)
    ends = [int(depth * tokens) // CSA * CSA for depth in DEPTHS]
    for end, needle in zip(ends, needles, strict=True):
        ids[end - LENGTH : end] = needle
    rows, last = [end // CSA - 1 for end in ends], tokens + LENGTH - 1
    units = random_units(cfg)
    params = group_params(cfg, units.__getitem__, False)
    cache = prefilled(cfg, num, params, ids)
    run = jax.jit(partial(ask, cfg, num))
    x_QD = [np.float64(run(params, question, cache)["attn_in"][-1]) for question in questions]
    keys_CJ = plain_keys(cfg, num, run(params, questions[0], cache)["index_keys"])
    units = taught(cfg, units, np.stack(x_QD), keys_CJ[rows])
    params, oracle = group_params(cfg, units.__getitem__, False), Oracle(cfg, units)
    w = oracle.units["layer_02"]["attn"]["indexer"]
    for depth, row, question, x in zip(DEPTHS, rows, questions, x_QD, strict=True):
        seen = run(params, question, cache)
        keys_CJ = plain_keys(cfg, num, seen["index_keys"])[: (last + 1) // CSA]
        dense = set(oracle.select(x, latent_of(oracle, x), keys_CJ, w, last).tolist())
        kept = set(np.asarray(seen["index_picks"])[-1].tolist())
        print(f"needle | {tokens} | depth {depth} | {len(kept & dense)} of {len(dense)} rows agree")
        assert row in dense and not dense.issuperset(rows)
        assert row in kept
        assert num.rounds or kept == dense
