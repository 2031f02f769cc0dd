"""Named cases of compress_chunk: real sizes to compile, small ones to run."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.compress_chunk import api


class Case(NamedTuple):
    """Sizes of one call. rows: complete ones of each sequence."""

    batch: int
    rows: int
    ratio: int
    row_dim: int
    overlaps: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of values and scores."""
        extra = int(self.overlaps)
        return self.batch, (self.rows + extra) * self.ratio, self.row_dim * (1 + extra)


# one row more with overlap: tokens come in eights
CASES = {
    f"chunk_b{batch}_t{fresh}_{name}": Case(
        batch, fresh // ratio + overlaps, ratio, row_dim, overlaps
    )
    for batch, fresh in ((1, 2048), (1, 8192), (8, 512))
    for name, ratio, row_dim, overlaps in (
        ("csa", 4, 512, True),
        ("keys", 4, 128, True),
        ("hca", 128, 512, False),
    )
}
REPRESENTATIVE = ("chunk_b1_t2048_csa", "chunk_b1_t2048_hca", "chunk_b8_t512_keys")

SMALL = {
    "overlapped": Case(3, 21, 4, 128, True),
    "overlapped_in_blocks": Case(2, 300, 4, 512, True),
    "overlapped_one": Case(1, 1, 4, 128, True),
    "plain": Case(2, 5, 16, 128),
    "plain_in_blocks": Case(1, 11, 128, 256),
    "plain_one": Case(1, 1, 8, 128),
}


def unavoidable_bytes(name: str) -> int:
    """HBM bytes: windows in and rows out, once."""
    case = CASES[name]
    batch, tokens, width = case.shape
    return 8 * batch * tokens * width + 4 * batch * case.rows * case.row_dim


def build(name: str) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    """The kernel of a case and its arguments."""
    case = CASES[name]
    run = partial(
        api.pool_windows, ratio=case.ratio, overlaps=case.overlaps, implementation="pallas"
    )
    tokens = (case.shape, jnp.dtype("float32"))
    return run, [tokens, tokens, ((case.batch,), jnp.dtype("int32"))]
