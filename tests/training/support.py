"""A model small enough to differentiate in a second, with every layer kind and live parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import ModelConfig, Yarn
from dsv4_jax.model import group_params
from dsv4_jax.training.batch import Batch
from tests.model.support import random_units

CONFIG = ModelConfig(
    vocab_size=61,
    dim=32,
    num_layers=3,
    compress_ratios=(0, 4, 8, 0),
    num_heads=2,
    head_dim=16,
    rope_dim=8,
    q_rank=16,
    o_groups=2,
    o_rank=8,
    num_experts=4,
    experts_per_token=2,
    expert_dim=32,
    num_hash_layers=1,
    routed_scale=1.5,
    window=6,
    index_heads=2,
    index_dim=16,
    index_topk=3,
    hc_mult=2,
    hc_iters=4,
    swiglu_limit=3.0,
    yarn=Yarn(original_len=16),
    max_len=512,
    dense_format=None,
    expert_format=None,
)
DEEP = CONFIG.replace(num_layers=5, compress_ratios=(0, 4, 8, 4, 8, 0))  # repeats (4, 8)


def random_params(cfg: ModelConfig = CONFIG, seed: int = 0, scan: bool = True) -> Any:
    """Float32 parameters, drawn so that every part matters."""
    units = jax.tree.map(
        lambda a: a if a.dtype == jnp.int32 else a.astype(jnp.float32), random_units(cfg, seed)
    )
    return group_params(cfg, units.__getitem__, scan)


def documents(sizes: list[int], seed: int = 0, vocab: int = CONFIG.vocab_size) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab, size).astype(np.int32) for size in sizes]


def pack(rows: list[list[np.ndarray]], length: int) -> Batch:
    """Rows of documents as a batch, padded at the end."""
    fields = np.zeros((4, len(rows), length), np.int32)
    for r, docs in enumerate(rows):
        start = 0
        for number, doc in enumerate(docs, start=1):
            part = slice(start, start + len(doc))
            fields[0, r, part], fields[1, r, part] = doc, number
            fields[2, r, part], fields[3, r, part] = np.arange(len(doc)), 1
            start += len(doc)
        assert start <= length
    return Batch(*map(jnp.asarray, fields))
