"""sparse_attention: one contract for the reference and the interpreted kernel."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax import cache as store
from dsv4_jax import presets
from dsv4_jax.attention import Window, attend_chunk
from dsv4_jax.compress import Chunk
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import Rotation, rotate
from pallas_kernels.index_topk.api import mask_words, words_mask
from pallas_kernels.sparse_attention import api, kernel, reference, tuning
from pallas_kernels.sparse_attention.shapes import SMALL, Case, call

IMPLEMENTATIONS = ("reference", "interpret")
LAYER = 1


LISTED = tuning.Tuning(1e9, most=0.9, least_groups=1)  # groups with chosen rows, unless all are


@functools.cache
def compiled(case, implementation, chip=tuning.DEFAULT):
    def run(*args):
        with mock.patch.object(tuning, "of_this_chip", lambda: chip):
            return call(case, implementation, *args)

    return jax.jit(run)


def chip_for(name):
    return LISTED if "listed" in name else tuning.DEFAULT


def row_store(rng, case, size, layers=None, packed=None):
    """Random rows in storage form, every FP8 block with its own scale."""
    lead = (layers or case.layers, case.batch, size)
    if case.packed if packed is None else packed:
        still = case.channels - case.rope
        codes = rng.normal(size=(*lead, still)).astype(ml_dtypes.float8_e4m3fn)
        scales = rng.integers(124, 129, (*lead, case.scales)).astype(np.uint8)
        scales[..., still // 64 :] = 255  # the unused bytes
        rope = rng.normal(size=(*lead, case.rope)).astype(ml_dtypes.bfloat16)
        values = np.concatenate([codes.view(np.uint8), rope.view(np.uint8)], axis=-1)
        return [jnp.asarray(values), jnp.asarray(scales)]
    values = rng.normal(size=(*lead, case.channels)) * 2.0 ** rng.integers(-2, 2, (*lead, 1))
    return [jnp.asarray(values.astype(ml_dtypes.bfloat16).view(np.uint16))]


def edges(case):
    """Visible counts around lanes, tiles and the capacity, none and one among them."""
    most = case.capacity
    near = [0, 1, most, most - 1, *(n + d for n in (128, 512, 256) for d in (-1, 0, 1))]
    near = sorted({n for n in near if 0 <= n <= most}, key=lambda n: (n % 3, n))
    return np.resize(near, (case.batch, case.fresh)).astype(np.int32)


def arguments(case, seed=0):
    rng = np.random.default_rng(seed)
    queries = (case.batch, case.fresh)
    q = jnp.asarray(rng.normal(size=(*queries, case.heads, case.channels)), jnp.bfloat16)
    sink = jnp.asarray(rng.normal(size=case.heads) * 3, jnp.float32)
    pos = jnp.asarray(np.resize([0, 1, 127, 128, 500, 2, 126], case.batch), jnp.int32)
    bounds = api.window_bounds(pos, case.fresh, case.window_rows, case.window)
    args = [q, sink, *bounds, jnp.int32(LAYER)]
    if case.turned:
        angles = rng.random((*queries, case.rope // 2)) * 6
        args += [jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)]
    if case.fresh == 1:
        args += row_store(rng, case, case.window_rows)
        if case.slots:
            slots = rng.permutation(case.slots)[: case.batch]
            args.append(jnp.asarray(slots, jnp.int32))
    else:
        rows = row_store(rng, case, case.window_rows, 1, packed=False)[0]
        args.append(jnp.asarray(np.asarray(rows).view(ml_dtypes.bfloat16)))
    if case.form == "window":
        return args
    args.append(jnp.asarray(edges(case)))
    if case.form == "masked":
        mask = rng.random((*queries, case.capacity)) < min(0.3, case.keep / case.capacity)
        mask[0], mask[-1] = mask[0] | (case.batch > 4), mask[-1] & (case.batch < 4)
        args.append(mask_words(jnp.asarray(mask)))
    rows = row_store(rng, case, case.capacity)
    if case.page:
        pages = case.batch * case.capacity // case.page
        rows.append(jnp.asarray(rng.permutation(pages).reshape(case.batch, -1), jnp.int32))
    return [*args, *rows]


def placed(case, args):
    """The same arguments with rings in their slots and compressed rows in their pages."""
    if not case.page:
        return args
    args, width = list(args), 2 if case.packed else 1
    first = 7 if case.turned else 5
    slots, table = args[first + width], args[-1]
    for n in range(first, first + width):
        ring = jnp.zeros((case.layers, case.slots, *args[n].shape[2:]), args[n].dtype)
        args[n] = ring.at[:, slots].set(args[n])
    for n in range(len(args) - 1 - width, len(args) - 1):
        rows = args[n].reshape(case.layers, table.size, case.page, *args[n].shape[3:])
        args[n] = jnp.zeros_like(rows).at[:, table.ravel()].set(rows)
    return args


def by_loops(case, args):
    """Attention one query at a time in float64, from the definition."""
    q, sink, start, stop, layer, *rest = args
    turn = [np.asarray(rest.pop(0), np.float64) for _ in range(2)] if case.turned else None

    def rows_from(rest, size, packed):
        if packed:
            rows = store.PackedRows(rest.pop(0), rest.pop(0), case.rope)
        else:
            rows = rest.pop(0).reshape(-1, case.batch, size, case.channels)
        index = int(layer) if rows is not None and jax.tree.leaves(rows)[0].shape[0] > 1 else 0
        return np.asarray(store.unpack(rows, jnp.float32)[index], np.float64)

    window = rows_from(rest, case.window_rows, case.packed and case.fresh == 1)
    if case.slots:
        rest.pop(0)
    visible = rest.pop(0) if case.form != "window" else None
    chosen = rest.pop(0) if case.form == "masked" else None
    more = rows_from(rest, case.capacity, case.packed) if case.form != "window" else None
    out = np.zeros(q.shape)
    for b, t in np.ndindex(case.batch, case.fresh):
        rows = [window[b, int(start[b, t]) : int(stop[b, t])]]
        if more is not None:
            count = int(visible[b, t])
            if case.form == "masked":
                mask = np.asarray(words_mask(chosen[b : b + 1, t : t + 1], case.capacity))[0, 0]
                rows.append(more[b, :count][mask[:count]])
            else:
                rows.append(more[b, :count])
        rows = np.concatenate(rows)
        scores = np.asarray(q[b, t], np.float64) @ rows.T * case.channels**-0.5
        weights = np.exp(scores)
        total = weights.sum(axis=1, keepdims=True) + np.exp(np.asarray(sink, np.float64))[:, None]
        y = weights @ rows / total
        if turn is not None:
            cos, sin = turn[0][b, t], turn[1][b, t]
            a, c = y[:, -case.rope :: 2].copy(), y[:, -case.rope + 1 :: 2].copy()
            y[:, -case.rope :: 2], y[:, -case.rope + 1 :: 2] = a * cos + c * sin, c * cos - a * sin
        out[b, t] = y
    return out


SLOW = {("interpret", name) for name in ("decode_dense", "prefill_masked")}
SLOW |= {(name, "prefill_listed") for name in IMPLEMENTATIONS}
CONTRACT = [
    pytest.param(i, name, marks=[pytest.mark.slow] if (i, name) in SLOW else [])
    for i in IMPLEMENTATIONS
    for name in SMALL
]


@pytest.mark.parametrize(("implementation", "name"), CONTRACT)
def test_output_is_that_of_the_definition(implementation, name):
    case = SMALL[name]
    args = arguments(case)
    run = compiled(case, implementation, chip_for(name))
    out = np.asarray(run(*placed(case, args)), np.float64)
    wanted = by_loops(case, args)
    # bfloat16 probabilities and output: 2^-8 relative to the largest channel of a head
    size = np.abs(wanted).max(axis=-1, keepdims=True) + 1e-6
    assert np.abs((out - wanted) / size).max() < 0.01
    assert np.abs((out - wanted) / size).mean() < 0.001


@pytest.mark.parametrize(
    "name", ["decode_listed", pytest.param("decode_masked", marks=pytest.mark.slow)]
)
def test_no_race_and_no_uninitialised_memory(name, monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    case = SMALL[name]._replace(batch=2)
    args = arguments(case)
    monkeypatch.setattr(tuning, "of_this_chip", lambda: chip_for(name))
    run = kernel.sparse_attention
    careful = pltpu.InterpretParams(detect_races=True)
    monkeypatch.setattr(kernel, "sparse_attention", lambda *a: run(*a[:-1], careful))
    out = np.asarray(call(case, "interpret", *args), np.float64)
    assert not state.races.races_found
    assert np.abs(out - by_loops(case, args)).max() < 0.05


def test_every_fp8_code_and_scale_decodes_exactly():
    """All finite codes at all scales whose products are normal bfloat16 numbers."""
    finite = [n for n in range(256) if n & 127 != 127]
    codes = np.resize(np.array(finite, np.uint8), (448, 256))
    codes = np.concatenate([np.roll(codes, 97 * n, axis=0) for n in range(4)], axis=1)
    scales = np.resize(np.arange(10, 246, dtype=np.uint8), (8, codes.shape[1]))
    rope = np.arange(64 * codes.shape[1], dtype=np.uint16).reshape(64, -1) % 0x7F80
    rope = np.stack([rope & 255, rope >> 8], axis=1).reshape(128, -1).astype(np.uint8)

    values = np.concatenate([codes, rope])

    def body(values_ref, scales_ref, out_ref):
        out_ref[...] = kernel.decode_columns(values_ref[...], scales_ref[...], 512)

    out = jax.ShapeDtypeStruct((512, codes.shape[1]), jnp.bfloat16)
    decoded = pl.pallas_call(body, out_shape=out, interpret=True)(values, scales)
    stored = store.PackedRows(jnp.asarray(values.T), jnp.asarray(scales[:7].T), 64)
    wanted = store.unpack(stored, jnp.float32)
    np.testing.assert_array_equal(np.asarray(decoded, np.float32), wanted.T)
    ours = reference.unpack_rows(jnp.asarray(values.T), jnp.asarray(scales.T), 512)
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("fresh", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_reference_equals_the_model(fresh):
    """A chunk of the model's HCA attention, from its cache, at positions 0, 40 and 600."""
    case = SMALL["decode_dense"]._replace(batch=3, fresh=fresh, turned=False, scales=7)
    rng, num = np.random.default_rng(5), Numerics()
    cfg = presets.v4_flash().replace(num_heads=case.heads)
    pos_B = jnp.asarray([0, 40, 600], jnp.int32)
    turn = Rotation(jnp.zeros((3, fresh, 32)), jnp.zeros((3, fresh, 32)))  # not used here
    tokens = jnp.zeros((3, fresh), jnp.int32)
    chunk = Chunk(
        pos_B, jnp.full(3, fresh, jnp.int32), tokens, turn, turn, jnp.full(3, fresh, jnp.int32)
    )
    ring, rows = (
        store.PackedRows(*row_store(rng, case, size), case.rope)
        for size in (case.window, case.capacity)
    )
    args = arguments(case)
    kv = jnp.asarray(rng.normal(size=(3, fresh, case.channels)), jnp.bfloat16)
    history = store.ring_history(
        ring, store.Place(jnp.int32(LAYER)), pos_B, case.window, num.jnp_dtype
    )
    recent = jnp.concatenate([history, kv], axis=1)
    cache = {"window": ring, "rows": rows}
    positions = pos_B[:, None] + jnp.arange(-case.window, fresh)[None]
    window = Window(recent, positions)
    wanted = attend_chunk(
        args[0], window, args[1], chunk, cache, jnp.int32(LAYER), None, 128, cfg, num
    )
    bounds = api.window_bounds(pos_B, fresh, recent.shape[1], case.window)
    visible = (pos_B[:, None] + jnp.arange(fresh)[None] + 1) // 128
    packed = api.PackedRows(rows.values, rows.scales)
    out = api.sparse_attention(
        args[0],
        args[1],
        api.Window(recent[None], *bounds),
        api.Compressed(packed, visible, LAYER),
        implementation="reference",
    )
    # both round probabilities to bfloat16, the model relative to the maximum without the sink
    size = np.abs(np.asarray(wanted, np.float32)).max(axis=-1, keepdims=True)
    difference = np.abs(np.asarray(out, np.float32) - np.asarray(wanted, np.float32))
    assert (difference / size).max() < 0.01
    assert (difference / size).mean() < 0.001


def test_turning_back_equals_the_model():
    rng = np.random.default_rng(2)
    out = jnp.asarray(rng.normal(size=(2, 3, 4, 96)), jnp.bfloat16)
    angles = jnp.asarray(rng.random((2, 3, 16)), jnp.float32)
    turn = Rotation(jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None])
    wanted = rotate(out, turn, Numerics(), inverse=True)
    ours = reference.turn_back(out.astype(jnp.float32), jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_array_equal(ours.astype(jnp.bfloat16), wanted)


def test_a_ring_is_the_history_in_another_order():
    start, stop = api.window_bounds(jnp.asarray([0, 5, 127, 500], jnp.int32), 1, 128, 128)
    assert start.ravel().tolist() == [0, 0, 0, 0] and stop.ravel().tolist() == [1, 6, 128, 128]
    start, stop = api.window_bounds(jnp.asarray([0, 126, 500], jnp.int32), 3, 131, 128)
    assert (stop - start).tolist() == [[1, 2, 3], [127, 128, 128], [128, 128, 128]]
    assert stop.tolist() == [[129, 130, 131]] * 3


def sparse_choice(case, groups):
    """Mask words of queries that choose rows 5 and 77 of some groups of 128, and all see."""
    mask = np.zeros((case.batch, case.fresh, case.capacity), bool)
    for b, chosen in enumerate(groups):
        for group in chosen:
            mask[b, :, 128 * group + 5] = mask[b, :, 128 * group + 77] = True
    return mask_words(jnp.asarray(mask)), np.full(mask.shape[:2], case.capacity, np.int32)


def test_listed_groups_alone_are_read():
    """Whatever is not read may be anything: here, what would make every sum NaN."""
    case = SMALL["decode_listed"]
    args, groups = arguments(case), [[0, 11], [3, 4, 5, 6, 9], [], [7], [1, 2, 10, 11], [0]]
    first = len(args) - 4
    args[first + 1], args[first] = sparse_choice(case, groups)
    wanted = by_loops(case, args)
    values = np.array(args[-2])
    for b, chosen in enumerate(groups):
        for group in set(range(case.capacity // 128)) - set(chosen):
            values[:, b, 128 * group : 128 * (group + 1)] = 0x7F  # NaN
    args[-2] = jnp.asarray(values)
    out = np.asarray(compiled(case, "interpret", LISTED)(*args), np.float64)
    assert np.abs(out - wanted).max() < 0.01 * np.abs(wanted).max()


def test_blocks_list_their_groups_up_to_the_share_of_the_chip(monkeypatch):
    """Of what is visible: bits of a later row neither count nor are listed."""
    case = Case(4, 1, "masked", 8192, heads=8)
    words, _ = sparse_choice(case, [[0, 40], [1, 2, 3, 4], [63], []])
    visible = jnp.asarray([[8192], [1024], [8000], [4096]], jnp.int32)
    rows = jnp.zeros((1, 4, 8192, 128), jnp.uint16)
    compressed = api.Compressed(rows, visible, words=words)
    q = jnp.zeros((4, 1, 8, 128), jnp.bfloat16)
    window = api.Window(jnp.zeros((1, 4, 128, 128), jnp.uint16), visible, visible)
    monkeypatch.setattr(tuning, "of_this_chip", lambda: tuning.Tuning(15, least_groups=64))
    sizes = api.plan(q, window, compressed, False)
    bits, live = api._live_groups(sizes, compressed)
    assert sizes.listed and live.tolist() == [2, -1, 0, 0]
    assert bits.tolist() == [[[1, 256]], [[30, 0]], [[0, 0]], [[0, 0]]]
    monkeypatch.setattr(tuning, "of_this_chip", lambda: tuning.Tuning(15, least_groups=65))
    assert not api.plan(q, window, compressed, False).listed


def test_a_chip_lists_more_groups_the_longer_one_takes():
    assert tuning.of_this_chip() == tuning.DEFAULT  # this machine has no TPU
    for chip in tuning.TABLE.values():
        shares = [chip.share(rows) for rows in (1, 64, 128, 1024)]
        assert shares == sorted(shares) and 0.3 < shares[1] and shares[-1] == chip.most
    assert tuning.live_groups(2048, 1) == pytest.approx(1)
    assert tuning.live_groups(2, 2) == pytest.approx(1.5)


def test_queries_without_rows_give_zero():
    case = SMALL["decode_masked"]._replace(batch=1)
    args = arguments(case)
    args[3] = jnp.zeros_like(args[3])  # an empty window: stop = start = 0
    visible = len(args) - 5
    args[visible] = jnp.zeros_like(args[visible])
    for implementation in IMPLEMENTATIONS:
        assert not np.asarray(compiled(case, implementation)(*args), np.float32).any()


def test_wrong_arguments_are_named():
    case = SMALL["prefill_dense_plain"]
    args = arguments(case)
    with pytest.raises(ValueError, match="sink_N has shape"):
        call(case, "reference", args[0], args[1][:3], *args[2:])
    with pytest.raises(ValueError, match="compressed.rows has shape"):
        call(case, "reference", *args[:-1], args[-1][..., :64])
    with pytest.raises(ValueError, match="'mosaic' is unknown"):
        call(case, "mosaic", *args)


def test_sizes_outside_the_kernel_are_refused_by_name_and_chosen_around():
    case = SMALL["prefill_dense_plain"]._replace(capacity=200, fresh=2)
    args = arguments(case)
    with pytest.raises(NotImplementedError, match="200 compressed rows"):
        call(case, "interpret", *args)
    out = np.asarray(jax.jit(functools.partial(call, case, None))(*args), np.float64)
    assert np.abs(out - by_loops(case, args)).max() < 0.05


def call_part(case, implementation, keep, *args):
    """`call` with the window or the compressed rows alone, and the logarithms."""

    def part(q, sink, window, compressed, **more):
        nothing = jnp.zeros_like(window.start_BT)
        if keep == "window":
            compressed = None
        else:
            window = window._replace(start_BT=nothing, stop_BT=nothing)
        return api.partial_attention(q, window, compressed, **more)

    with mock.patch.object(api, "sparse_attention", part):
        return call(case, implementation, *args)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parts_add_up_to_the_whole(implementation):
    """Window and compressed rows apart, merged by their denominators, with the sink at the end."""
    case = SMALL["decode_masked"]
    args = arguments(case)
    whole = np.asarray(compiled(case, implementation)(*args), np.float64)
    parts = [
        np.asarray(a, np.float64)
        for keep in ("window", "rows")
        for a in jax.jit(functools.partial(call_part, case, implementation, keep))(*args)
    ]
    sink = np.asarray(args[1], np.float64)[None, None]
    peak = np.maximum(np.maximum(parts[1], parts[3]), sink)
    weights = [np.exp(part - peak) for part in (parts[1], parts[3])]
    total = weights[0] + weights[1] + np.exp(sink - peak)
    merged = sum(out * w[..., None] for out, w in zip(parts[::2], weights, strict=True))
    assert np.abs(merged / total[..., None] - whole).max() < 0.02 * np.abs(whole).max()
