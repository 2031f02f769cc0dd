"""What a sequence remembers: window rings, compressor rings, compressed rows, index keys.

Caches are plain pytrees, in and out. Arrays of a layer group carry a leading dimension, one entry
per repeat of the group; functions here take that entry's index, so that a scan over layers can keep
the whole stack in its carry and update it in place.

Position p of a sequence lives in ring slot p mod (ring length). Row j of the compressed rows covers
tokens [j·r, (j+1)·r).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.row_format import PackedKeys as PackedKeys
from dsv4_jax.row_format import PackedRows as PackedRows
from dsv4_jax.row_format import Rows, empty_keys, empty_rows, pack, unpack
from dsv4_jax.schedule import layer_groups
from pallas_kernels.row_update.api import update_rows
from sharding.shards import SINGLE, Shards

ROW_TILE = 512  # compressed rows that one step of an attention or scoring loop reads
KERNEL_TILE = 1024  # the same of kernels; an eighth of it is the least they read
COLUMN_TILE = 128  # rows that a kernel rewrites together
RING_UNIT = 8  # spare ring entries come in so many

LayerCache = dict[str, Any]


@struct.dataclass
class Cache:
    """State of a batch of sequences.

    pos_B: tokens seen so far, int32. groups: per layer group and pattern offset a `LayerCache`.
    mtp: one `LayerCache` per MTP block, with its own count of rows `mtp_pos_B`.
    slots_B, table_BP: which ring slots and pages the sequences use (see `Place`); None where the
    arrays belong to these sequences alone.
    """

    pos_B: Array
    groups: list[list[LayerCache]]
    mtp_pos_B: Array
    mtp: list[LayerCache]
    slots_B: Array | None = None
    table_BP: Array | None = None


def init_cache(
    cfg: ModelConfig,
    batch: int,
    max_len: int,
    num: Numerics,
    scan: bool = True,
    shards: Shards = SINGLE,
    spare: int = 0,
) -> Cache:
    """Empty state for `batch` sequences of up to `max_len` tokens.

    shards: over how many devices the rows of a sequence are to be split, in whole blocks.
    spare: of the newest tokens so many may be taken back: see `spare_tokens`.

    Raises:
        ValueError: `max_len` is not positive or exceeds what the model was made for.
    """
    if not 1 <= max_len <= cfg.max_len:
        raise ValueError(f"max_len={max_len} must lie between 1 and the model's {cfg.max_len}")

    def rows_of(ratio: int) -> tuple[int, int]:
        rows, parts = row_capacity(max_len, ratio), shards.count("context")
        if parts > 1:
            rows = -(-rows // (parts * shards.row_block)) * shards.row_block  # of one shard
        if num.kernels:
            rows = -(-rows // row_unit(rows)) * row_unit(rows)
        return batch, rows * parts

    return _init(cfg, batch, rows_of, num, scan, spare)


def init_paged_cache(
    cfg: ModelConfig,
    slots: int,
    pages: int,
    page_tokens: int,
    num: Numerics,
    scan: bool = True,
    spare: int = 0,
) -> Cache:
    """Shared state of a serving engine: ring slots, and a pool of pages of compressed rows.

    Callers set `pos_B`, `slots_B` and `table_BP` of the sequences of each step.

    Raises:
        ValueError: `page_tokens` is no multiple of every compress ratio.
    """
    if page_tokens % page_unit(cfg):
        raise ValueError(f"page_tokens={page_tokens} must be a multiple of {page_unit(cfg)}")

    def rows_of(ratio: int) -> tuple[int, int]:
        return pages, page_tokens // ratio

    return _init(cfg, slots, rows_of, num, scan, spare)


def page_unit(cfg: ModelConfig) -> int:
    """Smallest page in tokens: the least common multiple of the compress ratios."""
    return math.lcm(*(ratio for ratio in cfg.compress_ratios if ratio))


def row_capacity(max_len: int, ratio: int) -> int:
    """Compressed rows allocated for `max_len` tokens: whole tiles, so that reads never clamp."""
    rows = max(max_len // ratio, 1)
    return -(-rows // ROW_TILE) * ROW_TILE if rows > ROW_TILE else rows


def row_unit(rows: int) -> int:
    """Kernels read compressed rows in tiles of this size."""
    return KERNEL_TILE if rows > ROW_TILE else KERNEL_TILE // 8


def _init(
    cfg: ModelConfig,
    slots: int,
    rows_of: Callable[[int], tuple[int, int]],
    num: Numerics,
    scan: bool,
    spare: int,
) -> Cache:
    more = -(-spare // RING_UNIT) * RING_UNIT
    window = cfg.window + more
    if spare and num.kernels and num.packed_cache:
        window = -(-window // COLUMN_TILE) * COLUMN_TILE

    def layer(ratio: int, repeats: int) -> LayerCache:
        cache: LayerCache = {"window": empty_rows(cfg, (repeats, slots, window), num)}
        if ratio:
            cache["rows"] = empty_rows(cfg, (repeats, *rows_of(ratio)), num)
            cache["ring"] = _empty_ring((repeats, slots), ratio, cfg.head_dim, more)
        if ratio == CSA:
            cache["keys"] = empty_keys(cfg, (repeats, *rows_of(ratio)), num)
            cache["key_ring"] = _empty_ring((repeats, slots), ratio, cfg.index_dim, more)
        return cache

    return Cache(
        pos_B=jnp.zeros(slots, jnp.int32),
        groups=[
            [layer(kind.ratio, group.repeats) for kind in group.kinds]
            for group in layer_groups(cfg, scan)
        ],
        mtp_pos_B=jnp.zeros(slots, jnp.int32),
        mtp=[layer(0, 1) for _ in range(cfg.num_mtp_layers)],
    )


def pooled_tokens(ratio: int) -> int:
    """Tokens that a compressed row pools; windows of ratio 4 overlap."""
    return (2 if ratio == CSA else 1) * ratio


def _empty_ring(lead: tuple[int, int], ratio: int, row_dim: int, more: int) -> dict[str, Array]:
    """Compressor inputs of the open window (and the one before it where windows overlap)."""
    pooled = pooled_tokens(ratio)
    shape = (*lead, pooled + more, pooled // ratio * row_dim)
    return {"values": jnp.zeros(shape, jnp.float32), "scores": jnp.zeros(shape, jnp.float32)}


class Place(NamedTuple):
    """Where a batch of sequences lives inside the arrays of a layer group.

    layer: entry along the leading dimension. slots_B: the ring slot of each sequence;
    None: sequence b has slot b. table_BP: the pages of each sequence's compressed rows, in order;
    None: rows are not paged, sequence b owns row store b.
    """

    layer: Array
    slots_B: Array | None = None
    table_BP: Array | None = None

    def slots(self, batch: int) -> Array:
        return jnp.arange(batch) if self.slots_B is None else self.slots_B


def num_rows(rows: Rows) -> int:
    """Entries along the third dimension: ring length, rows of a store, or rows of a page."""
    return jax.tree.leaves(rows)[0].shape[2]


def row_room(rows: Rows, place: Place) -> int:
    """Compressed rows that a sequence can hold."""
    pages = 1 if place.table_BP is None else place.table_BP.shape[1]
    return pages * num_rows(rows)


def tile_rows(rows: Rows, place: Place) -> int:
    """Rows that one step of a loop over compressed rows reads: whole pages where paged."""
    room = row_room(rows, place)
    if place.table_BP is None:
        return min(room, ROW_TILE)
    return min(room, max(ROW_TILE // num_rows(rows), 1) * num_rows(rows))


def read_tile(rows: Rows, place: Place, start: Array, size: int, dtype: jnp.dtype) -> Array:
    """Rows [start, start+size) of every sequence: `[B, size, H]`; a whole tile of `tile_rows`.

    Rows past a sequence's room hold garbage; callers mask them.
    """
    if place.table_BP is None:

        def cut(a: Array) -> Array:
            begin = (place.layer, 0, start, 0)
            return lax.dynamic_slice(a, begin, (1, a.shape[1], size, a.shape[3]))[0]

        return unpack(jax.tree.map(cut, rows), dtype)
    count = size // num_rows(rows)
    table = jnp.pad(place.table_BP, ((0, 0), (0, -place.table_BP.shape[1] % count)))
    pages = lax.dynamic_slice_in_dim(table, start // num_rows(rows), count, axis=1)

    def fetch(a: Array) -> Array:
        return a[place.layer, pages].reshape(len(pages), size, a.shape[3])

    return unpack(jax.tree.map(fetch, rows), dtype)


def gather_rows(rows: Rows, place: Place, which: Array, dtype: jnp.dtype) -> Array:
    """Compressed rows number `which` `[B, ...]` of each sequence: `[B, ..., H]`."""
    owner, entry = _locate(rows, place, which)
    return unpack(jax.tree.map(lambda a: a[place.layer, owner, entry], rows), dtype)


def write_rows(
    rows: Rows,
    place: Place,
    first_B: Array,
    count_B: Array,
    new_BTH: Array,
    kernels: str | None = None,
    every: int = 1,
) -> Rows:
    """Stores the first `count_B` of `new_BTH` as rows first_B, first_B + 1, …

    every: one sequence in so many has any, on average, which the kernel's cost estimate counts on.
    """
    if _by_kernel(rows, kernels):
        table = jnp.arange(len(first_B))[:, None] if place.table_BP is None else place.table_BP
        new = pack(rows, new_BTH)
        return _put_columns(rows, place, table, first_B, count_B, new, kernels, every)
    steps = jnp.arange(new_BTH.shape[1])[None]
    owner, entry = _locate(rows, place, first_B[:, None] + steps)
    entry = jnp.where(steps < count_B[:, None], entry, num_rows(rows))  # out of range: dropped

    def put(a: Array, new: Array) -> Array:
        return a.at[place.layer, owner, entry].set(new, mode="drop")

    return jax.tree.map(put, rows, pack(rows, new_BTH))


def _by_kernel(rows: Rows, kernels: str | None) -> bool:
    """Whether a kernel writes: XLA would turn a whole store of packed rows both ways."""
    return bool(kernels) and not isinstance(rows, Array) and num_rows(rows) % COLUMN_TILE == 0


def _put_columns(
    rows: Rows,
    place: Place,
    owner_BJ: Array,
    first_B: Array,
    count_B: Array,
    new: Rows,
    kernels: str | None,
    every: int = 1,
) -> Rows:
    stores, treedef = jax.tree.flatten(rows)
    updated = update_rows(
        tuple(stores),
        tuple(jax.tree.leaves(new)),
        owner_BJ,
        first_B,
        count_B.astype(jnp.int32),
        layer=place.layer,
        every=every,
        implementation=kernels,  # type: ignore[arg-type]
    )
    return jax.tree.unflatten(treedef, updated)


def _locate(rows: Rows, place: Place, which: Array) -> tuple[Array, Array]:
    """Second and third index of compressed rows: (sequence, row), or (page, row of the page)."""
    if place.table_BP is None:
        return jnp.arange(len(which)).reshape((-1,) + (1,) * (which.ndim - 1)), which
    page, entry = which // num_rows(rows), which % num_rows(rows)
    flat = jnp.clip(page, 0, place.table_BP.shape[1] - 1).reshape(len(which), -1)
    return jnp.take_along_axis(place.table_BP, flat, axis=1).reshape(which.shape), entry


def ring_history(ring: Rows, place: Place, pos_B: Array, count: int, dtype: jnp.dtype) -> Array:
    """The `count` entries in front of position `pos_B`, oldest first: `[B, count, H]`.

    Entries of negative positions hold garbage; callers mask them.
    """
    entries = (pos_B[:, None] + jnp.arange(-count, 0)[None]) % num_rows(ring)
    slots = place.slots(len(pos_B))

    def read(a: Array) -> Array:
        # whole rings first: single entries would be read as rows, which not every layout has
        return jnp.take_along_axis(a[place.layer, slots], entries[..., None], axis=1)

    return unpack(jax.tree.map(read, ring), dtype)


def ring_rows(ring: Rows, place: Place, dtype: jnp.dtype) -> Array:
    """Rings of all sequences as they lie: `[B, ring length, H]`."""

    def whole(a: Array) -> Array:
        layer = lax.dynamic_index_in_dim(a, place.layer, keepdims=False)
        return layer if place.slots_B is None else layer[place.slots_B]

    return unpack(jax.tree.map(whole, ring), dtype)


def ring_positions(ring: Rows, last_B: Array) -> Array:
    """Newest position up to `last_B` of every ring entry: `[B, ring length]`."""
    length = num_rows(ring)
    return last_B[:, None] - (last_B[:, None] - jnp.arange(length)[None]) % length


def can_push(ring: Rows, fresh: int, seen: int) -> bool:
    """Whether `fresh` entries may be put into a ring before anything is read from it.

    seen: entries that each of them looks back on, itself included.
    """
    return num_rows(ring) >= seen + fresh - 1


def ring_push(
    ring: Rows,
    place: Place,
    pos_B: Array,
    count_B: Array,
    new_BTH: Array,
    kernels: str | None = None,
) -> Rows:
    """Puts the first `count_B` of a few entries at positions `pos_B`, `pos_B` + 1, …"""
    length, slots, fresh = num_rows(ring), place.slots(len(pos_B)), new_BTH.shape[1]
    new = pack(ring, new_BTH)
    if _by_kernel(ring, kernels):
        for t in range(fresh):  # each may lie behind the ring's end, at its start
            one, entry_B = jax.tree.map(lambda a, t=t: a[:, t : t + 1], new), (pos_B + t) % length
            ring = _put_columns(ring, place, slots[:, None], entry_B, count_B > t, one, kernels)
        return ring
    steps = jnp.arange(fresh)[None]
    entry_BT = (pos_B[:, None] + steps) % length
    entry_BT = jnp.where(steps < count_B[:, None], entry_BT, length)  # out of range: dropped

    def put(a: Array, new: Array) -> Array:
        return a.at[place.layer, slots[:, None], entry_BT].set(new, mode="drop")

    # kept apart: fused into its readers, the update would be made in a copy for each of them
    return lax.optimization_barrier(jax.tree.map(put, ring, new))


def ring_write(
    ring: Rows,
    place: Place,
    pos_B: Array,
    count_B: Array,
    recent: Array,
    kernels: str | None = None,
) -> Rows:
    """Advances a ring by the `count_B` first of several new entries.

    `recent` `[B, ring length + new, H]` is the history in front of `pos_B`, then the new entries.
    """
    newest_BLH = newest(recent, num_rows(ring), pos_B, count_B)
    return ring_put(ring, place, count_B, newest_BLH, kernels)


def newest(recent: Array, length: int, pos_B: Array, count_B: Array) -> Array:
    """Of `[B, length + new, H]` the last `length` up to the `count_B` first new, as a ring lies."""
    last_B1 = (pos_B + count_B - 1)[:, None]
    source = last_B1 - (last_B1 - jnp.arange(length)[None]) % length - pos_B[:, None] + length
    return jnp.take_along_axis(recent, source[..., None], axis=1)


def ring_put(
    ring: Rows, place: Place, count_B: Array, newest_BLH: Array, kernels: str | None = None
) -> Rows:
    """Replaces whole rings; kernels leave those alone whose `count_B` is 0."""
    length, slots = num_rows(ring), place.slots(len(count_B))
    new = pack(ring, newest_BLH)
    if _by_kernel(ring, kernels):
        written_B = jnp.where(count_B > 0, length, 0)
        first_B = jnp.zeros_like(written_B)
        return _put_columns(ring, place, slots[:, None], first_B, written_B, new, kernels)
    return jax.tree.map(lambda a, x: a.at[place.layer, slots].set(x), ring, new)
