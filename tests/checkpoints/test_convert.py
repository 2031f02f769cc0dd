"""Conversion: formats, refusals, resuming; no failure leaves anything taken for whole."""

import json
import os
import shutil

import numpy as np
import pytest

from checkpoints import convert as convert_module
from checkpoints import files, resume, store
from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.manifest import load_config, read_manifest
from checkpoints.progress import Progress
from checkpoints.transforms import to_float32
from dsv4_jax.params import unit_specs
from tests.checkpoints.support import (
    BASE,
    INSTRUCT,
    read_raw,
    stored_arrays,
    values,
    write_raw,
)


@pytest.fixture
def source(tmp_path):
    shutil.copytree(BASE, tmp_path / "src")
    return tmp_path / "src"


@pytest.mark.parametrize("variant", ["instruct", "base", "bf16", "fp8", "single"])
def test_manifest_describes_what_is_stored(converted, variants, variant):
    root = converted[variant]
    manifest, cfg = read_manifest(root), load_config(root)
    assert list(manifest.units) == list(unit_specs(cfg))
    for unit, leaves in manifest.units.items():
        store.check_stored(leaves, unit, cfg)
    assert manifest.mtp_copies == (variant in ("base", "single"))
    assert (root / "config.json").read_bytes() == (variants[variant] / "config.json").read_bytes()
    assert not (root / ".convert").exists()


def test_workers_make_no_difference(tmp_path, converted):
    manifest = convert(INSTRUCT, tmp_path / "dst", workers=4, verify=True)
    assert manifest == read_manifest(converted["instruct"])
    assert stored_arrays(tmp_path / "dst") == stored_arrays(converted["instruct"])


@pytest.mark.parametrize("experts, fmt", [("fp8", "fp8"), ("bf16", None)])
@pytest.mark.parametrize("variant", ["instruct", "base"])
def test_expert_modes_keep_every_value(tmp_path, variants, variant, experts, fmt):
    convert(variants[variant], tmp_path / "dst", experts=experts, verify=True)
    cfg = load_config(tmp_path / "dst")
    assert (cfg.dense_format, cfg.expert_format) == ("fp8", fmt)
    raw = read_raw(variants[variant])
    for unit in ("layer_00", "mtp_0"):
        prefix = "layers.0" if unit == "layer_00" else "mtp.0"
        flat = store.load_unit_numpy(tmp_path / "dst", unit, cfg)
        for expert in range(cfg.num_experts):
            for matrix in ("w1", "w2", "w3"):
                stem = f"ffn/experts/{matrix}"
                if fmt:
                    parts = flat[f"{stem}/codes"][expert], flat[f"{stem}/scales"][expert]
                    have = to_float32(*parts)
                else:
                    have = flat[stem][expert].astype(np.float32)
                want = values(raw, f"{prefix}.ffn.experts.{expert}.{matrix}.weight")
                if experts == "bf16":  # rounds where scales are no powers of two
                    want = want.astype(np.float32).astype(flat[stem].dtype)
                np.testing.assert_array_equal(have, want.astype(np.float32))


def test_fp8_experts_equal_the_independent_variant(tmp_path, converted):
    convert(INSTRUCT, tmp_path / "dst", experts="fp8")
    assert stored_arrays(tmp_path / "dst") == stored_arrays(converted["fp8"])


def test_fp8_experts_that_do_not_fit_are_named(tmp_path):
    raw = read_raw(INSTRUCT)
    name = "layers.1.ffn.experts.2.w3"
    scale = raw.tensors[f"{name}.scale"].view(np.uint8).copy()
    scale[0, 0] = 20
    raw.put(f"{name}.scale", "F8_E8M0", scale.view(raw.tensors[f"{name}.scale"].dtype))
    root = write_raw(raw, tmp_path / "src")
    with pytest.raises(CheckpointError, match=f"{name}.weight cannot be converted .*fp8: .*apart"):
        convert(root, tmp_path / "dst", experts="fp8")
    with pytest.raises(CheckpointError, match="incomplete conversion"):
        load_config(tmp_path / "dst")


def test_fp8_experts_of_an_unquantised_model(tmp_path, variants):
    with pytest.raises(CheckpointError, match="lossless change of FP4 only"):
        convert(variants["bf16"], tmp_path / "dst", experts="fp8")
    assert not (tmp_path / "dst").exists()


def test_tokenizer_files_are_carried_along(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    (source / "encoding").mkdir()
    (source / "encoding" / "encoding.py").write_text("pass")
    notes = []
    progress = Progress("convert", quiet=True)
    progress.note = notes.append
    convert(source, tmp_path / "dst", progress=progress)
    assert (tmp_path / "dst" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "dst" / "encoding" / "encoding.py").exists()
    assert not notes
    (source / "tokenizer.json").unlink()
    shutil.rmtree(source / "encoding")
    convert(source, tmp_path / "dst", progress=progress, overwrite=True)
    assert notes == [
        f"warning: {source} has no tokenizer.json; the result will run on token ids only"
    ]
    assert not (tmp_path / "dst" / "tokenizer.json").exists()
    assert not (tmp_path / "dst" / "encoding").exists()


def test_a_complete_destination_is_refused(source, tmp_path):
    convert(source, tmp_path / "dst")
    with pytest.raises(CheckpointError, match="holds a complete checkpoint already.*--overwrite"):
        convert(source, tmp_path / "dst")
    convert(source, tmp_path / "dst", overwrite=True)
    load_config(tmp_path / "dst")


def test_refused_destinations_are_left_alone(source, tmp_path):
    with pytest.raises(CheckpointError, match="SRC and DST are the same directory"):
        convert(source, source / ".")
    with pytest.raises(CheckpointError, match="DST .* lies inside SRC"):
        convert(source, source / "dst")
    outer = tmp_path / "outer"
    shutil.copytree(BASE, outer / "src")
    with pytest.raises(CheckpointError, match="SRC .* lies inside DST"):
        convert(outer / "src", outer, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not a directory"):
        convert(source, tmp_path / "file")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="not empty and holds no checkpoint"):
            convert(source, tmp_path / "home", overwrite=overwrite)
    assert sorted(p.name for p in (tmp_path / "home").iterdir()) == ["thesis.txt"]
    assert not (source / "dst").exists()
    with pytest.raises(CheckpointError, match="cannot write .*: Not a directory"):
        convert(source, tmp_path / "file" / "dst")


def test_a_bad_source_creates_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def stop_after(monkeypatch, count):
    """Makes the conversion fail in front of the record of unit number `count` (0-based)."""
    original, calls = resume.write_record, []

    def write_record(*args):
        calls.append(args[1])
        if len(calls) > count:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(resume, "write_record", write_record)
    return calls


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_interrupted_conversion_continues(source, tmp_path, monkeypatch, converted, count):
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "dst")
    with pytest.raises(CheckpointError, match="incomplete conversion: run the same convert_hf.py"):
        load_config(tmp_path / "dst")
    saved = []
    original = store.save_unit
    monkeypatch.setattr(store, "save_unit", lambda p, u, t: saved.append(u) or original(p, u, t))
    manifest = convert(source, tmp_path / "dst", verify=True)
    assert saved == ["top", "layer_00", "mtp_0"][count:]
    assert manifest.units == read_manifest(converted["base"]).units


def test_a_changed_source_is_refused(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "dst")
    shard = source / "model-00004-of-00004.safetensors"
    config = source / "config.json"
    with pytest.raises(CheckpointError, match="--experts changed from keep to bf16: pass --overwr"):
        convert(source, tmp_path / "dst", experts="bf16")
    text = config.read_text()
    config.write_text(text + "\n")
    with pytest.raises(CheckpointError, match="since it began config.json of SRC changed"):
        convert(source, tmp_path / "dst")
    config.write_text(text)
    os.utime(shard, (1, 1))
    with pytest.raises(CheckpointError, match=r"SRC changed \(model-00004-of-00004.safetensors\)"):
        convert(source, tmp_path / "dst")
    saved = []
    original = store.save_unit
    monkeypatch.setattr(store, "save_unit", lambda p, u, t: saved.append(u) or original(p, u, t))
    convert(source, tmp_path / "dst", overwrite=True)
    assert saved == ["top", "layer_00", "mtp_0"]


class Killed(BaseException):
    """Stands for the death of the process."""


STEPS = [
    (files, "write_json"),
    (files, "write_atomic"),
    (files, "fsync_tree"),
    (files, "copy_companions"),
    (store, "save_unit"),
    (convert_module, "read_unit"),
    (convert_module, "write_manifest"),
    (resume, "open_destination"),
    (shutil, "rmtree"),
    (os, "replace"),
]


@pytest.mark.parametrize(
    "is_after", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["before", "after"]
)
@pytest.mark.parametrize("place", STEPS, ids=[name for _, name in STEPS])
def test_death_at_every_step(source, tmp_path, monkeypatch, converted, place, is_after):
    """Dies at the first, second, … call of a step, continues, until a run gets through.

    The destination holds another complete checkpoint at first, so overwriting is covered too.
    """
    dst = tmp_path / "dst"
    convert(source, dst, experts="bf16")
    module, name = place
    original = getattr(module, name)
    deaths = 0
    for attempt in range(40):
        calls = []

        def dying(*args, _calls=calls, _limit=attempt, **kwargs):
            _calls.append(name)
            if len(_calls) > _limit and not is_after:
                raise Killed
            result = original(*args, **kwargs)
            if len(_calls) > _limit:
                raise Killed
            return result

        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying)
            try:
                convert(source, dst, overwrite=True)
                break
            except Killed:
                deaths += 1
        if (dst / "manifest.json").exists():
            convert_module.verify_units(
                dst, load_config(dst), read_manifest(dst).units, Progress("verify", quiet=True)
            )
    assert 0 < deaths < 39
    assert read_manifest(dst) == read_manifest(converted["base"])
    assert stored_arrays(dst) == stored_arrays(converted["base"])


def test_two_conversions_of_one_destination_exclude_each_other(source, tmp_path):
    dst = tmp_path / "dst"
    (dst / ".convert").mkdir(parents=True)
    with files.exclusive(dst / ".convert" / resume.LOCK_NAME):
        with pytest.raises(CheckpointError, match="another process is writing"):
            convert(source, dst)
    convert(source, dst)


def test_verify_finds_damage(source, tmp_path, monkeypatch):
    original = store.save_unit

    def damage(path, unit, flat):
        if unit == "mtp_0":
            flat["attn/wkv/codes"].view(np.uint8)[3, 3] ^= 1
        original(path, unit, flat)

    monkeypatch.setattr(store, "save_unit", damage)
    with pytest.raises(CheckpointError, match="attn/wkv/codes differs from its recorded checksum"):
        convert(source, tmp_path / "dst", verify=True)
    with pytest.raises(CheckpointError, match="incomplete"):
        load_config(tmp_path / "dst")


def test_a_full_disk_is_foreseen(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="no space left .* are still to be written"):
        convert(source, tmp_path / "dst")


def test_a_full_disk_in_the_middle(source, tmp_path, monkeypatch, converted):
    original = store._checkpointer
    text = "RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def save(self, folder, args, force):
            if folder.name == "top":
                with original() as real:
                    return real.save(folder, args=args, force=force)
            (folder.parent / (folder.name + ".orbax-checkpoint-tmp")).mkdir()
            raise ValueError(text)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_checkpointer", Full)
        with pytest.raises(
            CheckpointError, match="no space left on the device while writing .*00:"
        ):
            convert(source, tmp_path / "dst")
    with pytest.raises(CheckpointError, match="incomplete"):
        load_config(tmp_path / "dst")
    convert(source, tmp_path / "dst")
    assert stored_arrays(tmp_path / "dst") == stored_arrays(converted["base"])


@pytest.mark.parametrize(
    "error, message",
    [
        (PermissionError(13, "Permission denied"), "permission denied or read-only"),
        (OSError(30, "Read-only file system"), "permission denied or read-only"),
        (OSError(122, "Disk quota exceeded"), "disk quota exceeded"),
        (OSError(28, "No space left on device"), "no space left on the device"),
        (OSError(5, "Input/output error"), "cannot write .*: Input/output error"),
    ],
)
def test_failed_writes_are_explained(source, tmp_path, monkeypatch, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(files, "write_json", fail)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "dst")


def test_progress_prints_plain_lines(source, tmp_path, capsys):
    convert(source, tmp_path / "dst", progress=Progress("convert"), verify=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: ")
    assert sum(line.startswith("convert: ") for line in lines) == 3
    assert lines[-1].startswith("verify: mtp_0 done, 100 %")


def test_progress_draws_a_bar_on_a_terminal():
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("convert", stream=stream) as progress:
        progress.start(100)
        progress.advance("top", 50)
        progress.note("a note")
    assert "50%" in stream.getvalue() and "a note" in stream.getvalue()


def test_the_manifest_is_plain_json(converted):
    raw = json.loads((converted["base"] / "manifest.json").read_text())
    assert raw["version"] == 1 and raw["scale_dtype"] == "float32"
    leaf = raw["units"]["layer_00"]["attn/wq_a/codes"]
    assert set(leaf) == {"shape", "dtype", "checksum"}
    assert raw["shards"]["model-00001-of-00004.safetensors"]["tensors"] == ["embed.weight"]
