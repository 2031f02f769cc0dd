"""Newton–Schulz, the partition of every leaf, and the optimizer's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv4_jax import presets
from dsv4_jax.params import count_params
from dsv4_jax.training.init import InitConfig, init_params
from dsv4_jax.training.leaves import map_places, places
from dsv4_jax.training.muon import orthogonalise, scale_by_muon
from dsv4_jax.training.optimizer import OptimizerConfig, _optax_muon, clip, make_optimizer
from dsv4_jax.training.partition import View, join, labels, split, view, views
from tests.training.support import CONFIG, random_params


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (4, 256), (48, 48), (128, 512)])
def test_newton_schulz_gives_orthonormal_factors(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    found = np.asarray(orthogonalise(jnp.asarray(x)))
    for a, b in zip(x, found, strict=True):
        u, s, vt = np.linalg.svd(a, full_matrices=False)
        if s[-1] > 0.1 * s[0]:
            values = np.linalg.svd(b, compute_uv=False)
            assert np.abs(values - 1).max() <= 5e-3
            assert np.abs(b - u @ vt).max() <= 5e-3
    rms = np.sqrt((found**2).mean()) * max(shape) ** 0.5 * 0.18
    assert abs(rms - 0.18) <= 1e-3


def test_bfloat16_operands_stay_close():
    x = jax.random.normal(jax.random.key(0), (2, 64, 128))
    values = np.linalg.svd(np.asarray(orthogonalise(x, jnp.bfloat16)), compute_uv=False)
    assert np.abs(values - 1).max() <= 2e-2


def test_a_zero_matrix_stays_zero():
    assert not np.asarray(orthogonalise(jnp.zeros((2, 8, 16)))).any()


def test_scale_does_not_matter_down_to_the_smallest_gradients():
    x = jax.random.normal(jax.random.key(0), (1, 8, 16))
    for scale in (1e-25, 1e-19, 1e15):
        np.testing.assert_allclose(orthogonalise(x * scale), orthogonalise(x), atol=1e-4)


def test_momentum_equals_optax_without_nesterov():
    """There both momenta are multiples of each other, and Muon does not see scale."""
    params = {"w": jnp.zeros((32, 64))}
    ours = scale_by_muon({"w": View("muon", (32,))}, nesterov=False)
    fast, slow = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
    theirs = optax.contrib.scale_by_muon(
        ns_coeffs=[fast] * 8 + [slow] * 2,
        ns_steps=10,
        nesterov=False,
        eps=1e-20,
        weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(0, 1)},
    )
    a, b = ours.init(params), theirs.init(params)
    for step in range(8):
        grads = {"w": jax.random.normal(jax.random.key(step), (32, 64))}
        x, a = ours.update(grads, a, params)
        y, b = theirs.update(grads, b, params)
        x, y = (np.asarray(z["w"]) / np.linalg.norm(z["w"]) for z in (x, y))
        assert np.abs(x - y).max() <= 1e-5 * np.abs(y).max()


def test_optax_muon_moves_every_matrix_of_a_stack_alone():
    """With our root mean square, of its own momentum; matrices are a leaf's last dimensions."""
    rule = _optax_muon(OptimizerConfig(matrices="optax_muon"))
    grads = {"w": jax.random.normal(jax.random.key(0), (2, 24, 16))}
    both, _ = jax.jit(rule.update)(grads, rule.init(grads), grads)
    one = {"w": grads["w"][1]}
    alone, _ = jax.jit(rule.update)(one, rule.init(one), one)
    np.testing.assert_allclose(both["w"][1], alone["w"], atol=1e-6)
    assert abs(np.sqrt((np.asarray(both["w"]) ** 2).mean()) - 0.18) < 0.03  # five steps only
    assert (np.asarray(both["w"]) * np.asarray(grads["w"])).sum() > 0


def test_split_and_join_are_inverse():
    x = jnp.arange(2 * 24 * 5.0).reshape(2, 24, 5)
    for how in (View("muon", (24,)), View("muon", (4, 4, 16)), View("muon", (8,), 3)):
        parts = split(x, how)
        assert [p.shape[1] for p in parts] == list(how.rows)
        assert all(p.shape[0] == 2 * how.groups for p in parts)
        np.testing.assert_array_equal(join(parts, x.shape), x)


def test_split_matrices_are_independent():
    """Turning one part of a leaf leaves the update of the others alone."""
    how = View("muon", (4, 4, 16))
    rule = scale_by_muon({"w": how})
    g = jax.random.normal(jax.random.key(0), (24, 32))
    changed = g.at[:4].set(jax.random.normal(jax.random.key(1), (4, 32)))
    u, v = (rule.update({"w": x}, rule.init({"w": x}))[0]["w"] for x in (g, changed))
    np.testing.assert_allclose(u[4:], v[4:], atol=1e-6)
    assert np.abs(u[:4] - v[:4]).max() > 1e-3


EXPECTED = {
    "embed": "adamw",
    "head": "adamw",
    "norm": "adamw",
    "base": "adamw",
    "scale": "adamw",
    "sink": "adamw",
    "ape": "adamw",
    "bias": "none",
    "tid2eid": "none",
}


@pytest.mark.parametrize("cfg", [CONFIG, presets.tiny(), presets.v4_flash(), presets.v4_pro()])
@pytest.mark.parametrize("scan", [True, False])
def test_partition_covers_every_leaf(cfg, scan):
    """The table of the recipe by name; the rule itself reads dimensions only."""
    total = 0
    for place in places(cfg, scan):
        how, name = view(place, cfg), place.name[-1]
        expected = EXPECTED.get(name, "adamw" if name.endswith("norm") else "muon")
        assert how.group == expected, place.path
        if how.group == "muon":
            assert sum(how.rows) * how.groups == place.spec.shape[-2], place.path
        if "hc" in place.name[0] and name == "fn" and "head" not in place.name[0]:
            m = cfg.hc_mult
            assert how.rows == (m, m, m * m)
        if "compressor" in place.name and name in ("wkv", "wgate"):
            overlapped = place.siblings["ape"].shape[0] == 4
            assert len(how.rows) == (2 if overlapped else 1)
        if name == "wo_a":
            assert how.groups == cfg.o_groups and how.rows == (cfg.o_rank,)
        if place.spec.dtype != "int32":
            total += int(np.prod(place.spec.shape)) * (place.repeats or 1)
    assert total == count_params(cfg).total


def test_adamw_share_of_the_released_models():
    for cfg, expected in ((presets.v4_flash(), 1.06e9), (presets.v4_pro(), 1.86e9)):
        size = sum(
            int(np.prod(p.spec.shape)) * (p.repeats or 1)
            for p in places(cfg, True)
            if view(p, cfg).group == "adamw"
        )
        assert abs(size / expected - 1) < 0.01


def random_like(params, seed):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        jnp.zeros_like(a) if a.dtype == jnp.int32 else jax.random.normal(k, a.shape)
        for k, a in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


@pytest.mark.slow
def test_frozen_leaves_and_slots_do_not_move():
    params = random_params()
    grads = random_like(params, 0)
    opt = OptimizerConfig()
    state = make_optimizer(opt, CONFIG, params).init(params)

    def one(learn, state):
        rule = make_optimizer(opt, CONFIG, params, learn)
        return jax.jit(rule.update)(grads, state, params)

    def moved(updates):
        return map_places(
            lambda place, u: (place.is_index, bool(np.asarray(u).any())), CONFIG, updates
        )

    updates, after = one("trunk", state)
    flags = jax.tree.leaves(moved(updates), is_leaf=lambda n: isinstance(n, tuple))
    groups = jax.tree.leaves(labels(CONFIG, params))
    for (is_index, has_moved), group in zip(flags, groups, strict=True):
        assert has_moved == (not is_index and group != "none")
    assert jax.tree.structure(after) == jax.tree.structure(state)
    updates, last = one("indexer", after)
    for is_index, has_moved in jax.tree.leaves(
        moved(updates), is_leaf=lambda n: isinstance(n, tuple)
    ):
        assert has_moved == is_index
    for side in ("trunk muon", "trunk adamw"):
        a, b = (jax.tree.leaves(s.inner_states[side]) for s in (after, last))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_zero_gradients_leave_only_decay():
    params = random_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    rule = make_optimizer(OptimizerConfig(), CONFIG, params)
    updates, _ = jax.jit(rule.update)(zeros, rule.init(params), params)

    def check(place, u, p):
        expected = np.zeros_like(p) if view(place, CONFIG).group == "none" else 0.1 * p
        np.testing.assert_allclose(u, expected, rtol=1e-6, err_msg=str(place.path))

    map_places(check, CONFIG, updates, params)


def test_clipping_keeps_indexers_apart():
    params = random_params()
    grads = random_like(params, 1)
    grads = map_places(lambda p, g: g * (1000 if p.is_index else 1), CONFIG, grads)
    clipped, norms = clip(grads, CONFIG, 1.0, "all")
    again, after = clip(clipped, CONFIG, 0.0, "all")
    assert norms.indexer > 100 * norms.trunk / 10 and norms.trunk > 1
    np.testing.assert_allclose([after.trunk, after.indexer], 1, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_initial_parameters():
    params = init_params(CONFIG, InitConfig(), jax.random.key(0))
    std = 0.02 * (1024 / CONFIG.dim) ** 0.5

    def check(place, p):
        p = np.asarray(p)
        name = place.name[-1]
        if name == "scale":
            assert (p == np.float32(0.01)).all()
        elif name == "fn":
            assert np.abs(p).max() <= 0.06 + 1e-6
        elif name == "tid2eid":
            assert all(len(set(row)) == CONFIG.experts_per_token for row in p)
        elif place.spec.init == "normal":
            assert np.abs(p).max() <= 3 * std + 1e-6 and abs(p.std() / std - 1) < 0.35
        else:
            assert (p == float(place.spec.init == "ones")).all()

    map_places(check, CONFIG, params)
    assert jax.tree.structure(views(CONFIG, params), is_leaf=lambda n: isinstance(n, View))
