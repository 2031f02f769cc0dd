"""The frozen description of a DeepSeek-V4 model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

SWA, CSA = 0, 4  # compress ratios with a meaning of their own; any other ratio is HCA
EXPERT_FORMATS = ("fp4", "fp8", None)
SCALE_DTYPES = ("float8_e8m0fnu", "float32")


@dataclass(frozen=True)
class Yarn:
    """YaRN stretch of the rotary frequencies of compressed layers."""

    factor: float = 16.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_len: int = 65536


@dataclass(frozen=True)
class ModelConfig:
    """Every number that decides what the model computes; checks itself.

    `compress_ratios` has one entry per main layer, then one per MTP block: 0 is window only (SWA),
    4 is CSA (overlapped compressor and indexer), any other value is HCA with that ratio.
    `dense_format`, `expert_format` and `scale_dtype` say how matrices are stored; they change no
    shape of the logical model.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names the field.
    """

    vocab_size: int
    dim: int
    num_layers: int
    compress_ratios: tuple[int, ...]
    num_heads: int
    head_dim: int
    rope_dim: int
    q_rank: int
    o_groups: int
    o_rank: int
    num_experts: int
    experts_per_token: int
    expert_dim: int
    num_hash_layers: int
    routed_scale: float
    window: int = 128
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 512
    num_mtp_layers: int = 1
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_iters: int = 20
    hc_eps: float = 1e-6
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: Yarn | None = Yarn()
    max_len: int = 1048576
    bos_id: int = 0
    eos_id: int = 1
    init_std: float = 0.02
    dense_format: str | None = "fp8"
    expert_format: str | None = "fp4"
    scale_dtype: str = "float8_e8m0fnu"

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def group_dim(self) -> int:
        """Query channels that one output group reads: N·H/G."""
        return self.num_heads * self.head_dim // self.o_groups

    @property
    def hc_mix_dim(self) -> int:
        """Mixing numbers of one hyper-connection: M pre, M post, M·M comb."""
        return (2 + self.hc_mult) * self.hc_mult

    @property
    def total_layers(self) -> int:
        """Main layers and MTP blocks."""
        return self.num_layers + self.num_mtp_layers

    def ratio(self, layer: int) -> int:
        """Compress ratio of main layer `layer`, or of MTP block `layer - num_layers`."""
        return self.compress_ratios[layer]

    def is_hash(self, layer: int) -> bool:
        """Whether the layer routes by token id. MTP blocks never do."""
        return layer < self.num_hash_layers

    def replace(self, **changes: object) -> ModelConfig:
        """A checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @classmethod
    def from_hf(cls, raw: dict) -> ModelConfig:
        """Reads an official `config.json` or transformers' newer spelling (`hf_config`)."""
        from dsv4_jax import hf_config

        return hf_config.read(raw)

    def to_hf(self) -> dict:
        """The official `config.json` fields of this model."""
        from dsv4_jax import hf_config

        return hf_config.write(self)


def _problems(c: ModelConfig):
    positive = (
        "vocab_size dim num_layers num_heads head_dim rope_dim q_rank o_groups o_rank num_experts "
        "experts_per_token expert_dim window index_heads index_dim index_topk hc_mult hc_iters "
        "max_len"
    )
    for name in positive.split():
        value = getattr(c, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{name}={value!r} must be a positive integer"
            return
    for name in ("num_hash_layers", "num_mtp_layers"):
        if getattr(c, name) < 0:
            yield f"{name}={getattr(c, name)} must not be negative"
    if len(c.compress_ratios) != c.total_layers:
        yield (
            f"compress_ratios has {len(c.compress_ratios)} entries but num_layers={c.num_layers} "
            f"and num_mtp_layers={c.num_mtp_layers} need {c.total_layers}"
        )
    if any(r < 0 for r in c.compress_ratios):
        yield f"compress_ratios={c.compress_ratios} must not hold negative ratios"
    if any(r for r in c.compress_ratios[c.num_layers :]):
        yield "compress_ratios: MTP blocks are window-only, their entries must be 0"
    if c.rope_dim > c.head_dim or c.rope_dim % 2:
        yield (
            f"rope_dim={c.rope_dim} must be even and not exceed head_dim={c.head_dim}: RoPE turns "
            "the last channels of each head in pairs"
        )
    if CSA in c.compress_ratios and c.rope_dim > c.index_dim:
        yield f"rope_dim={c.rope_dim} must not exceed index_dim={c.index_dim}"
    if c.num_heads % c.o_groups:
        yield f"num_heads={c.num_heads} must be a multiple of o_groups={c.o_groups}"
    if c.experts_per_token > c.num_experts:
        yield f"experts_per_token={c.experts_per_token} exceeds num_experts={c.num_experts}"
    if c.num_hash_layers > c.num_layers:
        yield f"num_hash_layers={c.num_hash_layers} exceeds num_layers={c.num_layers}"
    if c.expert_format not in EXPERT_FORMATS:
        yield f"expert_format={c.expert_format!r} must be one of {EXPERT_FORMATS}"
    if c.dense_format not in ("fp8", None):
        yield f"dense_format={c.dense_format!r} must be 'fp8' or None"
    if c.scale_dtype not in SCALE_DTYPES:
        yield f"scale_dtype={c.scale_dtype!r} must be one of {SCALE_DTYPES}"
    if c.expert_format == "fp4" and c.dim % 32 + c.expert_dim % 32:
        yield (
            f"dim={c.dim} and expert_dim={c.expert_dim} must be multiples of 32: FP4 experts share "
            "a scale among 32 inputs"
        )
    for name in ("hc_eps", "norm_eps", "rope_theta", "compress_rope_theta", "routed_scale"):
        if not getattr(c, name) > 0:
            yield f"{name}={getattr(c, name)} must be positive"
    if c.swiglu_limit < 0:
        yield f"swiglu_limit={c.swiglu_limit} must not be negative (0 switches the clamp off)"
