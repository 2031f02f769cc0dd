"""Guesses of the next tokens, and which of them stand.

A step computes the newest token and K guesses behind it, T = K + 1 tokens a sequence, and draws one
token from each position's logits. As long as what was drawn is what was guessed, the next
position's logits are those of the text as it is, and what they gave counts as well.

Two ways to decide. `coupled`: each token is drawn as it would be without guesses, with noise that
is a function of seed and position; the guess is drawn with the same noise. Guesses then never
change a token. `rejection`: a guess stands with probability min(1, p/q), else the token comes from
what p has more than q; more guesses stand, but the same seed gives other tokens.

A guess that fails needs no copy to be undone. What it wrote lies at positions that the next step
writes again, or behind what any token sees, if the rings are long enough: see `check_rings`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv4_jax import cache as store
from dsv4_jax.config import ModelConfig
from dsv4_jax.sampling import Knobs, adjust, chances, sample_rows
from dsv4_jax.schedule import layer_groups

EMPTY = -2  # stands for no token
MODES = ("coupled", "rejection")
GUESSED, JUDGED, REDRAWN = 1, 2, 3  # what a random number beside that of `draw` is for


class Guesses(NamedTuple):
    """tokens_BK: int32. chances_BKV: what they were drawn from, float32; None where coupled."""

    tokens_BK: Array
    chances_BKV: Array | None


class Judged(NamedTuple):
    """tokens_BT: int32, `EMPTY` behind the `count_B` first. uses_SV: with these tokens counted."""

    tokens_BT: Array
    count_B: Array
    uses_SV: Array


def check_rings(cfg: ModelConfig, cache: store.Cache, guesses: int) -> None:
    """Whether every ring keeps what is needed while so many tokens may be taken back.

    Raises:
        ValueError: one is too short.
    """
    groups = layer_groups(cfg, len(cache.groups) != cfg.num_layers)
    layers = [
        (kind.ratio, layer)
        for group, states in zip(groups, cache.groups, strict=True)
        for kind, layer in zip(group.kinds, states, strict=True)
    ]
    for ratio, layer in layers + [(0, layer) for layer in cache.mtp]:
        rings = {"window": (layer["window"], cfg.window)}
        for name in ("ring", "key_ring"):
            if name in layer:
                rings[name] = (layer[name]["values"], store.pooled_tokens(ratio))
        for name, (ring, seen) in rings.items():
            if not store.can_push(ring, guesses + 1, seen):
                raise ValueError(
                    f"a {name} of {store.num_rows(ring)} entries is too short for {guesses} guesses"
                    f": it must have {seen + guesses}"
                )


def judge(
    logits_BTV: Array,
    guesses: Guesses,
    pos_B: Array,
    count_B: Array,
    is_kept_B: Array,
    knobs: Knobs,
    words_BW: Array,
    uses_SV: Array,
    slots_B: Array,
) -> Judged:
    """Draws tokens from left to right for as long as guesses stand.

    pos_B: position of the newest token, whose logits come first. count_B: of the T tokens so many
    were computed, so that is how many there may be at most. is_kept_B: 1 where tokens are to be
    counted for penalties, else 0. The rest: see `sampling.sample_rows`.
    """
    goes_on_B, tokens = count_B > 0, []
    total_B = jnp.zeros_like(count_B)
    for t in range(logits_BTV.shape[1]):
        rows = (logits_BTV[:, t], pos_B + t + 1, knobs, words_BW, uses_SV, slots_B)
        is_last = t == guesses.tokens_BK.shape[1]
        if is_last:
            token_B, stands_B = sample_rows(*rows), False
        elif guesses.chances_BKV is None:
            token_B = sample_rows(*rows)
            stands_B = token_B == guesses.tokens_BK[:, t]
        else:
            token_B, stands_B = _rejected(
                *rows, guesses.tokens_BK[:, t], guesses.chances_BKV[:, t], t + 1 < count_B
            )
        tokens.append(jnp.where(goes_on_B, token_B, EMPTY))
        total_B = total_B + goes_on_B.astype(jnp.int32)
        uses_SV = uses_SV.at[slots_B, token_B].add(jnp.where(goes_on_B, 2 * is_kept_B, 0))
        goes_on_B = goes_on_B & stands_B & (t + 1 < count_B)
    return Judged(jnp.stack(tokens, axis=1), total_B, uses_SV)


def _rejected(
    logits_BV: Array,
    positions_B: Array,
    knobs: Knobs,
    words_BW: Array,
    uses_SV: Array,
    slots_B: Array,
    guess_B: Array,
    q_BV: Array,
    is_judged_B: Array,
) -> tuple[Array, Array]:
    """The token of a position, and whether it is the guess by right.

    Where a guess is not judged, since nothing behind it was computed, the token is drawn from p.
    """
    p_BV = chances(adjust(logits_BV, knobs, words_BW, uses_SV, slots_B), knobs)
    rows = jnp.arange(len(guess_B))
    keys_B = jax.random.wrap_key_data(knobs.keys_B2)
    uniform_B = jax.vmap(lambda k, p: jax.random.uniform(_key(k, p, JUDGED)))(keys_B, positions_B)
    stands_B = is_judged_B & (uniform_B * q_BV[rows, guess_B] < p_BV[rows, guess_B])
    more_BV = jnp.maximum(p_BV - q_BV, 0)
    # equal distributions: nothing is left of p, and no guess fails but by rounding
    rest_BV = jnp.where(more_BV.sum(axis=-1, keepdims=True) > 0, more_BV, p_BV)
    rest_BV = jnp.where(is_judged_B[:, None], rest_BV, p_BV)
    drawn_B = _draw(rest_BV, keys_B, positions_B, REDRAWN)
    return jnp.where(stands_B, guess_B, drawn_B), stands_B


def _key(key: Array, position: Array, purpose: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, position), purpose)


def _draw(chances_BV: Array, keys_B: Array, positions_B: Array, purpose: int) -> Array:
    size = chances_BV.shape[1]

    def noise(key: Array, position: Array) -> Array:
        return jax.random.gumbel(_key(key, position, purpose), (size,), jnp.float32)

    noise_BV = jax.vmap(noise)(keys_B, positions_B)
    return jnp.argmax(jnp.log(chances_BV) + noise_BV, axis=-1).astype(jnp.int32)


def guess(
    logits_BV: Array,
    positions_B: Array,
    knobs: Knobs,
    words_BW: Array,
    uses_SV: Array,
    slots_B: Array,
    rejects: bool,
) -> tuple[Array, Array | None]:
    """A guess at the tokens of `positions_B`; if it may be rejected, what it was drawn from."""
    if not rejects:
        return sample_rows(logits_BV, positions_B, knobs, words_BW, uses_SV, slots_B), None
    q_BV = chances(adjust(logits_BV, knobs, words_BW, uses_SV, slots_B), knobs)
    keys_B = jax.random.wrap_key_data(knobs.keys_B2)
    return _draw(q_BV, keys_B, positions_B, GUESSED), q_BV
