"""The programs that compute tokens, over the donated state of `device`."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax import model, parallel
from dsv4_jax.cache import Cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import Logprobs, logprobs_of, no_logprobs
from dsv4_jax.serving.engine.device import FAILED, Batch, Prompt, Sampled, State
from dsv4_jax.speculation import EMPTY, Guesses, Judged, guess, judge
from sharding.shards import Shards

SCORE_BLOCK = 32  # positions whose logits exist at a time when a prompt is scored


def _view(state: State, batch: Batch, pos_B: Array) -> Cache:
    """The cache as the rows of a step see it, the newest token of each at `pos_B`."""
    return dataclasses.replace(
        state.cache,
        pos_B=pos_B,
        mtp_pos_B=pos_B,
        slots_B=batch.slots_B,
        table_BP=batch.table_BP,
    )


def _keep(state: State, cache: Cache) -> State:
    """The state with what a step wrote to the cache."""
    cache = dataclasses.replace(
        cache,
        pos_B=state.cache.pos_B,
        mtp_pos_B=state.cache.mtp_pos_B,
        slots_B=None,
        table_BP=None,
    )
    return dataclasses.replace(state, cache=cache)


def _drawn(
    state: State,
    logits_BTV: Array,
    guesses: Guesses,
    batch: Batch,
    pos_B: Array,
    count_B: Array,
    shards: Shards,
) -> tuple[State, Judged, Sampled]:
    """Draws the tokens behind `pos_B`, and stores the newest of each row in its slot."""
    logits_BTV = _whole(logits_BTV, shards)
    slots_B, knobs = batch.slots_B, batch.knobs
    is_kept_B = batch.rows_B3[:, 2]
    rows = (pos_B, count_B, is_kept_B, knobs, batch.words_BW, state.uses_SV, slots_B)
    judged = judge(logits_BTV, guesses, *rows)
    real_BT = judged.tokens_BT != EMPTY
    logprobs = lax.cond(
        knobs.wants_logprobs_B.any(),
        logprobs_of,
        lambda logits, tokens: no_logprobs(tokens.shape, logits.shape[-1]),
        logits_BTV,
        jnp.where(real_BT, judged.tokens_BT, 0),
    )
    newest_B = model.last_of(judged.tokens_BT, judged.count_B)[:, 0]
    newest_B = jnp.where(judged.count_B > 0, newest_B, state.last_S[slots_B])
    state = dataclasses.replace(
        state,
        last_S=state.last_S.at[slots_B].set(newest_B),
        pos_S=state.pos_S.at[slots_B].set(pos_B + judged.count_B),
        uses_SV=judged.uses_SV,
    )
    finite_BT = jnp.isfinite(logits_BTV).all(axis=-1)
    tokens_BT = jnp.where(real_BT & ~finite_BT, FAILED, judged.tokens_BT)
    return state, judged, Sampled(tokens_BT, logprobs)


def decode(
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
    params: model.Params,
    state: State,
    batch: Batch,
    num_guesses: int = 0,
) -> tuple[State, Sampled]:
    """Computes each slot's newest token and the guesses behind it, draws, and guesses again.

    num_guesses: how many of the state's guesses are computed, and made: all of them or none.
    """
    slots_B = batch.slots_B
    pos_B = state.pos_S[slots_B]
    guesses = jax.tree.map(lambda a: a[slots_B, :num_guesses], state.guesses)
    tokens_BT = jnp.concatenate([state.last_S[slots_B][:, None], guesses.tokens_BK], axis=1)
    stop_B, is_real_B, _ = batch.rows_B3.T
    count_B = jnp.clip(stop_B - pos_B, 0, num_guesses + 1) * is_real_B
    cache = _view(state, batch, pos_B)
    out, cache = parallel.prefill(
        cfg, num, params, tokens_BT, cache, count_B, all_logits=True, shards=shards
    )
    args = (batch, pos_B, count_B, shards)
    state, judged, sampled = _drawn(_keep(state, cache), out.logits, guesses, *args)
    if state.guesses.tokens_BK.shape[1]:  # also without guesses: the block's ring has no holes
        next_BT = jnp.maximum(judged.tokens_BT, 0)
        args = (batch, pos_B, judged.count_B, num_guesses)
        state = _guess(cfg, num, shards, params, state, out.streams_BTMD, next_BT, *args)
    return state, sampled


def burst(
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
    params: model.Params,
    state: State,
    batch: Batch,
    num_steps: int,
) -> tuple[State, Sampled]:
    """`num_steps` steps of `decode` without guesses, one after the other; tokens `[B, steps]`."""

    def one(state: State, _: None) -> tuple[State, Sampled]:
        return decode(cfg, num, shards, params, state, batch)

    state, drawn = lax.scan(one, state, length=num_steps)

    def joined(a: Array) -> Array:
        return jnp.moveaxis(a[:, :, 0], 0, 1)

    return state, jax.tree.map(joined, drawn)


def prefill(
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
    params: model.Params,
    state: State,
    batch: Batch,
    prompt: Prompt,
) -> tuple[State, Sampled, Logprobs]:
    """Computes a chunk of each prompt; the token drawn behind it counts at a prompt's end."""
    pos_B, count_B, samples_B = batch.rows_B3.T
    cache = _view(state, batch, pos_B)
    out, cache = parallel.prefill(cfg, num, params, prompt.tokens_BT, cache, count_B, shards=shards)
    scores = lax.cond(
        prompt.scored_B.any(),
        partial(_score, cfg, num, shards),
        lambda _, streams, targets: no_logprobs(targets.shape, cfg.vocab_size),
        params,
        out.streams_BTMD,
        prompt.targets_BT,
    )
    # the newest token is the one in front of the drawn one, and of padding none is drawn
    args = (batch, pos_B + count_B - 1, jnp.minimum(count_B, 1), shards)
    none = jax.tree.map(lambda a: a[batch.slots_B, :0], state.guesses)
    state, judged, sampled = _drawn(_keep(state, cache), out.logits[:, None], none, *args)
    if state.guesses.tokens_BK.shape[1]:
        drawn_B = jnp.maximum(judged.tokens_BT[:, 0], 0)
        behind_B = jnp.where(samples_B > 0, drawn_B, prompt.behind_B)
        is_end_BT = jnp.arange(prompt.tokens_BT.shape[1])[None] == count_B[:, None] - 1
        next_BT = jnp.roll(prompt.tokens_BT, -1, axis=1)
        next_BT = jnp.where(is_end_BT, behind_B[:, None], next_BT)
        args = (batch, pos_B, count_B, state.guesses.tokens_BK.shape[1])
        state = _guess(cfg, num, shards, params, state, out.streams_BTMD, next_BT, *args)
    return state, sampled, scores


def _guess(
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
    params: model.Params,
    state: State,
    streams_BTMD: Array,
    next_BT: Array,
    batch: Batch,
    pos_B: Array,
    count_B: Array,
    num_guesses: int,
) -> State:
    """Runs the MTP block over what was computed, then over its own streams for each guess more.

    next_BT: the token behind each of those from `pos_B` on, of which `count_B` stand. What the
    block writes for its own guesses is written again once the tokens are known.
    """
    slots_B = batch.slots_B
    run = partial(parallel.draft, cfg, num, params, shards=shards)
    out, cache = run(streams_BTMD, next_BT, _view(state, batch, pos_B), count_B)
    is_real_B = jnp.minimum(count_B, 1)
    tokens, chances = [], []
    for k in range(num_guesses):
        positions_B = pos_B + count_B + 1 + k
        knobs, words_BW, uses_SV = batch.knobs, batch.words_BW, state.uses_SV
        rejects = state.guesses.chances_BKV is not None
        token_B, q_BV = guess(
            _whole(out.logits, shards), positions_B, knobs, words_BW, uses_SV, slots_B, rejects
        )
        tokens.append(token_B)
        chances.append(q_BV)
        if k + 1 < num_guesses:
            out, cache = run(out.streams_BTMD, token_B[:, None], cache, is_real_B)

    state = _keep(state, cache)
    if not num_guesses:
        return state

    def put(old: Array, new: list[Array]) -> Array:
        return old.at[slots_B].set(jnp.stack(new, axis=1))

    kept = state.guesses.chances_BKV
    guesses = Guesses(
        put(state.guesses.tokens_BK, tokens), None if kept is None else put(kept, chances)
    )
    return dataclasses.replace(state, guesses=guesses)


def _whole(logits: Array, shards: Shards) -> Array:
    """Logits of the whole vocabulary on every device, which then all draw the same."""
    if not isinstance(shards.mesh, Mesh):
        return logits
    return lax.with_sharding_constraint(logits, NamedSharding(shards.mesh, PartitionSpec()))


def _score(
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
    params: model.Params,
    streams_BTMD: Array,
    targets_BT: Array,
) -> Logprobs:
    """Log-probabilities at every position, with the logits of one block there at a time."""
    batch, length = targets_BT.shape
    blocks = length // SCORE_BLOCK

    def one(block: Array) -> Logprobs:
        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, block * SCORE_BLOCK, SCORE_BLOCK, axis=1)

        logits = parallel.logits_of(cfg, num, params, cut(streams_BTMD), shards=shards)
        return logprobs_of(logits, cut(targets_BT))

    def joined(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(batch, length, *a.shape[3:])

    return jax.tree.map(joined, lax.map(one, jnp.arange(blocks)))
