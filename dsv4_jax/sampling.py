"""Logits to tokens, on device, with counter-based randomness.

Letters of this module beside the common ones: J biased ids of a row, W 32-bit words of a mask,
K best tokens that are reported, S slots.

Whatever a row does not ask for leaves its numbers alone to the bit, though other rows of the batch
ask for it: a token depends on its own request only.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from hashlib import blake2b
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MAX_BIASED = 1024  # ids of one request that `logit_bias` may name
MAX_LOGPROBS = 20
MASK_BITS = 32
EVERYTHING = 0xFFFFFFFF  # a word of a mask that allows all its ids


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; `temperature` 0 takes the best.

    Args:
        max_tokens: Tokens to draw at most; 0 only with `prompt_logprobs`.
        temperature: Logits are divided by it.
        top_p: Keeps the smallest set of this probability; 1 is off.
        top_k: Keeps so many; 0 is off.
        seed: Same seed, same tokens; None draws one.
        min_p: Keeps what has at least this share of the best token's probability; 0 is off.
        presence_penalty: Taken off every token that was generated before.
        frequency_penalty: Taken off for each time it was.
        repetition_penalty: Divides (negative: multiplies) logits of tokens of prompt and output.
        logit_bias: (id, bias) pairs, added to the logits; at most `MAX_BIASED`.
        logprobs: Also the drawn token's log-probability and the so many best ones; None is off.
        prompt_logprobs: The same for every token of the prompt but the first.

    Log-probabilities are natural, of the model's own distribution: before temperature, penalties,
    bias and masks.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < (self.prompt_logprobs is None):
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be finite and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0 is off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)} must lie between -2 and 2")
        if not 0 < self.repetition_penalty <= 2:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be above 0 and at most 2"
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ValueError(f"{name}={count} must lie between 0 and {MAX_LOGPROBS}")
        self._check_bias()

    def _check_bias(self) -> None:
        ids = [token for token, _ in self.logit_bias]
        if len(ids) > MAX_BIASED:
            raise ValueError(f"logit_bias names {len(ids)} ids; {MAX_BIASED} are possible")
        if len(set(ids)) < len(ids):
            raise ValueError("logit_bias names an id twice")
        wrong = [token for token, bias in self.logit_bias if token < 0 or not math.isfinite(bias)]
        if wrong:
            raise ValueError(f"logit_bias of id {wrong[0]} must be finite, and ids not negative")

    @property
    def penalizes(self) -> bool:
        """Whether what was said before changes what comes next."""
        off = self.presence_penalty == self.frequency_penalty == 0
        return not off or self.repetition_penalty != 1

    def only_draws(self) -> bool:
        """Whether nothing is asked for but temperature, top-k, top-p and a seed."""
        basic = ("max_tokens", "temperature", "top_p", "top_k", "seed")
        rest = (field for field in fields(self) if field.name not in basic)
        return all(getattr(self, field.name) == field.default for field in rest)

    def key_words(self) -> np.ndarray:
        """The request's random key, uint32 `[2]`; the same seed gives the same tokens."""
        seed = secrets.token_hex(16) if self.seed is None else str(int(self.seed))
        return np.frombuffer(blake2b(seed.encode(), digest_size=8).digest(), np.uint32)

    def key(self) -> Array:
        """The same as a JAX key."""
        return jax.random.wrap_key_data(jnp.asarray(self.key_words()))


class Knobs(NamedTuple):
    """Sampling settings of rows. bias_ids_BJ: ids from the vocabulary's size on are padding."""

    keys_B2: Any
    temperature_B: Any
    top_p_B: Any
    top_k_B: Any
    min_p_B: Any
    presence_B: Any
    frequency_B: Any
    repetition_B: Any
    bias_ids_BJ: Any
    bias_BJ: Any
    wants_logprobs_B: Any


def knobs_of(rows: Sequence[tuple[SamplingParams, np.ndarray]], size: int) -> Knobs:
    """Numpy arrays of `size` rows from settings and keys; rows behind them are greedy."""

    def column(name: str, default: float, dtype: type) -> np.ndarray:
        values = np.full(size, default, dtype)
        values[: len(rows)] = [getattr(params, name) for params, _ in rows]
        return values

    keys_B2 = np.zeros((size, 2), np.uint32)
    ids_BJ, bias_BJ = no_bias(size)
    if any(params.logit_bias for params, _ in rows):
        ids_BJ, bias_BJ = ids_BJ.copy(), bias_BJ.copy()
    wants_logprobs_B = np.zeros(size, bool)
    for i, (params, key_2) in enumerate(rows):
        keys_B2[i] = key_2
        wants_logprobs_B[i] = params.logprobs is not None
        for j, (token, value) in enumerate(params.logit_bias):
            ids_BJ[i, j], bias_BJ[i, j] = token, value
    return Knobs(
        keys_B2,
        column("temperature", 0, np.float32),
        column("top_p", 1, np.float32),
        column("top_k", 0, np.int32),
        column("min_p", 0, np.float32),
        column("presence_penalty", 0, np.float32),
        column("frequency_penalty", 0, np.float32),
        column("repetition_penalty", 1, np.float32),
        ids_BJ,
        bias_BJ,
        wants_logprobs_B,
    )


@cache
def no_bias(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and bias of `size` rows that have none: the same two arrays each time, read-only."""
    ids_BJ = np.full((size, MAX_BIASED), np.iinfo(np.int32).max, np.int32)
    bias_BJ = np.zeros((size, MAX_BIASED), np.float32)
    for array in (ids_BJ, bias_BJ):
        array.flags.writeable = False
    return ids_BJ, bias_BJ


def mask_words(vocab_size: int) -> int:
    """Words of a mask: bit i % 32 of word i // 32 allows id i."""
    return -(-vocab_size // MASK_BITS)


def count_uses(prompt: Sequence[int], generated: Sequence[int], vocab_size: int) -> np.ndarray:
    """What penalties need to know, int32 `[V]`: twice the times generated, plus 1 if in prompt."""
    uses_V = np.zeros(vocab_size, np.int32)
    uses_V[np.asarray(prompt, np.int64)] = 1
    if generated:
        uses_V += 2 * np.bincount(np.asarray(generated), minlength=vocab_size).astype(np.int32)
    return uses_V


def sample(
    logits_V: Array, key: Array, position: Array, temperature: Array, top_p: Array, top_k: Array
) -> Array:
    """One token id (int32 scalar) from float32 logits; see `draw`."""
    one = [x[None] for x in (logits_V, key, position, temperature, top_p, top_k)]
    return draw(*one, min_p_B=jnp.zeros(1))[0]


def sample_rows(
    logits_BV: Array,
    positions_B: Array,
    knobs: Knobs,
    words_BW: Array,
    uses_SV: Array,
    slots_B: Array,
) -> Array:
    """Token ids int32 `[B]` from float32 logits, by everything the rows ask for.

    words_BW: uint32 masks. uses_SV: see `count_uses`; row b has entry slots_B[b], which is read
    only if the row penalizes.
    """

    def asked(logits_BV: Array) -> Array:
        return draw(
            adjust(logits_BV, knobs, words_BW, uses_SV, slots_B),
            jax.random.wrap_key_data(knobs.keys_B2),
            positions_B,
            knobs.temperature_B,
            knobs.top_p_B,
            knobs.top_k_B,
            knobs.min_p_B,
        )

    def masked(logits_BV: Array) -> Array:
        return _best(_masked(logits_BV, words_BW))

    # apart, so that logits nobody changes are not copied on their way
    wants_more = _has_bias(knobs) | _penalizes(knobs).any() | (knobs.temperature_B > 0).any()
    which = jnp.where(wants_more, 2, _has_masks(words_BW).astype(jnp.int32))
    return lax.switch(which, (_best, masked, asked), logits_BV)


def _best(logits_BV: Array) -> Array:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _masked(logits_BV: Array, words_BW: Array) -> Array:
    return jnp.where(_bits(words_BW, logits_BV.shape[1]), logits_BV, -jnp.inf)


def _has_masks(words_BW: Array) -> Array:
    return (words_BW != jnp.uint32(EVERYTHING)).any()


def _has_bias(knobs: Knobs) -> Array:
    return (knobs.bias_BJ != 0).any()


def _penalizes(knobs: Knobs) -> Array:
    """Which rows do, `[B]`."""
    return (knobs.presence_B != 0) | (knobs.frequency_B != 0) | (knobs.repetition_B != 1)


def adjust(
    logits_BV: Array, knobs: Knobs, words_BW: Array, uses_SV: Array, slots_B: Array
) -> Array:
    """Logits after masks, bias and penalties; see `sample_rows`."""
    penalizes_B = _penalizes(knobs)

    def change(x_BV: Array) -> Array:
        rows_B1 = jnp.arange(len(x_BV))[:, None]
        x_BV = x_BV.at[rows_B1, knobs.bias_ids_BJ].add(knobs.bias_BJ, mode="drop")
        return _penalized(x_BV, uses_SV[slots_B], penalizes_B, knobs)

    # apart: most rows of a server have a mask, few ask for more
    logits_BV = lax.cond(_has_masks(words_BW), _masked, lambda x, _: x, logits_BV, words_BW)
    return lax.cond(_has_bias(knobs) | penalizes_B.any(), change, lambda x: x, logits_BV)


def chances(logits_BV: Array, knobs: Knobs) -> Array:
    """Probabilities float32 `[B, V]` with which rows draw from logits that `adjust` returned."""
    best_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[1])
    scaled_BV = logits_BV / jnp.maximum(knobs.temperature_B, 1e-6)[:, None]
    kept_BV = _truncated(scaled_BV, knobs.top_p_B, knobs.top_k_B, knobs.min_p_B)
    return jnp.where(knobs.temperature_B[:, None] > 0, jax.nn.softmax(kept_BV, axis=-1), best_BV)


def _truncated(scaled_BV: Array, top_p_B: Array, top_k_B: Array, min_p_B: Array) -> Array:
    truncates_B = (top_p_B < 1) | (top_k_B > 0) | (min_p_B > 0)

    def truncate(x_BV: Array) -> Array:
        kept_BV = jax.vmap(_truncate)(x_BV, top_p_B, top_k_B, min_p_B)
        return jnp.where(truncates_B[:, None], kept_BV, x_BV)

    return lax.cond(truncates_B.any(), truncate, lambda x: x, scaled_BV)


def _bits(words_BW: Array, size: int) -> Array:
    """The first `size` bits of each row as booleans."""
    shifts = jnp.arange(MASK_BITS, dtype=jnp.uint32)[None, None]
    bits = (words_BW[..., None] >> shifts) & 1
    return bits.reshape(len(words_BW), -1)[:, :size] == 1


def _penalized(x_BV: Array, uses_BV: Array, penalizes_B: Array, knobs: Knobs) -> Array:
    repetition_B1 = knobs.repetition_B[:, None]
    count_BV = (uses_BV >> 1).astype(jnp.float32)
    repeated_BV = jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1)
    new_BV = jnp.where(uses_BV > 0, repeated_BV, x_BV)
    new_BV = new_BV - knobs.frequency_B[:, None] * count_BV
    new_BV = new_BV - knobs.presence_B[:, None] * (count_BV > 0).astype(jnp.float32)
    return jnp.where(penalizes_B[:, None], new_BV, x_BV)


def draw(
    logits_BV: Array,
    keys_B: Array,
    positions_B: Array,
    temperature_B: Array,
    top_p_B: Array,
    top_k_B: Array,
    min_p_B: Array,
) -> Array:
    """Token ids int32 `[B]` from float32 logits; equal logits give the lowest id.

    A draw depends on its key and position alone: the Gumbel trick with noise that is a function of
    both, so a token does not depend on what else is being computed.
    """
    best_B = _best(logits_BV)

    def drawn(_) -> Array:
        scaled_BV = logits_BV / jnp.maximum(temperature_B, 1e-6)[:, None]
        kept_BV = _truncated(scaled_BV, top_p_B, top_k_B, min_p_B)
        noise_BV = jax.vmap(_noise, (0, 0, None))(keys_B, positions_B, logits_BV.shape[1])
        drawn_B = jnp.argmax(kept_BV + noise_BV, axis=-1).astype(jnp.int32)
        return jnp.where(temperature_B > 0, drawn_B, best_B)

    return lax.cond((temperature_B > 0).any(), drawn, lambda _: best_B, None)


def _noise(key: Array, position: Array, size: int) -> Array:
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)


def _truncate(scaled_V: Array, top_p: Array, top_k: Array, min_p: Array) -> Array:
    """-inf outside the `top_k` best, below `min_p` of the best, then outside the set `top_p`."""
    order_V = jnp.argsort(-scaled_V, stable=True)
    ranked_V = scaled_V[order_V]
    ranks_V = jnp.arange(len(scaled_V))
    ranked_V = jnp.where((top_k == 0) | (ranks_V < top_k), ranked_V, -jnp.inf)
    is_likely_V = ranked_V >= ranked_V[0] + jnp.log(min_p)  # log 0 is -inf: off
    ranked_V = jnp.where(is_likely_V, ranked_V, -jnp.inf)
    probs_V = jax.nn.softmax(ranked_V)
    before_V = jnp.cumsum(probs_V) - probs_V  # the first token past the border is kept
    is_inside_V = (before_V < top_p) | (top_p >= 1) | (ranks_V == 0)
    ranked_V = jnp.where(is_inside_V, ranked_V, -jnp.inf)
    return jnp.full_like(scaled_V, -jnp.inf).at[order_V].set(ranked_V)


class Logprobs(NamedTuple):
    """Log-probabilities of chosen tokens `[...]` and of the K best, best first `[..., K]`."""

    chosen: Array
    top_ids: Array
    top: Array


def logprobs_of(logits: Array, tokens: Array) -> Logprobs:
    """From float32 logits `[..., V]` and ids `[...]`, both without any change of distribution."""
    scores = jax.nn.log_softmax(logits, axis=-1)
    top, top_ids = lax.top_k(scores, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
    return Logprobs(chosen, top_ids, top)


def no_logprobs(lead: tuple[int, ...], vocab_size: int) -> Logprobs:
    """Zeros of the shapes that `logprobs_of` returns."""
    best = (*lead, min(MAX_LOGPROBS, vocab_size))
    return Logprobs(
        jnp.zeros(lead, jnp.float32), jnp.zeros(best, jnp.int32), jnp.zeros(best, jnp.float32)
    )
