"""row_update: one contract for the reference and the interpreted kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.row_update import api
from pallas_kernels.row_update.shapes import SMALL, Case, arguments, call

LAYER = 1
implementations = pytest.mark.parametrize("implementation", ["reference", "interpret"])


def operands(case: Case, seed: int = 0):
    """Random stores and entries; starts and counts at the edges of tiles, none among them."""
    rng = np.random.default_rng(seed)
    arrays = [
        rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
        for shape, dtype in arguments(case)[: 2 * len(case.stores)]
    ]
    owners = rng.permutation(case.lead[1])[: case.batch * case.blocks]
    room = case.size * case.blocks
    first = np.resize([0, 127, 100, room - 1, 128, 1], case.batch)
    count = np.minimum(np.resize([case.fresh, case.fresh, 0, 1, 29], case.batch), case.fresh)
    where = (owners.reshape(case.batch, -1), first, count)
    return [*arrays, *(a.astype(np.int32) for a in where), np.int32(LAYER)]


def by_hand(case: Case, args):
    count = len(case.stores)
    stores, new = [a.copy() for a in args[:count]], args[count : 2 * count]
    owner_BJ, first_B, count_B, layer = args[2 * count :]
    for b in range(case.batch):
        for step in range(count_B[b]):
            entry = first_B[b] + step
            if entry < case.size * case.blocks:
                owner = owner_BJ[b, entry // case.size]
                for store, rows in zip(stores, new, strict=True):
                    store[layer, owner, entry % case.size] = rows[b, step]
    return stores


@functools.cache
def compiled(case: Case, implementation):
    return jax.jit(functools.partial(call, case, implementation))


@implementations
@pytest.mark.parametrize("name", SMALL)
def test_entries_are_where_they_belong_and_nothing_else_changes(name, implementation):
    case = SMALL[name]
    args = operands(case)
    wanted = by_hand(case, args)
    for store, expected in zip(compiled(case, implementation)(*args), wanted, strict=True):
        np.testing.assert_array_equal(store, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_entry", "run_paged"])
def test_no_races_and_no_uninitialised_reads(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    case = SMALL[name]
    args = [jnp.asarray(a) for a in operands(case)]
    count = len(case.stores)
    try:
        updated = api.update_rows(
            tuple(args[:count]),
            tuple(args[count : 2 * count]),
            *args[2 * count : -1],
            layer=args[-1],
            implementation="interpret",
            interpret_params=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
        )
        for store, expected in zip(updated, by_hand(case, operands(case)), strict=True):
            np.testing.assert_array_equal(store, expected)
        assert not state.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_every_byte_travels_unchanged():
    values = np.arange(256, dtype=np.uint8).repeat(32).reshape(1, 256, 32)
    stores = (jnp.zeros((1, 1, 256, 32), jnp.uint8),)
    where = (jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.full(1, 256, jnp.int32))
    (out,) = api.update_rows(stores, (jnp.asarray(values),), *where, implementation="interpret")
    np.testing.assert_array_equal(out[0], values)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, n, o, f, c: (s, (n[0][:, :, :2], *n[1:]), o, f, c), r"new\[0\] is uint8"),
        (lambda s, n, o, f, c: ((s[0].astype(jnp.int32), *s[1:]), n, o, f, c), "must be uint8"),
        (lambda s, n, o, f, c: ((s[0][:, :1], *s[1:]), n, o, f, c), "must begin with"),
        (lambda s, n, o, f, c: (s, n, o[:1], f, c), "owner_BJ"),
        (lambda s, n, o, f, c: (s, n, o, f.astype(jnp.float32), c), "first_B is float32"),
    ],
)
def test_wrong_operands_are_named(change, message):
    args = [jnp.asarray(a) for a in operands(SMALL["one_entry"])]
    with pytest.raises(ValueError, match=message):
        api.update_rows(*change(tuple(args[:2]), tuple(args[2:4]), *args[4:7]))


def test_sizes_outside_the_kernel_are_refused_by_name_and_chosen_around():
    case = Case(2, 1, 200, (8,))
    args = operands(case)
    with pytest.raises(NotImplementedError, match="200 entries"):
        call(case, "interpret", *args)
    with pytest.raises(ValueError, match="'mosaic' is unknown"):
        call(case, "mosaic", *args)
    np.testing.assert_array_equal(compiled(case, None)(*args)[0], by_hand(case, args)[0])
