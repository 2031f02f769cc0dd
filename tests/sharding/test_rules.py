"""Meshes, rules and placement: every dimension has a rule, and nothing large is everywhere."""

import ast
import re
from functools import partial
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

import dsv4_jax
from dsv4_jax import presets
from dsv4_jax.cache import init_cache
from dsv4_jax.dims import DIMS
from dsv4_jax.model import init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import check
from dsv4_jax.placement import cache_specs, explain, logical, param_specs
from dsv4_jax.preflight import slices
from dsv4_jax.preflight.programs import Sizes
from sharding.mesh import AXES, MeshShape, MeshSizes, make_mesh, meshes_of, nearest, num_chips
from sharding.rules import RULES, SERVE, TRAIN, make_rules, spec_of
from sharding.shards import Shards

SIZES = dict.fromkeys(AXES, 1)


def described(mesh: str, rules=SERVE) -> Shards:
    return Shards(MeshSizes(MeshShape.parse(mesh)), rules)


@pytest.mark.parametrize("rules", RULES.values(), ids=lambda rules: rules.name)
def test_every_named_dimension_has_a_rule(rules):
    for letter, dim in DIMS.items():
        assert set(rules.axes(dim.logical)) <= set(AXES), letter


def test_every_activation_is_named_after_dimensions():
    """So that each has a rule. Digits and other small letters are sizes within one function."""
    folder, count = Path(dsv4_jax.__file__).parent, 0
    for path in [*folder.glob("*.py"), *folder.glob("training/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "id", getattr(node, "arg", getattr(node, "attr", None)))
            if found := re.fullmatch(
                r"_?[a-z][a-z0-9_]*_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)", name or ""
            ):
                count += 1
                unknown = {letter for letter in found[1] if letter.isupper()} - DIMS.keys()
                assert not unknown, f"{path.name}: {name}"
    assert count > 1000


@pytest.mark.parametrize("model", ["v4-flash", "v4-pro-base"])
@pytest.mark.parametrize("rules", RULES.values(), ids=lambda rules: rules.name)
def test_every_parameter_and_cache_has_a_place(model, rules):
    cfg = presets.PRESETS[model]()
    shards = described("fsdp=2,expert=2,tensor=2", rules)
    specs = param_specs(cfg, shards)
    params = jax.eval_shape(partial(init_params, cfg), jax.random.key(0))
    jax.tree.map(lambda a, spec: shards.local_shape(spec, a.shape), params, specs)  # the same tree
    cache = jax.eval_shape(partial(init_cache, cfg, 8, 512, Numerics()))
    own = ("fsdp", "expert") if rules.axes("batch") else None
    assert cache_specs(cache, shards).pos_B == P(own)


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("v4-flash", "expert=2,tensor=8"),
        ("v4-flash", "context=8"),
        ("v4-flash", "fsdp=2,expert=16,context=8"),
        ("v4-pro", "expert=16,tensor=4"),
        ("v4-pro", "expert=8,context=4,tensor=2"),
    ],
)
def test_experts_are_spread_evenly(model, mesh):
    shards = described(mesh)
    rows = [row for row in explain(presets.PRESETS[model](), shards) if "experts" in row.name]
    total, held = (sum(getattr(row, f"{k}_bytes") for row in rows) for k in ("total", "device"))
    assert held <= 1.1 * total / MeshShape.parse(mesh).num_devices


@pytest.mark.parametrize(
    ("model", "kind", "devices", "batch"),
    [("v4-flash", "v5e", 16, 1), ("v4-pro", "v6e", 64, 4), ("v4-pro", "v5e", 128, 4)],
)
def test_contexts_are_split_where_sequences_are_fewer_than_devices(model, kind, devices, batch):
    """By the mesh that preflight takes by itself; with Pro no other one fits."""
    cfg, sizes = presets.PRESETS[model](), Sizes(batch, 1 << 20, 1)
    best, *others = slices.ranked(cfg, kind, devices, "decode", sizes)
    assert best.mesh.context > 1 and slices.fits(best, kind)
    whole = [e for e in others if e.mesh.context == 1 and slices.fits(e, kind)]
    assert all(e.cache > best.cache for e in whole)
    assert model == "v4-flash" or not whole


def test_training_stores_experts_over_fsdp_too():
    shards = described("fsdp=32,expert=16", TRAIN)
    rows = [row for row in explain(presets.v4_flash(), shards) if "experts" in row.name]
    total, held = (sum(getattr(row, f"{k}_bytes") for row in rows) for k in ("total", "device"))
    assert held <= 1.1 * total / 512


def test_an_unknown_dimension_is_an_error():
    with pytest.raises(ValueError, match="'haeds' has no rule in SERVE"):
        spec_of(SERVE, ("embed", "haeds"), (8, 8), SIZES)
    with pytest.raises(ValueError, match="unknown axes"):
        make_rules("WRONG", heads=("tenser",))


def test_an_axis_is_used_once():
    spec = spec_of(TRAIN, logical("DD"), (64, 64), SIZES | {"fsdp": 4})
    assert spec == P("fsdp", None)


def test_scales_are_not_torn_from_their_blocks():
    with pytest.raises(ValueError, match="size 512 does not divide into 8 parts in blocks of 128"):
        param_specs(presets.tiny().replace(num_heads=8, o_groups=8), described("tensor=8"))


def test_what_does_not_divide_is_named_with_meshes_that_do():
    shards = Shards(make_mesh(MeshShape(tensor=8)))
    with pytest.raises(ValueError, match=r"mesh tensor=8: .*heads.* Meshes of as many .*expert=8"):
        check(presets.tiny(), shards, batch=8)
    with pytest.raises(ValueError, match="a batch of 2.*expert=2,context=4"):
        check(presets.tiny(), Shards(make_mesh(MeshShape(expert=8))), batch=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert=0", "expert=0 must be a positive integer"),
        ("expert", "'expert' must be AXIS=N"),
        ("exprt=2", "'exprt=2' must be AXIS=N"),
        ("expert=2,expert=4", "'expert=4' must be AXIS=N, each axis once"),
        ("expert=-2", "'expert=-2' must be AXIS=N"),
    ],
)
def test_wrong_meshes_are_explained(text, message):
    with pytest.raises(ValueError, match=message):
        MeshShape.parse(text)


def test_a_mesh_uses_all_devices():
    with pytest.raises(ValueError, match="has 4 devices, but there are 8"):
        make_mesh(MeshShape(expert=4))
    assert dict(make_mesh(MeshShape(data=2, expert=4)).shape) == SIZES | {"data": 2, "expert": 4}


def test_nearest_meshes_come_first():
    found = nearest(MeshShape(expert=8), lambda shape: shape.expert <= 4)
    assert found[0].expert == 4 and all(shape.num_devices == 8 for shape in found)
    assert len(list(meshes_of(8))) == 35  # ways to spread 2·2·2 over five axes


def test_topology_names():
    assert num_chips("v5p:2x2x4") == 16 and num_chips("v6e:2x4") == 8
    with pytest.raises(ValueError, match="'v6e-8' must look like"):
        num_chips("v6e-8")
