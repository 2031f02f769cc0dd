"""Export: bit-identical without a format change, right values with one."""

import json
import shutil

import numpy as np
import pytest

from checkpoints import export as export_module
from checkpoints import files, store
from checkpoints.convert import convert, prepare
from checkpoints.errors import CheckpointError
from checkpoints.export import export
from checkpoints.manifest import load_config
from tests.checkpoints.support import (
    BASE,
    INSTRUCT,
    read_header,
    read_raw,
    tensor_files,
    values,
    write_raw,
)


@pytest.mark.parametrize("variant", ["instruct", "base", "bf16", "fp8", "single"])
def test_unmodified_conversions_come_back_bit_for_bit(tmp_path, variants, converted, variant):
    src = variants[variant]
    shards = export(converted[variant], tmp_path / "back")
    assert tensor_files(tmp_path / "back") == tensor_files(src)
    assert (tmp_path / "back" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    assert sorted(shards) == sorted(p.name for p in src.glob("*.safetensors"))
    index = "model.safetensors.index.json"
    assert (tmp_path / "back" / index).exists() == (src / index).exists()
    if (src / index).exists():
        before, after = (json.loads((d / index).read_text()) for d in (src, tmp_path / "back"))
        assert before == after


@pytest.mark.parametrize("variant", ["instruct", "base"])
def test_official_files_come_back_whole(tmp_path, variants, converted, variant):
    export(converted[variant], tmp_path / "back")
    for path in variants[variant].iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_unusual_shard_map_is_kept(tmp_path):
    raw = read_raw(BASE)
    names = list(raw.files)
    raw.files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    src = write_raw(raw, tmp_path / "src")
    convert(src, tmp_path / "dst")
    export(tmp_path / "dst", tmp_path / "back")
    assert tensor_files(tmp_path / "back") == tensor_files(src)


def test_without_mtp_copies_none_are_written(tmp_path):
    raw = read_raw(BASE)
    raw.drop("mtp.0.emb.tok_emb.weight")
    raw.drop("mtp.0.head.weight")
    src = write_raw(raw, tmp_path / "src")
    convert(src, tmp_path / "dst")
    export(tmp_path / "dst", tmp_path / "back")
    assert tensor_files(tmp_path / "back") == tensor_files(src)


def test_tokenizer_files_come_back(tmp_path):
    shutil.copytree(BASE, tmp_path / "src")
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "src", tmp_path / "dst")
    export(tmp_path / "dst", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"


EXACT = [  # stored, written, whether every value survives
    ("instruct", "fp4", True),
    ("instruct", "fp8", True),
    ("instruct", "bf16", True),
    ("fp8", "bf16", True),
    ("bf16", "fp8", True),  # its values came from FP8 and FP4
    ("bf16", "fp4", True),
    ("fp8", "fp4", True),
    ("base", "fp8", True),
    ("base", "bf16", False),  # scales are no powers of two
    ("base", "fp4", False),
]


@pytest.mark.parametrize("variant, fmt, is_exact", EXACT)
def test_other_formats(tmp_path, variants, converted, variant, fmt, is_exact):
    export(converted[variant], tmp_path / "back", fmt)
    before, after = read_raw(variants[variant]), read_raw(tmp_path / "back")
    for name in after.tensors:
        if name.endswith(".scale"):
            continue
        have, want = values(after, name), values(before, name)
        if is_exact:
            np.testing.assert_array_equal(have, want, name)
        else:
            step = {"bf16": 2.0**-8, "fp4": 0.25}[fmt]
            assert np.abs(have - want).max() <= step * np.abs(want).max(), name
    expert, dense = "layers.0.ffn.experts.0.w1.weight", "layers.0.attn.wq_a.weight"
    assert after.dtypes[expert] == {"fp4": "I8", "fp8": "F8_E4M3", "bf16": "BF16"}[fmt]
    assert after.dtypes[dense] == ("BF16" if fmt == "bf16" else "F8_E4M3")
    assert {name: after.files[name] for name in before.tensors if name in after.tensors} == {
        name: file for name, file in before.files.items() if name in after.tensors
    }


@pytest.mark.parametrize("variant, fmt, _", EXACT)
def test_other_formats_are_valid_sources_again(tmp_path, converted, variant, fmt, _):
    export(converted[variant], tmp_path / "back", fmt)
    job = prepare(tmp_path / "back", tmp_path / "again", "keep")
    wanted = {"fp4": ("fp8", "fp4"), "fp8": ("fp8", "fp8"), "bf16": (None, None)}[fmt]
    assert (job.stored.dense_format, job.stored.expert_format) == wanted
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("expert_dtype") == wanted[1]
    assert ("quantization_config" in config) == (wanted[0] is not None)
    metadata = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    total = sum(t.nbytes for t in job.reader.tensors.values())
    if (variant, fmt) not in (("instruct", "fp4"), ("base", "fp8")):  # those are the originals
        assert metadata["metadata"]["total_size"] == total


def test_converted_experts_are_exported_as_stored(tmp_path):
    convert(INSTRUCT, tmp_path / "dst", experts="fp8")
    export(tmp_path / "dst", tmp_path / "back")
    raw = read_raw(tmp_path / "back")
    assert raw.config["expert_dtype"] == "fp8"
    assert raw.dtypes["layers.1.ffn.experts.0.w2.weight"] == "F8_E4M3"
    convert(INSTRUCT, tmp_path / "dst16", experts="bf16")
    export(tmp_path / "dst16", tmp_path / "back16")
    raw = read_raw(tmp_path / "back16")
    assert "expert_dtype" not in raw.config and "quantization_config" in raw.config
    assert prepare(tmp_path / "back16", tmp_path / "x", "keep").stored.expert_format is None
    export(tmp_path / "dst16", tmp_path / "back4", "fp4")
    for name, array in read_raw(tmp_path / "back4").tensors.items():
        if not name.endswith("scale"):
            source = read_raw(INSTRUCT)
            np.testing.assert_array_equal(
                values(read_raw(tmp_path / "back4"), name), values(source, name)
            )
            assert array.shape == source.tensors[name].shape
            break


def test_new_shards_are_aligned(tmp_path, converted):
    export(converted["bf16"], tmp_path / "back", "fp4")
    for path in (tmp_path / "back").glob("*.safetensors"):
        header, base = read_header(path)
        assert base % 8 == 0
        header.pop("__metadata__", None)
        sizes = {"I64": 8, "F32": 4, "BF16": 2}
        for name, entry in header.items():
            assert entry["data_offsets"][0] % sizes.get(entry["dtype"], 1) == 0, name


def test_a_trained_checkpoint_gets_the_official_shards(tmp_path, converted):
    cfg = load_config(converted["instruct"])
    units = store.load_units(converted["instruct"], cfg)
    store.save_checkpoint(tmp_path / "trained", cfg, units)
    export(tmp_path / "trained", tmp_path / "back")
    have, want = tensor_files(tmp_path / "back"), tensor_files(INSTRUCT)
    assert have == want  # also the file of every tensor


def test_a_source_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        export(tmp_path / "none", tmp_path / "back")
    with pytest.raises(CheckpointError, match="must be converted first"):
        export(BASE, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_damaged_source_is_noticed(tmp_path, monkeypatch, converted):
    original = store.load_unit_numpy

    def damaged(path, unit, cfg):
        flat = original(path, unit, cfg)
        flat["norm"] = -flat["norm"] if "norm" in flat else flat
        return flat

    monkeypatch.setattr(store, "load_unit_numpy", damaged)
    with pytest.raises(CheckpointError, match="norm differs from its recorded checksum"):
        export(converted["base"], tmp_path / "back")
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


def test_destinations(tmp_path, converted):
    src = converted["base"]
    with pytest.raises(CheckpointError, match="same directory"):
        export(src, src)
    with pytest.raises(CheckpointError, match="lies inside SRC"):
        export(src, src / "back")
    shutil.copytree(src, tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds a converted checkpoint"):
        export(src, tmp_path / "other", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not empty and holds no official checkpoint"):
        export(src, tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is not a directory"):
        export(src, tmp_path / "file")
    export(src, tmp_path / "back")
    with pytest.raises(CheckpointError, match="holds an official checkpoint already"):
        export(src, tmp_path / "back")
    export(converted["instruct"], tmp_path / "back", overwrite=True)
    assert tensor_files(tmp_path / "back") == tensor_files(INSTRUCT)


@pytest.mark.parametrize("place", ["write", "finish", "rest"])
def test_a_broken_off_export_starts_again(tmp_path, monkeypatch, converted, place):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if place == "rest":
            patch.setattr(export_module, "_write_rest", die)
        else:
            patch.setattr(export_module.ShardWriter, place, die)
        with pytest.raises(Killed):
            export(converted["base"], tmp_path / "back")
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()
    export(converted["base"], tmp_path / "back")
    assert tensor_files(tmp_path / "back") == tensor_files(BASE)
    assert not (tmp_path / "back" / export_module.MARKER_NAME).exists()


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch, converted):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="no space left on the device"):
        export(converted["base"], tmp_path / "back")


def test_fp4_that_does_not_fit_fp8_is_named(tmp_path):
    raw = read_raw(INSTRUCT)
    name = "layers.2.ffn.experts.5.w2.scale"
    scale = raw.tensors[name].view(np.uint8).copy()
    scale[1, 1] = 10
    raw.put(name, "F8_E8M0", scale.view(raw.tensors[name].dtype))
    convert(write_raw(raw, tmp_path / "src"), tmp_path / "dst")
    with pytest.raises(CheckpointError, match="experts.5.w2.weight cannot become fp8"):
        export(tmp_path / "dst", tmp_path / "back", "fp8")


def test_unknown_formats(tmp_path, converted):
    with pytest.raises(ValueError, match="format='int4' must be one of"):
        export(converted["base"], tmp_path / "back", "int4")
