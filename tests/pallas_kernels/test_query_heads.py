"""Contract of the query heads, run for the reference and for the interpreted kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.attention import per_head
from dsv4_jax.norm import head_norm
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import Rotation, rotate
from pallas_kernels.query_heads.api import query_heads
from pallas_kernels.query_heads.shapes import SMALL, Case

implementations = pytest.mark.parametrize("implementation", ["reference", "interpret"])
EPS = 1e-6


def operands(case: Case, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((case.tokens, case.heads * case.channels)) * 3
    angle = rng.uniform(0, 6, (case.tokens, case.rotary // 2)).astype(np.float32)
    return jnp.asarray(y, jnp.bfloat16), jnp.cos(angle), jnp.sin(angle)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def run(args, heads, rounds, implementation, interpret_params=True):
    return query_heads(
        *args,
        heads,
        eps=EPS,
        rounds=rounds,
        implementation=implementation,
        interpret_params=interpret_params,
    )


def in_the_model(args, heads, num):
    y_Ux, cos, sin = args
    x_BTNH = y_Ux.reshape(1, len(y_Ux), heads, -1)
    turn = per_head(Rotation(cos[None], sin[None]))
    return jax.jit(lambda x: rotate(head_norm(x, EPS, num), turn, num))(x_BTNH)[0]


def assert_close(y, wanted):
    """Equal but where a sum near the middle of two bfloat16 numbers fell the other way."""
    y, wanted = np.asarray(y, np.float32), np.asarray(wanted, np.float32)
    assert (y == wanted).mean() > 0.9
    np.testing.assert_allclose(y, wanted, rtol=2**-6, atol=2**-7)


@implementations
@pytest.mark.parametrize("mode", ["reference", "plain"])
@pytest.mark.parametrize("name", SMALL)
def test_equals_the_functions_of_the_model(name, mode, implementation):
    case, num = SMALL[name], Numerics(mode, "bfloat16")
    args = operands(case)
    y = run(args, case.heads, num.rounds, implementation)
    assert y.shape == (case.tokens, case.heads, case.channels)
    assert_close(y, in_the_model(args, case.heads, num))


@implementations
def test_whole_numbers_agree_to_the_bit(implementation):
    """Heads of ±3 have a norm of 3 in any order of summing; quarter turns move them exactly."""
    case = SMALL["ragged"]
    rng = np.random.default_rng(1)
    y = rng.choice([-3.0, 3.0], (case.tokens, case.heads * case.channels))
    quarter = np.zeros((case.tokens, case.rotary // 2), np.float32)
    args = jnp.asarray(y, jnp.bfloat16), jnp.asarray(quarter), jnp.asarray(quarter + 1)
    got = np.asarray(run(args, case.heads, True, implementation), np.float32)
    heads = y.reshape(case.tokens, case.heads, -1) / 3
    still = case.channels - case.rotary
    np.testing.assert_array_equal(got[..., :still], heads[..., :still])
    np.testing.assert_array_equal(got[..., still::2], -heads[..., still + 1 :: 2])
    np.testing.assert_array_equal(got[..., still + 1 :: 2], heads[..., still::2])


def test_tokens_do_not_meet():
    case = SMALL["ragged"]
    y, cos, sin = operands(case)
    wanted = np.asarray(run((y, cos, sin), case.heads, True, "interpret"), np.float32)
    broken = y.at[4].set(jnp.nan)
    got = np.asarray(run((broken, cos, sin), case.heads, True, "interpret"), np.float32)
    np.testing.assert_array_equal(np.delete(got, 4, 0), np.delete(wanted, 4, 0))


@pytest.mark.parametrize("name", ["ragged", "two_groups"])
def test_no_races_and_no_uninitialised_reads(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    case = SMALL[name]
    args = operands(case, seed=2)
    try:
        params = pltpu.InterpretParams(detect_races=True)
        y = run(args, case.heads, True, "interpret", params)
        assert_close(y, run(args, case.heads, True, "reference"))
        assert not state.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_no_token_and_the_default():
    case = SMALL["few_heads"]
    y, cos, sin = operands(case)
    nothing = y[:0], cos[:0], sin[:0]
    assert run(nothing, case.heads, True, "interpret").shape == (0, case.heads, case.channels)
    args = (y, cos, sin)
    np.testing.assert_array_equal(
        run(args, case.heads, True, None), run(args, case.heads, True, "reference")
    )


def test_wrong_operands_are_named():
    case = SMALL["few_heads"]
    y, cos, sin = operands(case)
    bad = [
        ((y.astype(jnp.float32), cos, sin), "y is float32"),
        ((y[:, :-1], cos, sin), "must be bfloat16"),
        ((y, cos[:2], sin), "cos is"),
        ((y, cos, sin[:, :3]), "sin is"),
    ]
    for args, message in bad:
        with pytest.raises(ValueError, match=message):
            query_heads(*args, case.heads, eps=EPS, rounds=True)
    with pytest.raises(ValueError, match="implementation='mosaic'"):
        query_heads(y, cos, sin, case.heads, eps=EPS, rounds=True, implementation="mosaic")


def test_sizes_outside_the_kernel_are_refused_by_name_and_chosen_around():
    y, cos, sin = operands(Case(3, 4, 96, 32))
    with pytest.raises(NotImplementedError, match="96 channels"):
        query_heads(y, cos, sin, 4, eps=EPS, rounds=True, implementation="interpret")
    assert query_heads(y, cos, sin, 4, eps=EPS, rounds=True).shape == (3, 4, 96)
