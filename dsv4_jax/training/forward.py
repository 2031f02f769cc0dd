"""The forward pass of training: whole packed rows, every loss's ingredients, no state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.mhc import HyperHead
from dsv4_jax.model import is_scanned
from dsv4_jax.norm import rms_norm
from dsv4_jax.params import block_specs
from dsv4_jax.rope import frequencies, rotation
from dsv4_jax.schedule import Group, LayerKind, layer_groups
from dsv4_jax.training import drafts
from dsv4_jax.training.attention import Layout, attention
from dsv4_jax.training.batch import Batch
from dsv4_jax.training.experts import RouterTerms, moe
from dsv4_jax.training.halo import own_part, rows_before, whole_rows
from dsv4_jax.training.hyper import feed, spread
from dsv4_jax.training.index_loss import IndexTerms, no_terms
from dsv4_jax.training.joined import join
from dsv4_jax.training.program import Program
from dsv4_jax.training.windows import extent, find_windows

Params = dict[str, Any]


class LayerTerms(NamedTuple):
    """What one layer reports beside its output."""

    router: RouterTerms
    indexer: IndexTerms


class Hidden(NamedTuple):
    """y_BTD: in front of the output head, normed. drafts: the same of the MTP block, once for every
    time it runs; row t predicts token t + 2, see `drafts.run`.
    terms: per group and pattern offset the layers' terms, stacked where the group repeats.
    mtp_terms: of the MTP block, once for every time it runs."""

    y_BTD: Array
    drafts: list[Array]
    terms: list[list[LayerTerms]]
    mtp_terms: list[LayerTerms]


def forward(program: Program, params: Params, batch: Batch, routes: Any = None) -> Hidden:
    """Hidden states and terms of a packed batch.

    params: of one device's part on a mesh, but for `top`, which is joined already.
    routes: expert indices to use, shaped like `terms[g][i].router.experts_BTA`; None: each layer
    chooses. The MTP block always chooses for itself.
    """
    cfg, num = program.cfg, program.num
    layout = _layout(program, batch)
    x_BTD = num.cast(params["top"]["embed"][batch.tokens_BT])
    h_BTMD = jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], cfg.hc_mult, cfg.dim))
    terms = []
    groups = layer_groups(cfg, is_scanned(cfg, params))
    for g, (group, weights) in enumerate(zip(groups, params["groups"], strict=True)):
        given = None if routes is None else routes[g]
        h_BTMD, found = _run_group(program, group, weights, h_BTMD, layout, given)
        terms.append(found)
    top = params["top"]
    y_BTD: Any = HyperHead(cfg, num).apply({"params": top["hc_head"]}, h_BTMD)
    y_BTD = rms_norm(y_BTD, top["norm"], cfg.norm_eps, num)
    if not program.mtp:
        return Hidden(y_BTD, [], terms, [])
    found = drafts.run(program, params, h_BTMD, layout)
    mtp_terms = [LayerTerms(router, no_terms()) for _, router in found]
    return Hidden(y_BTD, [y_BTD for y_BTD, _ in found], terms, mtp_terms)


def _layout(program: Program, batch: Batch) -> Layout:
    cfg, shards, length = program.cfg, program.shards, batch.tokens_BT.shape[1]
    window, rows = (rotation(frequencies(cfg, kind), batch.position_BT) for kind in (False, True))
    whole, windows, extents = whole_rows(shards, batch), {}, {}
    for ratio in sorted({ratio for ratio in cfg.compress_ratios if ratio}):
        before = rows_before(shards, ratio)
        near = jax.tree.map(lambda x, n=before: own_part(shards, x, length, n), whole)
        windows[ratio] = find_windows(near, ratio, before)
        extents[ratio] = jax.tree.map(
            lambda x_BC: shards.join(x_BC, "context", 1), extent(windows[ratio], ratio)
        )
    return Layout(batch, whole, window, rows, windows, extents)


def _run_group(
    program: Program,
    group: Group,
    weights: list[Params],
    h_BTMD: Array,
    layout: Layout,
    routes: list[Array] | None,
) -> tuple[Array, list[LayerTerms]]:
    """All layers of a group; a repeated pattern is one scan."""
    given: list[Array | None] = [None] * len(group.kinds) if routes is None else list(routes)

    def pattern(h_BTMD: Array, xs: tuple[list[Params], list[Array | None]]):
        terms = []
        for kind, layer, route in zip(group.kinds, *xs, strict=True):
            layer = join(program, block_specs(program.cfg, *kind), layer)
            h_BTMD, found = block(program, kind, layer, h_BTMD, layout, route)
            terms.append(found)
        return h_BTMD, terms

    if program.remat == "group":
        policy = jax.checkpoint_policies.save_only_these_names("decision", "routed")
        pattern = jax.checkpoint(pattern, policy=policy, prevent_cse=group.repeats == 1)
    if group.repeats == 1:
        return pattern(h_BTMD, (weights, given))
    return lax.scan(pattern, h_BTMD, (weights, given))


def block(
    program: Program,
    kind: LayerKind,
    w: Params,
    h_BTMD: Array,
    layout: Layout,
    given_BTA: Array | None = None,
) -> tuple[Array, LayerTerms]:
    """One layer: attention and MoE, each behind a norm and a hyper-connection."""
    x_BTD, mix = feed(program, w["hc_attn"], w["attn_norm"], h_BTMD)
    a_BTD, index = attention(w["attn"], x_BTD, layout, kind.ratio, program)
    h_BTMD = spread(program, a_BTD, h_BTMD, mix)
    x_BTD, mix = feed(program, w["hc_ffn"], w["ffn_norm"], h_BTMD)
    f_BTD, router = moe(w["ffn"], x_BTD, layout.batch, program, given_BTA)
    return spread(program, f_BTD, h_BTMD, mix), LayerTerms(router, index)
