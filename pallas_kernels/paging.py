"""Tiles of rows that lie in pages: a page may hold several tiles, or a tile several pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Piece(NamedTuple):
    """Rows [start, start + size) of one owner (page or sequence), at `offset` of the tile."""

    owner: Array
    start: Array | int
    offset: int
    size: int


def pieces(tile: Array, size: int, page: int, batch: Array, table_ref: Any | None) -> list[Piece]:
    """Where tile number `tile` of a sequence lies.

    table_ref: pages of the sequence `[1, 1, P]` in SMEM; None: sequence `batch` owns its rows.
    """
    if table_ref is None:
        return [Piece(batch, pl.multiple_of(tile * size, size), 0, size)]
    if page >= size:
        per_page = page // size
        start = pl.multiple_of(lax.rem(tile, per_page) * size, size)
        return [Piece(table_ref[0, 0, lax.div(tile, per_page)], start, 0, size)]
    per_tile = size // page
    return [Piece(table_ref[0, 0, tile * per_tile + n], 0, n * page, page) for n in range(per_tile)]


def fits(page: int, size: int) -> bool:
    """Whether tiles and pages nest."""
    return page % size == 0 or size % page == 0


def table_blocks(table_BP: Array, page: int, size: int) -> Array:
    """Page tables `[B, 1, P]`, filled up to whole tiles with page 0."""
    per_tile = max(size // page, 1)
    table = jnp.pad(table_BP.astype(jnp.int32), ((0, 0), (0, -table_BP.shape[1] % per_tile)))
    return table[:, None]


def in_hbm(stores: tuple[Array, ...], interpret: Any) -> tuple[Array, ...]:
    """Pins what a kernel streams: XLA would copy a whole stack of layers to VMEM where it fits."""
    if interpret:
        return stores
    return tuple(pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in stores)


def hbm_shape(like: Array, interpret: Any) -> Any:
    """The shape of an output that must stay in HBM."""
    if interpret:
        return jax.ShapeDtypeStruct(like.shape, like.dtype)
    return pltpu.HBM(like.shape, like.dtype)


def unpaged(x: Array, layer: Array | int, table_BP: Array | None) -> Array:
    """Rows `[B, C, …]` of a layer of `[L, B, C, …]`, or of `[L, pages, page, …]` and a table."""
    if table_BP is None:
        return x[layer]
    rows = x[layer][table_BP]
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])
