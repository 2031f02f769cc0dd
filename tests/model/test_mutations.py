"""The fixtures must catch mistakes: typical ones are put in, and the checks must then fail.

The model runs in pieces (mixing, attention, experts, head) that are compiled on their own, so that
a mistake recompiles only what it touches.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import attend, attention, compress, indexer, mhc, moe, rope
from dsv4_jax import model as program
from dsv4_jax.attention import Attention
from dsv4_jax.cache import init_cache
from dsv4_jax.mhc import HyperConnection, HyperHead
from dsv4_jax.moe import MoE
from dsv4_jax.norm import rms_norm
from tests.model.support import PLAIN, REFERENCE, load_npz, relative, rms_ratio
from tests.model.test_layers import MAX_RMS, values
from tests.model.test_logits import MAX_ABS

TIMES = 5  # a mistake must exceed the bar clearly


class Pieces:
    """Compiled parts of the forward pass of one prompt of the fixture."""

    def __init__(self, model, prompt, num=PLAIN):
        self.model, self.num = model, num
        self.tokens_BT = jnp.asarray(prompt.tokens, jnp.int32)[None]
        self.compiled: dict[str, Callable] = {}

    def forget(self, kinds):
        """Drops the compiled parts whose name begins with one of `kinds`."""
        kept = {k: f for k, f in self.compiled.items() if not k.startswith(tuple(kinds))}
        return kept, {k: f for k, f in self.compiled.items() if k not in kept}

    def call(self, name, function, *args):
        if name not in self.compiled:
            self.compiled[name] = jax.jit(function)
        return self.compiled[name](*args)

    def attention(self, layer, cfg, x_BTD):
        def run(weights, x_BTD):
            size = x_BTD.shape[1]
            cache = init_cache(cfg, 1, size, self.num, scan=False)
            count_B = jnp.full(1, size, jnp.int32)
            chunk = program._chunk(cfg, cache, cache.pos_B, count_B, self.tokens_BT)
            module = Attention(cfg, self.num, cfg.ratio(layer))
            state = cache.groups[layer][0]
            return module.apply({"params": weights}, x_BTD, chunk, state, jnp.int32(0))[0]

        weights = self.model.units[f"layer_{layer:02d}"]["attn"]
        return self.call(f"attention {layer}", run, weights, x_BTD)

    def experts(self, layer, cfg, x_BTD):
        def run(weights, x_BTD):
            module = MoE(cfg, self.num, cfg.is_hash(layer))
            real_BT = jnp.ones(self.tokens_BT.shape, bool)
            return module.apply({"params": weights}, x_BTD, self.tokens_BT, real_BT)

        weights = self.model.units[f"layer_{layer:02d}"]["ffn"]
        return self.call(f"experts {layer}", run, weights, x_BTD)

    def logits(self, cfg):
        num, top = self.num, self.model.units["top"]

        def before(weights, norm, h_BTMD):
            mix = HyperConnection(cfg).apply({"params": weights}, h_BTMD)
            x_BTD = mhc.weigh_streams(h_BTMD, mix.pre_MBT, num)
            return rms_norm(x_BTD, norm, cfg.norm_eps, num), mix

        def after(out_BTD, h_BTMD, mix):
            return mhc.spread(out_BTD, h_BTMD, mix, num)

        def head(top, h_BTMD):
            y_BTD = HyperHead(cfg, num).apply({"params": top["hc_head"]}, h_BTMD)
            return program.output_head(rms_norm(y_BTD, top["norm"], cfg.norm_eps, num), top["head"])

        x_BTD = num.cast(top["embed"][self.tokens_BT])
        h_BTMD = jnp.repeat(x_BTD[:, :, None], cfg.hc_mult, axis=2)
        for layer in range(cfg.num_layers):
            weights = self.model.units[f"layer_{layer:02d}"]
            for name, sub_block in (("attn", self.attention), ("ffn", self.experts)):
                part = (weights[f"hc_{name}"], weights[f"{name}_norm"])
                x_BTD, mix = self.call("mixing before", before, *part, h_BTMD)
                out_BTD = sub_block(layer, cfg, x_BTD)
                h_BTMD = self.call("mixing after", after, out_BTD, h_BTMD, mix)
        return np.asarray(self.call("head", head, top, h_BTMD)[0])


@dataclasses.dataclass(frozen=True)
class Mistake:
    """Which pieces it touches, and what it changes: configuration fields, or functions."""

    pieces: tuple[str, ...]
    cfg: dict = dataclasses.field(default_factory=dict)
    patches: tuple[tuple[object, str, Callable], ...] = ()


def patched(mistake, run):
    with ExitStack() as stack:
        for owner, name, function in mistake.patches:
            stack.enter_context(mock.patch.object(owner, name, function))
        return run()


# -- functions with a mistake --------------------------------------------------------------------


def rotate_halves(x, turn, num, inverse=False):
    size = turn.cos.shape[-1]
    still, a, b = x[..., : -2 * size], x[..., -2 * size : -size], x[..., -size:]
    sin = -turn.sin if inverse else turn.sin
    return jnp.concatenate([still, a * turn.cos - b * sin, a * sin + b * turn.cos], axis=-1)


def rotate_forward_only(x, turn, num, inverse=False, rotate=rope.rotate):
    return x if inverse else rotate(x, turn, num)


def rotation_with_magnitude(freqs, positions, rotation=rope.rotation):
    cos, sin = rotation(freqs, positions)
    factor = np.float32(0.1 * np.log(16) + 1)
    return rope.Rotation(cos * factor, sin * factor)


def stretched_everywhere(cfg, compressed, frequencies=rope.frequencies):
    freqs = frequencies(cfg, compressed)
    if compressed:
        return freqs
    return rope._stretch(freqs, cfg.rope_theta, cfg.rope_dim, cfg.yarn).astype(np.float32)


def rotation_of_last_tokens(freqs, positions, rotation=rope.rotation):
    """Rows of ratio 4 take the position of their last token."""
    return rotation(freqs, positions + 3)


def finish_without_sink(state, sink_N, num, finish=attend.finish):
    return finish(state, jnp.full_like(sink_N, -1e30), num)


def finish_with_scaled_sink(state, sink_N, num, finish=attend.finish):
    return finish(state, sink_N * state.sum_BTNH.shape[-1] ** -0.5, num)


def visible_later(state, q, rows, place, visible, mask, num, absorb=attention._absorb_visible):
    visible = jnp.concatenate([visible[:, :1], visible[:, :-1]], axis=1)
    return absorb(state, q, rows, place, visible, mask, num)


def visible_earlier(state, q, rows, place, visible, mask, num, absorb=attention._absorb_visible):
    visible = jnp.concatenate([visible[:, 1:], visible[:, -1:]], axis=1)
    return absorb(state, q, rows, place, visible, mask, num)


def exchanged_halves(windows, pos_B, num_new, ratio, row_dim, pool=compress._pool_windows):
    def rolled(count):
        return tuple(jnp.roll(a, row_dim, axis=-1) for a in windows(count))

    return pool(rolled, pos_B, num_new, ratio, row_dim)


def own_windows_only(windows, pos_B, num_new, ratio, row_dim, pool=compress._pool_windows):
    def silent(count):
        values, scores = windows(count)
        return values, scores.at[..., :row_dim].set(-1e30)  # nothing speaks for the next window

    return pool(silent, pos_B, num_new, ratio, row_dim)


def first_row_with_zero_scores(
    windows, pos_B, num_new, ratio, row_dim, pool=compress._pool_windows
):
    return pool(windows, pos_B + ratio, num_new, ratio, row_dim)  # as if a window came before


def unsigned_weights(query, keys_BSJ, num, score_tile=indexer.score_tile):
    return score_tile(query._replace(w_BTI=jnp.abs(query.w_BTI)), keys_BSJ, num)


def no_relu(query, keys_BSJ, num):
    dots = jnp.einsum("BTIJ,BSJ->BTIS", query.q_BTIJ, keys_BSJ)
    return (dots * query.w_BTI[..., None]).sum(2)


def transposed_comb(a_BTD, h_BTMD, mix, num, spread=mhc.spread):
    return spread(a_BTD, h_BTMD, mix._replace(comb_MMBT=mix.comb_MMBT.swapaxes(0, 1)), num)


def halved_post(mix, scale, base, cfg, split=mhc.split_mixing):
    mixing = split(mix, scale, base, cfg)
    return mixing._replace(post_MBT=mixing.post_MBT / 2)


def pre_without_epsilon(mix, scale, base, cfg, split=mhc.split_mixing):
    mixing = split(mix, scale, base, cfg)
    return mixing._replace(pre_MBT=mixing.pre_MBT - cfg.hc_eps)


def sinkhorn_ending_on_rows(logits, iters, eps, sinkhorn=mhc.sinkhorn):
    comb = sinkhorn(logits, iters, eps)
    return comb / (comb.sum(1, keepdims=True) + eps)


def unclamped_shared(weights, x_YD, scale_Y, cfg, num, which=None, expert=moe.expert):
    limit = cfg.swiglu_limit if scale_Y is not None else 0.0
    return expert(weights, x_YD, scale_Y, cfg.replace(swiglu_limit=limit), num, which)


def unclamped_routed(weights, x_YD, scale_Y, cfg, num, which=None, expert=moe.expert):
    limit = cfg.swiglu_limit if scale_Y is None else 0.0
    return expert(weights, x_YD, scale_Y, cfg.replace(swiglu_limit=limit), num, which)


def route_without_bias(gate, x_UD, tokens_U, cfg, route=moe.route):
    gate = {name: a * 0 if name == "bias" else a for name, a in gate.items()}
    return route(gate, x_UD, tokens_U, cfg)


def route_without_normalising(gate, x_UD, tokens_U, cfg, route=moe.route):
    routing = route(gate, x_UD, tokens_U, cfg)
    scores = jnp.sqrt(jax.nn.softplus(x_UD @ gate["weight"].astype(jnp.float32).T))
    weights = jnp.take_along_axis(scores, routing.experts_UA, axis=-1) * cfg.routed_scale
    return routing._replace(weights_UA=weights)


ROTATE = (attention, "rotate"), (compress, "rotate")
MISTAKES = {
    "window one key short": Mistake(("attention",), {"window": 127}),
    "window one key long": Mistake(("attention",), {"window": 129}),
    "row of ratio 128 visible one token late": Mistake(
        ("attention 2",), patches=((attention, "_absorb_visible", visible_later),)
    ),
    "row of ratio 128 visible one token early": Mistake(
        ("attention 2",), patches=((attention, "_absorb_visible", visible_earlier),)
    ),
    "ratio 4 without overlap": Mistake(
        ("attention 1",), patches=((compress, "_pool_windows", own_windows_only),)
    ),
    "halves of ratio 4 exchanged": Mistake(
        ("attention 1",), patches=((compress, "_pool_windows", exchanged_halves),)
    ),
    "first row of ratio 4 padded with score 0": Mistake(
        ("attention 1",), patches=((compress, "_pool_windows", first_row_with_zero_scores),)
    ),
    "compressed rows rotated as their last token": Mistake(
        ("attention 1",), patches=((compress, "rotation", rotation_of_last_tokens),)
    ),
    "rotary halves instead of pairs": Mistake(
        ("attention",), patches=tuple((*at, rotate_halves) for at in ROTATE)
    ),
    "output not rotated back": Mistake(
        ("attention",), patches=((attention, "rotate", rotate_forward_only),)
    ),
    "YaRN missing": Mistake(("attention",), {"yarn": None}),
    "YaRN also on window-only layers": Mistake(
        ("attention",), patches=((program, "frequencies", stretched_everywhere),)
    ),
    "YaRN with magnitude factor": Mistake(
        ("attention",),
        patches=tuple((m, "rotation", rotation_with_magnitude) for m in (program, compress)),
    ),
    "base theta on compressed layers": Mistake(("attention",), {"compress_rope_theta": 10000.0}),
    "no sink": Mistake(("attention",), patches=((attend, "finish", finish_without_sink),)),
    "sink scaled like scores": Mistake(
        ("attention",), patches=((attend, "finish", finish_with_scaled_sink),)
    ),
    "indexer keeps all rows": Mistake(("attention 1",), {"index_topk": 64}),
    "indexer keeps one row too few": Mistake(("attention 1",), {"index_topk": 15}),
    "unsigned weights of index heads": Mistake(
        ("attention 1",), patches=((indexer, "score_tile", unsigned_weights),)
    ),
    "index scores without relu": Mistake(
        ("attention 1",), patches=((indexer, "score_tile", no_relu),)
    ),
    "comb transposed": Mistake(("mixing",), patches=((mhc, "spread", transposed_comb),)),
    "post without factor 2": Mistake(("mixing",), patches=((mhc, "split_mixing", halved_post),)),
    "Sinkhorn one iteration short": Mistake(("mixing",), {"hc_iters": 7}),
    "Sinkhorn ending on rows": Mistake(
        ("mixing",), patches=((mhc, "sinkhorn", sinkhorn_ending_on_rows),)
    ),
    "shared expert not clamped": Mistake(
        ("experts",), patches=((moe, "expert", unclamped_shared),)
    ),
    "routed experts not clamped": Mistake(
        ("experts",), patches=((moe, "expert", unclamped_routed),)
    ),
    "router bias ignored": Mistake(("experts",), patches=((moe, "route", route_without_bias),)),
    "routing weights not normalised": Mistake(
        ("experts",), patches=((moe, "route", route_without_normalising),)
    ),
    "routing scale ignored": Mistake(("experts",), {"routed_scale": 1.0}),
}


@pytest.fixture(scope="module")
def prompt(model):
    (prompt,) = [p for p in model.prompts if p.name == "p130"]
    return prompt


@pytest.fixture(scope="module")
def pieces(model, prompt):
    """Compiled without any mistake, and right."""
    pieces = Pieces(model, prompt)
    assert logits_error(pieces, model.cfg) < MAX_ABS
    return pieces


def logits_error(pieces, cfg):
    expected = pieces.model.expected("float32")
    got = pieces.logits(cfg)[expected["p130/prefill_rows"]]
    return np.abs(got - expected["p130/prefill"]).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_logits_show(name, pieces, model):
    mistake = MISTAKES[name]
    kept, dropped = pieces.forget(mistake.pieces)
    assert dropped
    pieces.compiled = dict(kept)
    try:
        error = patched(mistake, lambda: logits_error(pieces, model.cfg.replace(**mistake.cfg)))
    finally:
        pieces.compiled = kept | dropped
    print(f"mutation | {name} | {error:.3g}")
    assert error > TIMES * MAX_ABS


def test_mixing_pairs_show_a_missing_epsilon(model):
    """An epsilon of 1e-6 is too small for logits to show; the recorded pairs are fine enough."""
    blocks = load_npz("blocks.npz")
    args = (jnp.asarray(blocks["hc_mixes"].T)[:, None], blocks["hc_scale"], blocks["hc_base"])
    for split, right in ((mhc.split_mixing, True), (pre_without_epsilon, False)):
        got = jax.jit(partial(split, cfg=model.cfg))(*args)
        pre = np.asarray(got.pre_MBT[:, 0]).T
        assert (relative(pre, blocks["hc_pre"]) < 4e-7) == right


# -- roundings left out --------------------------------------------------------------------------


def unrounded_rows(rows, cfg, num):
    return rows


def unrounded_index(x, num):
    return x


def index_without_hadamard(x, num):
    return attention.fake_fp4(x)


def rounding_weight_behind_w2(weights, x_YD, scale_Y, cfg, num, which=None, expert=moe.expert):
    out = expert(weights, x_YD, None, cfg, num, which)
    return out if scale_Y is None else num.cast(out.astype(jnp.float32) * scale_Y[:, None])


def unrounded_linear(x, weight, num, rounded=True, wide=False, linear=attention.linear):
    return linear(x, weight, num, rounded=False, wide=wide)


ROUNDINGS = {
    "keys and values not rounded": ("attention", 1, attention, "round_rows", unrounded_rows),
    "index not rounded": ("attention", 1, attention, "round_index", unrounded_index),
    "index not rotated": ("attention", 1, attention, "round_index", index_without_hadamard),
    "attention inputs not rounded": ("attention", 0, attention, "linear", unrounded_linear),
    "expert inputs not rounded": ("experts", 0, moe, "linear", unrounded_linear),
    "routing weight behind w2": ("experts", 1, moe, "expert", rounding_weight_behind_w2),
}


@pytest.fixture(scope="module")
def sub_block_error(model, prompt):
    """Error of attention or experts of a layer from their recorded input; right ones run once."""
    recorded = load_npz("layers_p130.npz")
    right = Pieces(model, prompt, REFERENCE)

    def error(kind, layer, mistaken=False):
        where = "attn" if kind == "attention" else "ffn"
        x_BTD = jnp.asarray(values(recorded, f"quantised/{layer}/{where}_in"))[None]
        pieces = Pieces(model, prompt, REFERENCE) if mistaken else right
        got = getattr(pieces, kind)(layer, model.cfg, x_BTD)[0]
        return rms_ratio(got, values(recorded, f"quantised/{layer}/{where}_out"))

    return error


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDINGS)
def test_sub_blocks_show(name, sub_block_error):
    kind, layer, owner, function, wrong = ROUNDINGS[name]
    with mock.patch.object(owner, function, wrong):
        worst = sub_block_error(kind, layer, mistaken=True)
    print(f"rounding | {name} | {worst:.3g}")
    assert worst > MAX_RMS >= sub_block_error(kind, layer)
