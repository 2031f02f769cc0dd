"""Named sizes: small ones that interpret mode runs, the models' own for compiling and counting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.mhc import api


class Case(NamedTuple):
    tokens: int
    dim: int
    streams: int = 4

    @property
    def rows(self) -> int:
        return (2 + self.streams) * self.streams


SMALL = {
    "one_token": Case(1, 128),
    "short_lanes": Case(5, 96),
    "two_streams": Case(7, 160, 2),
    "full_lanes": Case(128, 128),
    "ragged_tile": Case(150, 128),
    "chunk_border": Case(9, 576),
}
FULL = {
    f"{model}_{step}": Case(tokens, dim)
    for model, dim in (("flash", 4096), ("pro", 7168))
    for step, tokens in (
        ("decode_1", 1),
        ("decode_8", 8),
        ("decode_64", 64),
        ("chunk_2048", 2048),
        ("chunk_8192", 8192),
    )
}
REPRESENTATIVE = ("flash_decode_1", "flash_chunk_2048", "pro_decode_64", "pro_chunk_2048")
STAGES = ("mix", "spread")


def unavoidable_bytes(name: str) -> int:
    """HBM bytes of one stage: every operand and result once."""
    name, stage = name.split(":")
    case = FULL[name]
    streams, numbers = case.streams * case.dim, case.streams * (1 + case.streams)
    if stage == "mix":
        return 4 * case.rows * streams + case.tokens * (2 * (streams + case.dim) + 4 * numbers)
    return case.tokens * (2 * (2 * streams + case.dim) + 4 * numbers)


def build(name: str) -> tuple[Callable, list]:
    """A case as (function, arguments): `flash_decode_8:mix` or `…:spread`."""
    name, stage = name.split(":")
    case = (FULL | SMALL)[name]
    m, width = case.streams, case.streams * case.dim
    h = ((case.tokens, width), jnp.bfloat16)
    if stage == "spread":
        return functools.partial(api.spread, implementation="pallas"), [
            ((case.tokens, case.dim), jnp.bfloat16),
            h,
            ((m, case.tokens), jnp.float32),
            ((m, m, case.tokens), jnp.float32),
        ]

    def mix(h, fn, scale, base, norm):
        return api.mix(
            h,
            fn,
            scale,
            base,
            iters=20,
            eps=1e-6,
            norm_eps=1e-6,
            norm_D=norm,
            implementation="pallas",
        )

    sizes = ((case.rows, width), (3,), (case.rows,), (case.dim,))
    return mix, [h, *((size, jnp.float32) for size in sizes)]
