"""Whole steps of the model as cases to compile for TPUs: one token per sequence, or one chunk.

`python -m pallas_kernels.aot dsv4_jax.bench.step:build --table CASE` compiles one for every chip.
Chips that cannot hold all experts get fewer of them (`_e8`); everything else is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import model
from dsv4_jax.cache import init_cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.presets import PRESETS
from pallas_kernels.sparse_attention.api import live_groups

NUM = Numerics("reference", "bfloat16", "pallas")
SHORT = (0, 4, 128, 4, 128)  # compress ratios of a model with few layers: every kind, one scan


class Case(NamedTuple):
    """Sizes of a step. layers: 0 for all, else those of `SHORT`."""

    preset: str
    batch: int
    fresh: int
    context: int
    experts: int
    short: bool = False

    def config(self) -> ModelConfig:
        """The model of this case."""
        cfg = PRESETS[self.preset]().replace(num_experts=self.experts)
        if not self.short:
            return cfg
        ratios = (*SHORT, 0)
        return cfg.replace(num_layers=len(SHORT), compress_ratios=ratios, num_hash_layers=1)


CASES = {
    "flash_decode_b64_8k_e8": Case("v4-flash", 64, 1, 8192, 8),
    "flash_decode_b64_8k_e32": Case("v4-flash", 64, 1, 8192, 32),
    "flash_decode_b64_8k_e128": Case("v4-flash", 64, 1, 8192, 128),
    "flash_decode_b8_128k_e8": Case("v4-flash", 8, 1, 131072, 8),
    "flash_decode_b8_1m_e8": Case("v4-flash", 8, 1, 1048576, 8),
    "pro_decode_b64_8k_e8": Case("v4-pro", 64, 1, 8192, 8),
    "flash_prefill_t2048_8k_e8": Case("v4-flash", 1, 2048, 8192, 8),
    "flash_short_prefill_t512_8k_e8": Case("v4-flash", 1, 512, 8192, 8, True),
    # 5120 rows of CSA layers: no other size of these models
    "flash_short_decode_b64_20k_e8": Case("v4-flash", 64, 1, 20480, 8, True),
    "pro_short_decode_b64_20k_e8": Case("v4-pro", 64, 1, 20480, 8, True),
    "flash_short_decode_b8_320k_e8": Case("v4-flash", 8, 1, 327680, 8, True),
}
REPRESENTATIVE = (
    "flash_short_decode_b64_20k_e8",
    "pro_short_decode_b64_20k_e8",
    "flash_short_decode_b8_320k_e8",
)


def operands(case: Case) -> tuple[Any, Any, Any]:
    """Shapes of parameters, tokens and cache."""
    cfg = case.config()
    params = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    cache = jax.eval_shape(partial(init_cache, cfg, case.batch, case.context, NUM))
    return params, jax.ShapeDtypeStruct((case.batch, case.fresh), jnp.int32), cache


def build(name: str) -> tuple[Callable[..., Any], list[tuple[Any, Any]], tuple[int, ...]]:
    """The step of a case, its arguments one by one, and those it may overwrite (the cache)."""
    case, leaves_of = CASES[name], jax.tree.leaves
    cfg, trees = case.config(), operands(case)
    treedef = jax.tree.structure(trees)

    def step(*leaves: Any) -> Any:
        params, tokens_BT, cache = jax.tree.unflatten(treedef, leaves)
        out, cache = model.prefill(cfg, NUM, params, tokens_BT, cache)
        return out.logits, cache

    arguments = [(leaf.shape, leaf.dtype) for leaf in leaves_of(trees)]
    count = len(leaves_of(trees[2]))
    return step, arguments, tuple(range(len(arguments) - count, len(arguments)))


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def unavoidable_bytes(name: str) -> int:
    """HBM bytes of a step: weights and context in use and the logits, each once.

    Without the embedding and the hash tables, of which a few rows are read, and without compressor
    rings, which only steps that complete a row read whole.
    """
    case = CASES[name]
    cfg, (params, _, cache) = case.config(), operands(case)
    used = min(1.0, case.batch * case.fresh * cfg.experts_per_token / cfg.num_experts)
    total = _size(params["top"]) - _size(params["top"]["embed"]) + 4 * case.batch * cfg.vocab_size
    for group in params["groups"]:
        for layer in group:
            experts = _size(layer["ffn"]["experts"])
            table = layer["ffn"]["gate"].get("tid2eid", ())
            total += int(_size(layer) - (1 - used) * experts) - _size(table)
    for layer in (layer for group in cache.groups for layer in group):
        total += _size([layer[name] for name in ("window", "keys") if name in layer])
        if "rows" in layer:
            total += int(_size(layer["rows"]) * _share_in_use(case, "keys" in layer))
    return total


def _share_in_use(case: Case, chosen: bool) -> float:
    """Of the compressed rows; chosen ones in groups of 128, as many as rows at random lie in."""
    groups, keep = case.context // (4 * 128), case.config().index_topk
    return live_groups(groups, case.fresh * keep) / groups if chosen else 1.0
