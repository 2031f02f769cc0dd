"""Which compressed rows a query may see: index scores and their exact top-k, fused."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import paging
from pallas_kernels.index_topk import kernel, reference
from pallas_kernels.index_topk.reference import mask_words, words_mask

__all__ = ["FP4Keys", "Rows", "mask_words", "select_mask", "select_rows", "words_mask"]

Implementation = Literal["reference", "pallas", "interpret"]
MAX_QUERIES = 1 << 17  # their visible counts live in SMEM
LANES, HEADS = 128, 8  # units of the vector registers


class FP4Keys(NamedTuple):
    """Index keys of a stack of layers: FP4 bytes `[L, B, C, J/2]`, low nibble first, and bytes of
    e8m0 scales `[L, B, C, J/32]`."""

    codes: Array
    scales: Array


class Rows(NamedTuple):
    """Chosen rows in ascending order, zeros behind them, and how many are real."""

    rows_BTK: Array
    count_BT: Array


Keys = FP4Keys | Array


def select_rows(
    q_BTIJ: Array,
    w_BTI: Array,
    keys: Keys,
    visible_BT: Array,
    keep: int,
    *,
    layer: Array | int = 0,
    table_BP: Array | None = None,
    rounded: bool = False,
    implementation: Implementation | None = None,
) -> Rows:
    """The `keep` entries with the largest Σ_heads relu(q · k) · w, as row numbers (for decoding).

    Ties go to the lowest row; -0.0 equals 0.0. Sums are float32; with `rounded`, dots, products
    and sums are rounded to bfloat16 as in the official code. Only visible entries are read.

    Args:
        keys: `FP4Keys`, or `[L, B, C, J]` of bfloat16, its bits (uint16), or float32.
        visible_BT: entries each query sees, from the first one on, int32.
        layer: entry of the leading dimension of the keys.
        table_BP: pages of each sequence in order; keys are then `[L, pages, page, …]`.
        implementation: None chooses by platform; a name means that one or an error.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        NotImplementedError: the kernel does not cover these sizes.
    """
    _check(q_BTIJ, w_BTI, keys, visible_BT, keep, table_BP)
    run = partial(_rows, keep=keep, rounded=rounded)
    args = (q_BTIJ, w_BTI, keys, visible_BT, layer, table_BP)
    return _dispatch(run, True, args, implementation)


def select_mask(
    q_BTIJ: Array,
    w_BTI: Array,
    keys: Keys,
    visible_BT: Array,
    keep: int,
    *,
    layer: Array | int = 0,
    table_BP: Array | None = None,
    rounded: bool = False,
    implementation: Implementation | None = None,
) -> Array:
    """The choice of `select_rows` as bits (for prefill): int32 words `[B, T, ⌈C/4096⌉·128]`.

    Bit b of word [s·128 + lane] is entry s·4096 + b·128 + lane; see `words_mask`.
    """
    _check(q_BTIJ, w_BTI, keys, visible_BT, keep, table_BP)
    run = partial(_mask, keep=keep, rounded=rounded)
    args = (q_BTIJ, w_BTI, keys, visible_BT, layer, table_BP)
    return _dispatch(run, False, args, implementation)


def _check(
    q_BTIJ: Array,
    w_BTI: Array,
    keys: Keys,
    visible_BT: Array,
    keep: int,
    table_BP: Array | None,
) -> None:
    batch, fresh, heads, channels = q_BTIJ.shape
    paged = table_BP is not None
    wanted: list[tuple[str, Array, tuple[int | None, ...]]] = [
        ("w_BTI", w_BTI, (batch, fresh, heads)),
        ("visible_BT", visible_BT, (batch, fresh)),
    ]
    if isinstance(keys, FP4Keys):
        layers, owners, capacity, _ = keys.codes.shape
        lead = (layers, owners if paged else batch, capacity)
        wanted.append(("keys.codes", keys.codes, (*lead, channels // 2)))
        wanted.append(("keys.scales", keys.scales, (*lead, channels // 32)))
        kinds = {keys.codes.dtype, keys.scales.dtype}
        if kinds != {jnp.dtype(jnp.uint8)} or channels % 32:
            raise ValueError(f"FP4 keys are uint8, channels in 32s; got {kinds}, {channels}")
    else:
        layers, owners, capacity, _ = keys.shape
        lead = (layers, owners if paged else batch, capacity)
        wanted.append(("keys", keys, (*lead, channels)))
        if keys.dtype not in (jnp.bfloat16, jnp.uint16, jnp.float32):
            raise ValueError(f"keys are {keys.dtype}, not bfloat16, its bits, or float32")
    if table_BP is not None:
        wanted.append(("table_BP", table_BP, (batch, table_BP.shape[-1])))
    for name, array, shape in wanted:
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape}")
    if q_BTIJ.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q_BTIJ is {q_BTIJ.dtype}, not bfloat16 or float32")
    if visible_BT.dtype != jnp.int32:
        raise ValueError(f"visible_BT is {visible_BT.dtype}, not int32")
    if keep < 1:
        raise ValueError(f"keep={keep} must be positive")


def _dispatch(run, rows_form, args, implementation):
    q_BTIJ, _, keys, *_, layer, table_BP = args
    args = (*args[:4], jnp.asarray(layer, jnp.int32), table_BP)
    if implementation is not None:
        return run(*args, implementation=implementation)
    reference_run = partial(run, implementation="reference")
    try:
        plan(q_BTIJ, keys, table_BP, 1, False, rows_form)
    except NotImplementedError:
        return reference_run(*args)
    return lax.platform_dependent(
        *args, tpu=partial(run, implementation="pallas"), default=reference_run
    )


def plan(
    q_BTIJ: Array, keys: Keys, table_BP: Array | None, keep: int, rounded: bool, rows_form: bool
) -> kernel.Plan:
    """Static sizes of a kernel call.

    Raises:
        NotImplementedError: the kernel does not cover these sizes.
    """
    batch, fresh, heads, channels = q_BTIJ.shape
    heads += -heads % HEADS
    packed = isinstance(keys, FP4Keys)
    capacity = (keys.codes if isinstance(keys, FP4Keys) else keys).shape[2]
    is_single = rows_form or (fresh == 1 and _single_fits(capacity, table_BP))
    page, tile = 0, kernel.pick_tile(capacity, is_single)
    if table_BP is not None:
        page, tile = capacity, kernel.pick_tile(0, is_single)
        capacity = -(-page * table_BP.shape[1] // tile) * tile
        if not paging.fits(page, tile) or page % (LANES if packed else 16):
            raise NotImplementedError(f"pages of {page} entries do not nest with tiles of {tile}")
    if channels % LANES:
        raise NotImplementedError(f"channels={channels} in 128s only")
    if packed and channels & (channels - 1):
        raise NotImplementedError(f"FP4 keys of {channels} channels: no power of two")
    if not packed and (q_BTIJ.dtype == jnp.float32) != (keys.dtype == jnp.float32):
        raise NotImplementedError(f"queries {q_BTIJ.dtype} with keys {keys.dtype}")
    if packed and q_BTIJ.dtype != jnp.bfloat16:
        raise NotImplementedError(f"queries {q_BTIJ.dtype} with FP4 keys")
    if not tile:
        raise NotImplementedError(f"capacity={capacity} is not in whole tiles")
    if batch * fresh > MAX_QUERIES:
        raise NotImplementedError(f"{batch * fresh} queries in one call, limit {MAX_QUERIES}")
    queries = 1 if is_single else kernel.pick_queries(fresh, capacity)
    return kernel.Plan(
        packed,
        rounded,
        keep,
        tile,
        capacity // tile,
        queries,
        heads,
        channels,
        capacity,
        page,
        rows_form,
    )


def _single_fits(capacity: int, table_BP: Array | None) -> bool:
    """Whether the keys of a sequence, or its pages, nest with the tile of a single query."""
    if table_BP is not None:
        return paging.fits(capacity, kernel.pick_tile(0, True))
    return kernel.pick_tile(capacity, True) > 0


def _whole_heads(q_BTIJ: Array, w_BTI: Array) -> tuple[Array, Array]:
    """Heads filled up to whole registers; those added have weight 0."""
    more = (0, -q_BTIJ.shape[2] % HEADS)
    if not more[1]:
        return q_BTIJ, w_BTI
    same = (0, 0)
    return jnp.pad(q_BTIJ, (same, same, more, same)), jnp.pad(w_BTI, (same, same, more))


def _stores(keys: Keys) -> tuple[Array, ...]:
    """What the kernel streams: FP4 as columns, which is how the TPU keeps narrow rows anyway."""
    if isinstance(keys, FP4Keys):
        return tuple(jnp.swapaxes(a, 2, 3) for a in keys)
    return (keys,)


def _rows(
    q_BTIJ, w_BTI, keys, visible_BT, layer, table_BP, *, keep, rounded, implementation
) -> Rows:
    batch, fresh = visible_BT.shape
    count_BT = jnp.minimum(visible_BT, keep)
    if implementation == "reference":
        mask = _reference_mask(q_BTIJ, w_BTI, keys, visible_BT, layer, table_BP, keep, rounded)
        return Rows(reference.mask_rows(mask, keep), count_BT)
    sizes = plan(q_BTIJ, keys, table_BP, keep, rounded, True)
    q_BTIJ, w_BTI = _whole_heads(q_BTIJ, w_BTI)
    q = q_BTIJ.reshape(batch * fresh, 1, *q_BTIJ.shape[2:])
    w = w_BTI.reshape(batch * fresh, 1, -1)
    rows = kernel.index_topk(
        sizes,
        layer[None],
        visible_BT.reshape(-1),
        q,
        w,
        _table(table_BP, sizes),
        _stores(keys),
        _interpret(implementation),
    )
    return Rows(rows.reshape(batch, fresh, -1)[..., :keep], count_BT)


def _mask(
    q_BTIJ, w_BTI, keys, visible_BT, layer, table_BP, *, keep, rounded, implementation
) -> Array:
    if implementation == "reference":
        mask = _reference_mask(q_BTIJ, w_BTI, keys, visible_BT, layer, table_BP, keep, rounded)
        return mask_words(mask)
    sizes = plan(q_BTIJ, keys, table_BP, keep, rounded, False)
    q_BTIJ, w_BTI = _whole_heads(q_BTIJ, w_BTI)
    seen = jnp.pad(visible_BT, ((0, 0), (0, -visible_BT.shape[1] % sizes.queries)))
    return kernel.index_topk(
        sizes,
        layer[None],
        seen.reshape(-1),
        q_BTIJ,
        w_BTI,
        _table(table_BP, sizes),
        _stores(keys),
        _interpret(implementation),
    )


def _reference_mask(q_BTIJ, w_BTI, keys, visible_BT, layer, table_BP, keep, rounded) -> Array:
    if isinstance(keys, FP4Keys):
        keys_BCJ = reference.unpack_keys(*(paging.unpaged(a, layer, table_BP) for a in keys))
    else:
        keys_BCJ = reference.plain_keys(paging.unpaged(keys, layer, table_BP))
    scores_BTC = reference.score(q_BTIJ, w_BTI, keys_BCJ, rounded)
    return reference.choose(scores_BTC, visible_BT, keep)


def _table(table_BP: Array | None, sizes: kernel.Plan) -> Array | None:
    return None if table_BP is None else paging.table_blocks(table_BP, sizes.page, sizes.tile)


def _interpret(implementation):
    if implementation not in ("pallas", "interpret"):
        raise ValueError(f"implementation={implementation!r} is unknown")
    return implementation == "interpret"
