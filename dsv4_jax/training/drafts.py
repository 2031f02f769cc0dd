"""The MTP block in training: over the main model's streams, then over its own, as it drafts.

The first run, of the published recipe, has the streams of token t and the embedding of token t + 1
and predicts token t + 2. A run more has what the run before made of token t − 1 in place of the
main model's streams of token t: what the block works on when it guesses a token behind its own
guess. Of the rows in front, a query then sees the newest as earlier runs left them, since they
belong to guesses as well, and all others as of the first run, as the block's cache has them
(the training-time test of EAGLE-3, arXiv 2503.01840, for one block that is run again).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.mhc import HyperHead
from dsv4_jax.norm import rms_norm
from dsv4_jax.params import mtp_specs
from dsv4_jax.training.attention import Layout, attend, project_in, project_out
from dsv4_jax.training.batch import ahead
from dsv4_jax.training.experts import RouterTerms, moe
from dsv4_jax.training.halo import from_left, own_part
from dsv4_jax.training.hyper import feed, spread
from dsv4_jax.training.joined import join
from dsv4_jax.training.precision import dense
from dsv4_jax.training.program import Program
from sharding.shards import Shards

Params = dict[str, Any]


def run(
    program: Program, params: Params, h_BTMD: Array, layout: Layout
) -> list[tuple[Array, RouterTerms]]:
    """Hidden states in front of the output head, `[B, T, D]`, and what routers report, of
    `program.drafts` runs. Of a document's first k tokens run k (from 0) says nothing of use.

    h_BTMD: streams after the main model's last layer. A document's last token has no next one:
    here it is padding, so that the embedding of its neighbour is not routed, counted or balanced.
    """
    cfg, num, shards = program.cfg, program.num, program.shards
    w = join(program, mtp_specs(cfg), params["mtp"][0])
    embed_VD = params["top"]["embed"]
    if program.objective is not None or program.mtp_only:  # what it learns is its own affair
        h_BTMD, embed_VD = lax.stop_gradient((h_BTMD, embed_VD))
    whole, length = layout.whole, layout.batch.tokens_BT.shape[1]
    next_BT = own_part(shards, ahead(whole.tokens_BT, 1), length)
    inside_BT = ahead(whole.segment_BT, 1) == whole.segment_BT
    whole = whole._replace(segment_BT=jnp.where(inside_BT, whole.segment_BT, 0))
    inner = jax.tree.map(lambda x: own_part(shards, x, length), whole)
    layout = layout._replace(batch=inner, whole=whole)
    e_BTD = rms_norm(num.cast(embed_VD[next_BT]), w["enorm"], cfg.norm_eps, num)
    e_BTD = dense(e_BTD, w["e_proj"], program.precision)
    found, rows = [], []
    for behind in range(program.drafts):
        if behind:
            h_BTMD = _later(shards, h_BTMD, 1)
        s_BTMD = rms_norm(h_BTMD, w["hnorm"], cfg.norm_eps, num)
        s_BTMD = dense(s_BTMD, w["h_proj"], program.precision)
        x_BTMD = num.cast(e_BTD.astype(jnp.float32)[:, :, None] + s_BTMD.astype(jnp.float32))
        h_BTMD, router = _block(program, w, x_BTMD, layout, rows)
        y_BTD: Any = HyperHead(cfg, num).apply({"params": w["hc_head"]}, h_BTMD)
        found.append((rms_norm(y_BTD, w["norm"], cfg.norm_eps, num), router))
    return found


def _block(
    program: Program, w: Params, x_BTMD: Array, layout: Layout, rows: list[Array]
) -> tuple[Array, RouterTerms]:
    """Streams of one run; rows: `[B, T, H]` of the runs before it, to which it adds its own."""
    x_BTD, mix = feed(program, w["hc_attn"], w["attn_norm"], x_BTMD)
    turn, attn = layout.rope_window, w["attn"]
    _, q_BTNH, kv_BTH = project_in(attn, x_BTD, turn, program)
    behind = len(rows)
    rows.append(kv_BTH)
    recent_BTRH = None
    if behind:
        newest = [_later(program.shards, rows[behind - ago], ago) for ago in range(behind)]
        recent_BTRH = jnp.stack(newest, axis=2)
    out_BTNH, _ = attend(q_BTNH, rows[0], attn["sink"], None, layout, program, recent_BTRH)
    a_BTD = project_out(attn, out_BTNH, turn, program)
    h_BTMD = spread(program, a_BTD, x_BTMD, mix)
    x_BTD, mix = feed(program, w["hc_ffn"], w["ffn_norm"], h_BTMD)
    batch = layout.batch
    is_drafted_BT = batch.position_BT >= behind
    batch = batch._replace(segment_BT=jnp.where(is_drafted_BT, batch.segment_BT, 0))
    f_BTD, router = moe(w["ffn"], x_BTD, batch, program)
    return spread(program, f_BTD, h_BTMD, mix), router


def _later(shards: Shards, x: Array, steps: int) -> Array:
    """`x` of token t − steps at every own token t of `[B, T, …]`; zeros at the row's start."""
    if not steps:
        return x
    return jnp.concatenate([from_left(shards, x, steps), x[:, : x.shape[1] - steps]], axis=1)
