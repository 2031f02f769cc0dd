"""Named sizes: small ones that interpret mode runs, the models' own for compiling and counting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.block_matmul import api


class Case(NamedTuple):
    """Inputs are those of one of `groups` parts of a block-diagonal weight."""

    rows: int
    in_dim: int
    out_dim: int
    scale_dtype: str = "float8_e8m0fnu"
    rounds: bool = False
    groups: int = 1

    @property
    def scale_shape(self) -> tuple[int, int]:
        return -(-self.out_dim // 128), -(-self.in_dim // 128)


BASE = "float32"  # scales of the -Base checkpoints

SMALL = {
    "one_row": Case(1, 128, 128, rounds=True),
    "one_input_block_short": Case(5, 64, 72),
    "ragged": Case(20, 200, 130, rounds=True),
    "ragged_base": Case(20, 200, 130, BASE, rounds=True),
    "blocks": Case(16, 512, 384),
    "blocks_base": Case(16, 512, 384, BASE),
    "row_tile_edge": Case(513, 128, 256),
    "rows_beyond_tile": Case(600, 256, 300, rounds=True),
}

MATRICES = {  # inputs, outputs
    "flash_q_a": (4096, 1024),
    "flash_q_b": (1024, 32768),
    "flash_kv": (4096, 512),
    "flash_o_b": (8192, 4096),
    "flash_shared_up": (4096, 2048),
    "flash_shared_down": (2048, 4096),
    "flash_index_q_b": (1024, 8192),
    "pro_q_a": (7168, 1536),
    "pro_q_b": (1536, 65536),
    "pro_kv": (7168, 512),
    "pro_o_b": (16384, 7168),
    "pro_shared_up": (7168, 3072),
    "pro_shared_down": (3072, 7168),
    "pro_index_q_b": (1536, 8192),
}
ROWS = {"decode_1": 1, "decode_8": 8, "decode_64": 64, "chunk_2048": 2048}


def _full_size() -> dict[str, Case]:
    cases = {
        f"{matrix}_{step}": Case(rows, *sizes, rounds=rows <= 64)
        for matrix, sizes in MATRICES.items()
        for step, rows in ROWS.items()
    }
    for name in ("flash_o_b_decode_64", "pro_o_b_decode_64", "pro_o_b_chunk_2048"):
        cases[f"{name}_base"] = cases[name]._replace(scale_dtype=BASE)
    for model, outputs, groups in (("flash", 8192, 8), ("pro", 16384, 16)):
        for step, rows in ROWS.items():
            cases[f"{model}_o_a_{step}"] = Case(rows, 4096, outputs, groups=groups)
    return cases


FULL = _full_size()
REPRESENTATIVE = (
    "flash_q_b_decode_1",
    "flash_kv_decode_8",
    "flash_o_b_decode_64",
    "pro_o_a_decode_64",
    "flash_o_a_chunk_2048",
    "flash_q_a_chunk_2048",
    "pro_q_b_decode_64",
    "pro_o_b_decode_8",
    "pro_o_b_chunk_2048",
    "flash_o_b_decode_64_base",
    "pro_o_b_chunk_2048_base",
)


def unavoidable_bytes(name: str) -> int:
    """HBM bytes of one call: weight, scales, input and output, each once."""
    case = FULL[name]
    scale_rows, scale_lanes = case.scale_shape
    scales = scale_rows * scale_lanes * jnp.dtype(case.scale_dtype).itemsize
    weight = case.in_dim * case.out_dim + scales
    return weight + 2 * case.rows * (case.in_dim * case.groups + case.out_dim)


def build(name: str) -> tuple[Callable, list]:
    """The kernel of a case and its arguments as (shape, dtype), for `aot.compile_for`."""
    case = (FULL | SMALL)[name]
    fn = functools.partial(
        api.block_matmul,
        groups=case.groups,
        round_activations=case.rounds,
        implementation="pallas",
    )
    return fn, [
        ((case.rows, case.in_dim * case.groups), jnp.bfloat16),
        ((case.out_dim, case.in_dim), jnp.float8_e4m3fn),
        (case.scale_shape, jnp.dtype(case.scale_dtype)),
    ]
