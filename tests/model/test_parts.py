"""Small building blocks: recorded pairs, golden values, and plain numpy in float64."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax import attend, indexer, mhc, moe, presets, rope
from dsv4_jax import cache as store
from dsv4_jax.config import Yarn
from dsv4_jax.norm import head_norm, rms_norm
from dsv4_jax.numerics import Numerics, linear
from dsv4_jax.quant import index_expert
from tests.model.support import PLAIN, REFERENCE, REFERENCE_F32, load_npz, relative

ROUNDING = 2e-6  # of the largest value: a few float32 roundings
ULP = 2.0**-23  # the last bit of a float32, at most


@pytest.fixture(scope="module")
def blocks():
    return load_npz("blocks.npz")


def bf16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


# -- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemm_fp8", "gemm_fp4"])
def test_products(name, blocks, model, within):
    if name == "gemm_fp8":
        weight = model.units["layer_00"]["attn"]["wq_a"]
    else:
        weight = index_expert(model.units["layer_01"]["ffn"]["experts"]["w1"], 3)
    got = jax.jit(partial(linear, num=REFERENCE_F32))(blocks["gemm_in"], weight)
    within(f"blocks: {name}_out, relative", relative(got, blocks[f"{name}_out"]), ROUNDING)


@pytest.mark.parametrize("name", ["expert", "shared_expert"])
def test_experts(name, blocks, model, within):
    ffn = model.units["layer_01"]["ffn"]
    weights, scale_Y = ffn["shared"], None
    if name == "expert":
        weights = {key: index_expert(value, 3) for key, value in ffn["experts"].items()}
        scale_Y = jnp.full(len(blocks["gemm_in"]), 0.375, jnp.float32)
    run = jax.jit(partial(moe.expert, cfg=model.cfg, num=REFERENCE_F32))
    got = run(weights, blocks["gemm_in"], scale_Y)
    within(f"blocks: {name}_out, relative", relative(got, blocks[f"{name}_out"]), ROUNDING)


def test_router(blocks, model, within):
    gate = model.units["layer_01"]["ffn"]["gate"]
    tokens_U = jnp.zeros(len(blocks["gemm_in"]), jnp.int32)
    got = jax.jit(partial(moe.route, cfg=model.cfg))(gate, blocks["gemm_in"], tokens_U)
    order = np.argsort(blocks["router_experts"], axis=-1)
    experts = np.take_along_axis(blocks["router_experts"], order, axis=-1)
    weights = np.take_along_axis(blocks["router_weights"], order, axis=-1)
    np.testing.assert_array_equal(got.experts_UA, experts)
    within("blocks: router_weights, relative", relative(got.weights_UA, weights), ROUNDING)


def test_golden_scores():
    z = jnp.float32([-2, 0, 1, 3])
    got = jax.jit(lambda z: jnp.sqrt(jax.nn.softplus(z)))(z)
    np.testing.assert_allclose(got, [0.3562696, 0.8325546, 1.1459763, 1.7460204], rtol=1e-6)


def test_hash_routing_weighs_by_score(model):
    """One token id has the same experts everywhere, but weights that depend on its input."""
    gate = model.units["layer_00"]["ffn"]["gate"]
    x_UD = np.random.default_rng(0).normal(size=(2, model.cfg.dim)).astype(np.float32)
    got = jax.jit(partial(moe.route, cfg=model.cfg))(gate, x_UD, jnp.int32([7, 7]))
    assert got.experts_UA[0].tolist() == got.experts_UA[1].tolist()
    assert got.experts_UA[0].tolist() == sorted(gate["tid2eid"][7].tolist())
    assert not np.allclose(got.weights_UA[0], got.weights_UA[1])
    np.testing.assert_allclose(got.weights_UA.sum(-1), model.cfg.routed_scale, rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 5, 150])
@pytest.mark.parametrize("spread", ["even", "one expert"])
def test_no_token_is_dropped(tokens, spread):
    """The sorted, tiled loop equals adding up experts token by token, however they are chosen."""
    cfg = presets.tiny().replace(
        dim=32, expert_dim=32, num_experts=5, experts_per_token=3, expert_format=None
    )
    rng = np.random.default_rng(tokens)
    shapes = {"w1": (5, 32, 32), "w3": (5, 32, 32), "w2": (5, 32, 32)}
    weights = {k: jnp.asarray(rng.normal(size=s).astype(np.float32)) for k, s in shapes.items()}
    x_UD = jnp.asarray(rng.normal(size=(tokens, 32)).astype(np.float32))
    chosen = [rng.permutation(5)[:3] if spread == "even" else np.arange(3) for _ in range(tokens)]
    routing = moe.Routing(
        jnp.asarray(np.sort(chosen, axis=-1), jnp.int32),
        jnp.asarray(rng.uniform(size=(tokens, 3)).astype(np.float32)),
    )
    real_U = np.arange(tokens) % 4 != 3
    run = jax.jit(partial(moe.routed_sum, cfg=cfg, num=PLAIN))
    got = np.asarray(run(weights, x_UD, routing, jnp.asarray(real_U)))
    each = jax.jit(partial(moe.expert, cfg=cfg, num=PLAIN))
    want = np.zeros((tokens, 32))
    for e in range(5):
        scale = np.where(np.asarray(routing.experts_UA) == e, routing.weights_UA, 0).sum(-1)
        one = {key: value[e] for key, value in weights.items()}
        want += np.asarray(each(one, x_UD, jnp.asarray(scale, jnp.float32)))
    assert relative(got[real_U], want[real_U]) < ROUNDING
    assert not got[~real_U].any()


def test_expert_clamps():
    """The gate is bounded above only, the other factor on both sides; 0 switches both off."""
    cfg = presets.tiny().replace(dim=1, expert_dim=1, expert_format=None, swiglu_limit=2.0)
    one = np.ones((1, 1), np.float32)

    def expert(gate, up, limit):
        weights = {"w1": np.float32([[gate]]), "w3": np.float32([[up]]), "w2": one}
        run = jax.jit(partial(moe.expert, cfg=cfg.replace(swiglu_limit=limit), num=PLAIN))
        return float(run(weights, one, None)[0, 0])

    def silu(x):
        return x / (1 + np.exp(-x))

    assert expert(5.0, 5.0, 2.0) == pytest.approx(silu(2) * 2)
    assert expert(-5.0, -5.0, 2.0) == pytest.approx(silu(-5) * -2)
    assert expert(5.0, -5.0, 0.0) == pytest.approx(silu(5) * -5)


# -- hyper-connections ---------------------------------------------------------------------------


def test_mixing(blocks, model, within):
    mix_hBT = jnp.asarray(blocks["hc_mixes"].T)[:, None]
    split = jax.jit(partial(mhc.split_mixing, cfg=model.cfg))
    got = split(mix_hBT, blocks["hc_scale"], blocks["hc_base"])
    for name, value in zip(("pre", "post", "comb"), got, strict=True):
        value = np.moveaxis(np.asarray(value)[..., 0, :], -1, 0)
        within(f"blocks: hc_{name}, relative", relative(value, blocks[f"hc_{name}"]), ROUNDING)


def test_golden_mixing():
    cfg = presets.v4_flash()
    mix_hBT = np.sin(0.37 * np.arange(24)).astype(np.float32)[:, None, None]
    split = jax.jit(partial(mhc.split_mixing, cfg=cfg))
    got = split(mix_hBT, np.float32([0.5, 1.5, 2.0]), np.zeros(24, np.float32))
    pre, post = (
        [0.5000010, 0.5450802, 0.5834976, 0.6101288],
        [1.6333023, 1.6175014, 1.5352141, 1.3739721],
    )
    comb = [
        [0.5086884, 0.2897569, 0.1385222, 0.0630315],
        [0.1999777, 0.2229561, 0.2596217, 0.3174435],
        [0.0656823, 0.1610868, 0.3145990, 0.4586309],
        [0.2256506, 0.3261992, 0.2872562, 0.1608931],
    ]
    np.testing.assert_allclose(got.pre_MBT[:, 0, 0], pre, atol=2e-7)
    np.testing.assert_allclose(got.post_MBT[:, 0, 0], post, atol=2e-7)
    np.testing.assert_allclose(got.comb_MMBT[:, :, 0, 0], comb, atol=2e-7)


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_sinkhorn_ends_on_columns(iters):
    logits = np.random.default_rng(iters).normal(size=(4, 4, 2, 3)).astype(np.float32)
    got = jax.jit(mhc.sinkhorn, static_argnums=(1, 2))(logits, iters, 1e-6)
    np.testing.assert_allclose(got.sum(0), 1, atol=1e-5)
    rows = np.abs(np.asarray(got.sum(1)) - 1).max()
    assert rows < 1e-3 if iters == 20 else rows > 1e-3


@pytest.mark.parametrize("streams", [1, 3])
def test_streams_in_float64(streams):
    """Collapse and spread sum over sources; comb[source, target]."""
    rng = np.random.default_rng(streams)
    h, a = rng.normal(size=(1, 5, streams, 8)), rng.normal(size=(1, 5, 8))
    mix = mhc.Mixing(
        *(
            jnp.asarray(rng.uniform(size=s).astype(np.float32))
            for s in ((streams, 1, 5), (streams, 1, 5), (streams, streams, 1, 5))
        )
    )
    pre, post, comb = (np.asarray(x, np.float64) for x in mix)
    h32, a32 = jnp.asarray(h, jnp.float32), jnp.asarray(a, jnp.float32)
    got = jax.jit(partial(mhc.weigh_streams, num=PLAIN))(h32, mix.pre_MBT)
    np.testing.assert_allclose(got, np.einsum("mbt,btmd->btd", pre, h), atol=2e-6)
    got = jax.jit(partial(mhc.spread, num=PLAIN))(a32, h32, mix)
    want = np.einsum("kbt,btd->btkd", post, a) + np.einsum("jkbt,btjd->btkd", comb, h)
    np.testing.assert_allclose(got, want, atol=2e-6)


# -- norms ---------------------------------------------------------------------------------------


def test_rms_norm_rounds_once():
    x = bf16(np.random.default_rng(0).normal(size=(7, 64)))
    weight = bf16(np.random.default_rng(1).normal(size=64))
    exact = weight * x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    got = rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-6, PLAIN)
    assert relative(got, exact) < ROUNDING
    got = rms_norm(jnp.asarray(x).astype(jnp.bfloat16), jnp.asarray(weight), 1e-6, REFERENCE)
    np.testing.assert_array_equal(np.asarray(got, np.float32), bf16(exact))


def test_head_norm_rounds_at_every_step():
    x = bf16(np.random.default_rng(2).normal(size=(9, 4, 128)))
    mean = bf16(bf16(bf16(x * x).mean(-1, keepdims=True)) + np.float32(1e-6))
    want = bf16(x * bf16(1 / np.sqrt(mean.astype(np.float64))))
    norm = jax.jit(head_norm, static_argnums=(1, 2))
    got = norm(jnp.asarray(x).astype(jnp.bfloat16), 1e-6, REFERENCE)
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    assert relative(norm(jnp.asarray(x), 1e-6, PLAIN), exact) < ROUNDING


# -- rotary positions ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swa", "compress"])
def test_rotation(kind, blocks, model, within):
    freqs = rope.frequencies(model.cfg, compressed=kind == "compress")
    error = (np.abs(freqs / blocks[f"rope_{kind}_angle1"] - 1)).max()
    within(f"blocks: rope_{kind}_angle1, relative", error, ULP)

    @jax.jit
    def run(x, positions):
        turn = rope.rotation(freqs, positions)
        there = rope.rotate(x, turn, PLAIN)
        return there, rope.rotate(there, turn, PLAIN, inverse=True)

    x = blocks[f"rope_{kind}_in"]
    there, back = run(x, jnp.asarray(blocks["rope_positions"], jnp.int32))
    within(
        f"blocks: rope_{kind}_out, relative", relative(there, blocks[f"rope_{kind}_out"]), ROUNDING
    )
    assert relative(back, x) < ROUNDING


@pytest.mark.parametrize("preset", ["v4_flash", "v4_pro"])
def test_frequencies_of_the_released_models(preset, blocks, within):
    """Equal but for the last bit: the recording took float32 powers, not correctly rounded."""
    cfg = getattr(presets, preset)()
    for kind in ("swa", "compress"):
        got = rope.frequencies(cfg, compressed=kind == "compress")
        error = (np.abs(got / blocks[f"released_{kind}_angle1"] - 1)).max()
        within(f"blocks: released_{kind}_angle1, relative", error, ULP)


def test_golden_yarn():
    got = rope.frequencies(presets.v4_flash(), compressed=True)[[0, 10, 15, 16, 20, 24, 25, 31]]
    want = [
        1,
        2.3643540e-2,
        3.6355387e-3,
        2.2656249e-3,
        2.9697779e-4,
        1.9531253e-5,
        5.3723124e-6,
        5.6805294e-7,
    ]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_slows_the_others():
    cfg = presets.tiny()
    plain = rope.frequencies(cfg.replace(yarn=None), compressed=True)
    got = rope.frequencies(cfg.replace(yarn=Yarn(factor=1.0)), compressed=True)
    np.testing.assert_allclose(got, plain, rtol=1e-6)
    got = rope.frequencies(cfg.replace(yarn=Yarn(factor=4.0, original_len=256)), compressed=True)
    assert got[0] == plain[0] and got[-1] == plain[-1] / 4
    ratio = got / plain
    assert (np.diff(ratio) <= 1e-6).all() and ((ratio > 0.26) & (ratio < 0.99)).any()
    # window-only layers never stretch
    assert (rope.frequencies(cfg, False) == rope.frequencies(cfg.replace(yarn=None), False)).all()


def test_golden_rotation():
    turn = rope.Rotation(jnp.cos(jnp.float32([0.5, 0.25])), jnp.sin(jnp.float32([0.5, 0.25])))
    got = rope.rotate(jnp.float32([1, 2, 3, 4]), turn, PLAIN)
    np.testing.assert_allclose(got, [-0.0812685, 2.2345905, 1.9171214, 4.6178617], atol=1e-6)


def test_rotation_leaves_the_first_channels(model):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)), jnp.bfloat16)
    turn = rope.Rotation(*(jnp.full((3, 2), value, jnp.float32) for value in (0.6, 0.8)))
    got = jax.jit(partial(rope.rotate, num=REFERENCE))(x, turn)
    np.testing.assert_array_equal(got[:, :6], x[:, :6])
    assert (np.asarray(got[:, 6:]) != np.asarray(x[:, 6:])).any()


@pytest.mark.parametrize("compressed", [False, True])
def test_angles_of_far_positions(compressed, within):
    """Up to 2^20: cos and sin of the float32 product, with a proper reduction of its range."""
    freqs = rope.frequencies(presets.v4_flash(), compressed)
    end = 1 << 20
    positions = np.r_[0:4096, end - 4096 : end, 4096:end:997]
    got = jax.jit(partial(rope.rotation, freqs))(jnp.asarray(positions, jnp.int32))
    angles = (positions.astype(np.float32)[:, None] * freqs).astype(np.float64)
    error = max(np.abs(got.cos - np.cos(angles)).max(), np.abs(got.sin - np.sin(angles)).max())
    within("rope: cos and sin below position 2^20, absolute", error, 1e-6)


# -- attention -----------------------------------------------------------------------------------


def attention_f64(q, kv, sink, mask):
    """q [T, N, H], kv [T, S, H], mask [T, S]."""
    scores = np.einsum("tnh,tsh->tns", q, kv) * q.shape[-1] ** -0.5
    scores = np.where(mask[:, None], scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), sink[None, :, None])
    probs = np.exp(scores - top)
    total = probs.sum(-1, keepdims=True) + np.exp(sink[None, :, None] - top)
    return np.einsum("tns,tsh->tnh", probs / total, kv)


def test_attention_core(blocks, within):
    q, idx = jnp.asarray(blocks["attn_q"])[None], blocks["attn_idx"]
    rows = jnp.asarray(blocks["attn_kv"][idx])[None]  # every query has its own
    mask = jnp.asarray(idx >= 0)[None]

    @jax.jit
    def run(q, rows, mask, sink):
        state = attend.absorb(attend.start(q), q, rows, mask, PLAIN)
        return attend.finish(state, sink, PLAIN)[0]

    got = run(q, rows, mask, blocks["attn_sink"])
    within("blocks: attn_out, relative", relative(got, blocks["attn_out"]), ROUNDING)


@pytest.mark.parametrize("cuts", [(), (1,), (5, 6), (12,)])
def test_online_softmax(cuts):
    """Any division of the rows gives the same; so does a first part that is wholly masked."""
    rng = np.random.default_rng(0)
    q, kv = rng.normal(size=(4, 2, 16)) * 3, rng.normal(size=(20, 16)) * 3
    sink, mask = rng.normal(size=2), rng.uniform(size=(4, 20)) < 0.6
    mask[:, :6], mask[:, -1] = False, True
    q32, kv32 = jnp.asarray(q, jnp.float32)[None], jnp.asarray(kv, jnp.float32)[None]

    @jax.jit
    def run(q32, kv32, mask, sink):
        state = attend.start(q32)
        for begin, end in zip((0, *cuts), (*cuts, 20), strict=True):
            part = mask[None, :, begin:end]
            state = attend.absorb(state, q32, kv32[:, begin:end], part, PLAIN)
        return attend.finish(state, sink, PLAIN)[0]

    got = run(q32, kv32, mask, sink.astype(np.float32))
    want = attention_f64(q, np.broadcast_to(kv, (4, 20, 16)), sink, mask)
    assert relative(got, want) < ROUNDING


def test_an_infinite_sink_leaves_nothing():
    q = jnp.ones((1, 1, 1, 4), jnp.float32)
    state = attend.absorb(attend.start(q), q, q[:, 0], jnp.ones((1, 1, 1), bool), PLAIN)
    assert attend.finish(state, jnp.float32([-1e30]), PLAIN).tolist() == [[[[1.0] * 4]]]
    assert attend.finish(state, jnp.float32([1e30]), PLAIN).tolist() == [[[[0.0] * 4]]]


# -- indexer -------------------------------------------------------------------------------------


def random_query(rng, tokens, heads, dim, rows):
    q, k = rng.normal(size=(1, tokens, heads, dim)), rng.normal(size=(1, rows, dim))
    w = rng.normal(size=(1, tokens, heads))
    return bf16(q), bf16(k), bf16(w)


@pytest.mark.parametrize("tokens", [6, 2 * indexer.FEW_QUERIES])
@pytest.mark.parametrize("num", [PLAIN, REFERENCE], ids=["plain", "reference"])
def test_index_scores(num, tokens):
    """Signed weights after the relu; in reference mode products, weighted terms and sum round."""
    q, k, w = random_query(np.random.default_rng(0), tokens, 4, 32, 10)
    cast = bf16 if num.rounds else np.asarray
    dots = cast(np.einsum("btij,bsj->btis", q, k))
    want = cast(cast(np.maximum(dots, 0) * w[..., None]).sum(2))
    query = indexer.IndexQuery(*(jnp.asarray(a).astype(num.jnp_dtype) for a in (q, w)))
    run = jax.jit(partial(indexer.score_tile, num=num))
    got = np.asarray(run(query, jnp.asarray(k).astype(num.jnp_dtype)))
    assert (want < 0).any() and (want > 0).any()
    if num.rounds:
        assert (got != want).mean() < 0.02  # a sum in another order may turn a rounding
        np.testing.assert_allclose(got, want, atol=2**-6 * np.abs(want).max())
    else:
        assert relative(got, want) < ROUNDING


def selected(scores, keep):
    """Both forms of the choice as sets of rows, best first: (select, selection_mask)."""
    chosen = jax.jit(indexer.select, static_argnums=1)(scores, keep)
    mask = np.asarray(jax.jit(indexer.selection_mask, static_argnums=1)(scores, keep))
    rows, valid = np.asarray(chosen.rows_BTK), np.asarray(chosen.valid_BTK)
    first = [[r for r, v in zip(*q, strict=True) if v] for q in zip(rows[0], valid[0], strict=True)]
    return first, [np.flatnonzero(m).tolist() for m in mask[0]]


def test_ties_take_the_lowest_row():
    ninf = -np.inf
    scores = np.float32(
        [
            [1, 1, 1, 1, 1, 1],
            [0.0, -0.0, 0.0, -0.0, -1, ninf],
            [-0.0, -1, 0.0, -0.0, 0.0, ninf],
            [2, 1, 3, 1, 1, 1],
            [ninf, 5, ninf, 4, ninf, ninf],
            [ninf] * 6,
            [-3, -2, -3, -2, -3, -2],
        ]
    )
    want = [[0, 1, 2], [0, 1, 2], [0, 2, 3], [2, 0, 1], [1, 3], [], [1, 3, 5]]
    chosen, masked = selected(jnp.asarray(scores)[None], 3)
    assert chosen == want
    assert masked == [sorted(rows) for rows in want]


@pytest.mark.parametrize("keep, rows", [(1, 16), (4, 16), (16, 16), (2, 64), (5, 1280)])
def test_selection_under_many_ties(keep, rows):
    """A stable sort decides: few distinct scores, both signs and both zeros, some rows hidden."""
    rng = np.random.default_rng(keep)
    scores = rng.choice(np.float32([-1, -0.0, 0.0, 0.5, 2]), (200, rows))
    visible = rng.integers(0, rows + 1, 200)
    scores[np.arange(rows)[None] >= visible[:, None]] = -np.inf
    order = np.argsort(-scores, axis=-1, kind="stable")
    want = [[r for r in row[:keep] if s[r] > -np.inf] for row, s in zip(order, scores, strict=True)]
    chosen, masked = selected(jnp.asarray(scores)[None], keep)
    assert chosen == want
    assert masked == [sorted(rows) for rows in want]


@pytest.mark.parametrize("span", [8, 24])
def test_selection_in_spans_is_selection_at_once(span):
    """Whole numbers as scores: many ties, within spans and across."""
    rng, rows, keep = np.random.default_rng(span), 40, 5
    whole = partial(rng.integers, -1, 2)
    query = indexer.IndexQuery(
        jnp.float32(whole(size=(1, 12, 2, 4))), jnp.float32(whole(size=(1, 12, 2)))
    )
    keys, place = jnp.float32(whole(size=(1, 1, rows, 4))), store.Place(jnp.int32(0))
    visible_BT = jnp.int32([[0, 3, *rng.integers(0, rows + 1, 10)]])
    with mock.patch.object(store, "ROW_TILE", 8), mock.patch.object(indexer, "SPAN", span):
        scores = indexer.score_rows(query, keys, place, visible_BT, PLAIN)
        want = indexer.select(scores, keep)
        got = indexer.select_rows(query, keys, place, visible_BT, keep, PLAIN)
    assert (got.valid_BTK == want.valid_BTK).all() and not got.valid_BTK.all()
    assert ((got.rows_BTK == want.rows_BTK) | ~got.valid_BTK).all()


# -- numerics ------------------------------------------------------------------------------------


def test_numerics_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="numerics='fast'"):
        Numerics("fast")
    with pytest.raises(ValueError, match="dtype='float16'"):
        Numerics("plain", "float16")


def test_numerics_are_static():
    assert hash(Numerics()) == hash(REFERENCE) and Numerics() == REFERENCE
    assert REFERENCE.packed_cache and not REFERENCE_F32.packed_cache and not PLAIN.packed_cache
