"""Named cases of sparse_attention: real sizes to compile, small ones to run."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.sparse_attention import api, tuning


class Case(NamedTuple):
    """Sizes and options of one call. layers: length of the cache's stack.

    form: `window` alone, `dense` (all visible rows), `masked` (bits, `keep` of them per query).
    """

    batch: int
    fresh: int
    form: str = "dense"
    capacity: int = 8192
    keep: int = 512
    heads: int = 64
    channels: int = 512
    rope: int = 64
    packed: bool = True
    window: int = 128
    layers: int = 2
    turned: bool = True
    scales: int = 8  # bytes per row, unused ones included
    page: int = 0  # compressed rows; 0: not paged
    pool: int = 0  # pages; 0: as many as the sequences can use
    slots: int = 0  # rings; 0: one per sequence, in order

    @property
    def window_rows(self) -> int:
        """The ring when decoding, else history and the chunk, plain and outside the stack."""
        return self.window if self.fresh == 1 else self.window + self.fresh


CONTEXTS = {"8k": 8192, "128k": 131072, "1m": 1048576}


def _cases(heads: int, keep: int) -> dict[str, Case]:
    cases, sized = {}, partial(Case, heads=heads, keep=keep)
    for name, context in CONTEXTS.items():
        hca, csa = max(context // 128, 128), context // 4
        for batch in (1, 8, 64):
            cases |= {
                f"decode_b{batch}_{name}_hca": sized(batch, 1, "dense", hca),
                f"decode_b{batch}_{name}_csa_masked": sized(batch, 1, "masked", csa),
            }
        cases[f"prefill_t2048_{name}_hca"] = sized(1, 2048, "dense", hca)
        cases[f"prefill_t2048_{name}_csa_masked"] = sized(1, 2048, "masked", csa)
    cases["decode_b64_window"] = sized(64, 1, "window")
    cases["prefill_t2048_window"] = sized(1, 2048, "window")
    return cases


CASES = {
    **{f"flash_{name}": case for name, case in _cases(64, 512).items()},
    **{f"pro_{name}": case for name, case in _cases(128, 1024).items()},
    "flash_decode_b8_128k_csa_masked_plain": Case(8, 1, "masked", 32768, packed=False),
    "flash_verify_b8_t4_128k_csa_masked": Case(8, 4, "masked", 32768),
    "flash_decode_b8_128k_hca_paged": Case(8, 1, "dense", 1024, packed=False, page=16, slots=9),
    "flash_decode_b8_128k_csa_masked_paged": Case(8, 1, "masked", 32768, page=128, slots=9),
    "flash_decode_b256_1m_csa_masked_paged": Case(
        256, 1, "masked", 262144, page=128, slots=256, layers=1, pool=16384
    ),
    "flash_prefill_t2048_128k_csa_masked_paged": Case(1, 2048, "masked", 32768, page=128),
    "flash_heads8_prefill_t2048_128k_csa_masked": Case(1, 2048, "masked", 32768, heads=8),
}

SMALL = {
    "decode_window": Case(5, 1, "window", heads=8, scales=7),
    "decode_dense": Case(9, 1, "dense", 1024, heads=8),
    "decode_masked": Case(9, 1, "masked", 1024, heads=16),
    "decode_listed": Case(6, 1, "masked", 1536, 5, heads=8),
    "decode_listed_paged": Case(5, 1, "masked", 1024, 3, heads=8, page=256, slots=6),
    "prefill_listed": Case(1, 19, "masked", 2048, 1, heads=8, turned=False),
    "verify_listed_plain": Case(3, 3, "masked", 640, 2, heads=8, packed=False, turned=False),
    "decode_masked_paged": Case(3, 1, "masked", 1024, heads=8, page=256, slots=5),
    "decode_masked_paged_plain": Case(
        3, 1, "masked", 512, heads=8, packed=False, page=64, slots=4, turned=False
    ),
    "prefill_dense_plain": Case(2, 21, "dense", 384, heads=8, packed=False),
    "prefill_masked": Case(1, 19, "masked", 1024, heads=8, turned=False),
    "verify_masked": Case(3, 4, "masked", 256, heads=8, rope=128),
    "decode_three_heads": Case(3, 1, "masked", 256, heads=3),
}


def rows_of(case: Case, *args: Any) -> tuple[api.RowStore, list[Any]]:
    """A row store from the front of `args`, and what is left."""
    if case.packed:
        return api.PackedRows(*args[:2]), list(args[2:])
    return args[0], list(args[1:])


def call(case: Case, implementation: api.Implementation | None, *args: Any) -> Any:
    """The public function of a case on the arrays of `arguments`."""
    q, sink, start, stop, layer, *rest = args
    rotation = None
    if case.turned:
        rotation, rest = (rest[0], rest[1]), rest[2:]
    if case.fresh == 1:
        rows, rest = rows_of(case, *rest)
        slots = rest.pop(0) if case.slots else None
        window = api.Window(rows, start, stop, layer, slots)
    else:
        window, rest = api.Window(rest[0], start, stop), rest[1:]
    compressed = None
    if case.form != "window":
        visible, rest = rest[0], rest[1:]
        words, rest = (rest[0], rest[1:]) if case.form == "masked" else (None, rest)
        rows, rest = rows_of(case, *rest)
        table = rest.pop(0) if case.page else None
        compressed = api.Compressed(rows, visible, layer, words, table, case.keep)
    return api.sparse_attention(
        q, sink, window, compressed, rotation=rotation, implementation=implementation
    )


Shape = tuple[tuple[int, ...], Any]


def _store(case: Case, owners: int, size: int) -> list[Shape]:
    lead = (case.layers, owners, size)
    if case.packed:
        widths = (case.channels + case.rope, case.scales)
        return [((*lead, width), jnp.uint8) for width in widths]
    return [((*lead, case.channels), jnp.uint16)]


def arguments(case: Case) -> list[Shape]:
    """Shapes and dtypes that `call` takes."""
    queries = (case.batch, case.fresh)
    shapes: list[Shape] = [
        ((*queries, case.heads, case.channels), jnp.bfloat16),
        ((case.heads,), jnp.float32),
        (queries, jnp.int32),
        (queries, jnp.int32),
        ((), jnp.int32),
    ]
    if case.turned:
        shapes += [((*queries, case.rope // 2), jnp.float32)] * 2
    if case.fresh == 1:
        shapes += _store(case, case.slots or case.batch, case.window_rows)
        if case.slots:
            shapes.append(((case.batch,), jnp.int32))
    else:
        shapes.append(((1, case.batch, case.window_rows, case.channels), jnp.bfloat16))
    if case.form != "window":
        shapes.append((queries, jnp.int32))
    if case.form == "masked":
        shapes.append(((*queries, -(-case.capacity // 4096) * 128), jnp.int32))
    pages = case.capacity // case.page if case.page else 1
    owners, size = case.pool or case.batch * pages, case.capacity // pages
    if case.form != "window":
        shapes += _store(case, owners, size)
    if case.page:
        shapes.append(((case.batch, pages), jnp.int32))
    return shapes


REPRESENTATIVE = (
    "flash_decode_b64_window",
    "flash_decode_b8_128k_hca",
    "flash_decode_b64_8k_csa_masked",
    "flash_decode_b8_128k_csa_masked",
    "flash_decode_b8_128k_csa_masked_plain",
    "flash_decode_b8_1m_csa_masked",
    "pro_decode_b64_8k_hca",
    "pro_decode_b1_1m_csa_masked",
    "flash_prefill_t2048_128k_hca",
    "pro_prefill_t2048_1m_csa_masked",
    "flash_verify_b8_t4_128k_csa_masked",
    "flash_heads8_prefill_t2048_128k_csa_masked",
    "flash_decode_b8_128k_hca_paged",
    "flash_decode_b256_1m_csa_masked_paged",
    "flash_prefill_t2048_128k_csa_masked_paged",
)


def unavoidable_bytes(name: str) -> int:
    """HBM bytes of a call at full visibility: rows in use, queries, output, choice, once.

    Chosen rows are in use in groups of 128, as many as `keep` rows at random lie in.
    """
    case = CASES[name]
    packed = case.channels + case.rope + 8  # codes, scales, and two bytes for each rotary channel
    row = packed if case.packed else 2 * case.channels
    queries = case.batch * case.fresh
    window = row if case.fresh == 1 else 2 * case.channels
    total = case.batch * case.window_rows * window
    total += queries * (4 * case.heads * case.channels + 4 * case.rope)
    if case.form == "window":
        return total
    rows: float = case.capacity
    if case.form == "masked":
        rows = 128 * tuning.live_groups(case.capacity // 128, case.fresh * case.keep)
        total += queries * -(-case.capacity // 4096) * 512
    return total + int(case.batch * rows * row)


def build(name: str) -> tuple[Any, list[Shape]]:
    """The kernel of a named case and its arguments, for `pallas_kernels.aot`."""
    case = CASES[name]
    return partial(call, case, "pallas"), arguments(case)
