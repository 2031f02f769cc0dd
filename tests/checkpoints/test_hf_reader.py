"""Damaged and incomplete official directories: every kind gives one clear error."""

import json
import shutil
import struct

import numpy as np
import pytest

from checkpoints.errors import CheckpointError
from checkpoints.hf_reader import open_checkpoint, read_shard
from tests.checkpoints.support import BASE, INSTRUCT, read_raw, write_raw, write_shard

SHARD = "model-00002-of-00004.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("source", [INSTRUCT, BASE])
def test_views_and_reads_give_the_stored_bytes(source):
    raw, reader = read_raw(source), open_checkpoint(source)
    assert reader.tensors.keys() == raw.tensors.keys()
    for name, array in raw.tensors.items():
        view = reader.view(name)
        assert (view.dtype, view.shape) == (array.dtype, array.shape)
        assert view.tobytes() == array.tobytes()
        out = np.empty(array.shape, array.dtype)
        reader.read_into(name, out)
        assert out.tobytes() == array.tobytes()
        assert not view.flags.writeable


def test_a_single_file_needs_no_index(variants):
    reader = open_checkpoint(variants["single"])
    assert reader.index_metadata is None
    assert reader.tensors.keys() == read_raw(BASE).tensors.keys()


def test_weight_and_scale_may_lie_in_different_files(tmp_path):
    raw = read_raw(BASE)
    files = sorted(set(raw.files.values()))
    raw.files = {
        name: files[-1] if name.endswith("scale") else file for name, file in raw.files.items()
    }
    reader = open_checkpoint(write_raw(raw, tmp_path / "mixed"))
    name = "layers.0.attn.wq_a.scale"
    assert reader.tensors[name].file == files[-1]
    assert reader.view(name).tobytes() == raw.tensors[name].tobytes()


def edit_header(path, change):
    """Rewrites the JSON header of a shard in place of the old one."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_index(root, change):
    index = json.loads((root / INDEX).read_text())
    change(index["weight_map"])
    (root / INDEX).write_text(json.dumps(index))


def truncate(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


NORM = "layers.0.attn_norm.weight"
DAMAGE = {
    "no config": (
        lambda r: (r / "config.json").unlink(),
        r"config\.json is missing",
    ),
    "config no JSON": (
        lambda r: (r / "config.json").write_text("{"),
        r"config\.json is not valid JSON",
    ),
    "config no object": (
        lambda r: (r / "config.json").write_text("[]"),
        "does not hold a JSON object",
    ),
    "no index": (
        lambda r: (r / INDEX).unlink(),
        r"index\.json is missing, and so is model\.safetensors",
    ),
    "index no JSON": (
        lambda r: (r / INDEX).write_text('{"weight_map": '),
        r"index\.json is not valid JSON",
    ),
    "index without map": (
        lambda r: (r / INDEX).write_text('{"metadata": {}}'),
        "has no 'weight_map'",
    ),
    "index with bad map": (
        lambda r: (r / INDEX).write_text('{"weight_map": {"a": 1}}'),
        "has no 'weight_map'",
    ),
    "index empty": (
        lambda r: (r / INDEX).write_text('{"weight_map": {}}'),
        "names no tensors",
    ),
    "index leaves the directory": (
        lambda r: edit_index(r, lambda m: m.update({NORM: "../other.safetensors"})),
        r"files outside the directory: \['\.\./other",
    ),
    "shard missing": (
        lambda r: (r / SHARD).unlink(),
        f"shard .*{SHARD} is missing",
    ),
    "index names a tensor that is nowhere": (
        lambda r: edit_index(r, lambda m: m.update({"layers.0.extra": SHARD})),
        f"places layers.0.extra in {SHARD}, which does not hold it",
    ),
    "index lacks a tensor": (
        lambda r: edit_index(r, lambda m: m.pop(NORM)),
        f"{SHARD} holds {NORM}, which .* does not name",
    ),
    "index names a file that is nowhere": (
        lambda r: edit_index(r, lambda m: m.update({NORM: "gone.safetensors"})),
        "shard .*gone.safetensors is missing",
    ),
    "truncated data": (
        lambda r: truncate(r / SHARD, 100_000),
        f"{SHARD} is truncated: its tensors end at byte .*, the file has 100000",
    ),
    "truncated header": (
        lambda r: truncate(r / SHARD, 1000),
        f"{SHARD} is truncated: its header needs .* bytes, the file has 1000",
    ),
    "empty shard": (
        lambda r: truncate(r / SHARD, 0),
        f"{SHARD} is truncated: 0 bytes hold no header",
    ),
    "bad header length": (
        lambda r: (r / SHARD).write_bytes(b"\xff" * 64),
        f"{SHARD} has a bad header length",
    ),
    "header no JSON": (
        lambda r: edit_header(r / SHARD, lambda h: b"{nonsense"),
        f"{SHARD} has a header that is not JSON",
    ),
    "header no object": (
        lambda r: edit_header(r / SHARD, lambda h: b"[1]"),
        "header that is not a JSON object",
    ),
    "name twice": (
        lambda r: edit_header(r / SHARD, lambda h: b'{"a": 1, "a": 2}'),
        "names a tensor or field twice",
    ),
    "entry without offsets": (
        lambda r: edit_header(r / SHARD, lambda h: h[NORM].pop("data_offsets") and None),
        f"entry {NORM} lacks dtype, shape or data_offsets",
    ),
    "negative size": (
        lambda r: edit_header(r / SHARD, lambda h: h[NORM].update(shape=[-128])),
        f"{NORM} has bad numbers",
    ),
    "unknown dtype": (
        lambda r: edit_header(r / SHARD, lambda h: h[NORM].update(dtype="F9")),
        f"{NORM} has unknown dtype 'F9'; known are",
    ),
    "offsets and shape disagree": (
        lambda r: edit_header(r / SHARD, lambda h: h[NORM].update(shape=[64])),
        f"{NORM} is BF16 .* but its offsets .* span",
    ),
    "overlap": (
        lambda r: edit_header(r / SHARD, lambda h: h[NORM].update(data_offsets=[0, 256])),
        "overlaps the tensor before it",
    ),
    "hole": (
        lambda r: edit_header(r / SHARD, lambda h: h.pop(NORM) and None),
        r"follows a hole \(inconsistent offsets\)",
    ),
    "trailing bytes": (
        lambda r: (r / SHARD).write_bytes((r / SHARD).read_bytes() + b"xx"),
        f"{SHARD} has 2 bytes after its last tensor",
    ),
    "Git LFS pointer": (
        lambda r: (r / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "Git LFS pointer, not the weights: run `git lfs pull`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, tmp_path):
    damage, message = DAMAGE[kind]
    root = tmp_path / "src"
    shutil.copytree(BASE, root)
    damage(root)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(root)


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_damage_of_several_files_is_listed_at_once(tmp_path):
    root = tmp_path / "src"
    shutil.copytree(BASE, root)
    (root / "model-00001-of-00004.safetensors").unlink()
    truncate(root / SHARD, 1000)
    edit_index(root, lambda m: m.update({"layers.0.extra": "model-00003-of-00004.safetensors"}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(root)
    text = str(caught.value)
    assert "is damaged, 3 problems:" in text
    assert "00001-of-00004.safetensors is missing" in text
    assert "is truncated" in text and "layers.0.extra" in text


def test_a_tensor_in_two_files_is_refused(tmp_path):
    raw = read_raw(BASE)
    root = write_raw(raw, tmp_path / "src")
    first, second = sorted(set(raw.files.values()))[1:3]
    inside = [n for n, f in raw.files.items() if f == second]
    tensors = {n: (raw.dtypes[n], raw.tensors[n]) for n in [*inside, NORM]}
    write_shard(root / second, tensors)
    with pytest.raises(CheckpointError, match=f"{NORM} is in {second} as well as in {first}"):
        open_checkpoint(root)


def test_a_file_that_shrinks_while_open_is_noticed(tmp_path):
    root = tmp_path / "src"
    shutil.copytree(BASE, root)
    reader = open_checkpoint(root)
    last = max(reader.shards[SHARD].tensors, key=lambda t: t.start)
    truncate(root / SHARD, last.start + 1)
    with pytest.raises(CheckpointError, match=f"ended inside {last.name}"):
        reader.read_into(last.name, np.empty(last.nbytes, np.uint8))
    (root / SHARD).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        reader.view(last.name)


def test_every_public_dtype_is_understood(tmp_path):
    write_shard(tmp_path / "x.safetensors", {"a": ("F16", np.zeros((2, 3), np.float16))})
    (tensor,) = read_shard(tmp_path, "x.safetensors").tensors
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("F16", (2, 3), 12)
