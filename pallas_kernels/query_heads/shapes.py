"""Named sizes: small ones that interpret mode runs, the models' own for compiling and counting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.query_heads import api


class Case(NamedTuple):
    tokens: int
    heads: int
    channels: int = 512
    rotary: int = 64


SMALL = {
    "one_token": Case(1, 8, 128, 32),
    "ragged": Case(11, 16, 256, 128),
    "two_groups": Case(9, 32, 128, 64),
    "few_heads": Case(3, 4, 384, 64),
    "odd_heads": Case(8, 20, 128, 128),
}
CASES = {
    f"{model}_{step}": Case(tokens, heads)
    for model, heads in (("flash", 64), ("pro", 128))
    for step, tokens in (
        ("decode_1", 1),
        ("decode_8", 8),
        ("decode_64", 64),
        ("chunk_2048", 2048),
        ("chunk_8192", 8192),
    )
}
CASES["flash_heads8_chunk_2048"] = Case(2048, 8)  # one of eight shards of the heads
REPRESENTATIVE = ("flash_decode_1", "pro_decode_64", "pro_chunk_2048", "flash_heads8_chunk_2048")


def unavoidable_bytes(name: str) -> int:
    """HBM bytes: every operand and result once."""
    case = CASES[name]
    return case.tokens * (4 * case.heads * case.channels + 4 * case.rotary)


def build(name: str) -> tuple[Callable, list]:
    """A case as (function, arguments)."""
    case = (CASES | SMALL)[name]
    run = functools.partial(
        api.query_heads, heads=case.heads, eps=1e-6, rounds=True, implementation="pallas"
    )
    turn = ((case.tokens, case.rotary // 2), jnp.float32)
    return run, [((case.tokens, case.heads * case.channels), jnp.bfloat16), turn, turn]
