"""Codes, scales and round trips: everything here is exact to the bit.

One limit is the hardware's: arithmetic of XLA on CPU and TPU takes numbers below 2^-126 for zero,
so a scale of 2^-127 (e8m0 byte 0) and products below 2^-126 decode to 0. No quantiser writes such
scales: their floors are 2^-22 (FP8) and 2^-126 (FP4).
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax import cache as store
from dsv4_jax import presets, quant
from dsv4_jax.attention import round_index, round_rows
from dsv4_jax.numerics import Numerics
from tests.model.support import REFERENCE, load_npz

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2, np.float32) * np.repeat(np.float32([1, -1]), 8)
TINY = np.float32(2.0**-126)
FINITE_SCALES = np.arange(255, dtype=np.uint8)  # 255 is NaN
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")

quantize_fp8 = jax.jit(quant.quantize_fp8, static_argnums=1)
quantize_fp4 = jax.jit(quant.quantize_fp4)
fake_fp8 = jax.jit(quant.fake_fp8, static_argnums=1)
fake_fp4 = jax.jit(quant.fake_fp4)
hadamard = jax.jit(quant.hadamard)
quantize_weight = jax.jit(quant.quantize_weight, static_argnums=(1, 2))
dequantize = jax.jit(quant.dequantize, static_argnums=1)


def bits(x):
    """Bit patterns, so that -0.0 differs from 0.0."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    different = np.argwhere(bits(got) != bits(want))
    assert not len(different), f"{len(different)} differ, first at {different[0]}"


def assert_decoded(got, want, operands_normal=True):
    """Equal to the bit, NaN for NaN; zero may stand for what lies below the normal numbers."""
    got, want = np.asarray(got), np.asarray(want)
    flushed = (got == 0) & ((np.abs(want) < TINY) | ~np.broadcast_to(operands_normal, want.shape))
    same = (bits(got) == bits(want)) | (np.isnan(got) & np.isnan(want)) | flushed
    assert same.all(), f"first difference at {np.argwhere(~same)[0]}"


@pytest.fixture(scope="module")
def blocks():
    return load_npz("blocks.npz")


# -- the recorded building blocks ----------------------------------------------------------------


def test_activation_codes(blocks, within):
    codes, scales = quantize_fp8(blocks["act_in"], quant.ACT_BLOCK)
    different = (bits(codes) != blocks["act_codes"]).sum()
    within("blocks: act_codes, number that differ", different, 0)
    different = (np.asarray(scales) != blocks["act_scale"]).sum()
    within("blocks: act_scale, number that differ", different, 0)


@pytest.mark.parametrize(
    "name, function",
    [("kv", lambda x: fake_fp8(x, quant.KV_BLOCK)), ("fp4", fake_fp4)],
)
def test_round_trips(name, function, blocks, within):
    got, want = function(jnp.asarray(blocks[f"{name}_in"])), blocks[f"{name}_out"]
    within(f"blocks: {name}_out, number that differ", (np.asarray(got) != want).sum(), 0)
    got = function(jnp.asarray(blocks[f"{name}_in"]).astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16


def test_hadamard(blocks, within):
    got = hadamard(jnp.asarray(blocks["hadamard_in"]))
    error = np.abs(np.asarray(got) - blocks["hadamard_out"]).max()
    within("blocks: hadamard_out, absolute", error, 1e-6)
    # as deployed: rounded to bfloat16
    got = np.asarray(quant.bf16_grid(got)).astype(BF16)
    assert_same_bits(got, blocks["hadamard_out"].astype(BF16))


@pytest.mark.parametrize("size", [1, 2, 32, 128])
def test_hadamard_is_an_involution(size):
    x = np.random.default_rng(0).normal(size=(5, size)).astype(np.float32)
    np.testing.assert_allclose(hadamard(hadamard(jnp.asarray(x))), x, atol=1e-5)


def test_hadamard_needs_a_power_of_two():
    with pytest.raises(ValueError, match="index_dim=96"):
        hadamard(jnp.zeros((2, 96)))


# -- golden values -------------------------------------------------------------------------------


def test_golden_fp8_block():
    x = jnp.float32([1, -0.3, 0.07, 3.14159])
    _, scale = quantize_fp8(x, 64)
    assert scale.tolist() == [2.0**-7]
    assert fake_fp8(x, 64).tolist() == [1, -0.3125, 0.0703125, 3.25]


def test_golden_fp4_blocks():
    x = jnp.float32([1, -0.3, 0.07, 3.14159])
    assert quantize_fp4(x)[1].tolist() == [1]
    assert fake_fp4(x).tolist() == [1, -0.5, 0, 3]
    x = jnp.float32([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25])
    assert fake_fp4(x).tolist() == [6, 4, 4, 2, 2, 1, 1, 0]


# -- scales --------------------------------------------------------------------------------------


def test_scales_are_the_power_of_two_at_or_above():
    exponents = np.arange(-125, 127, dtype=np.float64)
    exact = np.exp2(exponents).astype(np.float32)
    above, below = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))
    assert_same_bits(quant.pow2_at_least(jnp.asarray(exact)), exact)
    assert_same_bits(quant.pow2_at_least(jnp.asarray(below)), exact)
    assert_same_bits(quant.pow2_at_least(jnp.asarray(above)), 2 * exact)


@pytest.mark.parametrize("largest, quantize", [(448, "fp8"), (6, "fp4")])
def test_a_full_block_fills_its_codes(largest, quantize):
    """amax = largest · 2^k must get the scale 2^k, whatever fp32(1/largest) rounds to."""
    powers = np.exp2(np.arange(-20, 100)).astype(np.float32)
    x = jnp.asarray(np.float32(largest) * powers)[:, None]
    _, scale = quantize_fp8(x, 64) if quantize == "fp8" else quantize_fp4(x)
    assert_same_bits(scale[:, 0], powers)


def test_scale_floors():
    zeros = jnp.zeros((1, 64), jnp.float32)
    assert quantize_fp8(zeros, 64)[1].tolist() == [[2.0**-22]]
    assert quantize_fp4(zeros)[1].tolist() == [[2.0**-126] * 2]
    assert not np.asarray(fake_fp8(zeros, 64)).any()
    assert not np.asarray(fake_fp4(zeros)).any()


def test_e8m0_scales_decode():
    scales = jnp.asarray(FINITE_SCALES.view(E8M0))
    assert_same_bits(quant.decode_e8m0(scales), np.exp2(FINITE_SCALES - 127.0).astype(np.float32))


# -- stored weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["e8m0", "float32"])
def test_every_fp8_code_decodes(scale_dtype):
    """All 256 codes, at scales from the smallest to the largest, in one stacked weight."""
    if scale_dtype == "e8m0":
        scales = FINITE_SCALES[np.r_[:12, 60, 100:140, 180, 230:255]].view(E8M0)
    else:
        rng = np.random.default_rng(1)
        mantissa = rng.uniform(1, 2, 40) * np.exp2(rng.integers(-60, 60, 40))
        scales = np.r_[mantissa, 1 / 448, 1 / 3, 2.0**-126, 1e30].astype(np.float32)
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8).view(E4M3), (len(scales), 1, 256))
    tiles = np.repeat(scales[:, None, None], 2, axis=2)
    weight = quant.QuantizedArray(jnp.asarray(codes), jnp.asarray(tiles), "fp8")
    factor = scales.astype(np.float32)[:, None, None]
    with np.errstate(over="ignore"):
        want = codes.astype(np.float32) * factor
    for decode in (quant.dequantize, dequantize):
        got = decode(weight, FLOAT32)
        assert_decoded(got, want, operands_normal=factor >= TINY)


def test_every_fp4_code_decodes_at_every_scale():
    """16 codes in both nibbles × 255 scales."""
    pairs = np.arange(256, dtype=np.uint8)
    want = np.stack([E2M1[pairs & 15], E2M1[pairs >> 4]], axis=-1).reshape(1, -1)
    codes = np.broadcast_to(pairs, (255, 256))
    scales = np.repeat(FINITE_SCALES[:, None], 16, axis=1).view(E8M0)
    weight = quant.QuantizedArray(jnp.asarray(codes), jnp.asarray(scales), "fp4")
    factor = np.exp2(FINITE_SCALES - 127.0).astype(np.float32)[:, None]
    with np.errstate(over="ignore"):
        want = want * factor
    for decode in (quant.dequantize, dequantize):
        got = decode(weight, FLOAT32)
        assert_decoded(got, want, operands_normal=factor >= TINY)
    keep = (factor[:, 0] > 2.0**-120) & (factor[:, 0] < 2.0**120)
    exact = np.asarray(decode(weight, BFLOAT16))[keep]
    assert_same_bits(exact.astype(np.float32), want[keep])


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (3, 200), (2, 5, 129, 127)])
def test_ragged_fp8_weights(shape):
    """Tiles at the edges are cut off; requantising what was decoded changes nothing."""
    values = jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    weight = quantize_weight(values, "fp8", E8M0)
    out_dim, in_dim = shape[-2:]
    assert weight.shape == shape
    assert weight.scales.shape == (*shape[:-2], -(-out_dim // 128), -(-in_dim // 128))
    dense = dequantize(weight, FLOAT32)
    rows, cols = np.arange(out_dim) // 128, np.arange(in_dim) // 128
    scales = np.asarray(weight.scales).astype(np.float32)[..., rows[:, None], cols]
    assert_same_bits(dense, np.asarray(weight.codes).astype(np.float32) * scales)
    assert (
        np.abs(np.asarray(dense) - values) <= np.maximum(np.abs(values) / 16, scales / 512)
    ).all()
    again = quantize_weight(dense, "fp8", E8M0)
    assert_same_bits(dequantize(again, FLOAT32), dense)


@pytest.mark.parametrize("scale_dtype", [E8M0, np.float32])
def test_fp4_weights_round_trip(scale_dtype):
    values = (
        jnp.asarray(np.random.default_rng(1).normal(size=(3, 40, 96)).astype(np.float32)) * 0.02
    )
    weight = quantize_weight(values, "fp4", np.dtype(scale_dtype))
    assert weight.shape == (3, 40, 96) and weight.scales.shape == (3, 40, 3)
    dense = dequantize(weight, FLOAT32)
    again = quantize_weight(dense, "fp4", np.dtype(scale_dtype))
    assert_same_bits(dequantize(again, FLOAT32), dense)


def test_one_expert_of_a_stack():
    values = jnp.asarray(np.random.default_rng(2).normal(size=(4, 32, 64)).astype(np.float32))
    weight = quantize_weight(values, "fp4", E8M0)
    one = jax.jit(quant.index_expert)(weight, jnp.int32(2))
    assert_same_bits(one.codes, weight.codes[2])
    assert one.shape == (32, 64) and one.fmt == "fp4"


# -- codes ---------------------------------------------------------------------------------------


def test_fp4_nibbles():
    """The even channel lies in the low nibble, bit 3 is the sign, and -0.0 keeps it."""
    everything = jnp.asarray(np.arange(256, dtype=np.uint8))
    values = quant.unpack_fp4(everything)
    assert_same_bits(
        values.reshape(256, 2), np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], -1)
    )
    assert_same_bits(quant.pack_fp4(values), everything)


def test_fp4_rounds_ties_to_even_codes():
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
    middle = (sizes[:-1] + sizes[1:]) / 2
    even = [sizes[i] if i % 2 == 0 else sizes[i + 1] for i in range(7)]
    below = np.nextafter(middle.astype(np.float32), np.float32(0))
    above = np.nextafter(middle.astype(np.float32), np.float32(9))
    for sign in (1, -1):
        assert (sign * quant.round_e2m1(jnp.float32(sign * middle))).tolist() == even
        assert (sign * quant.round_e2m1(jnp.float32(sign * below))).tolist() == list(sizes[:-1])
        assert (sign * quant.round_e2m1(jnp.float32(sign * above))).tolist() == list(sizes[1:])


def test_fp8_rounds_like_ml_dtypes():
    """Every value between and on two neighbouring codes, through a block whose scale is 1."""
    codes = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    middle = (codes[:-1] + codes[1:]) / 2
    x = np.concatenate(
        [codes, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(500))]
    )
    x = np.concatenate([x, -x])
    block = np.stack([x, np.full_like(x, 448)], axis=-1)
    got, scale = quantize_fp8(jnp.asarray(block), 2)
    assert (np.asarray(scale) == 1).all()
    assert_same_bits(np.asarray(got)[:, 0], x.astype(E4M3))


# -- rows and keys of the caches -----------------------------------------------------------------


def adversarial_rows(size, rng):
    """bfloat16 rows whose blocks sit at the edges of scales and codes."""
    rows = [rng.normal(size=(64, size)), np.zeros((1, size)), np.full((1, size), -0.0)]
    rows.append(rng.normal(size=(64, size)) * np.exp2(rng.integers(-30, 30, (64, size))))
    edge = np.array([448, 447, 449, 240, 232, 224, 225, 6, 5, 7, 3.5, 2.5, 1, 0.25, 0.24, 0.26])
    for power in (-30, -14, -13, -1, 0, 3, 20):
        block = rng.choice(np.r_[edge, -edge, 0, 2.0**-9, 2.0**-10, -(2.0**-7)], (16, size))
        block[:, 0] = rng.choice(edge, 16)
        rows.append(block * 2.0**power)
    return jnp.asarray(np.concatenate(rows).astype(np.float32)).astype(jnp.bfloat16)


def packed_like(cfg, kind):
    make = store.empty_rows if kind == "rows" else store.empty_keys
    return make(cfg, (1,), REFERENCE)


@pytest.mark.parametrize("kind", ["rows", "keys"])
@pytest.mark.parametrize("preset", ["v4_flash", "tiny", "ragged"])
def test_packing_rounded_rows_is_exact(kind, preset):
    """What attention saw is what the cache gives back; packing again changes no bit of it."""
    if preset == "ragged":  # blocks of 64 and 32 that do not divide the channels
        cfg = presets.tiny().replace(head_dim=128, rope_dim=6, index_dim=16)
    else:
        cfg = getattr(presets, preset)()
    size = cfg.head_dim if kind == "rows" else cfg.index_dim
    x = adversarial_rows(size, np.random.default_rng(3))
    like = packed_like(cfg, kind)

    @jax.jit
    def run(x):
        rounded = round_rows(x, cfg, REFERENCE) if kind == "rows" else round_index(x, REFERENCE)
        packed = store.pack(like, rounded)
        back = store.unpack(packed, BFLOAT16)
        return rounded, packed, back, store.pack(like, back)

    rounded, packed, back, again = run(x)
    assert_same_bits(back, rounded)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(again), strict=True):
        assert_same_bits(a, b)


def test_packed_sizes():
    cfg = presets.v4_flash()
    sizes = {}
    for kind in ("rows", "keys"):
        leaves = jax.tree.leaves(packed_like(cfg, kind))
        sizes[kind] = sum(a.nbytes for a in leaves)
    assert sizes == {"rows": 583, "keys": 68}


def test_rounding_is_idempotent_in_bfloat16():
    x = adversarial_rows(128, np.random.default_rng(4))
    once = fake_fp8(x, 64)
    assert_same_bits(fake_fp8(once, 64), once)
    once = fake_fp4(x)
    assert_same_bits(fake_fp4(once), once)


def test_a_compiler_may_not_keep_excess_precision():
    """A cast to bfloat16 and back inside one fusion must round."""
    num = Numerics("reference", "bfloat16")
    x = jnp.float32(1 + 2.0**-9)
    got = jax.jit(lambda x: num.cast(x).astype(jnp.float32) * 1.0)(x)
    assert float(got) == 1.0
