"""The one legend of dimension letters.

Array names end in the letters of their dimensions (`q_BTNH`). Capital letters are the quantities
of the paper; small letters are sizes derived from them (merged or split dimensions). A letter gives
the meaning, the logical name that `sharding` maps to mesh axes, and the size in a given
configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dsv4_jax.config import ModelConfig


class Dim(NamedTuple):
    meaning: str
    logical: str | None  # the name sharding rules know; None: never sharded
    size: Callable[[ModelConfig], int] | None  # None: depends on the call or on the layer


DIMS: dict[str, Dim] = {
    # activations and caches
    "B": Dim("batch rows", "batch", None),
    "T": Dim("new tokens (queries)", "sequence", None),
    "S": Dim("rows attended to", None, None),
    "W": Dim("window rows", None, lambda c: c.window),
    "C": Dim("compressed rows", "context", None),
    "K": Dim("compressed rows kept by the indexer", None, lambda c: c.index_topk),
    "U": Dim("tokens, flattened B·T", "batch", None),
    "Y": Dim("routed rows, U·A", None, None),
    # parameters
    "D": Dim("hidden size", "embed", lambda c: c.dim),
    "N": Dim("query heads", "heads", lambda c: c.num_heads),
    "H": Dim("channels per head", None, lambda c: c.head_dim),
    "R": Dim("rotary channels", None, lambda c: c.rope_dim),
    "Q": Dim("query latent rank", "q_rank", lambda c: c.q_rank),
    "G": Dim("output groups", "o_groups", lambda c: c.o_groups),
    "O": Dim("output rank per group", None, lambda c: c.o_rank),
    "E": Dim("routed experts", "experts", lambda c: c.num_experts),
    "A": Dim("experts per token", None, lambda c: c.experts_per_token),
    "F": Dim("expert width", "expert_mlp", lambda c: c.expert_dim),
    "f": Dim("width of the shared expert", "mlp", lambda c: c.expert_dim),
    "M": Dim("residual streams", None, lambda c: c.hc_mult),
    "V": Dim("vocabulary", "vocab", lambda c: c.vocab_size),
    "L": Dim("layers", "layers", lambda c: c.num_layers),
    "I": Dim("indexer heads", "index_heads", lambda c: c.index_heads),
    "J": Dim("indexer channels", None, lambda c: c.index_dim),
    # derived
    "x": Dim("query channels, N·H", "heads", lambda c: c.num_heads * c.head_dim),
    "g": Dim("channels per output group, N·H/G", "group_channels", lambda c: c.group_dim),
    "z": Dim("output rank, G·O", "o_groups", lambda c: c.o_groups * c.o_rank),
    "y": Dim("indexer query channels, I·J", "index_heads", lambda c: c.index_heads * c.index_dim),
    "m": Dim("flattened streams, M·D", "embed_streams", lambda c: c.hc_mult * c.dim),
    "h": Dim("stream mixing numbers, (2+M)·M", None, lambda c: c.hc_mix_dim),
    "r": Dim("compress ratio of the layer", None, None),
    "d": Dim("compressor width: row width, twice if overlapped", None, None),
    "e": Dim("experts as the router scores them", "router_experts", lambda c: c.num_experts),
    "v": Dim("rows of a hash table", "hash_rows", lambda c: c.vocab_size),
    "s": Dim("ring slots", "slots", None),
    "P": Dim("pages", "pages", None),
    "1": Dim("size one", None, lambda c: 1),
    "3": Dim("pre, post, comb", None, lambda c: 3),
}
