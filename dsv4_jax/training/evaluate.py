"""Held-out loss: in nats and bits per byte, by position and by document length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.training.batch import Batch, ahead, from_fields, target_mask
from dsv4_jax.training.cross_entropy import token_losses
from dsv4_jax.training.data.source import Rows
from dsv4_jax.training.forward import forward
from dsv4_jax.training.program import Program

Scores = dict[str, np.ndarray]


def scorer(program: Program) -> Callable[[Any, Batch], Scores]:
    """A jitted function: per token t, the loss of token t + 1 and, from the MTP block, of t + 2.

    `agrees` says whether the MTP block's best guess of t + 2 is the main model's: the draft would
    be accepted at temperature 0.
    """

    def score(params: Any, batch: Batch) -> dict[str, jax.Array]:
        hidden, head = forward(program, params, batch), params["top"]["head"]
        shape, width = batch.tokens_BT.shape, program.cfg.dim

        def losses(y_BTD: jax.Array, steps: int) -> jax.Array:
            target_U = ahead(batch.tokens_BT, steps).reshape(-1)
            head_VD = head.astype(y_BTD.dtype)
            return token_losses(y_BTD.reshape(-1, width), head_VD, target_U).reshape(shape)

        found = {"loss": losses(hidden.y_BTD, 1)}
        if hidden.drafts:
            found["mtp"] = losses(hidden.drafts[0], 2)
            drafted = model.output_head(hidden.drafts[0], head).argmax(-1)
            found["agrees"] = drafted == ahead(model.output_head(hidden.y_BTD, head).argmax(-1), 1)
        return found

    compiled = jax.jit(score)
    return lambda params, batch: {k: np.asarray(v) for k, v in compiled(params, batch).items()}


def served_scorer(cfg: ModelConfig, num: Numerics, length: int) -> Callable[[Any, Batch], Scores]:
    """The same of the inference path, with its rounding, every document by itself."""

    @partial(jax.jit, static_argnums=0)
    def run(rows: int, params: Any, tokens_BT: jax.Array, count_B: jax.Array):
        cache = model.init_cache(cfg, rows, length, num, model.is_scanned(cfg, params))
        out, _ = model.prefill(cfg, num, params, tokens_BT, cache, count_B, all_logits=True)
        target_BT1 = ahead(tokens_BT, 1)[..., None]
        picked_BT = jnp.take_along_axis(out.logits, target_BT1, axis=-1)[..., 0]
        return jax.nn.logsumexp(out.logits, axis=-1) - picked_BT

    def score(params: Any, batch: Batch) -> Scores:
        result = np.zeros(batch.tokens_BT.shape, np.float32)
        for row, (tokens, segment) in enumerate(
            zip(np.asarray(batch.tokens_BT), np.asarray(batch.segment_BT), strict=True)
        ):
            for number in range(1, int(segment.max()) + 1):
                where = np.flatnonzero(segment == number)
                ids = np.zeros((1, length), np.int32)
                ids[0, : len(where)] = tokens[where]
                count_B = jnp.array([len(where)], jnp.int32)
                losses = np.asarray(run(1, params, jnp.asarray(ids), count_B))
                result[row, where] = losses[0, : len(where)]
        return {"loss": result}

    return score


def batches(rows: Rows, count: int, size: int) -> Iterator[Batch]:
    """The first `count` rows, `size` at a time (the last batch may repeat some of the first)."""
    for first in range(0, count, size):
        yield jax.tree.map(jnp.asarray, from_fields(rows.batch(first, range(size))[:4]))


def evaluate(
    score: Callable[[Any, Batch], Scores],
    params: Any,
    data: Iterator[Batch],
    bytes_of: np.ndarray | None = None,
) -> dict[str, Any]:
    """Mean losses in nats over learnt targets, and where they arise: by how many tokens of its
    document the model had seen (`position`), and by the document's length.

    bytes_of: bytes that every token id stands for; adds `bits_per_byte`.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    num_bytes = 0

    def add(name: str, values: np.ndarray) -> None:
        sums[name][0] += float(values.sum(dtype=np.float64))
        sums[name][1] += values.size

    for batch in data:
        found = score(params, batch)
        first, second = (np.asarray(target_mask(batch, steps)) for steps in (1, 2))
        add("loss", found["loss"][first])
        for name in ("mtp", "agrees"):
            if name in found:
                add(name, found[name][second].astype(np.float32))
        position, size = np.asarray(batch.position_BT) + 1, _document_size(batch)
        for bucket in _buckets(position[first]):
            inside = first & (_bucket(position) == bucket)
            add(f"position {2**bucket}-{2 ** (bucket + 1) - 1}", found["loss"][inside])
        for bucket in _buckets(size[first]):
            inside = first & (_bucket(size) == bucket)
            add(f"length {2**bucket}-{2 ** (bucket + 1) - 1}", found["loss"][inside])
        if bytes_of is not None:
            num_bytes += int(bytes_of[np.asarray(ahead(batch.tokens_BT, 1))[first]].sum())
    result: dict[str, Any] = {name: total / max(n, 1) for name, (total, n) in sums.items()}
    result["targets"] = int(sums["loss"][1])
    if bytes_of is not None:
        result["bits_per_byte"] = sums["loss"][0] / math.log(2) / max(num_bytes, 1)
    return result


def _document_size(batch: Batch) -> np.ndarray:
    """Length of each token's document inside its row."""
    segment = np.asarray(batch.segment_BT)
    sizes = np.stack([np.bincount(row, minlength=segment.max() + 1) for row in segment])
    return np.take_along_axis(sizes, segment, axis=1)


def _bucket(values: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(values, 1)).astype(int)


def _buckets(values: np.ndarray) -> list[int]:
    return sorted(set(_bucket(values).tolist()))
