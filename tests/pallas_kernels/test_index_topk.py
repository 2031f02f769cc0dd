"""index_topk: one contract for the reference and the interpreted kernel, against a NumPy sort.

Scores are made of small dyadic numbers, so that every order of summation gives the same float32.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax import cache as store
from dsv4_jax import indexer
from dsv4_jax.numerics import Numerics
from pallas_kernels.index_topk import api, kernel, reference, scoring
from pallas_kernels.index_topk.shapes import SMALL, Case, call

pytestmark = pytest.mark.slow  # interpreted kernels take minutes

IMPLEMENTATIONS = ("reference", "interpret")
LAYER = 1


@functools.cache
def compiled(case, implementation):
    return jax.jit(functools.partial(call, case, implementation))


def boundaries(case):
    """Visible counts at every edge of the kernel: tiles, lanes, the budget, nothing, everything."""
    edges = [n + d for n in (case.keep, 128, 512, 1024) for d in (-1, 0, 1)]
    edges = [0, 1, 2, case.capacity, case.capacity - 1] + [n for n in edges if n <= case.capacity]
    counts = np.resize(sorted(set(edges)), (case.batch, case.fresh))
    return counts.astype(np.int32)


def arguments(case, kind, seed=0):
    """`spread` scores take many values, `ties` only a few, `equal` one."""
    rng = np.random.default_rng(seed)
    lead, keys = (case.batch, case.fresh), (case.layers, case.batch, case.capacity)
    most = {"spread": 3, "ties": 1, "equal": 0}[kind]
    q = rng.integers(-most, most + 1, (*lead, case.heads, case.channels)) * 0.5
    if kind == "ties":
        q *= rng.random(q.shape) < 0.02
    w = rng.integers(-2, 4, (*lead, case.heads))
    codes = rng.integers(0, 256, (*keys, case.channels // 2)).astype(np.uint8)
    scales = rng.integers(126, 129, (*keys, case.channels // 32)).astype(np.uint8)
    stores = [jnp.asarray(codes), jnp.asarray(scales)]
    if not case.packed:
        plain = store.unpack(store.PackedKeys(*stores), jnp.bfloat16)
        stores = [jax.lax.bitcast_convert_type(plain, jnp.uint16)]
    visible = jnp.asarray(boundaries(case))
    q, w = jnp.asarray(q, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    args = (q, w, *stores, visible, jnp.int32(LAYER))
    return (*args, shuffled_table(rng, case)) if case.page else args


def shuffled_table(rng, case):
    pages = case.batch * case.capacity // case.page
    return jnp.asarray(rng.permutation(pages).reshape(case.batch, -1), jnp.int32)


def paged(case, args):
    """The same arguments with keys in the pages of the table."""
    *args, table = args
    for n in range(2, len(args) - 2):
        rows = args[n].reshape(case.layers, -1, case.page, args[n].shape[-1])
        args[n] = jnp.zeros_like(rows).at[:, table.ravel()].set(rows)
    return (*args, table)


def sorted_choice(case, q, w, *rest):
    """Mask of the chosen rows by scores in float64 and a lexicographic sort."""
    *stores, visible, layer = rest[:-1] if case.page else rest
    if case.packed:
        keys = np.asarray(reference.unpack_keys(*(a[layer] for a in stores)), np.float64)
    else:
        keys = np.asarray(stores[0][layer]).view(ml_dtypes.bfloat16).astype(np.float64)

    def cast(x):
        return x.astype(np.float32).astype(ml_dtypes.bfloat16) if case.rounded else x

    dots = np.einsum("BTIJ,BCJ->BTIC", np.asarray(q, np.float64), keys, optimize=True)
    relu = np.maximum(cast(dots).astype(np.float64), 0)
    terms = cast(relu * np.asarray(w, np.float64)[..., None]).astype(np.float64)
    scores = cast(terms.sum(axis=2)).astype(np.float64)
    mask = np.zeros(scores.shape, bool)
    for place in np.ndindex(*visible.shape):
        seen = scores[place][: int(visible[place])]
        order = np.lexsort((np.arange(seen.size), -seen))[: case.keep]
        mask[place][order] = True
    return mask


def check(case, result, mask):
    if case.form == "mask":
        words = np.asarray(api.words_mask(result, case.capacity))
        np.testing.assert_array_equal(words, mask)
        np.testing.assert_array_equal(np.asarray(api.mask_words(jnp.asarray(mask))), result)
        return
    rows, count = np.asarray(result.rows_BTK), np.asarray(result.count_BT)
    assert rows.shape == (case.batch, case.fresh, case.keep)
    for place in np.ndindex(*count.shape):
        wanted = np.flatnonzero(mask[place])
        assert count[place] == wanted.size
        np.testing.assert_array_equal(rows[place][: wanted.size], wanted)
        assert not rows[place][wanted.size :].any()


SLOW = {("interpret", name) for name in ("rows_verify", "mask_two_spans", "mask_paged")}
CONTRACT = [
    pytest.param(i, name, marks=[pytest.mark.slow] if (i, name) in SLOW else [])
    for i in IMPLEMENTATIONS
    for name in SMALL
]


@pytest.mark.parametrize(("implementation", "name"), CONTRACT)
def test_choice_is_that_of_a_sort(implementation, name):
    case = SMALL[name]
    for kind in ("spread", "ties", "equal"):
        args = arguments(case, kind)
        result = compiled(case, implementation)(*(paged(case, args) if case.page else args))
        check(case, result, sorted_choice(case, *args))


def test_most_entries_can_tie():
    """262,144 entries, a few score values: the index decides, exactly."""
    case = Case(1, 1, 262144, 512, heads=8, rounded=False, layers=1)
    *args, _, _ = arguments(case, "ties", seed=3)
    args = [*args, jnp.full((1, 1), case.capacity - 3, jnp.int32), jnp.int32(0)]
    mask = sorted_choice(case, *args)
    assert np.flatnonzero(mask)[-1] < case.capacity - 3
    check(case, compiled(case, "interpret")(*args), mask)


@pytest.mark.parametrize("name", ["rows", pytest.param("mask", marks=pytest.mark.slow)])
def test_no_race_and_no_uninitialised_memory(name, monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    case = SMALL[name]._replace(batch=2, fresh=1 if name == "rows" else 8)
    args = list(arguments(case, "spread"))
    top = case.capacity - 1
    args[-2] = jnp.asarray(np.resize([top, 513], args[-2].shape), jnp.int32)
    monkeypatch.setattr(api, "_interpret", lambda _: pltpu.InterpretParams(detect_races=True))
    result = call(case, "interpret", *args)
    assert not state.races.races_found
    check(case, result, sorted_choice(case, *args))


def test_every_fp4_code_and_scale_decodes_exactly():
    """All bytes at all scales whose products are normal bfloat16 numbers: 2^-125 … 2^125."""
    scales = np.arange(2, 253, dtype=np.uint8)
    columns = np.arange(256, dtype=np.uint8).reshape(4, 64).T  # every byte, in four columns
    codes = np.tile(columns, 256)  # whole lanes: some scales come twice
    exponents = np.tile(np.repeat(np.resize(scales, 256), 4), (4, 1))

    def body(codes_ref, scales_ref, out_ref):
        out_ref[...] = scoring.decode_columns(codes_ref[...], scales_ref[...])

    out = jax.ShapeDtypeStruct((128, codes.shape[1]), jnp.bfloat16)
    decoded = pl.pallas_call(body, out_shape=out, interpret=True)(codes, exponents)
    wanted = reference.unpack_keys(jnp.asarray(codes.T), jnp.asarray(exponents.T))
    order = scoring.channel_order(jnp.arange(128), 128)
    assert sorted(order.tolist()) == list(range(128))
    np.testing.assert_array_equal(np.asarray(decoded, np.float32), wanted.T[order])


def test_score_order_is_that_of_floats():
    values = np.array([-np.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 0.25, 7.0, np.inf], np.float32)
    order = np.asarray(scoring.score_order(jnp.asarray(values), False), np.int64)
    np.testing.assert_array_equal(np.sign(np.diff(order)), np.sign(np.diff(values)))
    assert order[0] > kernel.HIDDEN
    short = np.asarray(scoring.score_order(jnp.asarray(values), True), np.int64)
    assert (np.diff(short) >= 0).all() and short[3] == short[4] and short[0] > kernel.HIDDEN


def test_reference_equals_the_model():
    num, case = Numerics(), SMALL["rows_rounded_plain"]._replace(packed=True, batch=4)
    q, w, codes, scales, visible, _ = arguments(case, "spread")
    keys, place = store.PackedKeys(codes, scales), store.Place(jnp.int32(LAYER))
    scores = indexer.score_rows(indexer.IndexQuery(q, w), keys, place, visible, num)
    ours = reference.score(q, w, store.unpack(keys, jnp.float32)[LAYER], True)
    seen = np.arange(case.capacity) < np.asarray(visible)[..., None]
    np.testing.assert_array_equal(np.asarray(ours)[seen], np.asarray(scores)[seen])
    mask = np.asarray(indexer.selection_mask(scores, case.keep))
    chosen = reference.choose(ours, visible, case.keep)
    np.testing.assert_array_equal(chosen, mask)
    picked = indexer.select(scores, case.keep)
    rows = reference.mask_rows(chosen, case.keep)
    for at in np.ndindex(*visible.shape):
        valid = np.asarray(picked.valid_BTK[at])
        theirs = np.sort(np.asarray(picked.rows_BTK[at])[valid])
        np.testing.assert_array_equal(rows[at][: valid.sum()], theirs)


def test_wrong_arguments_are_named():
    case = SMALL["rows"]
    args = arguments(case, "spread")
    with pytest.raises(ValueError, match="w_BTI has shape"):
        call(case, "reference", args[0], args[1][:, :, :4], *args[2:])
    with pytest.raises(ValueError, match="keys.scales has shape"):
        call(case, "reference", *args[:3], args[3][..., :2], *args[4:])
    with pytest.raises(ValueError, match="visible_BT is float32"):
        call(case, "reference", *args[:4], args[4].astype(jnp.float32), args[5])
    with pytest.raises(ValueError, match="'mosaic' is unknown"):
        call(case, "mosaic", *args)


def test_sizes_outside_the_kernel_are_refused_by_name_and_chosen_around():
    case = SMALL["rows"]._replace(capacity=640)
    args = arguments(case, "spread")
    with pytest.raises(NotImplementedError, match="capacity=640"):
        call(case, "interpret", *args)
    check(case, call(case, None, *args), sorted_choice(case, *args))


def test_the_platform_chooses():
    case = SMALL["mask_rounded_plain"]
    args = arguments(case, "ties")
    check(case, jax.jit(functools.partial(call, case, None))(*args), sorted_choice(case, *args))
