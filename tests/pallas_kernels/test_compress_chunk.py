"""Contract of compress_chunk, run for the reference and for the interpreted kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compress_chunk.api import pool_windows
from pallas_kernels.compress_chunk.shapes import SMALL, Case

implementations = pytest.mark.parametrize("implementation", ["reference", "interpret"])


def operands(case: Case, seed: int = 0):
    """Every other sequence starts with row 0."""
    rng = np.random.default_rng(seed)
    values, scores = (rng.standard_normal(case.shape, np.float32) * 3 for _ in range(2))
    first = np.arange(case.batch) % 2 * 7
    return jnp.asarray(values), jnp.asarray(scores), jnp.asarray(first, jnp.int32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def run(args, case, implementation, interpret_params=True):
    return pool_windows(
        *args,
        ratio=case.ratio,
        overlaps=case.overlaps,
        implementation=implementation,
        interpret_params=interpret_params,
    )


def by_hand(case: Case, args):
    """Row by row in float64."""
    values, scores, first = (np.asarray(a, np.float64) for a in args)
    rows = np.zeros((case.batch, case.rows, case.row_dim))
    for b in range(case.batch):
        for c in range(case.rows):
            start = (c + case.overlaps) * case.ratio
            tokens = [(start + r, slice(-case.row_dim, None)) for r in range(case.ratio)]
            if case.overlaps and first[b] + c > 0:
                tokens += [(start - 1 - r, slice(0, case.row_dim)) for r in range(case.ratio)]
            weights = np.stack([np.exp(scores[b, t, at]) for t, at in tokens])
            parts = np.stack([values[b, t, at] for t, at in tokens])
            rows[b, c] = (weights * parts).sum(0) / weights.sum(0)
    return rows


@implementations
@pytest.mark.parametrize("name", SMALL)
def test_rows_are_those_of_the_definition(name, implementation):
    case = SMALL[name]
    args = operands(case)
    rows = run(args, case, implementation)
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, by_hand(case, args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["overlapped_in_blocks", "plain_in_blocks"])
def test_rows_do_not_depend_on_their_place_in_a_chunk(name):
    """Cut in two anywhere, a chunk gives the same bits."""
    case = SMALL[name]
    values, scores, first = operands(case)
    whole = run((values, scores, first), case, "interpret")
    cut, extra = 3, int(case.overlaps)
    head = case._replace(rows=cut)
    tail = case._replace(rows=case.rows - cut)
    ends = (cut + extra) * case.ratio
    front = run((values[:, :ends], scores[:, :ends], first), head, "interpret")
    begin = cut * case.ratio
    back = run((values[:, begin:], scores[:, begin:], first + cut), tail, "interpret")
    np.testing.assert_array_equal(jnp.concatenate([front, back], axis=1), whole)


def test_large_scores_and_what_was_not_written_leave_no_trace():
    """Exponents that overflow float32, and junk in front of a sequence's first row."""
    case = SMALL["overlapped"]
    values, scores, first = operands(case)
    scores = scores + 300
    wanted = run((values, scores, first), case, "reference")
    junk = values.at[0, :4].set(jnp.nan), scores.at[0, :4].set(jnp.nan), first
    np.testing.assert_allclose(run(junk, case, "interpret")[1:], wanted[1:], rtol=1e-5, atol=1e-5)
    finite = values.at[0, :4].set(1e30), scores.at[0, :4].set(1e30), first
    np.testing.assert_allclose(run(finite, case, "interpret"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["overlapped_in_blocks", "plain_in_blocks"])
def test_no_races_and_no_uninitialised_reads(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    case = SMALL[name]
    args = operands(case, seed=2)
    try:
        rows = run(args, case, "interpret", pltpu.InterpretParams(detect_races=True))
        np.testing.assert_allclose(rows, run(args, case, "reference"), rtol=1e-5, atol=1e-5)
        assert not state.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_wrong_operands_are_named():
    values, scores, first = operands(SMALL["overlapped"])
    bad = [
        ((values[:, :-1], scores, first), "whole windows"),
        ((values[..., :-1], scores[..., :-1], first), "even W"),
        ((values, scores.astype(jnp.bfloat16), first), "scores is bfloat16"),
        ((values, scores, first[:1]), "first_B is"),
    ]
    for args, message in bad:
        with pytest.raises(ValueError, match=message):
            pool_windows(*args, ratio=4, overlaps=True)
    with pytest.raises(ValueError, match="implementation='mosaic'"):
        pool_windows(values, scores, first, ratio=4, overlaps=True, implementation="mosaic")


def test_sizes_outside_the_kernel_are_refused_by_name_and_chosen_around():
    case = Case(1, 3, 4, 96)
    args = operands(case)
    with pytest.raises(NotImplementedError, match="96 channels"):
        pool_windows(*args, ratio=4, overlaps=False, implementation="interpret")
    rows = pool_windows(*args, ratio=4, overlaps=False)
    np.testing.assert_allclose(rows, run(args, case, "reference"), rtol=1e-5)
