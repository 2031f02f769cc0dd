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

    if fresh == 1 and num.kernels:
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
    recent, ring = _advance(ring, new, place, chunk, ratio, shards)
    num_new = -(-fresh // ratio)

    def finished(_) -> Array:
        if fresh > 1 and num.kernels:
            try:
                return finish(_pool_by_kernel(recent(), chunk.pos_B, num_new, ratio, num))
            except NotImplementedError:
                if num.implementation is not None:
                    raise
        return finish(_pool_windows(recent(), chunk.pos_B, num_new, ratio, row_dim))

    if fresh >= ratio:
        return NewRows(finished(None), first_B, count_B), ring
    # most chunks complete nothing: skip the work
    nothing = jnp.zeros((len(first_B), num_new, row_dim), num.jnp_dtype)
    rows_BCH = lax.cond(count_B.any(), finished, lambda _: nothing, None)
    return NewRows(rows_BCH, first_B, count_B), ring


class Recent(NamedTuple):
    """Projected tokens `[B, n, d]` that new rows may pool, float32; the first stands at start_B.

    start_B None: they are exactly the windows of the one row that a single token may complete.
    """

    values: Array
    scores: Array
    start_B: Array | None


def _advance(
    ring: dict[str, Any],
    new: dict[str, Array],
    place: store.Place,
    chunk: Chunk,
    ratio: int,
    shards: Shards,
) -> tuple[Callable[[], Recent], dict[str, Any]]:
    """A way to read the ring's history with the chunk behind it, and the advanced ring."""
    length, pos_B, count_B = store.num_rows(ring["values"]), chunk.pos_B, chunk.count_B

    def before(name: str) -> Array:
        old = store.ring_history(ring[name], place, pos_B, length, jnp.dtype("float32"))
        return context.history(old, new[name], shards)

    if new["values"].shape[1] == 1:
        ring = {
            name: store.ring_push(ring[name], place, pos_B, count_B, new[name][:, 0])
            for name in ring
        }
        return lambda: _windows_of(ring, place, pos_B, ratio), ring
    recent = Recent(
        jnp.concatenate([before("values"), new["values"]], axis=1),
        jnp.concatenate([before("scores"), new["scores"]], axis=1),
        pos_B - length,
    )
    ring = {
        name: context.write_ring(ring[name], place, chunk, getattr(recent, name), shards)
        for name in ring
    }
    return lambda: recent, ring


def _windows_of(ring: dict[str, Any], place: store.Place, pos_B: Array, ratio: int) -> Recent:
    """The ring in the order of the row that ends with position `pos_B`, if one does.

    The ring holds one window, which lies in order, or two, of which the later may come first.
    """
    length = store.num_rows(ring["values"])
    swapped = (pos_B + 1) % length != 0

    def read(name: str) -> Array:
        a = store.ring_rows(ring[name], place, jnp.dtype("float32"))
        if length == ratio:
            return a
        return jnp.where(swapped[:, None, None], jnp.roll(a, length // 2, axis=1), a)

    return Recent(read("values"), read("scores"), None)


def _pool_windows(recent: Recent, pos_B: Array, num_new: int, ratio: int, row_dim: int) -> Array:
    """Pools `num_new` windows from the one that holds `pos_B` on: float32 `[B, num_new, row_dim]`.

    With overlap (ratio 4) a row also pools the window before its own: the first half of the
    channels speaks for the next window, the second half for the own one.
    """
    overlap = 2 if ratio == CSA else 1
    values, scores = _windows_from(recent, pos_B, num_new + overlap - 1, ratio)
    if overlap == 1:
        return pool(values, scores)
    has_previous = (pos_B[:, None] // ratio + jnp.arange(num_new)[None]) > 0
    before = jnp.where(has_previous[..., None, None], scores[:, :-1, :, :row_dim], -jnp.inf)
    return pool(
        jnp.concatenate([values[:, :-1, :, :row_dim], values[:, 1:, :, row_dim:]], axis=2),
        jnp.concatenate([before, scores[:, 1:, :, row_dim:]], axis=2),
    )


def _windows_from(recent: Recent, pos_B: Array, count: int, ratio: int) -> tuple[Array, Array]:
    """Values and scores of `count` windows `[B, count, ratio, d]`, the first that a row needs."""
    overlap, span = 2 if ratio == CSA else 1, count * ratio
    first_B = pos_B - pos_B % ratio - (overlap - 1) * ratio
    begin_B = None if recent.start_B is None else first_B - recent.start_B

    def windows(a: Array) -> Array:
        if begin_B is None:
            return a.reshape(len(pos_B), -1, ratio, a.shape[-1])
        padded = jnp.pad(a, ((0, 0), (0, max(span + ratio - a.shape[1], 0)), (0, 0)))
        cut = jax.vmap(lambda row, begin: lax.dynamic_slice_in_dim(row, begin, span))
        return cut(padded, begin_B).reshape(len(pos_B), -1, ratio, a.shape[-1])

    return windows(recent.values), windows(recent.scores)


def _pool_by_kernel(recent: Recent, pos_B: Array, num_new: int, ratio: int, num: Numerics) -> Array:
    """`_pool_windows`, with windows in pairs where they overlap: the kernel takes tokens in 8s."""
    overlaps = ratio == CSA
    count = -(-(num_new + 1) // 2) * 2 if overlaps else num_new
    values, scores = _windows_from(recent, pos_B, count, ratio)
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
