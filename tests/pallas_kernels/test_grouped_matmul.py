"""Contract of the expert matmuls, run for the reference and for the interpreted kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.moe import Routing, routed_sum
from dsv4_jax.numerics import Numerics
from dsv4_jax.presets import tiny
from dsv4_jax.quant import QuantizedArray, dequantize, quantize_weight
from pallas_kernels.grouped_matmul import kernel, reference, resident, shapes
from pallas_kernels.grouped_matmul.api import PackedWeight, grouped_matmul, routed_experts
from pallas_kernels.grouped_matmul.plan import plan_rows, row_tile
from pallas_kernels.grouped_matmul.shapes import SMALL, Case

pytestmark = pytest.mark.slow  # interpreted kernels take minutes

E8M0, E4M3, BF16 = jnp.float8_e8m0fnu, jnp.float8_e4m3fn, jnp.bfloat16
implementations = pytest.mark.parametrize("implementation", ["reference", "interpret"])
FORMATS = {
    "fp4": ("fp4", "float8_e8m0fnu"),
    "fp8": ("fp8", "float8_e8m0fnu"),
    "base": ("fp8", "float32"),
}
formats = pytest.mark.parametrize("stored", FORMATS.values(), ids=FORMATS)


@functools.partial(jax.jit, static_argnames=("implementation", "interpret_params", "rounds"))
def multiply(x, owner, weight, implementation, interpret_params=True, rounds=False):
    return grouped_matmul(
        x,
        owner,
        weight,
        round_activations=rounds,
        implementation=implementation,
        interpret_params=interpret_params,
    )


def whole_weight(rng, experts, out_dim, in_dim, fmt, scale_dtype):
    """Weights that are small multiples of 2^-3, so that any order of summing is exact."""
    if fmt == "fp4":
        codes = rng.integers(0, 256, (experts, out_dim, in_dim // 2)).astype(np.uint8)
        scales = 2.0 ** rng.integers(-2, 2, (experts, out_dim, in_dim // 32))
        return PackedWeight(jnp.asarray(codes), jnp.asarray(scales, E8M0))
    codes = rng.integers(-8, 9, (experts, out_dim, in_dim))
    scales = 2.0 ** rng.integers(-3, 3, (experts, -(-out_dim // 128), -(-in_dim // 128)))
    if scale_dtype == "float32":
        scales = scales * rng.choice([1.0, 3.0], scales.shape)
    return PackedWeight(jnp.asarray(codes, E4M3), jnp.asarray(scales, jnp.dtype(scale_dtype)))


def by_hand(x, owner, weight):
    fmt = "fp4" if weight.codes.dtype == jnp.uint8 else "fp8"
    full = np.asarray(dequantize(QuantizedArray(*weight, fmt), jnp.float32), np.float64)
    rows = np.zeros((len(owner), full.shape[1]))
    for r, e in enumerate(np.asarray(owner)):
        if 0 <= e < len(full):
            rows[r] = full[e] @ np.asarray(x[r], np.float64)
    return np.asarray(jnp.asarray(rows, jnp.float32).astype(BF16), np.float32)


ROWS = 48
OWNERS = {
    "sorted": [0, 0, 0, 1, 1, 3],
    "any_order": [3, 0, 1, 3, 0, 2, 2, 3],
    "one_row": [2],
    "one_expert": [1] * 37,
    "tile_exactly_full": [2] * 16 + [3] * 32,
    "row_beyond_a_tile": [0] * 17,
    "only_the_last": [3, 3],
    "some_of_none": [4, 0, -1, 3, 99, 0],
    "all_of_none": [4, -1, 4],
}


@implementations
@formats
@pytest.mark.parametrize("groups", OWNERS)
def test_groups_of_any_size(groups, stored, implementation):
    rng = np.random.default_rng(1)
    ids = OWNERS[groups]
    if len(ids) > 1:  # one length for all, so that they share one compiled program
        ids = ids + [-1] * (ROWS - len(ids))
    owner = jnp.asarray(ids, jnp.int32)
    x = jnp.asarray(rng.integers(-4, 5, (len(owner), 160)), BF16)
    weight = whole_weight(rng, 4, 96, 160, *stored)
    y = multiply(x, owner, weight, implementation)
    np.testing.assert_array_equal(np.asarray(y, np.float32), by_hand(x, owner, weight))


@formats
def test_many_weight_tiles_and_ragged_sizes(stored, monkeypatch):
    monkeypatch.setattr(kernel, "DECODED_TILE_BYTES", 1)  # tiles of 256 rows
    rng = np.random.default_rng(2)
    owner = jnp.asarray(rng.integers(0, 3, 40), jnp.int32)
    x = jnp.asarray(rng.integers(-4, 5, (40, 288)), BF16)
    weight = whole_weight(rng, 3, 600, 288, *stored)
    assert kernel.describe(weight).out_tiles == 3
    y = jax.jit(lambda *args: grouped_matmul(*args, implementation="interpret"))(x, owner, weight)
    np.testing.assert_array_equal(np.asarray(y, np.float32), by_hand(x, owner, weight))


def routed_case(case: Case, seed: int = 0, none_share: float = 0.2):
    rng = np.random.default_rng(seed)
    keys = iter(jax.random.split(jax.random.key(seed), 3))

    def weight(out_dim, in_dim):
        values = jax.random.normal(next(keys), (case.experts, out_dim, in_dim)) * in_dim**-0.5
        packed = quantize_weight(values, case.fmt, jnp.dtype(case.scale_dtype))
        scales = packed.scales * 1.25 if case.scale_dtype == "float32" else packed.scales
        return PackedWeight(packed.codes, scales)

    x = jnp.asarray(rng.standard_normal((case.tokens, case.dim)) * 2, BF16)
    chosen = [rng.permutation(case.experts)[: case.per_token] for _ in range(case.tokens)]
    experts = np.sort(np.stack(chosen), axis=1)
    experts[rng.random(case.tokens) < none_share] = case.experts
    routing = rng.random((case.tokens, case.per_token)) + 0.1
    sizes = (case.expert_dim, case.dim), (case.expert_dim, case.dim), (case.dim, case.expert_dim)
    return (
        x,
        jnp.asarray(experts, jnp.int32),
        jnp.asarray(routing, jnp.float32),
        *(weight(*size) for size in sizes),
    )


@functools.partial(
    jax.jit, static_argnames=("limit", "rounds", "implementation", "interpret_params")
)
def run(args, limit, rounds, implementation, interpret_params=True):
    return routed_experts(
        *args,
        limit=limit,
        round_activations=rounds,
        implementation=implementation,
        interpret_params=interpret_params,
    )


def assert_close(y, wanted):
    """Equal but for sums near the middle of two bfloat16 numbers, which may fall either way."""
    y, wanted = np.asarray(y), np.asarray(wanted)
    assert np.isfinite(y).all()
    assert (y == wanted).mean() > 0.97
    np.testing.assert_allclose(y, wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())


@pytest.fixture
def many(monkeypatch):
    """Few tokens take the path of many."""
    monkeypatch.setattr(resident, "MAX_TOKENS", 0)
    run.clear_cache()
    yield
    run.clear_cache()


@pytest.mark.parametrize("name", SMALL)
def test_routed_experts_agree_with_the_reference(name, request):
    args = routed_case(SMALL[name], seed=3, none_share=0.0 if name == "one_token" else 0.2)
    wanted = run(args, 1.0, True, "reference")
    assert np.abs(wanted).max() > 0.1
    few = run(args, 1.0, True, "interpret")
    assert_close(few, wanted)
    request.getfixturevalue("many")
    np.testing.assert_array_equal(run(args, 1.0, True, "interpret"), few)


@formats
def test_few_tokens_over_many_weight_tiles(stored, monkeypatch):
    monkeypatch.setattr(kernel, "DECODED_TILE_BYTES", 1)  # tiles of 256 rows
    args = routed_case(Case(40, 2, 3, 544, 576, *stored), seed=12)
    case = jax.jit(lambda args: routed_experts(*args, limit=1.0, implementation="interpret"))
    assert_close(case(args), run(args, 1.0, False, "reference"))


@implementations
def test_what_is_not_finite_stays_in_its_token(implementation):
    x, *rest = routed_case(SMALL["ragged"], seed=13, none_share=0.0)
    rest[0] = rest[0].at[2].set(4)  # no expert here: nothing
    wanted = run((x, *rest), 1.0, True, implementation)
    broken = x.at[1, 5].set(jnp.nan).at[2].set(jnp.inf)
    y = np.asarray(run((broken, *rest), 1.0, True, implementation))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(wanted, 1, 0))


@implementations
@formats
def test_a_layer_of_a_stack_is_that_layer(stored, implementation):
    case = Case(7, 3, 4, 160, 96, *stored)
    x, experts, routing, *weights = routed_case(case, seed=5)
    stacks = [
        PackedWeight(*(jnp.stack([jnp.zeros_like(a), a, jnp.ones_like(a)]) for a in weight))
        for weight in weights
    ]
    wanted = run((x, experts, routing, *weights), 1.0, True, implementation)
    y = jax.jit(
        lambda layer: routed_experts(
            x,
            experts,
            routing,
            *stacks,
            layer=layer,
            limit=1.0,
            round_activations=True,
            implementation=implementation,
        )
    )(jnp.int32(1))
    np.testing.assert_array_equal(y, wanted)


@implementations
@formats
@pytest.mark.parametrize("mode", ["reference", "plain"])
def test_equals_the_experts_of_the_model(mode, stored, implementation):
    cfg = tiny().replace(dim=160, expert_dim=96, num_experts=4, swiglu_limit=1.0)
    num = Numerics(mode, "bfloat16")
    x, experts, routing, *packed = routed_case(Case(9, 2, 4, 160, 96, *stored), seed=4)
    weights = {
        name: QuantizedArray(w.codes, w.scales, stored[0])
        for name, w in zip(("w1", "w3", "w2"), packed, strict=True)
    }
    real_U = experts[:, 0] < cfg.num_experts
    wanted = jax.jit(lambda: routed_sum(weights, x, Routing(experts, routing), real_U, cfg, num))()
    y = run((x, experts, routing, *packed), 1.0, num.rounds, implementation)
    np.testing.assert_array_equal(np.asarray(y)[~np.asarray(real_U)], 0)
    assert_close(y, wanted)


def test_no_limit_means_no_clamp():
    args = routed_case(SMALL["ragged"], seed=5, none_share=0.0)
    free, clamped = (run(args, limit, False, "interpret") for limit in (0.0, 0.25))
    assert not np.allclose(free, clamped)
    assert_close(free, run(args, 0.0, False, "reference"))


def test_no_token_at_all():
    args = list(routed_case(SMALL["ragged"]))
    args[1] = jnp.full_like(args[1], 4)
    np.testing.assert_array_equal(run(tuple(args), 1.0, True, "interpret"), 0)
    args[:3] = [a[:0] for a in args[:3]]
    for implementation in (None, "reference", "interpret", "pallas"):
        assert run(tuple(args), 1.0, True, implementation).shape == (0, 160)


def test_every_byte_times_every_scale_is_exact():
    """All 256 pairs of FP4 numbers against each scale whose products are normal bfloat16.

    Row s of the weight has scale 2^(s-127) and all bytes; the unit matrix reads it back.
    """
    exponents = np.arange(2, 249)  # 0.5·2^-125 is the smallest normal number
    codes = np.resize(np.arange(256, dtype=np.uint8), (1, len(exponents), 256))
    scales = np.repeat(exponents.astype(np.uint8)[None, :, None], 16, axis=2)
    weight = PackedWeight(jnp.asarray(codes), jnp.asarray(scales).view(E8M0))
    unit, owner = jnp.eye(512, dtype=BF16), jnp.zeros(512, jnp.int32)
    y = np.asarray(multiply(unit, owner, weight, "interpret"), np.float64).T
    wanted = np.asarray(reference.dequantize(weight)[0], np.float64)
    np.testing.assert_array_equal(y, wanted)
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([sizes, -sizes])
    pairs = np.stack([values[np.arange(256) & 15], values[np.arange(256) >> 4]], -1).reshape(-1)
    np.testing.assert_array_equal(y, pairs * 2.0 ** (exponents[:, None] - 127))


@pytest.mark.parametrize(
    "in_dim", [4160, *(pytest.param(n, marks=pytest.mark.slow) for n in (4096, 7168))]
)
def test_every_block_of_a_long_row_gets_its_own_scale(in_dim):
    """More than 128 scales in a row, stored along and across."""
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 256, (1, 16, in_dim // 2)).astype(np.uint8)
    scales = 2.0 ** rng.integers(-30, 30, (1, 16, in_dim // 32))
    weight = PackedWeight(jnp.asarray(codes), jnp.asarray(scales, E8M0))
    assert kernel.describe(weight).scales_across == (in_dim != 4096)
    columns = rng.permutation(in_dim)[:16]
    x = jnp.zeros((16, in_dim), BF16).at[np.arange(16), columns].set(1)
    y = multiply(x, jnp.zeros(16, jnp.int32), weight, "interpret")
    wanted = np.asarray(reference.dequantize(weight)[0])[:, columns].T
    np.testing.assert_array_equal(np.asarray(y, np.float32), wanted)


def test_every_fp8_code_is_exact():
    codes = np.resize(np.arange(256, dtype=np.uint8), (1, 256, 128))
    codes = np.where(codes & 0x7F == 0x7F, 0, codes)
    for scales in (np.float32([[[2.0**-40], [2.0**40]]]), np.float32([[[1.0], [0.5]]])):
        weight = PackedWeight(jnp.asarray(codes).view(E4M3), jnp.asarray(scales, E8M0))
        y = multiply(jnp.eye(128, dtype=BF16), jnp.zeros(128, jnp.int32), weight, "interpret")
        wanted = np.asarray(reference.dequantize(weight)[0]).T
        np.testing.assert_array_equal(np.asarray(y, np.float32), wanted)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (20, 320), (70, 512)])
def test_prepared_rows_are_halves_of_rounded_rows(shape, rounds):
    x = jnp.asarray(np.random.default_rng(7).standard_normal(shape), BF16)
    rounded = reference.round_activations(x) if rounds else x
    halves = kernel.prepare(x, rounds, True, True)
    np.testing.assert_array_equal(halves[0], rounded[:, 0::2])
    np.testing.assert_array_equal(halves[1], rounded[:, 1::2])
    np.testing.assert_array_equal(kernel.prepare(x, rounds, False, True)[0], rounded)


@pytest.mark.parametrize("tile", [16, 32])
def test_plan_places_every_row_once(tile):
    rng = np.random.default_rng(8)
    owner = rng.integers(-1, 6, 90)
    plan = jax.jit(plan_rows, static_argnums=(1, 2))(jnp.asarray(owner, jnp.int32), 5, tile)
    slots = plan.source_Z.shape[0]
    assert plan.tile == tile
    here = (owner >= 0) & (owner < 5)
    slot = np.asarray(plan.slot_Y)
    assert (slot[~here] == slots).all() and len(set(slot[here])) == here.sum()
    np.testing.assert_array_equal(np.asarray(plan.source_Z)[slot[here]], np.flatnonzero(here))
    np.testing.assert_array_equal(np.asarray(plan.expert_T)[slot[here] // tile], owner[here])
    counts = np.bincount(owner[here], minlength=5)
    assert plan.num_tiles == -(-counts // tile).sum() <= slots // tile
    order = np.argsort(np.where(here, owner, 5), kind="stable")  # as sorted rows lie
    for t, start in enumerate(np.asarray(plan.start_T)[: int(plan.num_tiles)]):
        assert plan.source_Z[t * tile] == order[start]
    assert slot[here].max() < int(plan.num_tiles) * tile


def test_unused_tiles_and_idle_experts_are_never_touched():
    """NaN weights of experts without rows, and rows past the tiles in use, leave no trace."""
    rng = np.random.default_rng(9)
    weight = whole_weight(rng, 4, 128, 128, "fp8", "float32")
    poisoned = PackedWeight(weight.codes.at[jnp.array([0, 2])].set(jnp.nan), weight.scales)
    owner = jnp.asarray([1] * 5 + [3] * 2 + [7] * 30, jnp.int32)
    x = jnp.asarray(rng.integers(-4, 5, (37, 128)), BF16)
    y = multiply(x, owner, poisoned, "interpret")
    np.testing.assert_array_equal(np.asarray(y, np.float32), by_hand(x, owner, weight))


@pytest.mark.parametrize("path", ["few", "many"])
@pytest.mark.parametrize("name", ["ragged", "ragged_base"])
def test_no_races_and_no_uninitialised_reads(name, path, request):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    if path == "many":
        request.getfixturevalue("many")
    args = routed_case(SMALL[name], seed=10)
    try:
        y = run(args, 1.0, True, "interpret", pltpu.InterpretParams(detect_races=True))
        assert_close(y, run(args, 1.0, True, "reference"))
        assert not state.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_the_default_runs_on_cpu():
    args = routed_case(SMALL["one_token"])
    np.testing.assert_array_equal(run(args, 1.0, True, None), run(args, 1.0, True, "reference"))


def test_sizes_of_the_models_fit_every_chip():
    for name, case in shapes.FULL.items():
        assert row_tile(case.tokens * case.per_token, case.experts) == case.tile
        pair = []
        for out_dim, in_dim in ((case.expert_dim, case.dim), (case.dim, case.expert_dim)):
            args = [jax.ShapeDtypeStruct(*a) for a in shapes.weight_args(case, out_dim, in_dim)]
            fmt = kernel.describe(PackedWeight(*args), case.tile)
            assert fmt.out_tile % 256 == 0 and fmt.out_dim % fmt.out_tile == 0
            pair.append(fmt)
        assert kernel.vmem_bytes([pair[0]] * 2, case.tile) <= 60 << 20, name
        assert kernel.vmem_bytes([pair[1]], case.tile) <= 60 << 20, name


def test_wrong_operands_are_named():
    x, experts, routing, w1, w3, w2 = routed_case(Case(4, 2, 4, 128, 64))
    bad = [
        ((x, experts, routing, w1, w3, w1), "w2 .* must be"),
        ((x[:, :96], experts, routing, w1, w3, w2), r"must be bfloat16 \[rows, 128\]"),
        ((x, experts.astype(jnp.int16), routing, w1, w3, w2), "must be int32"),
        ((x, experts, routing[:, :1], w1, w3, w2), "weights are"),
        ((x, experts, routing, w1._replace(scales=w1.scales[:, :1]), w3, w2), "w1: .* scales must"),
        ((x, experts, routing, w1._replace(codes=w1.codes.view(jnp.int8)), w3, w2), "uint8"),
    ]
    for args, message in bad:
        with pytest.raises(ValueError, match=message):
            routed_experts(*args)
    with pytest.raises(ValueError, match="owner is"):
        grouped_matmul(x, experts, w1)
    with pytest.raises(ValueError, match="implementation='mosaic'"):
        routed_experts(x, experts, routing, w1, w3, w2, implementation="mosaic")
