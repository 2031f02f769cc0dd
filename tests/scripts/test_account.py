"""What a token costs, against published figures."""

import json
import math
from functools import partial

import jax
import pytest

from dsv4_jax import presets
from dsv4_jax.accounting import MILLION, V32, cache_bytes, flops
from dsv4_jax.cache import init_paged_cache
from dsv4_jax.numerics import Numerics
from dsv4_jax.preflight import decode_cost
from pallas_kernels import hlo
from scripts.account import main

OLD = V32()
MODELS = {"v4-flash": presets.v4_flash(), "v4-pro": presets.v4_pro()}


@pytest.mark.parametrize(("name", "percent"), [("v4-flash", 10), ("v4-pro", 27)])
def test_flops_are_the_published_share_of_v3_2(name, percent):
    ratio = flops(MODELS[name], 10**6).in_fp8 / OLD.in_fp8(10**6)
    assert round(100 * ratio) == percent


@pytest.mark.parametrize(
    ("name", "most", "ratio", "percent"),
    [("v4-flash", 3600, 0.075, 7), ("v4-pro", 5100, 0.106, 10)],
)
@pytest.mark.parametrize("implementation", ["reference", "pallas"])
def test_caches_are_the_published_share_of_v3_2(name, most, ratio, percent, implementation):
    num = Numerics("reference", "bfloat16", implementation)
    cache = cache_bytes(MODELS[name], num)
    assert cache.at(MILLION) / MILLION <= most
    share = cache.at(MILLION) / (OLD.bytes_per_token * MILLION)
    assert share <= ratio
    assert int(100 * share) == percent


def test_terms_of_a_million_tokens():
    """The sums of the design's own table, in GFLOP."""
    wanted = {"v4-flash": (24.7, 90.2, 1.8, 21.8, 140), "v4-pro": (93.8, 128.9, 9.1, 67.6, 303)}
    for name, figures in wanted.items():
        cost = flops(MODELS[name], MILLION)
        parts = (cost.linears, cost.index, cost.csa, cost.hca, cost.total)
        assert [p / 1e9 for p in parts] == pytest.approx(figures, rel=0.01, abs=0.06)
    assert OLD.flops(MILLION).total / 1e9 == pytest.approx(1158, rel=1e-3)
    assert OLD.bytes_per_token == 48_068


@pytest.mark.parametrize(("name", "most"), [("v4-flash", 3600), ("v4-pro", 5100)])
@pytest.mark.parametrize("implementation", ["reference", "pallas"])
def test_pages_of_an_engine_cost_no_more(name, most, implementation):
    """The same bytes per token as a sequence of its own."""
    cfg, num = MODELS[name], Numerics("reference", "bfloat16", implementation)

    def size(pages):
        cache = jax.eval_shape(partial(init_paged_cache, cfg, 1, pages, 512, num))
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))

    per_token = (size(2048) - size(1024)) / (1024 * 512)
    assert per_token == cache_bytes(cfg, num).per_token
    assert size(2048) / MILLION <= most


def test_parts_of_a_compiled_step():
    """What kernels say goes to its part, everything else to the rest; sums stay."""
    cfg = MODELS["v4-flash"]
    formula = decode_cost.formula_parts(cfg, MILLION)
    assert sum(formula.values()) == flops(cfg, MILLION).total
    assert formula["experts"] / 1e9 == pytest.approx(13.0, abs=0.1)
    parts = decode_cost.compiled_parts(10.0, {"sparse_attention": 4, "block_matmul": 3})
    assert parts == {"attention": 4, "index": 0, "experts": 0, "other": 6}
    cost = decode_cost.DecodeCost("v4-flash", "v5p:2x2x1", MILLION, formula, formula)
    assert cost.to_json()["ratio_to_v3.2"]["compiled"] == pytest.approx(0.121, abs=1e-3)
    assert "12.1%" in decode_cost.table(cost)


def test_kernels_count_as_often_as_they_run():
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %k.7 = f32[8]{0} custom-call(), custom_call_target="tpu_custom_call", x={"flops":"12"}
}

%test (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(20)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(), condition=%test, body=%body
  %k.9 = f32[8]{0} custom-call(), custom_call_target="tpu_custom_call", x={"flops":"5"}
}
"""
    assert hlo.kernel_flops(text) == {"k": 245}


def test_short_contexts_select_no_more_than_there_is():
    cfg = MODELS["v4-flash"]
    assert flops(cfg, 400).csa < flops(cfg, 4 * cfg.index_topk).csa == flops(cfg, MILLION).csa


def test_the_command(tmp_path, capsys):
    image = tmp_path / "curves.png"
    assert main(["--contexts", "8192,1048576", "--json", "--plot", str(image)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["v4-flash"]["parameters"]["main"] == 284_332_240_471
    assert set(found["v4-pro"]["flops"]) == {"8192", "1048576"}
    assert image.read_bytes().startswith(b"\x89PNG")
    assert main([]) == 0
    assert "v4-pro" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--contexts", "0"], ["--contexts", "x"], ["--plot", "a.txt"]])
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    assert "must" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_one_line(capsys):
    assert main(["--plot", "/nowhere/curves.png"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
