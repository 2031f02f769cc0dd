"""What a sequence remembers: window rings, compressor rings, compressed rows, index keys.

Caches are plain pytrees, in and out. Arrays of a layer group carry a leading dimension, one entry
per repeat of the group; functions here take that entry's index, so that a scan over layers can keep
the whole stack in its carry and update it in place.

Position p of a sequence lives in ring slot p mod (ring length). Row j of the compressed rows covers
tokens [j·r, (j+1)·r).

Eight- and sixteen-bit floats are kept as unsigned integers of the same bits: every backend updates
integers in place, while some would widen a whole cache of small floats to write one row.
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
from dsv4_jax.quant import (
    FP4_BLOCK,
    KV_BLOCK,
    dequantize_fp8,
    pack_fp4,
    quantize_fp4,
    quantize_fp8,
    unpack_fp4,
)
from dsv4_jax.schedule import layer_groups
from pallas_kernels.row_update.api import update_rows
from sharding.shards import SINGLE, Shards

E8M0_ONE = 127  # bits of the scale 1
ROW_TILE = 512  # compressed rows that one step of an attention or scoring loop reads
KERNEL_TILE = 1024  # the same of kernels; an eighth of it is the least they read
COLUMN_TILE = 128  # rows that a kernel rewrites together
SCALE_BYTES = 4  # whole words: XLA on TPU copies arrays of other widths before a kernel

LayerCache = dict[str, Any]


@struct.dataclass
class PackedRows:
    """KV rows as the checkpoint's training rounded them: 448 FP8 + 7 scales + 64 bfloat16 each.

    Bytes. values: float8_e4m3fn `[..., H-R]`, then bfloat16, low byte first: `[..., H-R + 2·R]`.
    scales: float8_e8m0fnu `[..., ⌈(H-R)/64⌉]`, filled up to whole words, 8 bytes, where kernels
    read them. An array of 16-bit values apart would be copied by some TPUs: they tile it otherwise
    than kernels do.
    """

    values: Array
    scales: Array
    rope_dim: int = struct.field(pytree_node=False)

    @property
    def still(self) -> int:
        """Channels in FP8."""
        return self.values.shape[-1] - 2 * self.rope_dim


@struct.dataclass
class PackedKeys:
    """Index keys in FP4: codes `[..., J/2]`, bits of float8_e8m0fnu scales `[..., ⌈J/32⌉]`."""

    codes: Array
    scales: Array


Rows = Array | PackedRows | PackedKeys


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
) -> Cache:
    """Empty state for `batch` sequences of up to `max_len` tokens.

    shards: over how many devices the rows of a sequence are to be split, in whole blocks.

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

    return _init(cfg, batch, rows_of, num, scan)


def init_paged_cache(
    cfg: ModelConfig, slots: int, pages: int, page_tokens: int, num: Numerics, scan: bool = True
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

    return _init(cfg, slots, rows_of, num, scan)


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
) -> Cache:
    def layer(ratio: int, repeats: int) -> LayerCache:
        cache: LayerCache = {"window": _empty_rows(cfg, (repeats, slots, cfg.window), num)}
        if ratio:
            cache["rows"] = _empty_rows(cfg, (repeats, *rows_of(ratio)), num)
            cache["ring"] = _empty_ring((repeats, slots), ratio, cfg.head_dim)
        if ratio == CSA:
            cache["keys"] = _empty_keys(cfg, (repeats, *rows_of(ratio)), num)
            cache["key_ring"] = _empty_ring((repeats, slots), ratio, cfg.index_dim)
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


def _empty_ring(lead: tuple[int, int], ratio: int, row_dim: int) -> dict[str, Array]:
    """Compressor inputs of the open window (and the one before it where windows overlap)."""
    overlap = 2 if ratio == CSA else 1
    shape = (*lead, overlap * ratio, overlap * row_dim)
    return {"values": jnp.zeros(shape, jnp.float32), "scores": jnp.zeros(shape, jnp.float32)}


def _empty_rows(cfg: ModelConfig, lead: tuple[int, ...], num: Numerics) -> Rows:
    if not num.packed_cache:
        return _bits(jnp.zeros((*lead, cfg.head_dim), num.jnp_dtype))
    still = cfg.head_dim - cfg.rope_dim
    return PackedRows(
        values=jnp.zeros((*lead, still + 2 * cfg.rope_dim), jnp.uint8),
        scales=jnp.full((*lead, _scale_bytes(still, num)), E8M0_ONE, jnp.uint8),
        rope_dim=cfg.rope_dim,
    )


def _scale_bytes(channels: int, num: Numerics) -> int:
    """Bytes for the scales of this many FP8 channels; whole words where kernels read them."""
    scales = -(-channels // KV_BLOCK)
    return -(-scales // SCALE_BYTES) * SCALE_BYTES if num.kernels else scales


def _empty_keys(cfg: ModelConfig, lead: tuple[int, ...], num: Numerics) -> Rows:
    if not num.packed_cache:
        return _bits(jnp.zeros((*lead, cfg.index_dim), num.jnp_dtype))
    return PackedKeys(
        codes=jnp.zeros((*lead, cfg.index_dim // 2), jnp.uint8),
        scales=jnp.full((*lead, -(-cfg.index_dim // FP4_BLOCK)), E8M0_ONE, jnp.uint8),
    )


def _bits(x: Array) -> Array:
    """Small floats as unsigned integers of the same bits; other arrays unchanged."""
    width = x.dtype.itemsize
    return lax.bitcast_convert_type(x, f"uint{8 * width}") if width < 4 else x


def _floats(x: Array, dtype: str) -> Array:
    return lax.bitcast_convert_type(x, jnp.dtype(dtype))


def _to_bytes(x: Array) -> Array:
    """bfloat16 `[..., R]` as uint8 `[..., 2·R]`, low byte first."""
    both = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint8)
    return both.reshape(*x.shape[:-1], 2 * x.shape[-1])


def _from_bytes(x: Array) -> Array:
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.bfloat16)


def pack(like: Rows, x: Array) -> Rows:
    """Values `[..., H]` (already rounded) in the storage form of `like`. Exact."""
    if isinstance(like, PackedRows):
        still = like.still
        codes, scales = quantize_fp8(x[..., :still], KV_BLOCK)
        bits = _bits(scales.astype(jnp.float8_e8m0fnu))
        spare = like.scales.shape[-1] - bits.shape[-1]
        bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, spare)], constant_values=E8M0_ONE)
        values = jnp.concatenate([_bits(codes), _to_bytes(x[..., still:])], axis=-1)
        return PackedRows(values, bits, like.rope_dim)
    if isinstance(like, PackedKeys):
        values, scales = quantize_fp4(x)
        return PackedKeys(pack_fp4(values), _bits(scales.astype(jnp.float8_e8m0fnu)))
    return _bits(x)


def unpack(rows: Rows, dtype: jnp.dtype) -> Array:
    """Values of stored rows or keys `[..., H]`."""
    if isinstance(rows, PackedRows):
        scales = _floats(rows.scales[..., : -(-rows.still // KV_BLOCK)], "float8_e8m0fnu")
        codes = _floats(rows.values[..., : rows.still], "float8_e4m3fn")
        still = dequantize_fp8(codes, scales, KV_BLOCK).astype(dtype)
        rest = _from_bytes(rows.values[..., rows.still :]).astype(dtype)
        return jnp.concatenate([still, rest], axis=-1)
    if isinstance(rows, PackedKeys):
        values = unpack_fp4(rows.codes)
        scales = _floats(rows.scales, "float8_e8m0fnu").astype(jnp.float32)
        scales = jnp.repeat(scales, FP4_BLOCK, axis=-1)
        return (values * scales[..., : values.shape[-1]]).astype(dtype)
    return (_floats(rows, "bfloat16") if rows.dtype == jnp.uint16 else rows).astype(dtype)


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


def ring_push(
    ring: Rows,
    place: Place,
    pos_B: Array,
    count_B: Array,
    new_BH: Array,
    kernels: str | None = None,
) -> Rows:
    """Puts one entry at position `pos_B` where `count_B` is not 0."""
    length, slots = num_rows(ring), place.slots(len(pos_B))
    if _by_kernel(ring, kernels):
        new, entry_B = pack(ring, new_BH[:, None]), pos_B % length
        return _put_columns(ring, place, slots[:, None], entry_B, count_B > 0, new, kernels)
    entry_B = jnp.where(count_B > 0, pos_B % length, length)  # out of range: dropped

    def put(a: Array, new: Array) -> Array:
        return a.at[place.layer, slots, entry_B].set(new, mode="drop")

    # kept apart: fused into its readers, the update would be made in a copy for each of them
    return lax.optimization_barrier(jax.tree.map(put, ring, pack(ring, new_BH)))


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
