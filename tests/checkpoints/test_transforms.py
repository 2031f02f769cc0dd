"""The per-array functions against plain float arithmetic."""

import ml_dtypes
import numpy as np
import pytest

from checkpoints import transforms as T
from tests.checkpoints.support import E2M1

E8M0, E4M3, BF16 = T.E8M0, T.E4M3, T.BF16


def random_fp4(shape, low, high, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
    scales = rng.integers(low, high, (shape[0], shape[1] // 32), dtype=np.uint8).view(E8M0)
    return codes, scales


def fp4_values(codes, scales):
    pairs = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).astype(np.float64)
    return pairs.reshape(len(codes), -1) * np.repeat(scales.astype(np.float64), 32, 1)


def fp8_values(codes, scales):
    full = np.repeat(np.repeat(scales.astype(np.float64), 128, 0), 128, 1)
    return codes.astype(np.float64) * full[: codes.shape[0], : codes.shape[1]]


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (96, 32), (130, 160), (1, 64)])
def test_fp4_to_fp8_loses_nothing(shape):
    codes, scales = random_fp4(shape, 110, 125)
    new_codes, new_scales = T.fp4_to_fp8(codes, scales)
    assert new_codes.dtype == E4M3 and new_scales.dtype == E8M0
    assert new_codes.shape == shape
    assert new_scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    np.testing.assert_array_equal(fp8_values(new_codes, new_scales), fp4_values(codes, scales))
    assert np.array_equal(np.signbit(new_codes), np.signbit(fp4_values(codes, scales)))


def test_fp4_to_fp8_scale_is_the_largest_over_64():
    codes, scales = random_fp4((128, 128), 100, 112)
    _, new = T.fp4_to_fp8(codes, scales)
    assert new.astype(np.float64)[0, 0] == scales.astype(np.float64).max() / 64


def test_fp4_to_fp8_at_the_limit_and_beyond():
    codes = np.full((128, 64), 0x21, np.uint8)  # values 0.5 and 1
    scales = np.full((128, 4), 100, np.uint8)
    scales[5, 2] = 114  # ratio 2^14: 0.5 · 2^-8 is e4m3's smallest value
    new_codes, new_scales = T.fp4_to_fp8(codes, scales.view(E8M0))
    np.testing.assert_array_equal(
        fp8_values(new_codes, new_scales), fp4_values(codes, scales.view(E8M0))
    )
    scales[5, 2] = 115
    with pytest.raises(T.InexactError, match="too far apart"):
        T.fp4_to_fp8(codes, scales.view(E8M0))
    codes[:] = 0x44  # value 2 still fits at that distance: values are checked, not scales
    T.fp4_to_fp8(codes, scales.view(E8M0))


def test_smallest_scales_do_not_wrap():
    codes, scales = random_fp4((128, 128), 0, 3)
    new_codes, new_scales = T.fp4_to_fp8(codes, scales)
    np.testing.assert_array_equal(fp8_values(new_codes, new_scales), fp4_values(codes, scales))


def test_far_scales_are_refused_not_wrapped():
    codes = np.full((128, 64), 0x77, np.uint8)
    scales = np.full((128, 4), 254, np.uint8)
    scales[0, 0] = 0  # 254 apart: an 8-bit or 16-bit index would wrap
    with pytest.raises(T.InexactError):
        T.fp4_to_fp8(codes, scales.view(E8M0))


def test_nan_scales_are_refused():
    codes, scales = random_fp4((128, 128), 120, 124)
    scales = scales.view(np.uint8).copy()
    scales[3, 1] = 255
    for transform in (T.fp4_to_fp8, T.fp4_to_bf16):
        with pytest.raises(T.InexactError, match="NaN"):
            transform(codes, scales.view(E8M0))


def test_float32_power_of_two_scales_are_kept_as_float32():
    codes, scales = random_fp4((128, 256), 118, 124)
    new_codes, new_scales = T.fp4_to_fp8(codes, scales.astype(np.float32))
    assert new_scales.dtype == np.float32
    np.testing.assert_array_equal(fp8_values(new_codes, new_scales), fp4_values(codes, scales))
    with pytest.raises(T.InexactError, match="power of two"):
        T.fp4_to_fp8(codes, scales.astype(np.float32) * 1.5)


@pytest.mark.parametrize("low, high", [(100, 140), (0, 20), (230, 252)])
def test_fp4_to_bf16_is_exact(low, high):
    codes, scales = random_fp4((64, 128), low, high)
    dense = T.fp4_to_bf16(codes, scales)
    assert dense.dtype == BF16
    np.testing.assert_array_equal(dense.astype(np.float64), fp4_values(codes, scales))


def test_fp4_to_bf16_refuses_overflow():
    codes, scales = np.full((1, 16), 0x77, np.uint8), np.full((1, 1), 254, np.uint8)
    with pytest.raises(T.InexactError, match="range"):
        T.fp4_to_bf16(codes, scales.view(E8M0))


@pytest.mark.parametrize("scale_dtype", [np.float32, E8M0])
def test_fp8_dequantises_like_plain_arithmetic(scale_dtype):
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((300, 200)).astype(E4M3)
    scales = rng.uniform(0.5, 2, (3, 2)).astype(np.float32).astype(scale_dtype)
    exact = fp8_values(codes, scales)
    np.testing.assert_array_equal(T.to_float32(codes, scales), exact.astype(np.float32))
    np.testing.assert_array_equal(
        T.to_bf16(codes, scales).view(np.uint16),
        exact.astype(np.float32).astype(BF16).view(np.uint16),
    )


def test_requantising_exact_values_gives_them_back():
    codes, scales = random_fp4((128, 128), 112, 120)
    dense = T.to_bf16(*T.fp4_to_fp8(codes, scales))
    for fmt in ("fp8", "fp4"):
        again = T.to_float32(*T.quantize(dense, fmt, E8M0))
        np.testing.assert_array_equal(again, dense.astype(np.float32))


def test_quantising_rounds_within_half_a_step():
    rng = np.random.default_rng(1)
    dense = rng.standard_normal((256, 128)).astype(ml_dtypes.bfloat16)
    for fmt, bound in (("fp8", 2**-4), ("fp4", 0.25)):
        error = np.abs(T.to_float32(*T.quantize(dense, fmt, E8M0)) - dense.astype(np.float32))
        assert (error <= bound * np.abs(dense.astype(np.float32)).max()).all()


@pytest.mark.parametrize(
    "rows, message",
    [
        ([[0, 1], [2, 3]], None),
        ([[0, 1], [2, 4]], "from 0 to 4; they must lie in 0 … 3"),
        ([[0, -1], [2, 3]], "from -1 to 3"),
        ([[0, 1], [3, 3], [2, 2]], "twice in 2 rows, first in row 1"),
    ],
)
def test_hash_tables(rows, message):
    problem = T.hash_table_problem(np.array(rows), 4)
    assert problem is None if message is None else message in problem
