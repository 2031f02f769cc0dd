"""Decoding steps through the real TPU compiler: what they move, and what they do not make."""

import math

import pytest

from dsv4_jax.bench import step
from pallas_kernels import aot, hlo
from pallas_kernels.grouped_matmul.plan import row_tile
from pallas_kernels.grouped_matmul.resident import hidden_rows

REASON = aot.skip_reason()
pytestmark = [pytest.mark.tpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

MAX_SURPLUS = 1.25  # bytes moved ÷ unavoidable
MAX_TEMPORARIES = 64 << 20


def named_sizes(case):
    """Entries of the arrays of a step of more than a mebibyte, by name."""
    cfg, tokens = case.config(), case.batch * case.fresh
    rows = tokens * cfg.experts_per_token
    sorted_rows = hidden_rows(rows, row_tile(rows, cfg.num_experts))
    return {
        "logits": tokens * cfg.vocab_size,
        "a layer's hash table": cfg.vocab_size * cfg.experts_per_token,
        "heads of queries or outputs": tokens * cfg.num_heads * cfg.head_dim,
        "residual streams": tokens * cfg.hc_mult * cfg.dim,
        "hidden states": tokens * cfg.dim,
        "hidden rows of experts": sorted_rows * cfg.expert_dim,
        "output groups": tokens * cfg.o_groups * cfg.o_rank,
        "heads of index queries": tokens * cfg.index_heads * cfg.index_dim,
    }


@pytest.mark.parametrize("name", step.REPRESENTATIVE)
def test_a_step_reads_weights_and_caches_once_and_makes_no_large_array(name):
    """On a v5p, which has the least VMEM: elsewhere XLA keeps more out of HBM."""
    case = step.CASES[name]
    cfg, allowed, rows = case.config(), named_sizes(case), case.context // 4
    (report,) = aot.compile_isolated("dsv4_jax.bench.step:build", [name], ["v5p"], 600)
    assert report.error is None, report.error
    assert report.temp_bytes < MAX_TEMPORARIES, report.buffers
    assert report.hbm_bytes < MAX_SURPLUS * step.unavoidable_bytes(name), report.moved
    stored = [copy for copy in report.copies if copy.startswith(("u8", "u16", "f8"))]
    assert not stored, f"{stored} copied"
    for text in report.buffers:
        (buffer,) = hlo.buffers(text)
        sizes = [int(n) for n in text[text.index("[") + 1 : -1].split(",")]
        assert rows not in sizes, f"{text}: a score, or a row, of every cached entry"
        gathered = case.batch * cfg.index_topk * cfg.head_dim
        assert math.prod(sizes) < gathered, f"{text}: as large as gathered rows"
        if buffer.size > 1 << 20:
            assert math.prod(sizes) in allowed.values(), f"{text} is none of {list(allowed)}"
