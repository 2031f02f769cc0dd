"""The name table against the published inventories."""

import functools
from collections import Counter

import pytest

from checkpoints import names
from checkpoints.hf_reader import DTYPES
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import unit_specs
from tests.checkpoints.support import BASE, INSTRUCT, read_raw

FLASH = ModelConfig(
    vocab_size=129280,
    dim=4096,
    num_layers=43,
    compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
    num_heads=64,
    head_dim=512,
    rope_dim=64,
    q_rank=1024,
    o_groups=8,
    o_rank=1024,
    num_experts=256,
    experts_per_token=6,
    expert_dim=2048,
    num_hash_layers=3,
    routed_scale=1.5,
)
PRO = FLASH.replace(
    dim=7168,
    num_layers=61,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
    num_heads=128,
    q_rank=1536,
    o_groups=16,
    num_experts=384,
    expert_dim=3072,
    routed_scale=2.5,
    index_topk=1024,
)
PRO_BASE = PRO.replace(expert_format="fp8", scale_dtype="float32")
official_tensors = functools.cache(names.official_tensors)
FLASH_BASE = FLASH.replace(expert_format="fp8", scale_dtype="float32")


@pytest.mark.parametrize(
    "cfg, copies, tensors, size",
    [
        (FLASH, False, 69_187, 159_609_485_896),
        (PRO, False, 145_116, 864_704_792_696),
        (FLASH_BASE, False, 69_187, 292_555_345_480),
        (FLASH_BASE, True, 69_189, 294_673_469_000),
        (PRO_BASE, False, 145_116, 1_602_325_824_632),
    ],
    ids=["flash", "pro", "flash-base", "flash-base-copies", "pro-base"],
)  # fmt: skip
def test_whole_checkpoints_have_the_published_counts_and_bytes(cfg, copies, tensors, size):
    entries = official_tensors(cfg, copies)
    assert (len(entries), sum(e.nbytes for e in entries)) == (tensors, size)
    assert len({e.name for e in entries}) == tensors


def test_flash_by_dtype_and_by_layer():
    entries = official_tensors(FLASH)
    count, size = Counter(e.dtype for e in entries), Counter[str]()
    layers, layer_bytes = Counter(e.unit for e in entries), Counter[str]()
    for e in entries:
        size[e.dtype] += e.nbytes
        layer_bytes[e.unit] += e.nbytes
    assert dict(count) == {
        "I8": 33792, "F8_E8M0": 34167, "BF16": 433, "F32": 417, "F8_E4M3": 375, "I64": 3,
    }  # fmt: skip
    assert dict(size) == {
        "I8": 141_733_920_768, "F8_E8M0": 8_858_737_664, "F8_E4M3": 6_023_020_544,
        "BF16": 2_830_518_528, "F32": 144_672_072, "I64": 18_616_320,
    }  # fmt: skip
    units = ["layer_00", "layer_02", "layer_03", "layer_04", "mtp_0"]
    assert [layers[u] for u in units] == [1565, 1576, 1569, 1576, 1575]
    assert [layer_bytes[u] for u in units] == [
        3_566_148_952, 3_596_055_640, 3_568_596_312, 3_589_851_224, 3_593_787_756,
    ]  # fmt: skip


def test_pro_by_layer():
    layers, size = Counter[str](), Counter[str]()
    for e in official_tensors(PRO):
        layers[e.unit] += 1
        size[e.unit] += e.nbytes
    units = ["layer_00", "layer_02", "layer_03", "layer_04", "mtp_0"]
    assert [layers[u] for u in units] == [2337, 2344, 2337, 2344, 2343]
    assert [size[u] for u in units] == [
        13_874_466_328, 13_909_746_200, 13_868_262_424, 13_903_542_296, 13_956_587_692,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, unit, leaf, expert",
    [
        ("embed.weight", "top", "embed", None),
        ("hc_head_fn", "top", "hc_head/fn", None),
        ("norm.weight", "top", "norm", None),
        ("layers.3.attn.wq_a.weight", "layer_03", "attn/wq_a/codes", None),
        ("layers.3.attn.wq_a.scale", "layer_03", "attn/wq_a/scales", None),
        ("layers.3.attn.attn_sink", "layer_03", "attn/sink", None),
        ("layers.3.attn.compressor.ape", "layer_03", "attn/compressor/ape", None),
        ("layers.3.attn.compressor.norm.weight", "layer_03", "attn/compressor/norm", None),
        ("layers.4.attn.indexer.compressor.wkv.weight", "layer_04",
         "attn/indexer/compressor/wkv", None),
        ("layers.4.attn.indexer.wq_b.scale", "layer_04", "attn/indexer/wq_b/scales", None),
        ("layers.0.ffn.gate.tid2eid", "layer_00", "ffn/gate/tid2eid", None),
        ("layers.3.ffn.gate.bias", "layer_03", "ffn/gate/bias", None),
        ("layers.3.ffn.gate.weight", "layer_03", "ffn/gate/weight", None),
        ("layers.3.ffn.experts.7.w1.weight", "layer_03", "ffn/experts/w1/codes", 7),
        ("layers.3.ffn.experts.255.w2.scale", "layer_03", "ffn/experts/w2/scales", 255),
        ("layers.3.ffn.shared_experts.w1.weight", "layer_03", "ffn/shared/w1/codes", None),
        ("layers.3.hc_attn_fn", "layer_03", "hc_attn/fn", None),
        ("layers.3.hc_ffn_scale", "layer_03", "hc_ffn/scale", None),
        ("mtp.0.e_proj.scale", "mtp_0", "e_proj/scales", None),
        ("mtp.0.hc_head_base", "mtp_0", "hc_head/base", None),
        ("mtp.0.emb.tok_emb.weight", "top", "embed", None),
        ("mtp.0.head.weight", "top", "head", None),
    ],
)  # fmt: skip
def test_names_and_leaves_correspond(name, unit, leaf, expert):
    (entry,) = [e for e in official_tensors(FLASH_BASE, True) if e.name == name]
    assert (entry.unit, entry.leaf, entry.expert) == (unit, leaf, expert)
    if not name.startswith(("mtp.0.emb", "mtp.0.head")):
        stem = names.official_stem(entry.unit, entry.path, entry.expert)
        assert name in (stem, stem + ".weight", stem + ".scale")


@pytest.mark.parametrize("source", [INSTRUCT, BASE])
def test_fixture_tensors_are_exactly_the_expected_ones(source):
    raw = read_raw(source)
    is_base = source == BASE
    cfg = ModelConfig.from_hf(raw.config)
    cfg = cfg.replace(scale_dtype="float32") if is_base else cfg
    expected = {e.name: (e.dtype, e.shape) for e in official_tensors(cfg, is_base)}
    assert expected == {n: (raw.dtypes[n], a.shape) for n, a in raw.tensors.items()}


def test_every_leaf_is_covered_once():
    for unit, specs in unit_specs(FLASH).items():
        entries = list(names.unit_entries(FLASH, unit, specs))
        covered = Counter(e.leaf for e in entries)
        structs = names.leaf_structs(FLASH, specs)
        assert covered.keys() == structs.keys()
        for leaf, struct in structs.items():
            experts = [e.expert for e in entries if e.leaf == leaf]
            assert experts in ([None], list(range(struct.shape[0])))


def test_flatten_and_unflatten_are_inverse():
    cfg = FLASH.replace(num_layers=1, compress_ratios=(0, 0), num_hash_layers=0)
    for specs in unit_specs(cfg).values():
        flat = names.leaf_structs(cfg, specs)
        assert names.flatten(names.unflatten(flat, specs, cfg)) == flat


def test_every_official_dtype_is_readable():
    assert {e.dtype for e in official_tensors(FLASH_BASE)} <= DTYPES.keys()
