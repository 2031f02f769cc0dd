"""Compressed rows of packed documents: where the windows lie, and how they are pooled.

A window is `ratio` consecutive tokens of one document, counted from its start, wherever in the row
that is. What a document has left over at its end is in no window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from dsv4_jax.compress import pool
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.gather import take_rows
from dsv4_jax.norm import rms_norm
from dsv4_jax.numerics import Numerics, linear_f32
from dsv4_jax.rope import frequencies, rotate, rotation
from dsv4_jax.training.batch import Batch


class Windows(NamedTuple):
    """The complete windows of a batch, in row order; C is what fits into a row.

    end_BC: index in the row of the last token; T where there is no window.
    segment_BC: its document, -1 where there is none. start_BC: position of the first token.
    own_Bn, own_BT: tokens of all windows (n = C·r), and the entry of every token; for `take_rows`.
    before_Bn, before_BT: the same of the windows in front of them, if they are overlapped.
    has_before_BC: whether there is one.
    """

    end_BC: Array
    segment_BC: Array
    start_BC: Array
    own_Bn: Array
    own_BT: Array
    before_Bn: Array
    before_BT: Array
    has_before_BC: Array


def find_windows(batch: Batch, ratio: int, before: int = 0) -> Windows:
    """Windows of `ratio` tokens of every document.

    before: tokens at the front that belong to another device; so do windows that end there.
    """
    rows, length = batch.tokens_BT.shape
    count = max((length + (ratio - 1 if before else 0)) // ratio, 1)  # the first may have begun
    step_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
    offset_BT = batch.position_BT % ratio
    is_end_BT = (offset_BT == ratio - 1) & (batch.segment_BT > 0)
    end_BC = jnp.sort(jnp.where(is_end_BT, step_BT, length), axis=1)[:, :count]
    end_BC = jnp.pad(end_BC, ((0, 0), (0, count - end_BC.shape[1])), constant_values=length)
    exists_BC, last_BC = (before <= end_BC) & (end_BC < length), jnp.minimum(end_BC, length - 1)
    segment_BC = jnp.where(exists_BC, _at(batch.segment_BT, last_BC), -1)
    start_BC = jnp.where(exists_BC, _at(batch.position_BT, last_BC) - ratio + 1, 0)
    has_before_BC = exists_BC & (start_BC >= ratio)
    inside = jnp.arange(1 - ratio, 1, dtype=jnp.int32)[None, None]

    def tokens(exists_BC: Array, shift: int) -> Array:
        index = jnp.where(exists_BC[..., None], end_BC[..., None] + inside - shift, length)
        return index.reshape(rows, count * ratio)

    number_BT = jnp.cumsum(is_end_BT, axis=1, dtype=jnp.int32) - is_end_BT.astype(jnp.int32)

    def entries(later: int) -> Array:
        """Entry of each token in the window `later` ones behind its own, if that is complete."""
        which_BT = number_BT + later
        safe_BT = jnp.minimum(which_BT, count - 1)
        expected_BT = step_BT + (ratio - 1 - offset_BT) + later * ratio
        found_BT = (which_BT < count) & (_at(end_BC, safe_BT) == expected_BT)
        found_BT &= _at(segment_BC, safe_BT) == batch.segment_BT
        return jnp.where(found_BT, which_BT * ratio + offset_BT, count * ratio)

    return Windows(
        end_BC,
        segment_BC,
        start_BC,
        tokens(exists_BC, 0),
        entries(0),
        tokens(has_before_BC, ratio),
        entries(1),
        has_before_BC,
    )


def _at(x_BT: Array, index_BJ: Array) -> Array:
    return jnp.take_along_axis(x_BT, index_BJ, axis=1)


class Extent(NamedTuple):
    """Where windows lie: their document, -1 if there is none, and the last token's position."""

    segment_BC: Array
    last_BC: Array


def extent(windows: Windows, ratio: int) -> Extent:
    return Extent(windows.segment_BC, windows.start_BC + ratio - 1)


def visible(windows: Extent, batch: Batch) -> Array:
    """Which windows each token may see: complete ones of its own document, bool `[B, T, C]`."""
    same_BTC = batch.segment_BT[:, :, None] == windows.segment_BC[:, None]
    return same_BTC & (windows.last_BC[:, None] <= batch.position_BT[..., None])


def compress_windows(
    weights: dict[str, Any],
    x_BTD: Array,
    windows: Windows,
    cfg: ModelConfig,
    num: Numerics,
) -> Array:
    """One row per window, normed and rotated: `[B, C, H]`; entries without a window hold noise."""
    ape_rd, size = weights["ape"], weights["norm"].shape[0]
    ratio = ape_rd.shape[0]
    both = linear_f32(x_BTD, weights["wkv"]), linear_f32(x_BTD, weights["wgate"])

    def cut(channels: slice, index_Bn: Array, inverse_BT: Array) -> tuple[Array, Array]:
        """Values and scores of windows, `[B, C, r, H]`, by one gather."""
        x_BTd = jnp.concatenate([a[..., channels] for a in both], axis=-1)
        taken = take_rows(x_BTd, index_Bn, inverse_BT).reshape(len(x_BTd), -1, ratio, 2 * size)
        return taken[..., :size], taken[..., size:]

    values, scores = cut(slice(-size, None), windows.own_Bn, windows.own_BT)
    scores = scores + ape_rd[None, None, :, -size:]
    if ratio == CSA:  # overlapped: half of the channels speak for the next window
        old_values, old_scores = cut(slice(size), windows.before_Bn, windows.before_BT)
        old_scores = old_scores + ape_rd[None, None, :, :size]
        old_scores = jnp.where(windows.has_before_BC[..., None, None], old_scores, -jnp.inf)
        values = jnp.concatenate([old_values, values], axis=2)
        scores = jnp.concatenate([old_scores, scores], axis=2)
    rows_BCH = rms_norm(num.cast(pool(values, scores)), weights["norm"], cfg.norm_eps, num)
    turn = rotation(frequencies(cfg, compressed=True), windows.start_BC)
    return rotate(rows_BCH, turn, num)
