"""The attention kernels go through the real TPU compiler for every generation, without a TPU."""

import importlib

import pytest

from pallas_kernels import aot

REASON = aot.skip_reason()
pytestmark = [pytest.mark.tpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

TIMEOUT_S = 1800  # against a compiler that hangs; a busy machine is no error
OPS = (
    "compress_chunk",
    "compress_step",
    "index_topk",
    "query_heads",
    "row_update",
    "sparse_attention",
)


def check(reports):
    for report in reports:
        where = f"{report.case} on {report.chip}"
        assert report.error is None, f"{where}: {report.error}"
        assert 0 < report.vmem_bytes < aot.CHIPS[report.chip].vmem_bytes, where
        pools = [c for c in report.copies if c.startswith(("u8", "u16"))]  # rows, keys, rings
        assert not pools, f"{where}: {pools} copied"
        assert report.smem_bytes < 256 << 10, where
        assert report.temp_bytes < 32 << 20, f"{where}: {report.temp_bytes} bytes of temporaries"


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_copies(op):
    shapes = importlib.import_module(f"pallas_kernels.{op}.shapes")
    target = f"{shapes.__name__}:build"
    check(aot.compile_isolated(target, shapes.REPRESENTATIVE, aot.CHIPS, TIMEOUT_S))
