"""compress_step: one contract for the reference and the interpreted kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compress_step import api
from pallas_kernels.compress_step.shapes import SMALL, Case, arguments, call

implementations = pytest.mark.parametrize("implementation", ["reference", "interpret"])


def operands(case: Case, seed: int = 0):
    """Random rings; positions at the edges of windows and rings, some sequences inactive."""
    rng = np.random.default_rng(seed)
    arrays = [(rng.normal(size=shape) * 3).astype(np.float32) for shape, _ in arguments(case)[:4]]
    r = case.ratio
    pos = np.resize([r - 1, 0, 2 * r - 1, 7 * r - 1, r, 3 * r - 2, 4 * r - 1], case.batch)
    count = np.resize([1, 1, 1, 0, 1], case.batch)
    numbers = [pos.astype(np.int32), count.astype(np.int32), np.int32(case.layers - 1)]
    slots = rng.permutation(case.slots)[: case.batch].astype(np.int32)
    return [*arrays, *numbers, *([slots] if case.slots else [])]


def by_hand(case: Case, args):
    """One sequence and one token at a time, in float64."""
    values, scores = args[0].astype(np.float64), args[1].astype(np.float64)
    new_values, new_scores, pos_B, count_B, layer = args[2:7]
    slots = args[7] if case.slots else range(case.batch)
    length, half = case.windows * case.ratio, case.row_dim
    rows = np.zeros((case.batch, case.row_dim))
    for b, (slot, pos) in enumerate(zip(slots, pos_B, strict=True)):
        if not count_B[b]:
            continue
        values[layer, slot, pos % length] = new_values[b]
        scores[layer, slot, pos % length] = new_scores[b]
        if (pos + 1) % case.ratio:
            continue
        own = [p % length for p in range(pos - case.ratio + 1, pos + 1)]
        channels = slice(half, None) if case.windows == 2 else slice(None)
        seen = [(values[layer, slot, p, channels], scores[layer, slot, p, channels]) for p in own]
        if case.windows == 2 and pos >= case.ratio:
            before = [p % length for p in range(pos - 2 * case.ratio + 1, pos - case.ratio + 1)]
            seen += [(values[layer, slot, p, :half], scores[layer, slot, p, :half]) for p in before]
        weights = np.exp([s for _, s in seen])
        rows[b] = (weights / weights.sum(axis=0) * [v for v, _ in seen]).sum(axis=0)
    return rows, values, scores


@functools.cache
def compiled(case: Case, implementation):
    return jax.jit(functools.partial(call, case, implementation))


@implementations
@pytest.mark.parametrize("name", SMALL)
def test_rings_and_rows_are_those_of_the_definition(name, implementation):
    case = SMALL[name]
    args = operands(case)
    step = compiled(case, implementation)(*args)
    rows, values, scores = by_hand(case, args)
    np.testing.assert_array_equal(step.values, values.astype(np.float32))
    np.testing.assert_array_equal(step.scores, scores.astype(np.float32))
    np.testing.assert_allclose(step.rows_Bd, rows, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["overlapped_in_slots", "plain"])
def test_no_races_and_no_uninitialised_reads(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    case = SMALL[name]._replace(batch=6)
    args = [jnp.asarray(a) for a in operands(case)]
    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        step = api.compress_step(
            *args[:6],
            ratio=case.ratio,
            layer=args[6],
            slots_B=args[7] if case.slots else None,
            implementation="interpret",
            interpret_params=careful,
        )
        rows, values, _ = by_hand(case, operands(case))
        np.testing.assert_array_equal(step.values, values.astype(np.float32))
        np.testing.assert_allclose(step.rows_Bd, rows, rtol=0, atol=5e-6)
        assert not state.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: lambda a: a[:, :, :3]}, r"values\[2, 5, 3, 128\]"),
        ({1: lambda a: a[:1]}, "scores is"),
        ({2: lambda a: a.astype(jnp.bfloat16)}, "new_values_BW is bfloat16"),
        ({3: lambda a: a[:, :64]}, "new_scores_BW is"),
        ({4: lambda a: a.astype(jnp.float32)}, "pos_B is float32"),
        ({5: lambda a: a[:2]}, "count_B is"),
    ],
)
def test_wrong_operands_are_named(change, message):
    case = SMALL["plain"]
    args = [jnp.asarray(a) for a in operands(case)]
    args = [change.get(n, lambda a: a)(a) for n, a in enumerate(args)]
    with pytest.raises(ValueError, match=message):
        call(case, None, *args)


def test_sizes_outside_the_kernel_are_refused_by_name_and_chosen_around():
    case = Case(2, 6, 128, layers=1)
    args = operands(case)
    with pytest.raises(NotImplementedError, match="6 entries"):
        call(case, "interpret", *args)
    with pytest.raises(ValueError, match="'mosaic' is unknown"):
        call(case, "mosaic", *args)  # type: ignore[arg-type]
    rows, _, _ = by_hand(case, args)
    np.testing.assert_allclose(compiled(case, None)(*args).rows_Bd, rows, rtol=0, atol=5e-6)
