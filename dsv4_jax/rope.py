"""Rotary positions: interleaved pairs in the last channels, two frequency tables, YaRN."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv4_jax.config import ModelConfig, Yarn
from dsv4_jax.numerics import Numerics


class Rotation(NamedTuple):
    """cos and sin of the angles, float32 `[..., R/2]`."""

    cos: Array
    sin: Array


def frequencies(cfg: ModelConfig, compressed: bool) -> np.ndarray:
    """Float32 angle per position and channel pair `[R/2]`, by the official recipe on the host.

    Layers with compression use their own base, stretched by YaRN; window-only layers do not.
    """
    base = cfg.compress_rope_theta if compressed else cfg.rope_theta
    exponents = np.arange(0, cfg.rope_dim, 2, dtype=np.float32) / np.float32(cfg.rope_dim)
    # float32 powers differ between machines in their last bit; rounded float64 ones do not
    powers = np.power(np.float64(base), exponents.astype(np.float64)).astype(np.float32)
    freqs = np.float32(1) / powers
    if compressed and cfg.yarn:
        freqs = _stretch(freqs, base, cfg.rope_dim, cfg.yarn)
    return freqs.astype(np.float32)


def _stretch(freqs: np.ndarray, base: float, dim: int, yarn: Yarn) -> np.ndarray:
    """YaRN: slow pairs are divided by the factor, fast ones kept, a linear ramp between."""

    def pair_of(turns: float) -> float:
        return dim * math.log(yarn.original_len / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # the official guard against a division by zero
    pairs = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp
    return freqs / np.float32(yarn.factor) * (np.float32(1) - keep) + freqs * keep


def rotation(freqs: np.ndarray, positions: Array) -> Rotation:
    """Angles at integer `positions`: the float32 product, as the official table holds it."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(freqs).reshape(
        (1,) * positions.ndim + (-1,)
    )
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Array, turn: Rotation, num: Numerics, inverse: bool = False) -> Array:
    """Turns the last R channels of `x` `[..., H]`; `turn` broadcasts against `[..., R/2]`.

    Channels (2i, 2i+1) form a pair. Computed in float32, rounded once.
    """
    rope_dim = 2 * turn.cos.shape[-1]
    still, turned = x[..., : x.shape[-1] - rope_dim], x[..., x.shape[-1] - rope_dim :]
    pairs = turned.astype(jnp.float32).reshape(*turned.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    sin = -turn.sin if inverse else turn.sin
    out = jnp.stack([a * turn.cos - b * sin, a * sin + b * turn.cos], axis=-1)
    return jnp.concatenate([still, num.cast(out.reshape(turned.shape))], axis=-1)
