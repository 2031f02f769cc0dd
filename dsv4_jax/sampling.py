"""Logits to tokens, on device, with counter-based randomness."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

MAX_SEED = 2**31 - 1
MAX_BIASED = 300  # ids with a bias, per request
MAX_LOGPROBS = 20  # logprobs per position


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; `top_k` 0, `top_p` 1 and `min_p` 0 are off, `temperature` 0 is greedy.

    Penalties count generated tokens (`repetition_penalty`: the prompt's too). `logprobs` and
    `prompt_logprobs` ask for that many best tokens beside the one that is there; None is off.

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
        if self.max_tokens < (1 if self.prompt_logprobs is None else 0):
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be finite and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0 is off)")

    def key(self) -> Array:
        """The request's random key; the same seed gives the same tokens."""
        seed = secrets.randbelow(MAX_SEED) if self.seed is None else self.seed
        return jax.random.fold_in(jax.random.key(seed & MAX_SEED), (seed >> 31) & MAX_SEED)


def sample(
    logits_V: Array, key: Array, position: Array, temperature: Array, top_p: Array, top_k: Array
) -> Array:
    """One token id (int32 scalar) from float32 logits; see `sample_batch`."""
    one = (x[None] for x in (logits_V, key, position, temperature, top_p, top_k))
    return sample_batch(*one)[0]


def sample_batch(
    logits_BV: Array,
    keys_B: Array,
    positions_B: Array,
    temperature_B: Array,
    top_p_B: Array,
    top_k_B: Array,
) -> Array:
    """Token ids int32 `[B]` from float32 logits; equal logits give the lowest id.

    A draw depends on its key and position alone: the Gumbel trick with noise that is a function of
    both, so a token does not depend on what else is being computed.
    """
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(_) -> Array:
        scaled_BV = logits_BV / jnp.maximum(temperature_B, 1e-6)[:, None]
        truncates = ((top_p_B < 1) | (top_k_B > 0)).any()
        kept_BV = lax.cond(
            truncates, jax.vmap(_truncate), lambda x, *_: x, scaled_BV, top_p_B, top_k_B
        )
        noise_BV = jax.vmap(_noise, (0, 0, None))(keys_B, positions_B, logits_BV.shape[1])
        drawn_B = jnp.argmax(kept_BV + noise_BV, axis=-1).astype(jnp.int32)
        return jnp.where(temperature_B > 0, drawn_B, best_B)

    return lax.cond((temperature_B > 0).any(), draw, lambda _: best_B, None)


def _noise(key: Array, position: Array, size: int) -> Array:
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)


def _truncate(scaled_V: Array, top_p: Array, top_k: Array) -> Array:
    """-inf outside the `top_k` best, then outside the smallest set of probability `top_p`."""
    order_V = jnp.argsort(-scaled_V, stable=True)
    ranked_V = scaled_V[order_V]
    ranks_V = jnp.arange(len(scaled_V))
    ranked_V = jnp.where((top_k == 0) | (ranks_V < top_k), ranked_V, -jnp.inf)
    probs_V = jax.nn.softmax(ranked_V)
    before_V = jnp.cumsum(probs_V) - probs_V  # the first token past the border is kept
    ranked_V = jnp.where((before_V < top_p) | (ranks_V == 0), ranked_V, -jnp.inf)
    return jnp.full_like(scaled_V, -jnp.inf).at[order_V].set(ranked_V)
