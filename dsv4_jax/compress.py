"""Compressor: pools windows of tokens into rows, the same rows for any chunking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax import cache as store
from dsv4_jax import context
from dsv4_jax.config import CSA
from dsv4_jax.norm import rms_norm
from dsv4_jax.numerics import Numerics, linear_f32
from dsv4_jax.rope import Rotation, rotate, rotation
from pallas_kernels.compress_chunk.api import pool_windows
from pallas_kernels.compress_step.api import compress_step
from sharding.shards import SINGLE, Shards


class Chunk(NamedTuple):
    """Where the new tokens of each sequence stand.

    pos_B: position of the first one. count_B: how many are real; the rest is padding.
    rope: rotations at the tokens' positions `[B, T, R/2]`, for window-only and compressed layers.
    slots_B, table_BP: as in `cache.Place`.
    total_B: real tokens on all devices, where they are split.
    """

    pos_B: Array
    count_B: Array
    tokens_BT: Array
    rope_window: Rotation
    rope_rows: Rotation
    total_B: Array
    slots_B: Array | None = None
    table_BP: Array | None = None

    def place(self, index: Array) -> store.Place:
        """Where these sequences live in the caches of layer `index` of a group."""
        return store.Place(index, self.slots_B, self.table_BP)

    def visible(self, steps_T: Array, ratio: int) -> Array:
        """Compressed rows that tokens `steps_T` of the chunk may see, `[B, T]`; none of padding."""
        steps = steps_T[None]
        rows_BT = (self.pos_B[:, None] + steps + 1) // ratio
        return jnp.where(steps < self.count_B[:, None], rows_BT, 0)

    def last(self) -> Chunk:
        """The chunk of each sequence's last real token alone; its rows are those of one device."""
        first_B, count_B = jnp.maximum(self.count_B - 1, 0), jnp.minimum(self.count_B, 1)
        return self._replace(
            pos_B=self.pos_B + first_B,
            count_B=count_B,
            tokens_BT=last_of(self.tokens_BT, self.count_B),
            rope_window=Rotation(*(last_of(a, self.count_B) for a in self.rope_window)),
            rope_rows=Rotation(*(last_of(a, self.count_B) for a in self.rope_rows)),
            total_B=count_B,
        )


def last_of(x: Array, count_B: Array) -> Array:
    """The last real entry along axis 1 of each sequence: `[B, 1, ...]`."""
    at = jnp.maximum(count_B - 1, 0).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, at, axis=1)


class NewRows(NamedTuple):
    """Rows that a chunk completes: the first `count_B` of `rows_BCH`, starting at row `first_B`."""

    rows_BCH: Array
    first_B: Array
    count_B: Array


def pool(values: Array, scores: Array) -> Array:
    """Softmax over tokens, separately for every channel: `[..., tokens, d]` to `[..., d]`, fp32."""
    return (jax.nn.softmax(scores, axis=-2) * values).sum(axis=-2)


def compress(
    weights: dict[str, Any],
    x_BTD: Array,
    ring: dict[str, Any],
    index: Array,
    chunk: Chunk,
    num: Numerics,
    norm_eps: float,
    freqs: Any,
    shards: Shards = SINGLE,
) -> tuple[NewRows, dict[str, Any]]:
    """Rows completed by this chunk (normed and rotated, not yet rounded to low precision).

    The state is a ring of the last windows' projected tokens, values and scores, in float32. A row
    depends on positions alone: any split of a sequence into chunks gives the same rows.
    """
    ratio, width = weights["ape"].shape
    row_dim = weights["norm"].shape[0]
    fresh = x_BTD.shape[1]
    values_BTd = linear_f32(x_BTD, weights["wkv"])
    slots_BT = (chunk.pos_B[:, None] + jnp.arange(fresh)[None]) % ratio
    scores_BTd = linear_f32(x_BTD, weights["wgate"]) + weights["ape"][slots_BT]
    place = chunk.place(index)
    first_B = chunk.pos_B // ratio
    count_B = (chunk.pos_B + chunk.count_B) // ratio - first_B

    def finish(rows_BCd: Array) -> Array:
        rows_BCH = rms_norm(num.cast(rows_BCd), weights["norm"], norm_eps, num)
        positions_BC = (first_B[:, None] + jnp.arange(rows_BCd.shape[1])[None]) * ratio
        return rotate(rows_BCH, rotation(freqs, positions_BC), num)

    has_spare = store.num_rows(ring["values"]) > store.pooled_tokens(ratio)
    if fresh == 1 and num.kernels and not has_spare:
        try:
            step = compress_step(
                ring["values"],
                ring["scores"],
                values_BTd[:, 0],
                scores_BTd[:, 0],
                chunk.pos_B,
                chunk.count_B,
                ratio=ratio,
                layer=index,
                slots_B=chunk.slots_B,
                implementation=num.kernels,  # type: ignore[arg-type]
            )
            ring = {"values": step.values, "scores": step.scores}
            return NewRows(finish(step.rows_Bd[:, None]), first_B, count_B), ring
        except NotImplementedError:
            if num.implementation is not None:
                raise
    new = {"values": values_BTd, "scores": scores_BTd}
    windows, ring = _advance(ring, new, place, chunk, ratio, shards)
    num_new = -(-fresh // ratio)

    def finished(_) -> Array:
        if fresh > 1 and num.kernels:
            try:
                return finish(_pool_by_kernel(windows, chunk.pos_B, num_new, ratio, num))
            except NotImplementedError:
                if num.implementation is not None:
                    raise
        return finish(_pool_windows(windows, chunk.pos_B, num_new, ratio, row_dim))

    if fresh >= ratio:
        return NewRows(finished(None), first_B, count_B), ring
    # most chunks complete nothing: skip the work
    nothing = jnp.zeros((len(first_B), num_new, row_dim), num.jnp_dtype)
    rows_BCH = lax.cond(count_B.any(), finished, lambda _: nothing, None)
    return NewRows(rows_BCH, first_B, count_B), ring


Windows = Callable[[int], tuple[Array, Array]]  # values and scores of so many, the first needed


def _advance(
    ring: dict[str, Any],
    new: dict[str, Array],
    place: store.Place,
    chunk: Chunk,
    ratio: int,
    shards: Shards,
) -> tuple[Windows, dict[str, Any]]:
    """A way to read windows `[B, n, ratio, d]`, float32, with the chunk in them; and the new ring.

    The first is the first that the row of the chunk's first token pools.
    """
    fresh, pooled = new["values"].shape[1], store.pooled_tokens(ratio)
    length, pos_B, count_B = store.num_rows(ring["values"]), chunk.pos_B, chunk.count_B
    first_B = pos_B - pos_B % ratio - (pooled - ratio)
    if store.can_push(ring["values"], fresh, pooled) and not shards.split:
        ring = {
            name: store.ring_push(ring[name], place, pos_B, count_B, new[name]) for name in ring
        }
        if length == pooled:
            return lambda _: _whole_ring(ring, place, pos_B, ratio), ring
        return lambda count: _from_ring(ring, place, first_B, count, ratio), ring

    def recent(name: str) -> Array:
        old = store.ring_history(ring[name], place, pos_B, length, jnp.dtype("float32"))
        return jnp.concatenate([context.history(old, new[name], shards), new[name]], axis=1)

    recents = {name: recent(name) for name in ring}
    ring = {
        name: context.write_ring(ring[name], place, chunk, recents[name], shards) for name in ring
    }

    def cut(name: str, count: int) -> Array:
        a, span = recents[name], count * ratio
        padded = jnp.pad(a, ((0, 0), (0, max(span + ratio - a.shape[1], 0)), (0, 0)))
        pick = jax.vmap(lambda row, begin: lax.dynamic_slice_in_dim(row, begin, span))
        return _in_windows(pick(padded, first_B - pos_B + length), ratio)

    return lambda count: (cut("values", count), cut("scores", count)), ring


def _in_windows(a: Array, ratio: int) -> Array:
    return a.reshape(a.shape[0], -1, ratio, a.shape[-1])


def _whole_ring(
    ring: dict[str, Any], place: store.Place, pos_B: Array, ratio: int
) -> tuple[Array, Array]:
    """The ring in the order of the row that ends with position `pos_B`, if one does.

    The ring holds one window, which lies in order, or two, of which the later may come first.
    """
    length = store.num_rows(ring["values"])
    swapped = (pos_B + 1) % length != 0

    def read(name: str) -> Array:
        a = store.ring_rows(ring[name], place, jnp.dtype("float32"))
        if length > ratio:
            a = jnp.where(swapped[:, None, None], jnp.roll(a, length // 2, axis=1), a)
        return _in_windows(a, ratio)

    return read("values"), read("scores")


def _from_ring(
    ring: dict[str, Any], place: store.Place, first_B: Array, count: int, ratio: int
) -> tuple[Array, Array]:
    """`count` windows from position `first_B` on; windows not complete yet hold garbage."""

    def read(name: str) -> Array:
        span, dtype = count * ratio, jnp.dtype("float32")
        rows = store.ring_history(ring[name], place, first_B + span, span, dtype)
        return _in_windows(rows, ratio)

    return read("values"), read("scores")


def _pool_windows(windows: Windows, pos_B: Array, num_new: int, ratio: int, row_dim: int) -> Array:
    """Pools `num_new` windows from the one that holds `pos_B` on: float32 `[B, num_new, row_dim]`.

    With overlap (ratio 4) a row also pools the window before its own: the first half of the
    channels speaks for the next window, the second half for the own one.
    """
    overlap = store.pooled_tokens(ratio) // ratio
    values, scores = windows(num_new + overlap - 1)
    if overlap == 1:
        return pool(values, scores)
    has_previous = (pos_B[:, None] // ratio + jnp.arange(num_new)[None]) > 0
    before = jnp.where(has_previous[..., None, None], scores[:, :-1, :, :row_dim], -jnp.inf)
    return pool(
        jnp.concatenate([values[:, :-1, :, :row_dim], values[:, 1:, :, row_dim:]], axis=2),
        jnp.concatenate([before, scores[:, 1:, :, row_dim:]], axis=2),
    )


def _pool_by_kernel(
    windows: Windows, pos_B: Array, num_new: int, ratio: int, num: Numerics
) -> Array:
    """`_pool_windows`, with windows in pairs where they overlap: the kernel takes tokens in 8s."""
    overlaps = ratio == CSA
    count = -(-(num_new + 1) // 2) * 2 if overlaps else num_new
    values, scores = windows(count)
    flat = len(pos_B), count * ratio, values.shape[-1]
    rows = pool_windows(
        values.reshape(flat),
        scores.reshape(flat),
        pos_B // ratio,
        ratio=ratio,
        overlaps=overlaps,
        implementation=num.kernels,  # type: ignore[arg-type]
    )
    return rows[:, :num_new]
