"""Every sub-block of every layer against recorded inputs and outputs (prompt of 130 tokens).

Without rounding, whole-model intermediates are compared. With rounding each sub-block is fed its
recorded input, so nothing can drift: 0.01 rms tells a mirror that keeps every rounding from one
that leaves any out (those start at 0.016). Our experts are equal to the bit. Attention differs by
0.004, from two sources: the recording adds up keys in blocks of 64, each with probabilities rounded
against its own running maximum, and it takes the query norm of its last elements through scalar
code with one rounding more (see test_logits).
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax import model as program
from dsv4_jax.attention import Attention
from dsv4_jax.cache import init_cache
from dsv4_jax.mhc import HyperConnection, HyperHead, spread, weigh_streams
from dsv4_jax.moe import MoE
from dsv4_jax.norm import rms_norm
from dsv4_jax.quant import hadamard
from tests.model.capture import captured
from tests.model.support import PLAIN, REFERENCE, load_npz, relative, rms_ratio

LAYERS = (0, 1, 2)
MAX_RELATIVE = 1e-5
MAX_RMS = 0.01
PER_POSITION = ("attn_in", "attn_out", "ffn_in", "ffn_out", "streams_out", "q", "attn_core_out")
ATTENTION = ("q", "kv", "compressed_kv", "index_keys", "attn_core_out", "attn_out")


@pytest.fixture(scope="module")
def recorded():
    return load_npz("layers_p130.npz")


@pytest.fixture(scope="module")
def tokens_BT(model):
    (prompt,) = [p for p in model.prompts if p.name == "p130"]
    return jnp.asarray(prompt.tokens, jnp.int32)[None]


def values(recorded, key):
    """A recorded array; bfloat16 ones are stored as their bits."""
    array = recorded[key]
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def at_rows(got, want, recorded):
    """Our array at the positions that were recorded."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    if len(got) == len(want):
        return got, want
    size, rows = recorded["float32/0/route_weights"].shape[0], recorded["rows"]
    return np.concatenate([got[rows], got[size:]]), want


def check_routing(recorded, group, layer, log, index):
    """Experts are equal; weights, in the order of the experts, to float32 accuracy."""
    experts = recorded[f"{group}/{layer}/route_experts"]
    order = np.argsort(experts, axis=-1)
    want = np.take_along_axis(recorded[f"{group}/{layer}/route_weights"], order, axis=-1)
    np.testing.assert_array_equal(
        log["route_experts"][index], np.take_along_axis(experts, order, axis=-1)
    )
    return relative(np.asarray(log["route_weights"][index]), want)


def check_picks(recorded, group, layer, log, index):
    """Selected rows are equal, except where a score ties with the last one that is kept."""
    want = np.sort(recorded[f"{group}/{layer}/index_picks"], axis=-1)
    got = np.sort(np.asarray(log["index_picks"][index]), axis=-1)
    scores = np.asarray(log["index_scores"][index])
    for position in np.flatnonzero((got != want).any(-1)):
        odd = np.setxor1d(got[position], want[position])
        bound = np.sort(scores[position])[-got.shape[1]]
        assert (scores[position][odd] == bound).all(), f"position {position}: {odd} are no ties"


@pytest.fixture(scope="module")
def plain_log(model, tokens_BT):
    def run(params, tokens_BT):
        cache = init_cache(model.cfg, 1, tokens_BT.shape[1], PLAIN, scan=False)
        return program.prefill(model.cfg, PLAIN, params, tokens_BT, cache, all_logits=True)[0][0]

    params = program.group_params(model.cfg, model.units.__getitem__, scan=False)
    return captured(run, params, tokens_BT)


@pytest.mark.parametrize("layer", LAYERS)
def test_plain(layer, recorded, plain_log, within):
    for what in (*PER_POSITION, "kv", "compressed_kv", "index_keys"):
        if f"float32/{layer}/{what}" not in recorded:
            assert plain_log[what][layer] is None
            continue
        got = plain_log[what][layer]
        if what == "index_keys":  # the recording rotates them although nothing is rounded
            got = hadamard(got)
        got, want = at_rows(got, recorded[f"float32/{layer}/{what}"], recorded)
        within(f"sub-blocks: plain float32, {what}, relative", relative(got, want), MAX_RELATIVE)
    error = check_routing(recorded, "float32", layer, plain_log, layer)
    within("sub-blocks: plain float32, route_weights, relative", error, MAX_RELATIVE)


def test_plain_picks(recorded, plain_log):
    check_picks(recorded, "float32", 1, plain_log, 1)


def test_plain_logits(recorded, plain_log, within):
    got, want = at_rows(plain_log["result"][0][0], recorded["float32/logits"], recorded)
    within("sub-blocks: plain float32, logits, relative", relative(got, want), MAX_RELATIVE)


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_from_its_recorded_input(layer, model, tokens_BT, recorded, within):
    cfg, num = model.cfg, REFERENCE

    def run(weights, x_BTD):
        cache = init_cache(cfg, 1, tokens_BT.shape[1], num, scan=False)
        count_B = jnp.full(1, tokens_BT.shape[1], jnp.int32)
        chunk = program._chunk(cfg, cache, cache.pos_B, count_B, tokens_BT)
        module = Attention(cfg, num, cfg.ratio(layer))
        return module.apply(
            {"params": weights}, x_BTD, chunk, cache.groups[layer][0], jnp.int32(0)
        )[0]

    x_BTD = jnp.asarray(values(recorded, f"quantised/{layer}/attn_in"))[None]
    log = captured(run, model.units[f"layer_{layer:02d}"]["attn"], x_BTD)
    for what in ATTENTION:
        if f"quantised/{layer}/{what}" in recorded:
            want = values(recorded, f"quantised/{layer}/{what}")
            got, want = at_rows(log[what][0], want, recorded)
            within(f"sub-blocks: reference bfloat16, {what}, rms", rms_ratio(got, want), MAX_RMS)
    if f"quantised/{layer}/index_picks" in recorded:
        check_picks(recorded, "quantised", layer, log, 0)


@pytest.mark.parametrize("layer", LAYERS)
def test_experts_from_their_recorded_input(layer, model, tokens_BT, recorded, within):
    module = MoE(model.cfg, REFERENCE, model.cfg.is_hash(layer))

    def run(weights, x_BTD):
        real_BT = jnp.ones(tokens_BT.shape, bool)
        return module.apply({"params": weights}, x_BTD, tokens_BT, real_BT)

    x_BTD = jnp.asarray(values(recorded, f"quantised/{layer}/ffn_in"))[None]
    log = captured(run, model.units[f"layer_{layer:02d}"]["ffn"], x_BTD)
    got, want = at_rows(log["ffn_out"][0], values(recorded, f"quantised/{layer}/ffn_out"), recorded)
    within("sub-blocks: reference bfloat16, ffn_out, rms", rms_ratio(got, want), MAX_RMS)
    error = check_routing(recorded, "quantised", layer, log, 0)
    within("sub-blocks: reference bfloat16, route_weights, relative", error, MAX_RELATIVE)


@pytest.mark.parametrize("layer", LAYERS)
def test_streams_from_recorded_sub_blocks(layer, model, tokens_BT, recorded, within):
    """Collapse, norm and spread around the recorded attention and expert outputs."""
    cfg, num, weights = model.cfg, REFERENCE, model.units[f"layer_{layer:02d}"]

    def value(what, at=layer):
        return jnp.asarray(values(recorded, f"quantised/{at}/{what}"))[None]

    def sub_block(h_BTMD, name, out_BTD):
        mix = HyperConnection(cfg).apply({"params": weights[f"hc_{name}"]}, h_BTMD)
        x_BTD = weigh_streams(h_BTMD, mix.pre_MBT, num)
        x_BTD = rms_norm(x_BTD, weights[f"{name}_norm"], cfg.norm_eps, num)
        return x_BTD, spread(out_BTD, h_BTMD, mix, num)

    @jax.jit
    def run(h_BTMD, attn_out, ffn_out):
        attn_in, h_BTMD = sub_block(h_BTMD, "attn", attn_out)
        ffn_in, h_BTMD = sub_block(h_BTMD, "ffn", ffn_out)
        return {"attn_in": attn_in, "ffn_in": ffn_in, "streams_out": h_BTMD}

    if layer:
        h_BTMD = value("streams_out", layer - 1)
    else:
        x_BTD = num.cast(model.units["top"]["embed"][tokens_BT])
        h_BTMD = jnp.repeat(x_BTD[:, :, None], cfg.hc_mult, axis=2)
    for what, got in run(h_BTMD, value("attn_out"), value("ffn_out")).items():
        error = rms_ratio(got, value(what))
        within(f"sub-blocks: reference bfloat16, {what}, rms", error, MAX_RMS)


def test_logits_from_recorded_streams(model, recorded, within):
    cfg, num, top = model.cfg, REFERENCE, model.units["top"]

    @jax.jit
    def run(h_BTMD):
        y_BTD = HyperHead(cfg, num).apply({"params": top["hc_head"]}, h_BTMD)
        return program.output_head(rms_norm(y_BTD, top["norm"], cfg.norm_eps, num), top["head"])

    h_BTMD = jnp.asarray(values(recorded, f"quantised/{LAYERS[-1]}/streams_out"))[None]
    got, want = at_rows(run(h_BTMD)[0], recorded["quantised/logits"], recorded)
    within("sub-blocks: reference bfloat16, logits, rms", rms_ratio(got, want), MAX_RMS)
