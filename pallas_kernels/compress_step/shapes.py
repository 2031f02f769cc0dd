"""Named cases of compress_step: real sizes to compile, small ones to run."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.compress_step import api


class Case(NamedTuple):
    """Sizes of one call. windows: windows of a ring, 2 where they overlap."""

    batch: int
    ratio: int
    row_dim: int
    windows: int = 1
    layers: int = 20
    slots: int = 0  # 0: a ring for each sequence, in order

    @property
    def width(self) -> int:
        return self.windows * self.row_dim


CASES = {
    f"decode_b{batch}_{name}": Case(batch, ratio, row_dim, windows)
    for batch in (1, 8, 64, 256)
    for name, ratio, row_dim, windows in (
        ("csa", 4, 512, 2),
        ("keys", 4, 128, 2),
        ("hca", 128, 512, 1),
    )
}
REPRESENTATIVE = ("decode_b1_csa", "decode_b64_csa", "decode_b64_keys", "decode_b64_hca")

SMALL = {
    "overlapped": Case(9, 4, 128, 2, layers=2),
    "plain": Case(5, 16, 128, layers=2),
    "plain_in_slots": Case(3, 8, 256, layers=2, slots=7),
    "overlapped_in_slots": Case(11, 4, 128, 2, layers=3, slots=16),
    "one": Case(1, 8, 128, layers=1),
}


def call(case: Case, implementation: api.Implementation | None, *args: Any) -> api.Step:
    """The public function of a case on the arrays of `arguments`."""
    values, scores, new_values, new_scores, pos_B, count_B, layer = args[:7]
    return api.compress_step(
        values,
        scores,
        new_values,
        new_scores,
        pos_B,
        count_B,
        ratio=case.ratio,
        layer=layer,
        slots_B=args[7] if case.slots else None,
        implementation=implementation,
    )


def arguments(case: Case) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes that `call` takes."""
    f32, i32 = jnp.dtype("float32"), jnp.dtype("int32")
    slots = case.slots or case.batch
    ring = ((case.layers, slots, case.windows * case.ratio, case.width), f32)
    new = ((case.batch, case.width), f32)
    numbers: list[tuple[tuple[int, ...], Any]] = [((case.batch,), i32)] * 2
    more = [((case.batch,), i32)] if case.slots else []
    return [ring, ring, new, new, *numbers, ((), i32), *more]


def unavoidable_bytes(name: str) -> int:
    """HBM bytes of a step at random positions: entries in, and one ring in `ratio` read whole."""
    case = CASES[name]
    entry = 2 * 4 * case.width
    ring = entry * case.windows * case.ratio
    return case.batch * (2 * entry + ring // case.ratio + 4 * case.row_dim)


def build(name: str) -> tuple[Any, list[tuple[tuple[int, ...], Any]], tuple[int, ...]]:
    """The kernel of a case, its arguments, and those it may overwrite."""
    case = CASES[name]
    return partial(call, case, "pallas"), arguments(case), (0, 1)
