"""Attention of one layer: window rows, compressed rows and the sink in one online softmax."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import paging
from pallas_kernels.index_topk.reference import words_mask
from pallas_kernels.sparse_attention import kernel, reference, tuning
from pallas_kernels.sparse_attention.tuning import live_groups

__all__ = [
    "Compressed",
    "PackedRows",
    "Window",
    "live_groups",
    "partial_attention",
    "sparse_attention",
    "window_bounds",
]

Implementation = Literal["reference", "pallas", "interpret"]
LANES, HEADS, BLOCK = 128, 8, 64
MAX_QUERIES = 1 << 15  # their limits live in SMEM
NO_SINK = -1e30  # vanishes beside any row


class PackedRows(NamedTuple):
    """Rows as bytes (uint8): FP8 codes and then the bfloat16 rest, low byte first,
    `[L, B, S, H-R + 2·R]`; e8m0 scales `[L, B, S, (H-R)/64]`.

    Scales may be followed by unused bytes. Eight in all keep the array in the layout that the
    kernel reads; seven would be copied on every call.
    """

    values: Array
    scales: Array


RowStore = PackedRows | Array


class Window(NamedTuple):
    """Rows of recent tokens; query t sees those in [start, stop). See `window_bounds`.

    rows: `PackedRows`, or `[L, B, S, H]` of bfloat16, its bits (uint16), or float32.
    slots_B: the second index of each sequence's rows, where it is not the sequence itself.
    """

    rows: RowStore
    start_BT: Array
    stop_BT: Array
    layer: Array | int = 0
    slots_B: Array | None = None


class Compressed(NamedTuple):
    """Compressed rows; query t sees the first visible_BT of them, fewer if some are chosen.

    words: mask words `[B, T, ⌈C/4096⌉·128]` of index_topk.select_mask.
    keep: so many bits are set per query at most; 0: unknown. Only the cost estimate counts on it.
    table_BP: pages of each sequence in order; rows are then `[L, pages, page, …]`.
    """

    rows: RowStore
    visible_BT: Array
    layer: Array | int = 0
    words: Array | None = None
    table_BP: Array | None = None
    keep: int = 0

    @property
    def capacity(self) -> int:
        """Rows that a sequence can have."""
        pages = 1 if self.table_BP is None else self.table_BP.shape[-1]
        return _num_rows(self.rows) * pages


def window_bounds(pos_B: Array, fresh: int, num_rows: int, window: int) -> tuple[Array, Array]:
    """start and stop of `fresh` queries from position `pos_B`, whose rows come last of `num_rows`.

    A ring of exactly `window` rows that already holds the only new token is also served: its order
    does not matter, so start is 0 and stop the number of rows written.
    """
    if fresh == 1 and num_rows == window:
        return jnp.zeros_like(pos_B)[:, None], jnp.minimum(pos_B + 1, window)[:, None]
    stop_T = jnp.arange(fresh, dtype=jnp.int32)[None] + num_rows - fresh + 1
    before_B1 = (num_rows - fresh - pos_B)[:, None]  # rows of negative positions
    start_BT = jnp.maximum(jnp.maximum(stop_T - window, before_B1), 0)
    return start_BT, jnp.broadcast_to(stop_T, start_BT.shape)


def sparse_attention(
    q_BTNH: Array,
    sink_N: Array,
    window: Window,
    compressed: Compressed | None = None,
    *,
    rotation: tuple[Array, Array] | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """Attention output `[B, T, N, H]` in the dtype of the queries.

    Keys are values. Scores are scaled by H^-1/2; the sink joins the denominator, unscaled.

    Args:
        rotation: cos and sin `[B, T, R/2]`: the output is turned back by these angles.
        implementation: None chooses by platform; a name means that one or an error.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        NotImplementedError: the kernel does not cover these sizes.
    """
    args = (q_BTNH, sink_N, window, compressed, rotation)
    return _dispatch(args, False, implementation)[0]


def partial_attention(
    q_BTNH: Array,
    window: Window,
    compressed: Compressed | None = None,
    *,
    rotation: tuple[Array, Array] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """Attention over some of the rows, without sink, and the logarithms of its denominators.

    Parts o, l of several places are Σ o·exp(l) / Σ exp(l) together; the sink's l is itself. Without
    any row o is 0 and l is `NO_SINK`. Output `[B, T, N, H]`, float32 `[B, T, N]`. Arguments and
    errors as of `sparse_attention`.
    """
    sink_N = jnp.full(q_BTNH.shape[2], NO_SINK, jnp.float32)
    args = (q_BTNH, sink_N, window, compressed, rotation)
    return _dispatch(args, True, implementation)


def _dispatch(args, part: bool, implementation: Implementation | None) -> tuple[Array, Array]:
    q_BTNH, _, window, compressed, rotation = args
    _check(*args)
    if implementation == "reference":
        return _reference(*args)
    if implementation is not None:
        if implementation not in ("pallas", "interpret"):
            raise ValueError(f"implementation={implementation!r} is unknown")
        return _kernel(*args, part=part, interpret=implementation == "interpret")
    try:
        plan(q_BTNH, window, compressed, rotation is not None)
    except NotImplementedError:
        return _reference(*args)
    run = partial(_kernel, part=part, interpret=False)
    return lax.platform_dependent(*args, tpu=run, default=_reference)


def _num_rows(rows: RowStore) -> int:
    return jax.tree.leaves(rows)[0].shape[2]


def _check(
    q_BTNH: Array,
    sink_N: Array,
    window: Window,
    compressed: Compressed | None,
    rotation: tuple[Array, Array] | None,
) -> None:
    batch, fresh, heads, channels = q_BTNH.shape
    queries, has_slots = (batch, fresh), window.slots_B is not None
    wanted: list[tuple[str, Array, tuple[int, ...]]] = [
        ("sink_N", sink_N, (heads,)),
        ("window.start_BT", window.start_BT, queries),
        ("window.stop_BT", window.stop_BT, queries),
        *_row_shapes("window.rows", window.rows, None if has_slots else batch, channels),
    ]
    if window.slots_B is not None:
        wanted.append(("window.slots_B", window.slots_B, (batch,)))
    if compressed is not None:
        table_BP = compressed.table_BP
        owners = batch if table_BP is None else None
        wanted.append(("compressed.visible_BT", compressed.visible_BT, queries))
        wanted += _row_shapes("compressed.rows", compressed.rows, owners, channels)
        if table_BP is not None:
            wanted.append(("compressed.table_BP", table_BP, (batch, table_BP.shape[-1])))
        if compressed.words is not None:
            words = -(-compressed.capacity // 4096) * LANES
            wanted.append(("compressed.words", compressed.words, (*queries, words)))
    if rotation is not None:
        pairs = rotation[0].shape[-1]
        wanted += [(f"rotation[{n}]", a, (*queries, pairs)) for n, a in enumerate(rotation)]
    for name, array, shape in wanted:
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape}")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q_BTNH is {q_BTNH.dtype}, not bfloat16 or float32")


def _row_shapes(
    name: str, rows: RowStore, batch: int | None, channels: int
) -> list[tuple[str, Array, tuple[int, ...]]]:
    layers, owners, size = jax.tree.leaves(rows)[0].shape[:3]
    lead = (layers, batch or owners, size)
    if isinstance(rows, PackedRows):
        width = rows.values.shape[-1]
        if not channels <= width <= 2 * channels:
            raise ValueError(f"{name}.values has {width} bytes a row for {channels} channels")
        blocks = max(-(-(2 * channels - width) // BLOCK), rows.scales.shape[-1])
        kinds = (rows.values.dtype, rows.scales.dtype)
        if set(kinds) != {jnp.dtype(jnp.uint8)}:
            raise ValueError(f"{name} holds {kinds}, not bytes (uint8)")
        return [
            (f"{name}.values", rows.values, (*lead, width)),
            (f"{name}.scales", rows.scales, (*lead, blocks)),
        ]
    if rows.dtype not in (jnp.bfloat16, jnp.uint16, jnp.float32):
        raise ValueError(f"{name} is {rows.dtype}, not bfloat16, its bits, or float32")
    return [(name, rows, (*lead, channels))]


def plan(q_BTNH: Array, window: Window, compressed: Compressed | None, turned: bool) -> kernel.Plan:
    """Static sizes of a kernel call.

    Raises:
        NotImplementedError: the kernel does not cover these sizes.
    """
    batch, fresh, heads, channels = q_BTNH.shape
    heads += -heads % HEADS
    if channels % LANES:
        raise NotImplementedError(f"channels={channels} in 128s only")
    if heads > kernel.MAX_ROWS // 8:
        raise NotImplementedError(f"heads={heads}, limit {kernel.MAX_ROWS // 8}: split the heads")
    if batch * fresh > MAX_QUERIES:
        raise NotImplementedError(f"{batch * fresh} queries in one call, limit {MAX_QUERIES}")
    rows, masked, listed, expected = None, False, False, 0
    queries = kernel.pick_queries(fresh, heads)
    if compressed is not None:
        masked, expected = compressed.words is not None, compressed.capacity
        rows = _store(compressed.rows, q_BTNH, _rows_tile(compressed), 4)
        if compressed.table_BP is not None:
            rows = rows._replace(page=_num_rows(compressed.rows))
        listed = masked and not rows.page % LANES
    if listed and compressed is not None:
        chip, groups = tuning.of_this_chip(), compressed.capacity // LANES
        listed = groups >= chip.least_groups
        live = tuning.live_groups(groups, compressed.keep * queries or compressed.capacity)
        if listed and live <= chip.share(queries * heads) * groups:
            expected = int(LANES * live)
    return kernel.Plan(
        queries,
        heads,
        channels,
        _store(window.rows, q_BTNH, LANES, 2),
        rows,
        masked,
        listed,
        turned,
        expected,
    )


def _rows_tile(compressed: Compressed) -> int:
    size = _num_rows(compressed.rows)
    if compressed.table_BP is None:
        tile = next((n for n in (512, 256, 128) if size % n == 0), 0)
        if not tile:
            raise NotImplementedError(f"{size} compressed rows are not whole tiles of 128")
        return tile
    least = LANES if isinstance(compressed.rows, PackedRows) else 16
    if size % least or not paging.fits(size, 512):
        raise NotImplementedError(f"pages of {size} rows do not nest with tiles of 512")
    return 512


def _store(rows: RowStore, q_BTNH: Array, tile: int, depth: int) -> kernel.Store:
    packed = isinstance(rows, PackedRows)
    if isinstance(rows, PackedRows):
        if q_BTNH.dtype != jnp.bfloat16:
            raise NotImplementedError(f"queries {q_BTNH.dtype} with packed rows")
        rest = rows.values.shape[-1] - q_BTNH.shape[-1]
        if (q_BTNH.shape[-1] - rest) % BLOCK or rest % 16:
            raise NotImplementedError("packed rows in whole blocks of 64 channels only")
    elif (q_BTNH.dtype == jnp.float32) != (rows.dtype == jnp.float32):
        raise NotImplementedError(f"queries {q_BTNH.dtype} with rows {rows.dtype}")
    return kernel.Store(packed, q_BTNH.shape[-1], tile, depth, 2 if packed else 1)


def _columns(rows: RowStore) -> tuple[Array, ...]:
    """Packed rows as columns, which is how the TPU keeps them anyway; plain rows as they are."""
    if isinstance(rows, PackedRows):
        return tuple(jnp.swapaxes(a, 2, 3) for a in rows)
    return (rows,)


def _whole_tiles(window: Window) -> Window:
    """Window rows in tiles of 128; a ring of 128 rows is taken as it is."""
    pad = -_num_rows(window.rows) % LANES
    if not pad:
        return window

    def one(a: Array) -> Array:
        layer = lax.dynamic_index_in_dim(a, jnp.asarray(window.layer, jnp.int32), 0)
        return jnp.pad(layer, ((0, 0), (0, 0), (0, pad), (0, 0)))

    return window._replace(rows=jax.tree.map(one, window.rows), layer=0)


def _blocks(x_BT: Array, queries: int) -> Array:
    """Numbers per query, in whole blocks: `[B·blocks, Q]`."""
    pad = -x_BT.shape[1] % queries
    return jnp.pad(x_BT.astype(jnp.int32), ((0, 0), (0, pad))).reshape(-1, queries)


def _limits(
    sizes: kernel.Plan, window: Window, compressed: Compressed | None, live: Array | None
) -> kernel.Limits:
    start, stop = (_blocks(x, sizes.queries) for x in (window.start_BT, window.stop_BT))
    visible = jnp.zeros_like(start)
    if compressed is not None:
        visible = _blocks(compressed.visible_BT, sizes.queries)
    first = jnp.where(stop > start, start, _num_rows(window.rows)).min(axis=1)
    end = jnp.where(stop > start, stop, 0).max(axis=1)
    tile = 1 if sizes.rows is None else sizes.rows.tile
    live = jnp.full_like(end, -1) if live is None else live
    layers = [window.layer, 0 if compressed is None else compressed.layer]
    return kernel.Limits(
        jnp.stack([jnp.asarray(n, jnp.int32) for n in layers]),
        _slots(window).astype(jnp.int32),
        start.reshape(-1),
        stop.reshape(-1),
        visible.reshape(-1),
        first // sizes.window.tile,
        -(-end // sizes.window.tile),
        jnp.where(live < 0, -(-visible.max(axis=1) // tile), 0),
        jnp.maximum(live, 0),
    )


def _live_groups(sizes: kernel.Plan, compressed: Compressed) -> tuple[Array, Array]:
    """Which groups of 128 rows hold a row that some query of a block has chosen.

    One bit per group, `[B·blocks, 1, words]`, and how many of them are to be listed, `[B·blocks]`:
    -1 where so many are set that the block streams all rows instead.
    """
    assert compressed.words is not None
    batch, fresh, width = compressed.words.shape
    words = jnp.pad(compressed.words, ((0, 0), (0, -fresh % sizes.queries), (0, 0)))
    zero, words = jnp.int32(0), words.reshape(-1, sizes.queries, width)
    words = lax.reduce(words, zero, lax.bitwise_or, (1,))  # first, so that little is laid out anew
    bits = lax.reduce(words.reshape(-1, width // LANES, LANES), zero, lax.bitwise_or, (2,))
    groups = -(-_blocks(compressed.visible_BT, sizes.queries).max(axis=1) // LANES)
    # a page behind the visible ones may be any
    shown = jnp.clip(groups[:, None] - 32 * jnp.arange(width // LANES)[None], 0, 32)
    bits &= jnp.where(shown == 32, -1, (1 << (shown & 31)) - 1)
    live = lax.population_count(bits).sum(axis=1)
    share = tuning.of_this_chip().share(sizes.queries * sizes.heads)
    most = share * groups.astype(jnp.float32)
    return bits[:, None], jnp.where(live.astype(jnp.float32) <= most, live, -1)


def _slots(window: Window) -> Array:
    return jnp.arange(len(window.start_BT)) if window.slots_B is None else window.slots_B


def _kernel(
    q_BTNH, sink_N, window, compressed, rotation, *, part, interpret
) -> tuple[Array, Array]:
    sizes = plan(q_BTNH, window, compressed, rotation is not None)._replace(part=part)
    heads = q_BTNH.shape[2]
    if more := sizes.heads - heads:
        q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, 0), (0, more), (0, 0)))
        sink_N = jnp.pad(sink_N, (0, more))
    window = _whole_tiles(window)
    bits = live = table = None
    if compressed is not None and sizes.listed:
        bits, live = _live_groups(sizes, compressed)
    if compressed is not None and compressed.table_BP is not None:
        assert sizes.rows is not None
        table = paging.table_blocks(compressed.table_BP, sizes.rows.page, sizes.rows.tile)
    out_BTNH, *log = kernel.sparse_attention(
        sizes,
        _limits(sizes, window, compressed, live),
        q_BTNH,
        sink_N.astype(jnp.float32),
        () if rotation is None else _turn(*rotation),
        None if compressed is None else compressed.words,
        bits,
        table,
        _columns(window.rows),
        () if compressed is None else _columns(compressed.rows),
        interpret,
    )
    log_BTN = log[0][:, :, :heads, 0] if part else jnp.zeros(out_BTNH.shape[:3], jnp.float32)
    return out_BTNH[:, :, :heads], log_BTN[:, :, :heads]


def _turn(cos_BTr: Array, sin_BTr: Array) -> tuple[Array, Array]:
    """cos and signed sin of the last 128 channels; those in front of the rotary ones stand still.

    Raises:
        NotImplementedError: more than 128 channels turn.
    """
    still = LANES - 2 * cos_BTr.shape[-1]
    if still < 0:
        raise NotImplementedError(f"{LANES - still} rotary channels, limit {LANES}")
    cos = jnp.repeat(cos_BTr.astype(jnp.float32), 2, axis=-1)
    sin_BTr = sin_BTr.astype(jnp.float32)
    sin = jnp.stack([sin_BTr, -sin_BTr], axis=-1).reshape(cos.shape)
    front = ((0, 0), (0, 0), (still, 0))
    return jnp.pad(cos, front, constant_values=1), jnp.pad(sin, front)


def _unpacked(rows: RowStore, channels: int, layer: Array | int, table_BP: Array | None) -> Array:
    if isinstance(rows, PackedRows):
        flat = (paging.unpaged(a, layer, table_BP) for a in rows)
        return reference.unpack_rows(*flat, channels=channels)
    return reference.plain_rows(paging.unpaged(rows, layer, table_BP))


def _reference(q_BTNH, sink_N, window, compressed, rotation) -> tuple[Array, Array]:
    channels = q_BTNH.shape[-1]
    rows = _unpacked(window.rows, channels, window.layer, None)[_slots(window)][:, None]
    index = jnp.arange(rows.shape[2])[None, None]
    mask = (index >= window.start_BT[..., None]) & (index < window.stop_BT[..., None])
    if compressed is not None:
        more = _unpacked(compressed.rows, channels, compressed.layer, compressed.table_BP)
        more = more[:, None]
        index = jnp.arange(more.shape[2])[None, None]
        shown = index < compressed.visible_BT[..., None]
        if compressed.words is not None:
            shown &= words_mask(compressed.words, more.shape[2])
        rows = jnp.concatenate([rows, more], axis=2)
        mask = jnp.concatenate([mask, shown], axis=2)
    out, log_BTN = reference.attend(q_BTNH, rows, mask, sink_N)
    if rotation is not None:
        out = reference.turn_back(out, *(a.astype(jnp.float32) for a in rotation))
    return out.astype(q_BTNH.dtype), log_BTN
