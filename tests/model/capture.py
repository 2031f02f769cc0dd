"""Records what flows between the sub-blocks while a model function is traced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax import attention, indexer, moe
from dsv4_jax import cache as store
from dsv4_jax.attention import Attention
from dsv4_jax.block import Block
from dsv4_jax.moe import MoE

Log = dict[str, list[Any]]


def captured(function: Callable, *args: Any) -> Log:
    """Runs `function` under jit and returns the inputs and outputs of its layers, in order.

    Works while layers are not scanned: a recorded array may not leave its trace.
    """

    def run(*args: Any) -> Log:
        with recording() as log:
            log["result"] = [function(*args)]
        return dict(log)

    return jax.jit(run)(*args)


@contextmanager
def recording() -> Iterator[Log]:
    log: Log = defaultdict(list)
    attend_chunk, route = attention.attend_chunk, moe.route

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            if isinstance(context.module, Attention):
                log["attn_in"].append(args[0][0])
                log["attn_out"].append(out[0][0])
            elif isinstance(context.module, MoE):
                log["ffn_in"].append(args[0][0])
                log["ffn_out"].append(out[0])
            elif isinstance(context.module, Block):
                log["streams_out"].append(out[0][0])
        return out

    def attend(q, window, sink, chunk, cache, index, query, ratio, cfg, num):
        out = attend_chunk(q, window, sink, chunk, cache, index, query, ratio, cfg, num)
        log["q"].append(q[0])
        log["attn_core_out"].append(out[0])
        history = store.num_rows(cache["window"])
        if q.shape[1] == 1:
            kv = window.rows_BSH[0, chunk.pos_B % history]
        else:
            kv = window.rows_BSH[0, history:]
        if ratio:
            rows = store.unpack(cache["rows"], num.jnp_dtype)[0, 0]
            log["compressed_kv"].append(rows)
            kv = jnp.concatenate([kv, rows])
        log["kv"].append(kv)
        if query is not None:
            steps = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
            visible = (chunk.pos_B[:, None] + steps + 1) // ratio
            scores = indexer.score_rows(query, cache["keys"], chunk.place(index), visible, num)
            picks = indexer.select_rows(
                query, cache["keys"], chunk.place(index), visible, cfg.index_topk, num
            )
            log["index_keys"].append(store.unpack(cache["keys"], num.jnp_dtype)[0, 0])
            log["index_scores"].append(scores[0])
            log["index_picks"].append(jnp.where(picks.valid_BTK, picks.rows_BTK, -1)[0])
        else:
            for name in ("index_keys", "index_scores", "index_picks"):
                log[name].append(None)
        if not ratio:
            log["compressed_kv"].append(None)
        return out

    def routed(*args):
        out = route(*args)
        log["route_experts"].append(out.experts_UA)
        log["route_weights"].append(out.weights_UA)
        return out

    with (
        mock.patch.object(attention, "attend_chunk", attend),
        mock.patch.object(moe, "route", routed),
        nn.intercept_methods(intercept),
    ):
        yield log
