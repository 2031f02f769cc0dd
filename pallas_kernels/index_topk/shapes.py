"""Named cases of index_topk: real sizes to compile, small ones to run."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.index_topk import api


class Case(NamedTuple):
    """Sizes and options of one call. layers: length of the cache's stack."""

    batch: int
    fresh: int
    capacity: int
    keep: int
    form: str = "rows"
    packed: bool = True
    rounded: bool = True
    heads: int = 64
    channels: int = 128
    layers: int = 2
    page: int = 0  # entries; 0: not paged
    pool: int = 0  # pages; 0: as many as the sequences can use


def _decode(keep: int) -> dict[str, Case]:
    return {
        f"decode_b{batch}_{name}": Case(batch, 1, capacity, keep)
        for batch in (1, 8, 64)
        for name, capacity in (("8k", 2048), ("128k", 32768), ("1m", 262144))
    }


def _prefill(keep: int) -> dict[str, Case]:
    return {
        f"prefill_t2048_{name}": Case(1, 2048, capacity, keep, "mask")
        for name, capacity in (("8k", 2048), ("128k", 32768), ("1m", 262144))
    }


CASES = {
    **{f"flash_{name}": case for name, case in (_decode(512) | _prefill(512)).items()},
    **{f"pro_{name}": case for name, case in (_decode(1024) | _prefill(1024)).items()},
    **{
        f"{model}_decode_b{batch}_{name}_mask": Case(batch, 1, capacity, keep, "mask")
        for model, keep in (("flash", 512), ("pro", 1024))
        for batch in (1, 8, 64)
        for name, capacity in (("8k", 2048), ("128k", 32768), ("1m", 262144))
    },
    "flash_decode_b8_128k_plain": Case(8, 1, 32768, 512, packed=False, rounded=False),
    "flash_prefill_t2048_128k_plain": Case(1, 2048, 32768, 512, "mask", False, False),
    "flash_verify_b8_t4_128k": Case(8, 4, 32768, 512),
    "flash_decode_b256_1m_paged": Case(256, 1, 262144, 512, page=128, layers=1, pool=16384),
    "flash_decode_b8_128k_paged": Case(8, 1, 32768, 512, page=128),
    "flash_prefill_t2048_128k_paged": Case(1, 2048, 32768, 512, "mask", page=128),
}

SMALL = {
    "rows": Case(14, 1, 2048, 24, heads=8, rounded=False),
    "rows_rounded_plain": Case(14, 1, 2048, 130, packed=False, heads=16),
    "rows_paged": Case(5, 1, 2048, 24, heads=8, page=256),
    "mask_paged": Case(2, 9, 2048, 24, "mask", packed=False, heads=8, page=1024),
    "rows_verify": Case(4, 3, 1024, 5, heads=8),
    "mask": Case(1, 21, 1024, 24, "mask", heads=8, rounded=False),
    "mask_rounded_plain": Case(2, 9, 384, 7, "mask", False, heads=16),
    "mask_two_spans": Case(1, 8, 4608, 600, "mask", heads=8),
    "mask_single": Case(14, 1, 5120, 130, "mask", heads=8, rounded=False),
    "mask_single_paged": Case(5, 1, 2048, 24, "mask", heads=8, page=256),
    "mask_five_heads": Case(2, 9, 384, 7, "mask", False, heads=5),
}


def call(case: Case, implementation: api.Implementation | None, *args: Any) -> Any:
    """The public function of a case on the arrays of `arguments`."""
    q, w, *rest = args
    table = rest.pop() if case.page else None
    *stores, visible, layer = rest
    keys = api.FP4Keys(*stores) if case.packed else stores[0]
    run = api.select_rows if case.form == "rows" else api.select_mask
    options = {"rounded": case.rounded, "implementation": implementation, "table_BP": table}
    return run(q, w, keys, visible, case.keep, layer=layer, **options)


def arguments(case: Case) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes that `call` takes."""
    lead = (case.batch, case.fresh)
    store = (case.layers, case.batch, case.capacity)
    if case.page:
        store = (case.layers, case.pool or case.batch * case.capacity // case.page, case.page)
    if case.packed:
        stores = [
            ((*store, case.channels // 2), jnp.uint8),
            ((*store, case.channels // 32), jnp.uint8),
        ]
    else:
        stores = [((*store, case.channels), jnp.uint16)]
    return [
        ((*lead, case.heads, case.channels), jnp.bfloat16),
        ((*lead, case.heads), jnp.bfloat16),
        *stores,
        (lead, jnp.int32),
        ((), jnp.int32),
        *([((case.batch, case.capacity // case.page), jnp.int32)] if case.page else []),
    ]


REPRESENTATIVE = (
    "flash_decode_b8_128k_mask",
    "flash_decode_b64_8k_mask",
    "pro_decode_b8_1m_mask",
    "flash_decode_b8_128k",
    "flash_decode_b1_1m",
    "pro_decode_b64_8k",
    "pro_decode_b8_1m",
    "flash_prefill_t2048_8k",
    "pro_prefill_t2048_1m",
    "flash_decode_b8_128k_plain",
    "flash_prefill_t2048_128k_plain",
    "flash_verify_b8_t4_128k",
    "flash_decode_b256_1m_paged",
    "flash_prefill_t2048_128k_paged",
)


def unavoidable_bytes(name: str) -> int:
    """HBM bytes of a call at full visibility: keys of every sequence, queries, result, once."""
    case = CASES[name]
    key = case.channels // 2 + case.channels // 32 if case.packed else 2 * case.channels
    queries = case.batch * case.fresh
    result = case.keep if case.form == "rows" else -(-case.capacity // 4096) * 128
    query = 2 * case.heads * (case.channels + 1) + 4
    return case.batch * case.capacity * key + queries * (query + 4 * result)


def build(name: str) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    """The kernel of a named case and its arguments, for `pallas_kernels.aot`."""
    case = CASES[name]
    return partial(call, case, "pallas"), arguments(case)
