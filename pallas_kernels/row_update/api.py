"""Writes new entries into stores whose entries are columns, in place.

XLA keeps `[L, O, C, K]` arrays with a narrow last dimension as columns (C along lanes), which is
also what attention reads. Its own scatter wants rows, and would turn the whole store both ways.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.row_update import kernel, reference

__all__ = ["update_rows"]

Implementation = Literal["reference", "pallas", "interpret"]


def update_rows(
    stores: tuple[Array, ...],
    new: tuple[Array, ...],
    owner_BJ: Array,
    first_B: Array,
    count_B: Array,
    *,
    layer: Array | int = 0,
    every: int = 1,
    implementation: Implementation | None = None,
    interpret_params: Any = True,
) -> tuple[Array, ...]:
    """Stores the first `count_B` of `new` as entries first_B, first_B + 1, … of each sequence.

    stores: uint8 `[L, O, C, K]`, all with the same L, O and C. Donate them: the kernel
        writes in place.
    new: for each store uint8 `[B, T, K]`.
    owner_BJ: the second index of block j of a sequence's entries, `[B, J]` int32, where blocks have
        C entries. No two sequences may write to the same owner.
    layer: entry of the leading dimension.
    every: one sequence in so many has new entries, on average: for the cost estimate alone.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        NotImplementedError: the kernel does not cover these sizes.
    """
    _check(stores, new, owner_BJ, first_B, count_B)
    args = (stores, new, owner_BJ, first_B, count_B, jnp.asarray(layer, jnp.int32))
    if implementation == "reference":
        return reference.update_rows(*args)
    run = partial(_kernel, every=every, interpret=False)
    if implementation == "interpret":
        return _kernel(*args, every=every, interpret=interpret_params)
    if implementation == "pallas":
        return run(*args)
    if implementation is not None:
        raise ValueError(f"implementation={implementation!r} is unknown")
    try:
        kernel.check(stores, new)
    except NotImplementedError:
        return reference.update_rows(*args)
    return lax.platform_dependent(*args, tpu=run, default=reference.update_rows)


def _check(stores, new, owner_BJ: Array, first_B: Array, count_B: Array) -> None:
    lead, (batch, fresh) = stores[0].shape[:3], new[0].shape[:2]
    for n, (store, rows) in enumerate(zip(stores, new, strict=True)):
        if store.dtype != jnp.uint8 or store.ndim != 4:
            found = f"{store.dtype}{list(store.shape)}"
            raise ValueError(f"stores[{n}] is {found}, must be uint8 [L, O, C, K]")
        if store.shape[:3] != lead:
            raise ValueError(f"stores[{n}]{list(store.shape)} must begin with {list(lead)}")
        wanted = (batch, fresh, store.shape[3])
        if rows.shape != wanted or rows.dtype != store.dtype:
            raise ValueError(
                f"new[{n}] is {rows.dtype}{list(rows.shape)}, must be {store.dtype}{list(wanted)}"
            )
    if owner_BJ.ndim != 2 or len(owner_BJ) != batch:
        raise ValueError(f"owner_BJ{list(owner_BJ.shape)} must be [{batch}, J]")
    for name, array in (("first_B", first_B), ("count_B", count_B)):
        if array.shape != (batch,) or array.dtype != jnp.int32:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, must be int32 [{batch}]")


def _kernel(
    stores, new, owner_BJ, first_B, count_B, layer, *, every, interpret
) -> tuple[Array, ...]:
    kernel.check(stores, new)
    columns = tuple(jnp.swapaxes(store, 2, 3) for store in stores)
    source_XS = jnp.concatenate([rows.reshape(-1, rows.shape[2]).T for rows in new])
    source_XS = jnp.pad(source_XS, ((0, 0), (0, kernel.padding(source_XS.shape[1]))))
    size, (_, blocks) = stores[0].shape[2], owner_BJ.shape
    count_B = jnp.clip(blocks * size - first_B, 0, count_B)
    begin_B1 = (first_B // size)[:, None]  # only the blocks that may be written go to SMEM
    touched = jnp.arange(min((new[0].shape[1] + size - 2) // size + 1, blocks))[None]
    updated = kernel.update_rows(
        columns,
        source_XS,
        jnp.take_along_axis(owner_BJ, jnp.minimum(begin_B1 + touched, blocks - 1), axis=1),
        first_B % size,
        count_B,
        layer[None],
        fresh=new[0].shape[1],
        every=every,
        interpret=interpret,
    )
    return tuple(jnp.swapaxes(column, 2, 3) for column in updated)
