"""The strict comparison of names, shapes, dtypes and of the values that obey rules."""

import numpy as np
import pytest

from checkpoints.check import check_tensors, check_values, detect_formats
from checkpoints.convert import prepare
from checkpoints.errors import MAX_LISTED, CheckpointError
from checkpoints.hf_reader import open_checkpoint
from checkpoints.manifest import config_from_hf
from tests.checkpoints.support import BASE, INSTRUCT, read_raw, write_raw

NORM, WQ = "layers.0.attn_norm.weight", "layers.0.attn.wq_a.weight"


def examine(root):
    """All checks a conversion makes before it writes anything."""
    return prepare(root, root.parent / "dst", "keep")


@pytest.mark.parametrize(
    "variant, formats",
    [
        ("instruct", ("fp8", "fp4", "float8_e8m0fnu")),
        ("base", ("fp8", "fp8", "float32")),
        ("bf16", (None, None, "float8_e8m0fnu")),
        ("fp8", ("fp8", "fp8", "float8_e8m0fnu")),
        ("single", ("fp8", "fp8", "float32")),
    ],
)
def test_formats_come_from_the_stored_dtypes(variants, variant, formats):
    cfg = examine(variants[variant]).stored
    assert (cfg.dense_format, cfg.expert_format, cfg.scale_dtype) == formats


@pytest.mark.parametrize("claim", [None, "fp8", "fp4", "bf16"])
def test_what_the_config_claims_of_experts_does_not_matter(tmp_path, claim):
    raw = read_raw(INSTRUCT)
    raw.config.pop("expert_dtype")
    if claim:
        raw.config["expert_dtype"] = claim
    assert examine(write_raw(raw, tmp_path / "src")).stored.expert_format == "fp4"


def test_no_quantisation_config_over_quantised_weights(tmp_path):
    raw = read_raw(INSTRUCT)
    del raw.config["quantization_config"]
    cfg = examine(write_raw(raw, tmp_path / "src")).stored
    assert (cfg.dense_format, cfg.expert_format) == ("fp8", "fp4")


def change_missing(raw):
    raw.drop(NORM)


def change_extra(raw):
    raw.put("layers.0.attn.kv_proj.weight", "BF16", raw.tensors[NORM], like=NORM)


def change_shape(raw):
    raw.put(NORM, "BF16", raw.tensors[NORM][:64])


def change_dtype(raw):
    raw.put(NORM, "F32", raw.tensors[NORM].astype(np.float32))


def change_format_of_one(raw):
    raw.put(WQ, "I8", raw.tensors[WQ].view(np.int8))


def change_scale(raw):
    raw.drop("layers.0.attn.wq_a.scale")


def change_layer(raw):
    for name in [n for n in raw.tensors if n.startswith("mtp.0.ffn.experts.1.")]:
        raw.drop(name)


CHANGES = {
    "missing": (change_missing, r"missing: layers\.0\.attn_norm\.weight \(BF16 \[128\]\)"),
    "extra": (change_extra, r"unexpected: layers\.0\.attn\.kv_proj\.weight \(BF16 \[128\]\)"),
    "shape": (change_shape, r"wrong shape: layers\.0\.attn_norm\.weight is \[64\], expected \[128"),
    "dtype": (change_dtype, r"wrong dtype: layers\.0\.attn_norm\.weight is F32, expected BF16"),
    "one format": (change_format_of_one, r"wrong dtype: layers\.0\.attn\.wq_a\.weight is I8, exp"),
    "scale": (change_scale, r"missing: layers\.0\.attn\.wq_a\.scale \(F32"),
    "expert": (change_layer, r"missing: mtp\.0\.ffn\.experts\.1\.w1\.weight"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_difference_is_named(kind, tmp_path):
    change, message = CHANGES[kind]
    raw = read_raw(BASE)
    assert raw.tensors[NORM].shape == (128,)
    change(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        examine(write_raw(raw, tmp_path / "src"))
    assert "does not match its config.json" in str(caught.value)


def test_all_differences_are_listed_at_once(tmp_path):
    raw = read_raw(BASE)
    change_extra(raw)
    change_missing(raw)
    raw.put("norm.weight", "BF16", raw.tensors["norm.weight"][:64])
    raw.put("mtp.0.enorm.weight", "F32", raw.tensors["mtp.0.enorm.weight"].astype(np.float32))
    with pytest.raises(CheckpointError) as caught:
        examine(write_raw(raw, tmp_path / "src"))
    lines = str(caught.value).splitlines()
    assert "4 problems" in lines[0]
    kinds = sorted(line.strip().split(":")[0] for line in lines[1:])
    assert kinds == ["missing", "unexpected", "wrong dtype", "wrong shape"]


def test_long_lists_are_cut_with_a_count(tmp_path):
    raw = read_raw(INSTRUCT)
    names = [n for n in raw.tensors if n.startswith("layers.1.")]
    for name in names:
        raw.drop(name)
    with pytest.raises(CheckpointError) as caught:
        examine(write_raw(raw, tmp_path / "src"))
    lines = str(caught.value).splitlines()
    assert f"{len(names)} problems" in lines[0]
    assert len(lines) == MAX_LISTED + 2
    assert lines[-1].strip() == f"… and {len(names) - MAX_LISTED} more"


def test_matrices_in_unsupported_dtypes(tmp_path):
    raw = read_raw(BASE)
    for name in [n for n in raw.tensors if n.removesuffix("weight") + "scale" in raw.tensors]:
        raw.put(name, "F32", raw.tensors[name].astype(np.float32))
    with pytest.raises(CheckpointError, match="is F32; matrices must be stored as F8_E4M3 or BF16"):
        examine(write_raw(raw, tmp_path / "src"))


@pytest.mark.parametrize(
    "value, message",
    [
        (8, "tid2eid holds expert ids from 0 to 8; they must lie in 0 … 7"),
        (-1, "tid2eid holds expert ids from -1 to"),
        (None, "tid2eid names an expert twice in 1 rows, first in row 5"),
    ],
)
def test_bad_hash_tables_are_named(tmp_path, value, message):
    raw = read_raw(INSTRUCT)
    name = "layers.0.ffn.gate.tid2eid"
    table = raw.tensors[name].copy()
    table[5, 0] = table[5, 1] if value is None else value
    raw.put(name, "I64", table)
    with pytest.raises(CheckpointError, match=f"{name.removesuffix('tid2eid')}{message}"):
        examine(write_raw(raw, tmp_path / "src"))


def test_copies_of_the_embedding_must_equal_it(tmp_path):
    raw = read_raw(BASE)
    name = "mtp.0.emb.tok_emb.weight"
    changed = raw.tensors[name].view(np.uint16).copy()
    changed[-1, -1] ^= 1
    raw.put(name, "BF16", changed.view(raw.tensors[name].dtype))
    message = "mtp.0.emb.tok_emb.weight differs from embed.weight, of which it must be a copy"
    with pytest.raises(CheckpointError, match=message):
        examine(write_raw(raw, tmp_path / "src"))


def test_both_copies_or_none(tmp_path):
    raw = read_raw(BASE)
    raw.drop("mtp.0.head.weight")
    with pytest.raises(CheckpointError, match="missing: mtp.0.head.weight"):
        examine(write_raw(raw, tmp_path / "one"))
    raw.drop("mtp.0.emb.tok_emb.weight")
    examine(write_raw(raw, tmp_path / "none"))


def test_checks_pass_on_the_fixtures():
    for source in (INSTRUCT, BASE):
        reader = open_checkpoint(source)
        cfg = detect_formats(reader, config_from_hf(reader.config))
        entries = check_tensors(reader, cfg)
        assert {e.name for e in entries} == reader.tensors.keys()
        check_values(reader, entries, cfg)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model_type", "deepseek_v41", "model_type='deepseek_v41' is another architecture"),
        ("dspark_block_size", 5, "dspark_block_size"),
        ("vision_n_layers", 32, "vision_n_layers"),
        ("hidden_size", None, "hidden_size"),
    ],
)
def test_other_architectures_are_rejected(tmp_path, field, value, message):
    raw = read_raw(BASE)
    raw.config[field] = value
    with pytest.raises(ValueError, match=message):
        examine(write_raw(raw, tmp_path / "src"))
