"""Index scores and top-k, written to be read: float32, all scores at once, a stable sort."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

SPAN = 4096  # entries of one row of 128 mask words


def unpack_keys(codes: Array, scales: Array) -> Array:
    """Float32 keys `[..., J]` of FP4 bytes `[..., J/2]` (low nibble first) and e8m0 scale bytes."""
    nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    table = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    powers = lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu).astype(jnp.float32)
    return table[nibbles] * jnp.repeat(powers, 32, axis=-1)


def plain_keys(keys: Array) -> Array:
    """Float32 keys of floats, or of bfloat16 bits kept as uint16."""
    if keys.dtype == jnp.uint16:
        keys = lax.bitcast_convert_type(keys, jnp.bfloat16)
    return keys.astype(jnp.float32)


def score(q_BTIJ: Array, w_BTI: Array, keys_BCJ: Array, rounded: bool) -> Array:
    """Σ_heads relu(q · k) · w as float32 `[B, T, C]`; `rounded`: to bfloat16 at every arrow."""

    def cast(x: Array) -> Array:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if rounded else x

    q, w = q_BTIJ.astype(jnp.float32), w_BTI.astype(jnp.float32)
    exact = lax.Precision.HIGHEST
    dots_BTIC = cast(jnp.einsum("BTIJ,BCJ->BTIC", q, keys_BCJ, precision=exact))
    return cast(cast(jnp.maximum(dots_BTIC, 0) * w[..., None]).sum(axis=2))


def choose(scores_BTC: Array, visible_BT: Array, keep: int) -> Array:
    """Mask of the `keep` best visible entries; of equal scores the lowest index wins."""
    index = jnp.arange(scores_BTC.shape[-1])
    shown = index[None, None] < visible_BT[..., None]
    scores = jnp.where(scores_BTC == 0, 0.0, scores_BTC)  # -0.0 and 0.0 are a tie
    first = jnp.argsort(~shown, axis=-1, stable=True)  # hidden entries last, even behind -inf
    scores = jnp.take_along_axis(scores, first, axis=-1)
    scores = jnp.where(jnp.take_along_axis(shown, first, axis=-1), scores, -jnp.inf)
    best = jnp.take_along_axis(first, jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    place = jnp.argsort(best, axis=-1)
    return (place < keep) & shown


def mask_rows(mask_BTC: Array, keep: int) -> Array:
    """The chosen rows in ascending order `[B, T, keep]`, then zeros."""
    count = mask_BTC.sum(axis=-1, keepdims=True)
    rows = jnp.argsort(~mask_BTC, axis=-1, stable=True)[..., :keep].astype(jnp.int32)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, keep - rows.shape[-1])))
    return jnp.where(jnp.arange(keep)[None, None] < count, rows, 0)


def mask_words(mask_BTC: Array) -> Array:
    """Bits of a mask: word [s, lane] holds entries s·4096 + bit·128 + lane; `[B, T, s·128]`."""
    batch, fresh, capacity = mask_BTC.shape
    mask = jnp.pad(mask_BTC, ((0, 0), (0, 0), (0, -capacity % SPAN)))
    bits = mask.reshape(batch, fresh, -1, 32, 128).astype(jnp.uint32)
    words = (bits << jnp.arange(32, dtype=jnp.uint32)[None, None, None, :, None]).sum(axis=3)
    words = lax.bitcast_convert_type(words.astype(jnp.uint32), jnp.int32)
    return words.reshape(batch, fresh, -1)


def words_mask(words: Array, capacity: int) -> Array:
    """The mask `[B, T, capacity]` of `mask_words`."""
    groups = words.reshape(*words.shape[:2], -1, 1, 128)
    bits = (groups >> jnp.arange(32)[None, None, None, :, None]) & 1
    return bits.reshape(*words.shape[:2], -1)[..., :capacity] > 0
