"""Contract of the hyper-connection kernels, run for the reference and for the interpreted ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax import mhc
from dsv4_jax.norm import rms_norm
from dsv4_jax.numerics import Numerics
from dsv4_jax.presets import tiny
from pallas_kernels.mhc import kernel
from pallas_kernels.mhc.api import mix, spread
from pallas_kernels.mhc.shapes import FULL, SMALL, Case

ITERS, EPS, NORM_EPS = 20, 1e-6, 1e-6
implementations = pytest.mark.parametrize("implementation", ["reference", "interpret"])
cases = pytest.mark.parametrize("name", SMALL)


def operands(case: Case, seed: int = 0):
    rng = np.random.default_rng(seed)
    m, dim = case.streams, case.dim

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    h = (draw(case.tokens, m * dim) * 3).astype(jnp.bfloat16)
    fn = draw(case.rows, m * dim) * 2 * (m * dim) ** -0.5
    scale, base, norm = draw(3) + 1.0, draw(case.rows), draw(dim) + 1.0
    return h, fn, scale, base, norm


@functools.partial(jax.jit, static_argnames=("normed", "implementation", "interpret_params"))
def run_mix(args, normed, implementation, interpret_params=True):
    *args, norm = args
    return mix(
        *args,
        iters=ITERS,
        eps=EPS,
        norm_eps=NORM_EPS,
        norm_D=norm if normed else None,
        implementation=implementation,
        interpret_params=interpret_params,
    )


run_spread = jax.jit(spread, static_argnames=("implementation", "interpret_params"))


def assert_bf16_close(y, wanted):
    """Equal but for float32 sums that fall on the other side of a rounding border."""
    y, wanted = np.asarray(y, np.float32), np.asarray(wanted, np.float32)
    assert np.isfinite(y).all()
    assert (y == wanted).mean() > 0.99
    np.testing.assert_allclose(y, wanted, rtol=2**-6, atol=1e-5)


def in_the_model(case: Case, args, normed):
    """The model's own functions: x, post, comb, and the spread of x."""
    h, fn, scale, base, norm = args
    cfg = tiny().replace(hc_mult=case.streams, hc_iters=ITERS, hc_eps=EPS)
    num = Numerics("plain", "bfloat16")
    h_BTMD = h.reshape(1, case.tokens, case.streams, case.dim)
    mixing = mhc.split_mixing(mhc._mix_logits(h_BTMD, fn, NORM_EPS), scale, base, cfg)
    x_BTD = mhc.weigh_streams(h_BTMD, mixing.pre_MBT, num)
    if normed:
        x_BTD = rms_norm(x_BTD, norm, NORM_EPS, num)
    new = mhc.spread(x_BTD, h_BTMD, mixing, num)
    return x_BTD[0], mixing.post_MBT[:, 0], mixing.comb_MMBT[:, :, 0], new.reshape(h.shape)


@implementations
@cases
def test_equals_the_functions_of_the_model(name, implementation):
    case = SMALL[name]
    args = operands(case)
    normed = case.tokens % 2 == 1
    wanted = jax.jit(lambda: in_the_model(case, args, normed))()
    mixed = run_mix(args, normed, implementation)
    assert_bf16_close(mixed.x_UD, wanted[0])
    np.testing.assert_allclose(mixed.post_MU, wanted[1], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(mixed.comb_MMU, wanted[2], rtol=2e-5, atol=1e-6)
    new = run_spread(*(wanted[0], args[0], *wanted[1:3]), implementation=implementation)
    assert_bf16_close(new, wanted[3])


@implementations
def test_mixing_is_doubly_stochastic(implementation):
    comb = np.asarray(run_mix(operands(SMALL["full_lanes"]), False, implementation).comb_MMU)
    assert (comb > 0).all()
    np.testing.assert_allclose(comb.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(comb.sum(1), 1, atol=2e-2)


@implementations
def test_logits_have_float32_precision(implementation):
    """Mixing numbers against float64: bfloat16 products would miss by a hundred times more."""
    case = SMALL["chunk_border"]
    h, fn, scale, base, norm = operands(case, seed=1)
    flat = np.asarray(h, np.float64)
    root = np.sqrt((flat**2).mean(1) + NORM_EPS)
    logits = np.asarray(fn, np.float64) @ flat.T / root
    m = case.streams
    post = logits[m : 2 * m] * float(scale[1]) + np.asarray(base, np.float64)[m : 2 * m, None]
    mixed = run_mix((h, fn, scale, base, norm), False, implementation)
    np.testing.assert_allclose(mixed.post_MU, 2 / (1 + np.exp(-post)), rtol=2e-5)


@implementations
def test_tokens_do_not_meet(implementation):
    """A token's result does not depend on its neighbours, not even on NaN ones."""
    h, *rest = operands(SMALL["ragged_tile"])
    whole = run_mix((h, *rest), True, implementation)
    broken = run_mix((h.at[7].set(jnp.nan), *rest), True, implementation)
    keep = np.arange(len(h)) != 7
    for a, b in ((whole.x_UD, broken.x_UD), (whole.post_MU.T, broken.post_MU.T)):
        np.testing.assert_array_equal(
            np.asarray(a, np.float32)[keep], np.asarray(b, np.float32)[keep]
        )


def test_streams_may_come_apart_or_side_by_side():
    case = SMALL["short_lanes"]
    h, *rest = operands(case)
    apart = h.reshape(case.tokens, case.streams, case.dim)
    for implementation in ("reference", "interpret"):
        flat, split = (run_mix((x, *rest), True, implementation) for x in (h, apart))
        for a, b in zip(flat, split, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        new = [
            run_spread(flat.x_UD, x, flat.post_MU, flat.comb_MMU, implementation=implementation)
            for x in (h, apart)
        ]
        assert new[1].shape == apart.shape
        np.testing.assert_array_equal(np.asarray(new[0]), np.asarray(new[1]).reshape(h.shape))


def test_no_token_and_the_default():
    h, *rest = operands(SMALL["short_lanes"])
    for implementation in (None, "reference", "interpret", "pallas"):
        mixed = run_mix((h[:0], *rest), True, implementation)
        assert [x.shape for x in mixed] == [(0, 96), (4, 0), (4, 4, 0)]
    for a, b in zip(
        run_mix((h, *rest), True, None), run_mix((h, *rest), True, "reference"), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["short_lanes", "ragged_tile"])
def test_no_races_and_no_uninitialised_reads(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    args, checked = operands(SMALL[name]), pltpu.InterpretParams(detect_races=True)
    wanted = run_mix(args, True, "reference")
    try:
        mixed = run_mix(args, True, "interpret", checked)
        assert_bf16_close(mixed.x_UD, wanted.x_UD)
        new = run_spread(
            wanted.x_UD,
            args[0],
            *wanted[1:],
            implementation="interpret",
            interpret_params=checked,
        )
        assert_bf16_close(new, run_spread(wanted.x_UD, args[0], *wanted[1:]))
        assert not state.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_sizes_of_the_models_fit_every_chip():
    for name, case in FULL.items():
        width = case.streams * case.dim
        tile = kernel.row_tile(case.tokens, width)
        assert kernel.vmem_bytes(tile, width, case.rows) <= 60 << 20, name


def test_wrong_operands_are_named():
    h, fn, scale, base, norm = operands(SMALL["short_lanes"])
    options = dict(iters=ITERS, eps=EPS, norm_eps=NORM_EPS)
    with pytest.raises(ValueError, match=r"fn\[23, 384\] must be"):
        mix(h, fn[:23], scale, base, **options)
    with pytest.raises(ValueError, match="must be .5, 384. or"):
        spread(h[:, :96], h[:, :100], jnp.zeros((4, 5)), jnp.zeros((4, 4, 5)))
    with pytest.raises(ValueError, match="h is float32"):
        mix(h.astype(jnp.float32), fn, scale, base, **options)
    with pytest.raises(ValueError, match="must be .3. and .24."):
        mix(h, fn, scale[:2], base, **options)
    with pytest.raises(ValueError, match=r"norm\[95\]"):
        mix(h, fn, scale, base, **options, norm_D=norm[:95])
    with pytest.raises(ValueError, match="implementation='mosaic'"):
        mix(h, fn, scale, base, **options, implementation="mosaic")
