"""`config.json` in the official and in transformers' spelling, to ModelConfig and back."""

from __future__ import annotations

from typing import Any

from dsv4_jax.config import CSA, SWA, ModelConfig, Yarn

# our name: (official name, default when absent; ... = required)
_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", ...),
    "dim": ("hidden_size", ...),
    "num_layers": ("num_hidden_layers", ...),
    "num_heads": ("num_attention_heads", ...),
    "head_dim": ("head_dim", ...),
    "q_rank": ("q_lora_rank", ...),
    "o_groups": ("o_groups", ...),
    "o_rank": ("o_lora_rank", ...),
    "num_experts": ("n_routed_experts", ...),
    "experts_per_token": ("num_experts_per_tok", ...),
    "expert_dim": ("moe_intermediate_size", ...),
    "routed_scale": ("routed_scaling_factor", ...),
    "window": ("sliding_window", ...),
    "index_heads": ("index_n_heads", ...),
    "index_dim": ("index_head_dim", ...),
    "index_topk": ("index_topk", ...),
    "swiglu_limit": ("swiglu_limit", 10.0),
    "hc_mult": ("hc_mult", 4),
    "hc_iters": ("hc_sinkhorn_iters", 20),
    "hc_eps": ("hc_eps", 1e-6),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "max_len": ("max_position_embeddings", 1048576),
    "bos_id": ("bos_token_id", 0),
    "eos_id": ("eos_token_id", 1),
    "init_std": ("initializer_range", 0.02),
}
_ALIASES = {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"}
# fields with one supported value: anything else changes what is computed
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "rope_interleave": True,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
# fields of sibling architectures: present with a value means this is another model
_FOREIGN = {
    "first_k_dense_replace": "dense feed-forward layers",
    "kv_lora_rank": "multi-head latent attention",
    "n_group": "group-limited routing",
    "topk_group": "group-limited routing",
    "v_head_dim": "values that differ from keys",
    "qk_nope_head_dim": "multi-head latent attention",
    "moe_layer_freq": "interleaved dense layers",
    "vision_n_layers": "the vision variant",
    "markov_rank": "the DSpark block drafter",
}
_FOREIGN_PREFIXES = {"dspark_": "the DSpark block drafter", "engram": "Engram tables"}
_RELEVANT_PREFIXES = (
    "attn_ compress hc_ index_ indexer kv_ layer_ mlp_ moe_ n_ num_ o_ partial_ q_ qk_ rope_ "
    "rotary_ routed_ router_ sinkhorn sliding_ swiglu_ v_ yarn_"
).split()
_HARMLESS = {"num_labels", "router_aux_loss_coef", "router_jitter_noise", "layer_norm_eps"}
_ROPE_KEYS: set[str] = {"rope_type", "rope_theta", "partial_rotary_factor"}
_YARN_KEYS: set[str] = set(
    "rope_type type factor beta_fast beta_slow original_max_position_embeddings attention_factor "
    "truncate".split()
)
_LAYER_TYPES = {"sliding_attention": SWA}
_RATE_NAMES = {"compressed_sparse_attention": CSA, "heavily_compressed_attention": 128}


def read(raw: dict) -> ModelConfig:
    """Config of a parsed `config.json`.

    Raises:
        ValueError: a field is missing, contradicts another, or asks for something this model does
            not compute; the message names the field.
    """
    raw = dict(raw)
    _check_kind(raw)
    for alias, name in _ALIASES.items():
        if alias in raw:
            value = raw.pop(alias)
            if raw.setdefault(name, value) != value:
                raise ValueError(f"config: {alias}={value} contradicts {name}={raw[name]}")
    known = {official for official, _ in _FIELDS.values()}
    values = {ours: _take(raw, name, default) for ours, (name, default) in _FIELDS.items()}
    num_mtp = _count(raw, "num_nextn_predict_layers")
    values["num_mtp_layers"] = _mtp_of_ratios(raw) if num_mtp is None else num_mtp
    values["compress_ratios"] = _ratios(raw, values["num_layers"], values["num_mtp_layers"])
    values["num_hash_layers"] = _hash_layers(raw, values["num_layers"])
    values |= _rope(raw, values["head_dim"])
    values |= _formats(raw)
    _check_rest(raw, known)
    return ModelConfig(**values)


def write(cfg: ModelConfig) -> dict:
    """The official spelling, with every field a reader of hub checkpoints looks at."""
    raw: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    raw |= {name: value for name, value in _FIXED.items() if name != "mlp_bias"}
    raw.pop("rope_interleave")
    raw |= {official: getattr(cfg, ours) for ours, (official, _) in _FIELDS.items()}
    raw["num_nextn_predict_layers"] = cfg.num_mtp_layers
    raw["num_hash_layers"] = cfg.num_hash_layers
    raw["compress_ratios"] = list(cfg.compress_ratios)
    raw["qk_rope_head_dim"] = cfg.rope_dim
    raw["rope_theta"] = cfg.rope_theta
    raw["compress_rope_theta"] = cfg.compress_rope_theta
    raw["rope_scaling"] = None
    if cfg.yarn:
        raw["rope_scaling"] = {
            "type": "yarn",
            "factor": cfg.yarn.factor,
            "beta_fast": cfg.yarn.beta_fast,
            "beta_slow": cfg.yarn.beta_slow,
            "original_max_position_embeddings": cfg.yarn.original_len,
        }
    if cfg.dense_format:
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    if cfg.expert_format:
        raw["expert_dtype"] = cfg.expert_format
    return raw


def _take(raw: dict, name: str, default: Any) -> Any:
    value = raw.get(name)
    if value is None:
        if default is ...:
            raise ValueError(f"config: required field {name!r} is missing")
        return default
    kind = type(default) if default is not ... else (int, float)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config: {name}={value!r} must be a number")
    return float(value) if kind is float else value


def _count(raw: dict, name: str) -> int | None:
    value = raw.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"config: {name}={value!r} must be an integer")
    return value


def _check_kind(raw: dict) -> None:
    kind = raw.get("model_type", "deepseek_v4")
    if kind != "deepseek_v4":
        raise ValueError(
            f"config: model_type={kind!r} is another architecture; this program loads "
            "'deepseek_v4' checkpoints only"
        )
    for name, value in raw.items():
        what = _FOREIGN.get(name) or next(
            (w for p, w in _FOREIGN_PREFIXES.items() if name.startswith(p)), None
        )
        if what and value not in (None, 0, False):
            raise ValueError(f"config: {name}={value!r} belongs to {what}, which is not supported")
    for name, wanted in _FIXED.items():
        if name in raw and raw[name] is not None and raw[name] != wanted:
            raise ValueError(
                f"config: {name}={raw[name]!r} is not supported; DeepSeek-V4 has {wanted!r}"
            )


def _mtp_of_ratios(raw: dict) -> int:
    ratios, layers = raw.get("compress_ratios"), raw.get("num_hidden_layers", 0)
    return max(len(ratios) - layers, 0) if ratios else 0


def _ratios(raw: dict, num_layers: int, num_mtp: int) -> tuple[int, ...]:
    ratios, kinds = raw.get("compress_ratios"), raw.get("layer_types")
    if kinds is not None:
        rates = dict(_RATE_NAMES) | (raw.get("compress_rates") or {})
        unknown = set(kinds) - rates.keys() - _LAYER_TYPES.keys()
        if unknown:
            raise ValueError(f"config: layer_types holds unknown kinds {sorted(unknown)}")
        if rates["compressed_sparse_attention"] != CSA:
            raise ValueError(
                "config: compress_rates.compressed_sparse_attention="
                f"{rates['compressed_sparse_attention']} is not supported; it must be {CSA}"
            )
        named = [(_LAYER_TYPES | rates)[kind] for kind in kinds]
        if ratios is not None and list(ratios[: len(named)]) != named:
            raise ValueError("config: layer_types contradicts compress_ratios")
        if ratios is None:
            if len(named) != num_layers:
                raise ValueError(
                    f"config: layer_types has {len(named)} entries, num_hidden_layers={num_layers}"
                )
            ratios = named + [SWA] * num_mtp  # transformers drops the MTP entries
    if ratios is None:
        raise ValueError("config: required field 'compress_ratios' (or 'layer_types') is missing")
    if len(ratios) != num_layers + num_mtp:
        raise ValueError(
            f"config: compress_ratios has {len(ratios)} entries; num_hidden_layers={num_layers} + "
            f"num_nextn_predict_layers={num_mtp} need {num_layers + num_mtp}"
        )
    if not all(isinstance(r, int) and not isinstance(r, bool) for r in ratios):
        raise ValueError(f"config: compress_ratios={ratios} must hold integers")
    return tuple(ratios)


def _hash_layers(raw: dict, num_layers: int) -> int:
    kinds, count = raw.get("mlp_layer_types"), _count(raw, "num_hash_layers")
    if kinds is not None:
        unknown = set(kinds) - {"hash_moe", "moe"}
        if unknown:
            raise ValueError(f"config: mlp_layer_types holds unknown kinds {sorted(unknown)}")
        named = list(kinds).count("hash_moe")
        if "hash_moe" in kinds[named:] or len(kinds) != num_layers:
            raise ValueError(
                "config: mlp_layer_types must name every layer, 'hash_moe' layers first"
            )
        if count is not None and count != named:
            raise ValueError(f"config: num_hash_layers={count} contradicts mlp_layer_types")
        return named
    if count is None:
        raise ValueError("config: required field 'num_hash_layers' is missing")
    return count


def _rope(raw: dict, head_dim: int) -> dict:
    parameters = raw.get("rope_parameters") or {}
    _refuse_others("rope_parameters", parameters, {"main", "compress"})
    main, compress = parameters.get("main") or {}, parameters.get("compress") or {}
    _refuse_others("rope_parameters.main", main, _ROPE_KEYS)
    if main.get("rope_type", "default") != "default":
        raise ValueError(
            f"config: rope_parameters.main.rope_type={main['rope_type']!r} is not "
            "supported; window-only layers use plain RoPE"
        )
    yarn = _yarn("rope_parameters.compress", compress, _ROPE_KEYS | _YARN_KEYS)
    if scaling := raw.get("rope_scaling"):
        legacy = _yarn("rope_scaling", scaling, _YARN_KEYS)
        if compress and legacy != yarn:
            raise ValueError("config: rope_scaling contradicts rope_parameters.compress")
        yarn = legacy
    return {
        "rope_dim": _rope_dim(raw, head_dim, main, compress),
        "rope_theta": _theta(raw, "rope_theta", "main", main, 10000.0),
        "compress_rope_theta": _theta(raw, "compress_rope_theta", "compress", compress, 160000.0),
        "yarn": yarn,
    }


def _rope_dim(raw: dict, head_dim: int, main: dict, compress: dict) -> int:
    rope_dim = _count(raw, "qk_rope_head_dim")
    for where in (raw, main, compress):
        factor = where.get("partial_rotary_factor")
        if factor is None:
            continue
        if rope_dim is None:
            rope_dim = round(head_dim * factor)
        if round(head_dim * factor) != rope_dim:
            raise ValueError(
                f"config: partial_rotary_factor={factor} of head_dim={head_dim} contradicts "
                f"qk_rope_head_dim={rope_dim}"
            )
    if rope_dim is None:
        raise ValueError("config: required field 'qk_rope_head_dim' is missing")
    return rope_dim


def _theta(raw: dict, name: str, kind: str, parameters: dict, default: float) -> float:
    outer, inner = _take(raw, name, None), _take(parameters, "rope_theta", None)
    if None not in (outer, inner) and outer != inner:
        raise ValueError(
            f"config: {name}={outer} contradicts rope_parameters.{kind}.rope_theta={inner}"
        )
    return float(next((v for v in (outer, inner) if v is not None), default))


def _refuse_others(name: str, values: dict, known: set[str]) -> None:
    others = sorted(key for key in values.keys() - known if values[key] is not None)
    if others:
        raise ValueError(f"config: {name} has unknown fields {others}; they may change the angles")


def _yarn(name: str, scaling: dict, known: set[str]) -> Yarn | None:
    if not scaling:
        return None
    _refuse_others(name, scaling, known)
    for key, wanted in (("attention_factor", 1.0), ("truncate", True)):
        if scaling.get(key) not in (None, wanted):
            raise ValueError(f"config: {name}.{key}={scaling[key]!r} must be {wanted}")
    kind = scaling.get("rope_type", scaling.get("type", "yarn"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"config: {name} type {kind!r} is not supported; use 'yarn'")
    missing = {"factor", "original_max_position_embeddings"} - scaling.keys()
    if missing:
        raise ValueError(f"config: {name} lacks {sorted(missing)}")
    if not scaling["original_max_position_embeddings"]:
        return None  # the official code switches YaRN off when the original length is 0
    return Yarn(
        factor=_take(scaling, "factor", 16.0),
        beta_fast=_take(scaling, "beta_fast", 32.0),
        beta_slow=_take(scaling, "beta_slow", 1.0),
        original_len=int(scaling["original_max_position_embeddings"]),
    )


def _formats(raw: dict) -> dict:
    """Storage formats the config claims; a checkpoint reader corrects them by stored dtype."""
    quant = raw.get("quantization_config")
    if not quant:
        return {"dense_format": None, "expert_format": raw.get("expert_dtype")}
    fixed = (("quant_method", "fp8"), ("activation_scheme", "dynamic"), ("fmt", "e4m3"))
    for name, wanted in fixed:
        if quant.get(name, wanted) != wanted:
            raise ValueError(
                f"config: quantization_config.{name}={quant[name]!r} is not supported; "
                f"it must be {wanted!r}"
            )
    if list(quant.get("weight_block_size", [128, 128])) != [128, 128]:
        raise ValueError(
            "config: quantization_config.weight_block_size="
            f"{quant['weight_block_size']} is not supported; it must be [128, 128]"
        )
    if quant.get("scale_fmt", "ue8m0") != "ue8m0":
        raise ValueError(
            f"config: quantization_config.scale_fmt={quant['scale_fmt']!r} is not supported; "
            "activations are rounded with power-of-two scales ('ue8m0')"
        )
    outer, inner = raw.get("expert_dtype"), quant.get("expert_dtype")
    if outer and inner and outer != inner:
        raise ValueError(
            f"config: expert_dtype={outer!r} contradicts quantization_config.expert_dtype={inner!r}"
        )
    expert = outer or inner or "fp4"
    if expert not in ("fp4", "fp8"):
        raise ValueError(f"config: expert_dtype={expert!r} must be 'fp4' or 'fp8'")
    return {"dense_format": "fp8", "expert_format": expert}


def _check_rest(raw: dict, known: set[str]) -> None:
    handled = known | _FIXED.keys() | _FOREIGN.keys() | _HARMLESS
    handled |= set(
        "num_nextn_predict_layers compress_ratios layer_types compress_rates num_hash_layers "
        "mlp_layer_types qk_rope_head_dim partial_rotary_factor rope_parameters rope_theta "
        "rope_scaling compress_rope_theta".split()
    )
    relevant = [n for n in raw if n not in handled and n.startswith(tuple(_RELEVANT_PREFIXES))]
    if relevant:
        raise ValueError(
            f"config: unknown fields {sorted(relevant)} may change what the model computes"
        )
