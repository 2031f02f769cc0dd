"""Configurations: both spellings, what is refused, the released models in full size."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import presets
from dsv4_jax.cache import PackedKeys, PackedRows, init_cache
from dsv4_jax.config import ModelConfig, Yarn
from dsv4_jax.model import decode_step, draft, group_params, init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.params import abstract, count_params, init_tree, unit_specs
from dsv4_jax.quant import QuantizedArray, dequantize
from dsv4_jax.schedule import layer_groups
from tests.model.support import DATA

REFERENCE = Numerics()


def fixture_config(folder="checkpoint"):
    return json.loads((DATA / folder / "config.json").read_text())


def released(layers, dim, heads, q_rank, groups, expert_dim, experts, scale, topk, ratios, dtype):
    """The published `config.json` of a released model."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "compress_ratios": ratios,
        "compress_rope_theta": 160000,
        "eos_token_id": 1,
        "expert_dtype": dtype,
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": dim,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": topk,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": expert_dim,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": groups,
        "o_lora_rank": 1024,
        "q_lora_rank": q_rank,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": scale,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": 129280,
    }


FLASH = (43, 4096, 64, 1024, 8, 2048, 256, 1.5, 512, [0, 0] + [4, 128] * 20 + [4, 0])
PRO = (61, 7168, 128, 1536, 16, 3072, 384, 2.5, 1024, [128, 128] + [4, 128] * 29 + [4, 0])
RELEASED = {
    "v4-flash": released(*FLASH, "fp4"),
    "v4-pro": released(*PRO, "fp4"),
    "v4-flash-base": released(*FLASH, "fp8"),
    "v4-pro-base": released(*PRO, "fp8"),
}


def modern(raw):
    """The same configuration as transformers saves it."""
    raw = json.loads(json.dumps(raw))
    kinds = {
        0: "sliding_attention",
        4: "compressed_sparse_attention",
        128: "heavily_compressed_attention",
    }
    layers, hashed = raw["num_hidden_layers"], raw.pop("num_hash_layers")
    raw["layer_types"] = [kinds[r] for r in raw.pop("compress_ratios")[:layers]]
    raw["compress_rates"] = {kinds[4]: 4, kinds[128]: 128}
    raw["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    raw["partial_rotary_factor"] = raw.pop("qk_rope_head_dim") / raw["head_dim"]
    yarn = raw.pop("rope_scaling")
    raw["rope_parameters"] = {
        "main": {
            "rope_type": "default",
            "rope_theta": raw.pop("rope_theta"),
            "partial_rotary_factor": raw["partial_rotary_factor"],
        },
        "compress": {
            "rope_type": yarn.pop("type"),
            **yarn,
            "rope_theta": raw.pop("compress_rope_theta"),
            "partial_rotary_factor": raw["partial_rotary_factor"],
            "attention_factor": 1.0,
        },
    }
    raw["num_local_experts"] = raw.pop("n_routed_experts")
    raw["intermediate_size"] = raw.pop("moe_intermediate_size")
    raw["quantization_config"]["expert_dtype"] = raw["expert_dtype"]
    raw |= {
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "mlp_bias": False,
        "pad_token_id": None,
        "rope_interleave": True,
    }
    return raw


# -- spellings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED)
def test_presets_are_the_published_configurations(name):
    preset = presets.PRESETS[name]()
    assert preset == ModelConfig.from_hf(RELEASED[name]).replace(scale_dtype=preset.scale_dtype)
    assert preset.scale_dtype == ("float32" if name.endswith("base") else "float8_e8m0fnu")
    # everything that was published comes back
    written = preset.to_hf()
    versions = {"transformers_version"}
    assert {k: written.get(k) for k in RELEASED[name].keys() - versions} == {
        k: v for k, v in RELEASED[name].items() if k not in versions
    }


@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint_base"])
def test_official_round_trip(folder):
    raw = fixture_config(folder)
    cfg = ModelConfig.from_hf(raw)
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg
    assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg
    written = cfg.to_hf()
    assert all(written[name] == raw[name] for name in raw if name != "transformers_version")


def test_fixture_values():
    cfg = ModelConfig.from_hf(fixture_config())
    assert cfg == ModelConfig(
        vocab_size=320,
        dim=256,
        num_layers=3,
        compress_ratios=(0, 4, 128, 0),
        num_heads=4,
        head_dim=128,
        rope_dim=64,
        q_rank=128,
        o_groups=2,
        o_rank=64,
        num_experts=8,
        experts_per_token=3,
        expert_dim=128,
        num_hash_layers=1,
        routed_scale=1.5,
        window=128,
        index_heads=8,
        index_dim=128,
        index_topk=16,
        num_mtp_layers=1,
        swiglu_limit=3.0,
        hc_mult=4,
        hc_iters=8,
        yarn=Yarn(16.0, 32.0, 1.0, 64),
        max_len=1024,
    )


def test_a_configuration_without_quantisation_or_scaling():
    raw = fixture_config()
    del raw["quantization_config"], raw["expert_dtype"], raw["rope_scaling"]
    raw["max_position_embeddings"] = 65536
    cfg = ModelConfig.from_hf(raw)
    assert (cfg.dense_format, cfg.expert_format, cfg.yarn) == (None, None, None)
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg


def test_random_configurations_round_trip():
    rng = np.random.default_rng(0)
    for _ in range(20):
        layers, mtp = (int(n) for n in rng.integers((1, 0), (9, 3)))
        ratios = [int(r) for r in rng.choice([0, 2, 4, 7, 64, 128], layers)] + [0] * mtp
        cfg = presets.tiny().replace(
            num_layers=layers,
            num_mtp_layers=mtp,
            compress_ratios=tuple(ratios),
            num_hash_layers=int(rng.integers(0, layers + 1)),
            hc_mult=int(rng.integers(1, 6)),
            swiglu_limit=float(rng.choice([0.0, 2.5, 10.0])),
            hc_eps=float(rng.choice([1e-6, 1e-3])),
            yarn=rng.choice([None, Yarn(4.0, 16.0, 2.0, 128)]),
            expert_format=rng.choice(["fp4", "fp8"]),
        )
        assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


@pytest.mark.parametrize("name", [*RELEASED, "checkpoint", "checkpoint_base"])
def test_the_newer_spelling_means_the_same(name):
    raw = RELEASED.get(name) or fixture_config(name)
    assert ModelConfig.from_hf(modern(raw)) == ModelConfig.from_hf(raw)


def test_both_spellings_together():
    raw = fixture_config()
    assert ModelConfig.from_hf(modern(raw) | raw) == ModelConfig.from_hf(raw)


def test_the_newer_spelling_without_extra_layers():
    raw = modern(fixture_config())
    del raw["num_nextn_predict_layers"]
    cfg = ModelConfig.from_hf(raw)
    assert cfg.num_mtp_layers == 0 and cfg.compress_ratios == (0, 4, 128)


def test_other_rates_of_the_plain_compressor():
    raw = modern(fixture_config())
    raw["compress_rates"]["heavily_compressed_attention"] = 32
    assert ModelConfig.from_hf(raw).compress_ratios == (0, 4, 32, 0)


def test_harmless_fields_are_ignored():
    more = {"_name_or_path": "x", "pad_token_id": 2, "output_attentions": False, "dtype": "float32"}
    assert ModelConfig.from_hf(fixture_config() | more) == ModelConfig.from_hf(fixture_config())


# -- refusals ------------------------------------------------------------------------------------

REQUIRED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups "
    "o_lora_rank n_routed_experts num_experts_per_tok moe_intermediate_size routed_scaling_factor "
    "sliding_window index_n_heads index_head_dim index_topk compress_ratios num_hash_layers "
    "qk_rope_head_dim"
).split()


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_fields(field):
    raw = fixture_config()
    del raw[field]
    with pytest.raises(ValueError, match=field):
        ModelConfig.from_hf(raw)
    with pytest.raises(ValueError, match=field):
        ModelConfig.from_hf(raw | {field: None})


OTHER_KINDS = {
    # another architecture, or a variant of this one
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "n_group": 8,
    "topk_group": 4,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "moe_layer_freq": 1,
    "vision_n_layers": 24,
    "markov_rank": 64,
    "dspark_block_size": 8,
    "engram_layers": [3],
    # values that would change the result
    "hidden_act": "gelu",
    "scoring_func": "sigmoid",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "attention_dropout": 0.1,
    "mlp_bias": True,
    "rope_interleave": False,
    "tie_word_embeddings": True,
    # fields nobody knows, whose names say that they matter
    "attn_temperature": 1.0,
    "compress_rate_csa": 8,
    "compressor_bias": True,
    "hc_alpha": 0.1,
    "index_bias": True,
    "indexer_types": ["a"],
    "kv_share": 2,
    "layer_scale": 0.1,
    "mlp_kind": "relu",
    "moe_bias": True,
    "n_null_experts": 4,
    "num_meta_tokens": 4,
    "o_bias": True,
    "q_norm_eps": 1e-5,
    "qk_norm": True,
    "rope_kind": "ntk",
    "rotary_base": 5000,
    "routed_bias": True,
    "router_dtype": "bfloat16",
    "sinkhorn_temperature": 2.0,
    "sliding_stride": 2,
    "swiglu_alpha": 1.7,
    "v_bias": True,
    "yarn_scale": 2.0,
    # wrong kinds of values
    "hidden_size": "256",
    "vocab_size": True,
    "num_nextn_predict_layers": "1",
    "num_hash_layers": 1.0,
    "compress_ratios": [0, 4.0, 128, 0],
    "qk_rope_head_dim": 64.0,
    "rope_theta": "10000",
}


@pytest.mark.parametrize("field", OTHER_KINDS)
def test_what_would_be_another_model(field):
    with pytest.raises(ValueError, match=field):
        ModelConfig.from_hf(fixture_config() | {field: OTHER_KINDS[field]})


CONTRADICTIONS = {
    "num_local_experts": {"num_local_experts": 16},
    "intermediate_size": {"intermediate_size": 64},
    "compress_ratios": {"compress_ratios": [0, 4, 128]},
    "layer_types contradicts compress_ratios": {
        "layer_types": ["sliding_attention"] * 3,
    },
    "layer_types holds unknown kinds": {"layer_types": ["full_attention"] * 3},
    "num_hash_layers=1 contradicts mlp_layer_types": {"mlp_layer_types": ["moe"] * 3},
    "mlp_layer_types must name every layer": {"mlp_layer_types": ["hash_moe"]},
    "mlp_layer_types must name every layer, ": {"mlp_layer_types": ["moe", "hash_moe", "moe"]},
    "mlp_layer_types holds unknown kinds": {"mlp_layer_types": ["dense"] * 3},
    "compress_rates.compressed_sparse_attention": {
        "layer_types": ["sliding_attention"] * 3,
        "compress_rates": {"compressed_sparse_attention": 8},
    },
    "partial_rotary_factor": {"partial_rotary_factor": 0.25},
    "rope_theta=10000 contradicts": {"rope_parameters": {"main": {"rope_theta": 5000}}},
    "compress_rope_theta=160000 contradicts": {
        "rope_parameters": {"compress": {"rope_type": "default", "rope_theta": 40000}},
        "rope_scaling": None,
    },
    "rope_scaling contradicts rope_parameters.compress": {
        "rope_parameters": {
            "compress": {
                "rope_type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 64,
            }
        }
    },
    "rope_parameters has unknown fields": {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
    "rope_parameters.main has unknown fields": {"rope_parameters": {"main": {"factor": 4}}},
    "rope_parameters.main.rope_type": {"rope_parameters": {"main": {"rope_type": "yarn"}}},
    "rope_scaling has unknown fields": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "mscale": 0.7,
        }
    },
    "rope_scaling.attention_factor": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.277,
        }
    },
    "rope_scaling type 'linear'": {"rope_scaling": {"type": "linear", "factor": 2}},
    "rope_scaling lacks": {"rope_scaling": {"type": "yarn", "factor": 16}},
    "expert_dtype='fp8' contradicts": {
        "expert_dtype": "fp8",
        "quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"},
    },
    "expert_dtype='int4'": {"expert_dtype": "int4"},
    "quantization_config.quant_method": {"quantization_config": {"quant_method": "gptq"}},
    "quantization_config.activation_scheme": {
        "quantization_config": {"activation_scheme": "static"}
    },
    "quantization_config.fmt": {"quantization_config": {"fmt": "e5m2"}},
    "quantization_config.scale_fmt": {"quantization_config": {"scale_fmt": None}},
    "quantization_config.weight_block_size": {
        "quantization_config": {"weight_block_size": [64, 64]}
    },
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions(message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        ModelConfig.from_hf(fixture_config() | CONTRADICTIONS[message])


IMPOSSIBLE = {
    "vocab_size": 0,
    "num_heads": 3,  # not a multiple of o_groups
    "head_dim": 16,  # smaller than rope_dim
    "rope_dim": 63,
    "index_dim": 32,  # smaller than rope_dim
    "experts_per_token": 9,
    "num_hash_layers": 4,
    "num_mtp_layers": 2,
    "compress_ratios": (0, 4, -1, 0),
    "expert_format": "fp6",
    "dense_format": "fp4",
    "scale_dtype": "bfloat16",
    "dim": 250,  # FP4 blocks of 32
    "window": 1.5,
    "hc_mult": True,
    "hc_eps": 0.0,
    "norm_eps": -1e-6,
    "routed_scale": 0,
    "swiglu_limit": -1.0,
    "max_len": 0,
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_impossible_values(field):
    cfg = ModelConfig.from_hf(fixture_config())
    with pytest.raises(ValueError, match=field):
        cfg.replace(**{field: IMPOSSIBLE[field]})


def test_mtp_blocks_have_no_compressed_rows():
    cfg = ModelConfig.from_hf(fixture_config())
    with pytest.raises(ValueError, match="MTP blocks are window-only"):
        cfg.replace(compress_ratios=(0, 4, 128, 4))


def test_all_problems_are_told_at_once():
    cfg = ModelConfig.from_hf(fixture_config())
    with pytest.raises(ValueError, match="num_heads=3.*experts_per_token=9"):
        cfg.replace(num_heads=3, experts_per_token=9)


# -- the released models in full size ------------------------------------------------------------

# total of the main model, of the MTP block, active, active without the embedding
COUNTS = {
    "v4-flash": (284_332_240_471, 6_610_048_891, 13_799_632_471, 13_270_101_591),
    "v4-pro": (1_572_997_201_763, 25_840_145_979, 49_779_081_059, 48_852_402_019),
}
STORED_BYTES = {"v4-flash": 159_609_485_896}  # of the published checkpoint
ROW_BYTES, KEY_BYTES = 583, 68


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts(name):
    cfg = presets.PRESETS[name]()
    main, mtp, active, without_embedding = COUNTS[name.removesuffix("-base")]
    count = count_params(cfg)
    assert (count.main, count.mtp, count.active) == (main, mtp, active)
    assert count.total == main + mtp
    assert count.active - cfg.vocab_size * cfg.dim == without_embedding


def nbytes(tree):
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def test_stored_bytes_of_flash():
    """Every array in its stored dtype; hash tables have 64 bits in the published files."""
    cfg = presets.v4_flash()
    tree = abstract(cfg, unit_specs(cfg))
    tables = cfg.num_hash_layers * cfg.vocab_size * cfg.experts_per_token * 4
    assert nbytes(tree) + tables == STORED_BYTES["v4-flash"]


@pytest.fixture(scope="module", params=RELEASED)
def full_size(request):
    """Configuration and abstract parameters as the model runs them."""
    cfg = presets.PRESETS[request.param]()
    return cfg, jax.eval_shape(partial(init_params, cfg), jax.random.key(0))


def test_full_size_parameter_tree(full_size):
    """Initialisation gives what the specs promise, grouped: repeated layers are stacked."""
    cfg, params = full_size
    units = abstract(cfg, unit_specs(cfg))
    groups = layer_groups(cfg)
    assert [(g.start, len(g.kinds), g.repeats) for g in groups] == [
        (0, 1, 2),
        (2, 1, 1),
        (3, 2, (cfg.num_layers - 3) // 2),
    ]
    assert params["top"] == units["top"] and params["mtp"] == [units["mtp_0"]]
    for group, layers in zip(groups, params["groups"], strict=True):
        for offset, tree in enumerate(layers):
            one = units[f"layer_{group.start + offset:02d}"]
            lead = (group.repeats,) if group.repeats > 1 else ()
            stacked = jax.tree.map(lambda a, lead=lead: (*lead, *a.shape), one)
            assert jax.tree.map(lambda a: a.shape, tree) == stacked
            assert jax.tree.map(lambda a: a.dtype, tree) == jax.tree.map(lambda a: a.dtype, one)
    assert nbytes(params) == nbytes(units)


def per_token_and_constant(cfg, length):
    """Bytes of compressed rows per token, and of the main layers' windows."""
    cache = jax.eval_shape(lambda: init_cache(cfg, 1, length, REFERENCE))
    layers = [layer for group in cache.groups for layer in group]
    rows = sum(nbytes(layer.get(name, ())) for layer in layers for name in ("rows", "keys"))
    return rows / length, sum(nbytes(layer["window"]) for layer in layers)


@pytest.mark.parametrize("name, wanted", [("v4-flash", 3508.8), ("v4-pro", 5023.7)])
def test_cache_bytes_per_token(name, wanted):
    cfg = presets.PRESETS[name]()
    per_token, windows = per_token_and_constant(cfg, 1 << 20)
    csa, hca = (sum(r == ratio for r in cfg.compress_ratios) for ratio in (4, 128))
    assert per_token == csa * (ROW_BYTES + KEY_BYTES) / 4 + hca * ROW_BYTES / 128
    assert per_token == pytest.approx(wanted, abs=0.05)
    assert windows == cfg.num_layers * cfg.window * ROW_BYTES
    assert per_token_and_constant(cfg, 1 << 19) == (per_token, windows)


def test_full_size_decode_step(full_size):
    """One token of two sequences: shapes, dtypes, and a state like the one before."""
    cfg, params = full_size
    cache = jax.eval_shape(lambda: init_cache(cfg, 2, 1 << 20, REFERENCE))
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    out, after = jax.eval_shape(partial(decode_step, cfg, REFERENCE), params, tokens, cache)
    assert (out.logits.shape, out.logits.dtype) == ((2, cfg.vocab_size), jnp.float32)
    assert out.streams_BTMD.shape == (2, 1, cfg.hc_mult, cfg.dim)
    assert out.streams_BTMD.dtype == jnp.bfloat16
    assert after == cache
    next_ids = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = partial(draft, cfg, REFERENCE)
    drafted, after = jax.eval_shape(step, params, out.streams_BTMD, next_ids, cache)
    assert drafted.logits.shape == (2, cfg.vocab_size) and after == cache


def test_caches_are_packed_in_the_serving_default():
    cache = init_cache(presets.tiny(), 1, 64, Numerics())
    layers = [layer for group in cache.groups for layer in group]
    assert all(isinstance(layer["window"], PackedRows) for layer in layers)
    assert any(isinstance(layer.get("keys"), PackedKeys) for layer in layers)
    plain = init_cache(presets.tiny(), 1, 64, Numerics("plain", "float32"))
    assert all(layer["window"].dtype == jnp.float32 for group in plain.groups for layer in group)


# -- initialisation ------------------------------------------------------------------------------


def test_initial_parameters():
    """The declared spread, in the declared formats; every hash row names distinct experts."""
    cfg = presets.tiny()
    layer = jax.jit(lambda key: init_tree(key, cfg, unit_specs(cfg)["layer_00"]))(jax.random.key(0))
    attn, gate, experts = layer["attn"], layer["ffn"]["gate"], layer["ffn"]["experts"]
    assert np.asarray(gate["weight"], np.float32).std() == pytest.approx(0.02, rel=0.1)
    for weight, fmt in ((attn["wq_b"], "fp8"), (experts["w1"], "fp4")):
        assert isinstance(weight, QuantizedArray) and weight.fmt == fmt
        values = dequantize(weight, jnp.dtype("float32"))
        assert np.asarray(values).std() == pytest.approx(0.02, rel=0.1)
    assert not attn["sink"].any() and (attn["q_norm"] == 1).all()
    table = np.sort(np.asarray(gate["tid2eid"]), axis=-1)
    assert (np.diff(table, axis=-1) > 0).all()
    assert table.min() == 0 and table.max() == cfg.num_experts - 1


def test_grouping_keeps_layers_in_order():
    cfg = presets.tiny().replace(num_layers=8, compress_ratios=(0, 0, 4, 8, 4, 8, 4, 8, 0))
    marks = {name: {"x": jnp.full(2, i)} for i, name in enumerate(unit_specs(cfg))}
    params = group_params(cfg, marks.__getitem__)
    seen = {}
    for group, layers in zip(layer_groups(cfg), params["groups"], strict=True):
        for offset, tree in enumerate(layers):
            for repeat, layer in enumerate(group.layers(offset)):
                seen[layer] = int(tree["x"].reshape(-1, 2)[repeat, 0])
    assert seen == {layer: layer + 1 for layer in range(8)}  # unit 0 is "top"
    assert len(params["groups"]) < cfg.num_layers
