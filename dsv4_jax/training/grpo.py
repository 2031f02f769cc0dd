"""Group-relative policy optimisation: advantages of a group, and the terms of every drawn token.

For sequence i of a group, with rho = p / p_old of a token and u = p_ref / p:

    J = mean over sequences of 1/|y_i| Σ_t M_i · min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i)
                                           - beta · rho (u - log u - 1)

M_i leaves out sequences that turned out badly and that today's model would hardly draw; the second
term is an unbiased estimate of KL(p ‖ p_ref) whose gradient is one too (as published for V3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

LARGEST_LOG = 20.0  # of ratios: beyond it they are constant, and nothing overflows


@dataclass(frozen=True)
class Grpo:
    """Learns from rollouts by their rewards.

    reference: a run or converted checkpoint that the KL term holds on to; None: what the run
    starts from. clip: eps. kl: beta; 0 needs no reference. mask_above: delta, the mean
    log(p_old / p) above which a sequence with a negative advantage is left out; by default none is.
    Defaults are R1's; V4 publishes none of them.

    Raises:
        ValueError: a value is out of range.
    """

    reference: str | None = None
    clip: float = 10.0
    kl: float = 1e-3
    mask_above: float = math.inf

    def __post_init__(self) -> None:
        for name in ("clip", "mask_above"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be positive")
        if not self.kl >= 0:
            raise ValueError(f"objective.kl={self.kl} must not be negative")
        if self.reference is not None and not self.kl:
            raise ValueError("objective.reference is for the KL term: set objective.kl above 0")


def group_advantages(rewards: Sequence[float], by_deviation: bool = False) -> np.ndarray:
    """Rewards of one group less their mean, float32.

    by_deviation: also divided by their standard deviation (zeros where all are equal).
    """
    found = np.asarray(rewards, np.float64)
    found = found - found.mean()
    spread = found.std()
    if by_deviation and spread > 0:
        found = found / spread
    return found.astype(np.float32)


class Drawn(NamedTuple):
    """Of every token t what was drawn behind it; float32 `[B, T]`, but for is_drawn_BT (bool).

    old_BT: log p_old of it. reference_BT: log p_ref. advantage_BT: of its sequence.
    """

    is_drawn_BT: Array
    old_BT: Array
    reference_BT: Array | None
    advantage_BT: Array


class TokenTerms(NamedTuple):
    """Float32 `[B, T]`, 0 where nothing was drawn.

    loss: what is to be made small, -J's terms. kl: the estimate of KL to the reference. clipped:
    1 where the ratio has left the range and no longer pulls. masked: 1 - M of its sequence.
    share: 1/|y| of its sequence; each of the others is weighted by it.
    """

    loss: Array
    kl: Array
    clipped: Array
    masked: Array
    share: Array


def token_terms(
    config: Grpo, log_p_BT: Array, drawn: Drawn, sums: Callable[[Array], Array]
) -> TokenTerms:
    """Terms of every token; differentiable by `log_p_BT`, float32 `[B, T]`.

    sums: `[B, T, n]` to the sum over each token's sequence, at each of its tokens.
    """
    real = drawn.is_drawn_BT
    gap_BT = _where(real, log_p_BT - drawn.old_BT)
    found = sums(lax.stop_gradient(jnp.stack([real.astype(jnp.float32), -gap_BT], axis=-1)))
    share_BT = _where(real, 1 / jnp.maximum(found[..., 0], 1.0))
    drift_BT = found[..., 1] * share_BT
    masked_BT = real & (drawn.advantage_BT < 0) & (drift_BT > config.mask_above)
    ratio_BT = _exp(gap_BT)
    kept_BT = jnp.clip(ratio_BT, 1 - config.clip, 1 + config.clip)
    free_BT, held_BT = ratio_BT * drawn.advantage_BT, kept_BT * drawn.advantage_BT
    gain_BT = jnp.where(masked_BT, 0.0, jnp.minimum(free_BT, held_BT))
    kl_BT = jnp.zeros_like(gain_BT)
    if drawn.reference_BT is not None:
        log_u_BT = _where(real, drawn.reference_BT - log_p_BT)
        kl_BT = ratio_BT * (_exp(log_u_BT) - log_u_BT - 1)
    loss_BT = _where(real, config.kl * kl_BT - gain_BT)
    clipped_BT = (real & ~masked_BT & (held_BT < free_BT)).astype(jnp.float32)
    return TokenTerms(loss_BT, kl_BT, clipped_BT, masked_BT.astype(jnp.float32), share_BT)


def _where(real_BT: Array, x_BT: Array) -> Array:
    return jnp.where(real_BT, x_BT, 0.0)


def _exp(x: Array) -> Array:
    return jnp.exp(jnp.clip(x, -LARGEST_LOG, LARGEST_LOG))


def sequence_mean(terms: TokenTerms, values_BT: Array, sequences: Array) -> Array:
    """Σ over sequences of the mean over each one's tokens, divided by `sequences`; a scalar."""
    return (terms.share * values_BT).sum() / jnp.maximum(sequences, 1.0)
