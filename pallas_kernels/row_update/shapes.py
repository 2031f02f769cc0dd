"""Named cases of row_update: real sizes to compile, small ones to run."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.row_update import api

ROWS = (576, 8)  # bytes of values and scales of a row
KEYS = (64, 4)  # codes and scales of an index key


class Case(NamedTuple):
    """Sizes of one call. blocks: owners (pages) of a sequence, `size` entries each."""

    batch: int
    fresh: int
    size: int
    stores: tuple[int, ...] = ROWS
    blocks: int = 1
    owners: int = 0  # 0: as many as the sequences have blocks
    layers: int = 2

    @property
    def lead(self) -> tuple[int, int, int]:
        return self.layers, self.owners or self.batch * self.blocks, self.size


CASES = {
    "decode_b1_window": Case(1, 1, 128, layers=20),
    "decode_b64_window": Case(64, 1, 128, layers=20),
    "decode_b64_8k_rows": Case(64, 1, 2048, layers=20),
    "decode_b64_8k_keys": Case(64, 1, 2048, KEYS, layers=20),
    "decode_b8_1m_rows": Case(8, 1, 262144),
    "decode_b256_1m_rows_paged": Case(256, 1, 128, blocks=2048, owners=16384, layers=1),
    "prefill_t2048_window": Case(1, 128, 128, owners=64, layers=20),
    "prefill_t2048_128k_rows": Case(1, 512, 32768),
    "prefill_t2048_128k_rows_paged": Case(1, 512, 128, blocks=256, owners=512),
    "prefill_t2048_128k_keys": Case(1, 512, 32768, KEYS),
}
REPRESENTATIVE = tuple(CASES)

SMALL = {
    "one_entry": Case(5, 1, 256, (16, 8)),
    "run": Case(4, 200, 512, (8, 4)),
    "run_paged": Case(3, 150, 128, (8, 4), blocks=3, owners=11),
    "many_sources": Case(9, 70, 128, (4,)),
}


def call(case: Case, implementation: api.Implementation | None, *args: Any) -> Any:
    """The public function of a case on the arrays of `arguments`."""
    count = len(case.stores)
    stores, new, rest = args[:count], args[count : 2 * count], args[2 * count :]
    *where, layer = rest
    return api.update_rows(stores, new, *where, layer=layer, implementation=implementation)


def arguments(case: Case) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes that `call` takes."""
    stores = [((*case.lead, width), jnp.dtype("uint8")) for width in case.stores]
    new = [((case.batch, case.fresh, width), jnp.dtype("uint8")) for width in case.stores]
    counts = [((case.batch,), jnp.dtype("int32"))] * 2
    where = [((case.batch, case.blocks), jnp.dtype("int32")), *counts, ((), jnp.dtype("int32"))]
    return [*stores, *new, *where]


def unavoidable_bytes(name: str) -> int:
    """HBM bytes of a call: new entries, read and written."""
    case = CASES[name]
    return 2 * case.batch * case.fresh * sum(case.stores)


def build(name: str) -> tuple[Any, list[tuple[tuple[int, ...], Any]], tuple[int, ...]]:
    """The kernel of a case, its arguments, and those it may overwrite."""
    case = CASES[name]
    return partial(call, case, "pallas"), arguments(case), tuple(range(len(case.stores)))
