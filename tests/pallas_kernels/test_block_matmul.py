"""Contract of the FP8 block matmul, run for the reference and for the interpreted kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.numerics import Numerics, linear
from dsv4_jax.quant import QuantizedArray, fake_fp8, quantize_weight
from pallas_kernels.block_matmul import kernel, reference, tuning
from pallas_kernels.block_matmul.api import block_matmul
from pallas_kernels.block_matmul.shapes import SMALL, Case

pytestmark = pytest.mark.slow  # interpreted kernels take minutes

E8M0, E4M3 = jnp.float8_e8m0fnu, jnp.float8_e4m3fn
implementations = pytest.mark.parametrize("implementation", ["reference", "interpret"])


def whole_numbers(case: Case, seed: int = 0):
    """Operands whose sums are exact in float32 in any order, so results must agree to the bit."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-4, 5, (case.rows, case.in_dim))
    codes = rng.integers(-8, 9, (case.out_dim, case.in_dim))
    scales = 2.0 ** rng.integers(-3, 4, case.scale_shape)
    if case.scale_dtype == "float32":
        scales = scales * rng.choice([1.0, 3.0, 5.0], case.scale_shape)
    y = x @ (codes * np.kron(scales, np.ones((128, 128)))[: case.out_dim, : case.in_dim]).T
    arrays = (
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(codes, E4M3),
        jnp.asarray(scales, jnp.dtype(case.scale_dtype)),
    )
    return arrays, y.astype(np.float32)


def normal(case: Case, seed: int = 1):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((case.rows, case.in_dim)), jnp.bfloat16)
    values = jnp.asarray(rng.standard_normal((case.out_dim, case.in_dim)) * 0.02, jnp.float32)
    weight = quantize_weight(values, "fp8", jnp.dtype(case.scale_dtype))
    scales = weight.scales
    if case.scale_dtype == "float32":
        scales = scales * jnp.asarray(rng.uniform(0.5, 1.0, scales.shape), jnp.float32)
    return x, weight.codes, scales


@implementations
@pytest.mark.parametrize("name", SMALL)
def test_whole_numbers_agree_to_the_bit(name, implementation):
    case = SMALL[name]
    arrays, wanted = whole_numbers(case)
    y = block_matmul(
        *arrays,
        round_activations=case.rounds,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("name", [name for name in SMALL if SMALL[name].scale_dtype != "float32"])
def test_native_products_give_the_same_bits(name):
    case = SMALL[name]
    arrays, wanted = whole_numbers(case)
    y = block_matmul(
        *arrays,
        round_activations=case.rounds,
        out_dtype=jnp.float32,
        native=True,
        implementation="interpret",
    )
    np.testing.assert_array_equal(y, wanted)


def test_native_products_are_chosen_by_chip_and_refused_by_scale():
    assert tuning.of_this_chip() == tuning.DEFAULT  # this machine has no TPU
    assert tuning.TABLE["7x"].native_rows > 0
    arrays, _ = whole_numbers(SMALL["ragged_base"])
    with pytest.raises(ValueError, match="native products need float8_e8m0fnu"):
        block_matmul(*arrays, native=True)


@pytest.mark.parametrize("name", SMALL)
def test_kernel_agrees_with_the_reference(name):
    case = SMALL[name]
    arrays = normal(case)
    options = dict(round_activations=case.rounds, out_dtype=jnp.float32)
    wanted = block_matmul(*arrays, **options, implementation="reference")
    y = block_matmul(*arrays, **options, implementation="interpret")
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


@implementations
@pytest.mark.parametrize("scale_dtype", ["float8_e8m0fnu", "float32"])
@pytest.mark.parametrize("rounds", [False, True])
def test_equals_the_linear_layer_of_the_model(scale_dtype, rounds, implementation):
    x, codes, scales = normal(Case(19, 320, 200, scale_dtype))
    mode = Numerics("reference" if rounds else "plain", "bfloat16")
    wanted = linear(x, QuantizedArray(codes, scales, "fp8"), mode)
    y = block_matmul(x, codes, scales, round_activations=rounds, implementation=implementation)
    assert y.dtype == wanted.dtype
    wanted, y = (np.asarray(a, np.float32) for a in (wanted, y))
    assert (wanted == y).mean() > 0.99  # the rest: a sum near the middle of two bfloat16 numbers
    np.testing.assert_allclose(y, wanted, rtol=2**-7, atol=1e-6)


@implementations
@pytest.mark.parametrize("out_dim", [256, 128])  # a group fills a weight block, or half of one
@pytest.mark.parametrize("rounds", [False, True])
def test_groups_and_layers_agree_to_the_bit(rounds, out_dim, implementation):
    """Two groups of one layer of a stack: two products of that layer's halves."""
    (x, codes, scales), _ = whole_numbers(Case(20, 256, out_dim))
    both = jnp.concatenate([x, -2 * x], axis=1)
    y = block_matmul(
        both,
        jnp.stack([jnp.zeros_like(codes), codes]),
        jnp.stack([jnp.ones_like(scales), scales]),
        layer=jnp.int32(1),
        groups=2,
        round_activations=rounds,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    whole = block_matmul(
        x,
        codes,
        scales,
        round_activations=rounds,
        out_dtype=jnp.float32,
        implementation="reference",
    )
    wanted = jnp.concatenate([whole[:, : out_dim // 2], -2 * whole[:, out_dim // 2 :]], axis=1)
    np.testing.assert_array_equal(y, wanted)


def test_every_code_times_every_scale_is_exact():
    """All finite codes against each e8m0 scale whose products are normal bfloat16 numbers."""
    codes = np.resize(np.arange(256, dtype=np.uint8), (128, 128))
    codes = np.where(codes & 0x7F == 0x7F, 0, codes)  # the two NaNs
    exponents = np.arange(127 - 117, 127 + 119 + 1, dtype=np.uint8)  # 2^-9 … 448 stay normal
    tall = jnp.asarray(np.tile(codes, (len(exponents), 1))).view(E4M3)
    scales = jnp.asarray(exponents[:, None]).view(E8M0)
    y = block_matmul(
        jnp.eye(128, dtype=jnp.bfloat16),
        tall,
        scales,
        out_dtype=jnp.float32,
        implementation="interpret",
    )
    values = np.asarray(jnp.asarray(codes).view(E4M3), np.float64)
    wanted = np.concatenate([values * 2.0 ** (int(e) - 127) for e in exponents])
    np.testing.assert_array_equal(np.asarray(y, np.float64).T, wanted)


def test_every_code_times_float32_scales_is_exact_before_the_last_rounding():
    codes = np.resize(np.arange(256, dtype=np.uint8), (128, 128))
    codes = np.where(codes & 0x7F == 0x7F, 0, codes)
    scales = np.float32([1.0, 0.1, 3.3e-5, 2.7e4, np.pi, 2**-100 / 3])
    y = block_matmul(
        jnp.eye(128, dtype=jnp.bfloat16),
        jnp.asarray(np.tile(codes, (len(scales), 1))).view(E4M3),
        jnp.asarray(scales[:, None]),
        out_dtype=jnp.float32,
        implementation="interpret",
    )
    values = np.asarray(jnp.asarray(codes).view(E4M3), np.float32)
    wanted = np.concatenate([values * s for s in scales])
    np.testing.assert_array_equal(np.asarray(y).T, wanted)


@pytest.mark.parametrize("top", [448.0, 447.0, 0.9, 2.0**-14, 1.5 * 2.0**60])
def test_fused_rounding_is_exact_on_every_bfloat16_number(top):
    """Each row holds its largest value, then numbers below it; a unit weight shows them rounded."""
    every = jnp.arange(1 << 15, dtype=jnp.uint16).view(jnp.bfloat16).astype(jnp.float32)
    below = np.asarray(every[np.asarray(every) <= top])
    below = below[below >= top * 2.0**-30]
    below = np.concatenate([below, -below, np.zeros(-2 * len(below) % 127, np.float32)])
    x = np.concatenate([np.full((len(below) // 127, 1), top), below.reshape(-1, 127)], axis=1)
    x = jnp.asarray(x[:512], jnp.bfloat16)
    unit = jnp.eye(128, dtype=E4M3)
    y = block_matmul(
        x, unit, jnp.ones((1, 1), E8M0), round_activations=True, implementation="interpret"
    )
    np.testing.assert_array_equal(y, fake_fp8(x, 128))
    np.testing.assert_array_equal(reference.round_activations(x), fake_fp8(x, 128))


def test_rounding_of_small_rows_uses_the_smallest_scale():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((16, 200)) * 1e-5, jnp.bfloat16)
    x = x.at[3].set(0)
    unit = jnp.eye(200, dtype=E4M3)
    scales = jnp.ones((2, 2), E8M0)
    y = block_matmul(x, unit, scales, round_activations=True, implementation="interpret")
    np.testing.assert_array_equal(y, fake_fp8(x, 128))
    np.testing.assert_array_equal(reference.round_activations(x), fake_fp8(x, 128))


def test_leading_dimensions_and_no_rows():
    (x, codes, scales), wanted = whole_numbers(Case(6, 128, 128))
    y = block_matmul(
        x.reshape(2, 3, 128), codes, scales, out_dtype=jnp.float32, implementation="interpret"
    )
    np.testing.assert_array_equal(np.asarray(y).reshape(6, -1), wanted)
    for implementation in (None, "reference", "interpret", "pallas"):
        none = block_matmul(x[:0], codes, scales, implementation=implementation)
        assert none.shape == (0, 128)


def test_the_default_runs_on_cpu():
    (x, codes, scales), wanted = whole_numbers(Case(4, 128, 256))
    y = jax.jit(lambda *a: block_matmul(*a, out_dtype=jnp.float32))(x, codes, scales)
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("name", ["ragged", "ragged_base"])
def test_no_races_and_no_uninitialised_reads(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    case = SMALL[name]
    arrays, wanted = whole_numbers(case)
    try:
        y = block_matmul(
            *arrays,
            round_activations=case.rounds,
            out_dtype=jnp.float32,
            implementation="interpret",
            interpret_params=pltpu.InterpretParams(detect_races=True),
        )
        np.testing.assert_array_equal(y, wanted)
        assert not state.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_tiles_respect_hardware_units():
    for rows in (1, 8, 64, 500, 8192):
        for out_dim, in_dim in ((512, 4096), (65536, 1536), (7168, 16384), (130, 200)):
            row_tile, weight_tile = kernel.tile_sizes(rows, out_dim, in_dim)
            assert row_tile % 16 == 0 and weight_tile % 128 == 0
            assert kernel.vmem_bytes(row_tile, weight_tile, in_dim) <= 56 << 20


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, c, s: (x.astype(jnp.float32), c, s), "x is float32"),
        (lambda x, c, s: (x[:, :100], c, s), "must end in the 128 inputs"),
        (lambda x, c, s: (x, c.astype(jnp.float32), s), "must be float8_e4m3fn"),
        (lambda x, c, s: (x, c, s[:1]), "one per 128×128 block"),
        (lambda x, c, s: (x, c, s.astype(jnp.bfloat16)), "float8_e8m0fnu or float32"),
    ],
)
def test_wrong_operands_are_named(change, message):
    arrays, _ = whole_numbers(Case(4, 128, 256))
    with pytest.raises(ValueError, match=message):
        block_matmul(*change(*arrays))


def test_unknown_implementation_is_an_error():
    arrays, _ = whole_numbers(Case(4, 128, 128))
    with pytest.raises(ValueError, match="implementation='mosaic'"):
        block_matmul(*arrays, implementation="mosaic")
