"""Restoring units as the model does: whole, sharded, densified; and clear refusals."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints import store
from checkpoints.errors import CheckpointError
from checkpoints.manifest import MANIFEST_NAME, load_config
from checkpoints.names import flatten, leaf_structs
from dsv4_jax.params import abstract, unit_specs
from dsv4_jax.quant import QuantizedArray
from tests.checkpoints.support import BASE, INSTRUCT


def as_bytes(tree):
    return {leaf: np.asarray(a).tobytes() for leaf, a in flatten(tree).items()}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def split(mesh, struct):
    """Splits the first dimension that eight (or four, or two) devices divide."""
    for dim, size in enumerate(struct.shape):
        for axes, count in ((("data", "expert"), 8), ("expert", 4), ("data", 2)):
            if size % count == 0:
                return NamedSharding(mesh, P(*[None] * dim, axes))
    return NamedSharding(mesh, P())


@pytest.mark.parametrize("variant", ["instruct", "base", "bf16", "fp8"])
def test_restoring_onto_eight_devices(converted, mesh, variant):
    root, cfg = converted[variant], load_config(converted[variant])
    assert len(jax.devices()) == 8
    for unit, specs in unit_specs(cfg).items():
        structs = abstract(cfg, specs)
        shardings = jax.tree.map(lambda s: split(mesh, s), structs)
        tree = store.load_unit(root, unit, cfg, shardings)
        assert jax.tree.structure(tree) == jax.tree.structure(structs)
        for array, struct in zip(jax.tree.leaves(tree), jax.tree.leaves(structs), strict=True):
            assert (array.shape, array.dtype) == (struct.shape, struct.dtype)
            assert array.sharding == split(mesh, struct)
        assert as_bytes(tree) == as_bytes(store.load_unit(root, unit, cfg))
    codes = flatten(tree)["ffn/experts/w1" + ("" if variant == "bf16" else "/codes")]
    assert {s.data.shape[0] for s in codes.addressable_shards} == {cfg.num_experts // 8 or 1}


def test_one_sharding_for_all_and_none(converted, mesh):
    root, cfg = converted["base"], load_config(converted["base"])
    replicated = NamedSharding(mesh, P())
    tree = store.load_unit(root, "layer_00", cfg, replicated)
    assert all(a.sharding == replicated for a in jax.tree.leaves(tree))
    tree = store.load_unit(root, "layer_00", cfg)
    assert all(a.devices() == {jax.devices()[0]} for a in jax.tree.leaves(tree))


def test_units_one_by_one(converted, mesh):
    root, cfg = converted["instruct"], load_config(converted["instruct"])
    assert [u for u, _ in store.load_units(root, cfg)] == list(unit_specs(cfg))
    asked = []

    def place(unit):
        asked.append(unit)
        return NamedSharding(mesh, P())

    units = dict(store.load_units(root, cfg, ["layer_02", "top"], place))
    assert list(units) == asked == ["layer_02", "top"]


def test_numpy_and_dense_forms(converted):
    root, cfg = converted["instruct"], load_config(converted["instruct"])
    tree = store.load_unit(root, "layer_01", cfg)
    assert isinstance(tree["ffn"]["experts"]["w1"], QuantizedArray)
    assert tree["ffn"]["experts"]["w1"].fmt == "fp4"
    flat = store.load_unit_numpy(root, "layer_01", cfg)
    assert all(isinstance(a, np.ndarray) for a in flat.values())
    assert {leaf: a.tobytes() for leaf, a in flat.items()} == as_bytes(tree)
    dense = store.densify(tree, jnp.bfloat16)
    assert dense["ffn"]["experts"]["w1"].shape == tree["ffn"]["experts"]["w1"].shape
    assert dense["ffn"]["experts"]["w1"].dtype == jnp.bfloat16
    assert dense["attn_norm"] is tree["attn_norm"]


def test_saving_and_loading_a_unit(tmp_path, converted):
    root, cfg = converted["instruct"], load_config(converted["instruct"])
    tree = store.load_unit(root, "layer_00", cfg)
    for _ in range(2):  # the second time replaces the first
        store.save_unit(tmp_path, "layer_00", tree)
        assert as_bytes(store.load_unit(tmp_path, "layer_00", cfg)) == as_bytes(tree)


def test_saving_sharded_arrays(tmp_path, converted, mesh):
    root, cfg = converted["base"], load_config(converted["base"])
    structs = abstract(cfg, unit_specs(cfg)["mtp_0"])
    shardings = jax.tree.map(lambda s: split(mesh, s), structs)
    tree = store.load_unit(root, "mtp_0", cfg, shardings)
    store.save_unit(tmp_path, "mtp_0", tree)
    assert as_bytes(store.load_unit(tmp_path, "mtp_0", cfg)) == as_bytes(tree)


def test_saving_a_checkpoint_checks_it(tmp_path, converted):
    root, cfg = converted["base"], load_config(converted["base"])
    units = dict(store.load_units(root, cfg))
    store.save_checkpoint(tmp_path / "good", cfg, units.items())
    assert load_config(tmp_path / "good") == cfg
    with pytest.raises(CheckpointError, match=r"lacks units \['mtp_0'\]"):
        few = {u: units[u] for u in ("top", "layer_00")}
        store.save_checkpoint(tmp_path / "few", cfg, few.items())
    broken = units["top"] | {"norm": units["top"]["norm"].astype(jnp.float32), "more": jnp.ones(2)}
    with pytest.raises(CheckpointError) as caught:
        store.save_checkpoint(tmp_path / "bad", cfg, [("top", broken)])
    assert "norm is float32" in str(caught.value) and "unexpected: more" in str(caught.value)
    with pytest.raises(CheckpointError, match="not a checkpoint|no manifest"):
        load_config(tmp_path / "bad")


def incomplete(tmp_path, converted):
    shutil.copytree(converted["base"], tmp_path / "x")
    (tmp_path / "x" / MANIFEST_NAME).unlink()
    (tmp_path / "x" / ".convert").mkdir()


def damaged(text):
    def make(tmp_path, converted):
        shutil.copytree(converted["base"], tmp_path / "x")
        (tmp_path / "x" / MANIFEST_NAME).write_text(text)

    return make


REFUSALS = {
    "missing": (lambda t, c: None, "does not exist"),
    "file": (lambda t, c: (t / "x").write_text(""), "is not a directory"),
    "empty": (lambda t, c: (t / "x").mkdir(), "is not a checkpoint: it has no manifest.json"),
    "official": (lambda t, c: shutil.copytree(BASE, t / "x"),
                 "must be converted first: python scripts/convert_hf.py .*/x runs/x"),
    "incomplete": (incomplete, "incomplete conversion: run the same convert_hf.py command again"),
    "no JSON": (damaged("{"), "is not valid JSON"),
    "other JSON": (damaged("[]"), "is not a manifest of this program"),
    "other kind": (damaged('{"kind": "other"}'), "is not a manifest of this program"),
    "other version": (damaged('{"kind": "dsv4_jax checkpoint", "version": 9}'), "another format"),
    "no units": (damaged('{"kind": "dsv4_jax checkpoint", "version": 1}'), "is damaged"),
    "odd field": (damaged('{"kind": "dsv4_jax checkpoint", "version": 1, "units": {}, "q": 1}'),
                  "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_is_no_checkpoint_is_refused(tmp_path, converted, kind):
    make, message = REFUSALS[kind]
    make(tmp_path, converted)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path / "x")
    if kind in ("missing", "official"):
        cfg = load_config(converted["base"])
        with pytest.raises(CheckpointError, match=message):
            store.load_unit(tmp_path / "x", "top", cfg)


def test_missing_and_mismatching_units(tmp_path, converted):
    shutil.copytree(converted["base"], tmp_path / "x")
    cfg = load_config(tmp_path / "x")
    with pytest.raises(CheckpointError, match="unit 'layer_77' is none of"):
        store.load_unit(tmp_path / "x", "layer_77", cfg)
    for changed in (
        cfg.replace(vocab_size=cfg.vocab_size + 1),
        cfg.replace(dim=cfg.dim * 2),
    ):
        with pytest.raises(CheckpointError, match="does not match the configuration"):
            store.load_unit(tmp_path / "x", "top", changed)
        with pytest.raises(CheckpointError, match="does not match the configuration"):
            store.load_unit_numpy(tmp_path / "x", "top", changed)
    for changed in (
        cfg.replace(expert_format="fp4"),
        cfg.replace(dense_format=None),
        cfg.replace(scale_dtype="float8_e8m0fnu"),
    ):
        with pytest.raises(CheckpointError, match="does not match the configuration"):
            store.load_unit(tmp_path / "x", "layer_00", changed)
    shutil.rmtree(tmp_path / "x" / "params" / "mtp_0")
    with pytest.raises(CheckpointError, match="mtp_0 is missing: the checkpoint is damaged"):
        store.load_unit(tmp_path / "x", "mtp_0", cfg)


def test_shardings_must_match_the_tree(converted, mesh):
    root, cfg = converted["base"], load_config(converted["base"])
    leaves = leaf_structs(cfg, unit_specs(cfg)["top"])
    shardings = dict.fromkeys([leaf for leaf in leaves if leaf != "norm"], NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=r"do not match its tree, differing at \["):
        store.load_unit(root, "top", cfg, shardings)


def test_config_is_the_official_one(converted):
    cfg = load_config(converted["instruct"])
    assert (cfg.dim, cfg.num_layers, cfg.compress_ratios) == (256, 3, (0, 4, 128, 0))
    text = (converted["instruct"] / "config.json").read_text()
    assert text == (INSTRUCT / "config.json").read_text()


def test_arrays_are_stored_in_few_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 1 << 20)
    shapes = {
        "experts": (6, 64, 128),
        "large": (3, 2048, 768),
        "matrix": (3072, 1024),
        "hash": (4096, 6),
    }
    arrays = {
        name: np.random.default_rng(0).integers(1, 255, shape, np.uint8)
        for name, shape in shapes.items()
    }
    store.save_unit(tmp_path, "unit", arrays)
    pieces = {name: store.chunk_shape(shape, 1) for name, shape in shapes.items()}
    assert pieces["experts"] == (1, 64, 128)  # a host reads its own experts
    assert pieces["hash"] == (4096, 6)
    assert math.prod(pieces["large"]) <= 1 << 20 and math.prod(pieces["matrix"]) <= 1 << 20
    for name, piece in pieces.items():
        base = {"driver": "ocdbt", "base": f"file://{store.unit_path(tmp_path, 'unit')}/"}
        stored = tensorstore.open(
            {"driver": "zarr", "kvstore": base | {"path": f"{name}/"}}
        ).result()
        assert stored.chunk_layout.read_chunk.shape == piece, name
        np.testing.assert_array_equal(stored.read().result(), arrays[name])
