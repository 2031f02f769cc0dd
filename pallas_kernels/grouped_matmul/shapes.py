"""Named sizes: small ones that interpret mode runs, the models' own for compiling and counting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import kernel, resident
from pallas_kernels.grouped_matmul.api import PackedWeight, routed_experts
from pallas_kernels.grouped_matmul.plan import RowPlan, row_tile


class Case(NamedTuple):
    tokens: int
    per_token: int
    experts: int
    dim: int
    expert_dim: int
    fmt: str = "fp4"
    scale_dtype: str = "float8_e8m0fnu"

    @property
    def tile(self) -> int:
        return row_tile(self.tokens * self.per_token, self.experts)

    @property
    def num_tiles(self) -> int:
        rows = self.tokens * self.per_token
        return min(rows, -(-rows // self.tile) + self.experts)

    @property
    def is_resident(self) -> bool:
        return self.tokens <= resident.MAX_TOKENS


SMALL = {
    "one_token": Case(1, 2, 8, 128, 64),
    "ragged": Case(7, 3, 4, 160, 96),
    "ragged_fp8": Case(7, 3, 4, 200, 72, "fp8"),
    "ragged_base": Case(7, 3, 4, 200, 72, "fp8", "float32"),
    "two_tiles": Case(40, 2, 3, 256, 576),
    "two_tiles_fp8": Case(40, 2, 3, 384, 320, "fp8"),
    "two_tiles_base": Case(40, 2, 3, 384, 320, "fp8", "float32"),
}

FLASH, PRO = (6, 256, 4096, 2048), (6, 384, 7168, 3072)
TOKENS = {"decode_1": 1, "decode_8": 8, "decode_64": 64, "chunk_2048": 2048, "chunk_8192": 8192}
FULL = {
    f"{model}_{step}{suffix}": Case(tokens, *sizes, *stored)
    for model, sizes in (("flash", FLASH), ("pro", PRO))
    for step, tokens in TOKENS.items()
    for suffix, stored in (
        ("", ()),
        ("_fp8", ("fp8",)),
        ("_base", ("fp8", "float32")),
    )
}
# FP8-resident Pro does not fit one v5e even layer by layer: a quarter of the experts
FULL["pro_quarter_decode_8_fp8"] = Case(8, 6, 96, 7168, 3072, "fp8")
REPRESENTATIVE = (
    "flash_decode_1",
    "flash_chunk_2048",
    "flash_decode_64_base",
    "pro_decode_64",
    "pro_quarter_decode_8_fp8",
    "pro_chunk_2048",
)
STAGES = ("up", "down")


def weight_args(case: Case, out_dim: int, in_dim: int) -> list:
    """Codes and scales of one stacked weight as (shape, dtype)."""
    lead = (case.experts, out_dim)
    if case.fmt == "fp4":
        return [((*lead, in_dim // 2), jnp.uint8), ((*lead, in_dim // 32), jnp.float8_e8m0fnu)]
    blocks = (case.experts, -(-out_dim // 128), -(-in_dim // 128))
    return [((*lead, in_dim), jnp.float8_e4m3fn), (blocks, jnp.dtype(case.scale_dtype))]


def unavoidable_bytes(name: str) -> int:
    """HBM bytes of one stage: weights of the experts in use, and its rows in and out, once."""
    name, stage = name.split(":")
    case = FULL[name]
    rows = case.tokens * case.per_token
    matrices = {"up": 2, "down": 1}[stage]
    blocks = -(-case.dim // 128) * -(-case.expert_dim // 128)
    scale_bytes = 4 if case.scale_dtype == "float32" else 1
    weights = case.dim * case.expert_dim
    stored = weights * 17 // 32 if case.fmt == "fp4" else weights + blocks * scale_bytes
    outer = 2 * rows * case.dim  # what leaves `down` as a sum is float32
    if case.is_resident:
        outer = (2 if stage == "up" else 4) * case.tokens * case.dim
    return min(rows, case.experts) * matrices * stored + outer + 2 * rows * case.expert_dim


def build(name: str) -> tuple[Callable, list]:
    """A case as (function, arguments): `flash_decode_8:up`, `…:down`, or the whole op, `…:all`."""
    name, stage = name.split(":")
    case = (FULL | SMALL)[name]
    parts, slots = 2 if case.fmt == "fp4" else 1, case.num_tiles * case.tile
    up, down = (case.expert_dim, case.dim), (case.dim, case.expert_dim)
    first = jnp.zeros(1, jnp.int32)  # layer of the stack
    tokens = -(-case.tokens // kernel.ROWS) * kernel.ROWS
    sorted_rows = resident.hidden_rows(case.tokens * case.per_token, case.tile)
    hidden = sorted_rows if case.is_resident else slots
    plan_args = [((case.num_tiles,), jnp.int32), ((), jnp.int32), ((slots,), jnp.int32)]

    def plan(expert_T: jax.Array, num_tiles: jax.Array, token: jax.Array) -> RowPlan:
        return RowPlan(token, token[: case.tokens * case.per_token], expert_T, expert_T, num_tiles)

    def swiglu(expert_T, num_tiles, token, x, scale, c1, s1, c3, s3):
        w1, w3 = PackedWeight(c1[None], s1[None]), PackedWeight(c3[None], s3[None])
        up = kernel.SwiGLU(w1, w3, 10.0, True, parts == 2)
        rest = up, plan(expert_T, num_tiles, token), first
        if case.is_resident:
            return resident.swiglu(x, token, scale, *rest)
        return kernel.swiglu(x, scale, *rest)

    def product(expert_T, num_tiles, token, x, codes, scales):
        weight = PackedWeight(codes[None], scales[None])
        rest = weight, plan(expert_T, num_tiles, token), first
        if case.is_resident:
            return resident.combine(x, token, tokens, *rest)
        return kernel.product(x, *rest)

    def everything(x, experts, weights, c1, s1, c3, s3, c2, s2):
        packed = PackedWeight(c1, s1), PackedWeight(c3, s3), PackedWeight(c2, s2)
        run = functools.partial(routed_experts, implementation="pallas")
        return run(x, experts, weights, *packed, limit=10.0, round_activations=True)

    def rows(count: int, width: int):
        return (parts, count, width // parts), jnp.bfloat16

    if stage == "up":
        pair = weight_args(case, *up) * 2
        x = rows(tokens if case.is_resident else slots, case.dim)
        return swiglu, [*plan_args, x, ((slots,), jnp.float32), *pair]
    if stage == "down":
        return product, [*plan_args, rows(hidden, case.expert_dim), *weight_args(case, *down)]
    routing = (case.tokens, case.per_token)
    return everything, [
        ((case.tokens, case.dim), jnp.bfloat16),
        (routing, jnp.int32),
        (routing, jnp.float32),
        *weight_args(case, *up) * 2,
        *weight_args(case, *down),
    ]
