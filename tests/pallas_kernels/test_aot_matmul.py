"""Every matmul and hyper-connection kernel goes through the real TPU compiler, no TPU needed."""

import importlib

import pytest

from pallas_kernels import aot

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(aot.skip_reason() is not None, reason=str(aot.skip_reason())),
]

OPS = {"block_matmul": (), "grouped_matmul": ("up", "down"), "mhc": ("mix", "spread")}
RAGGED = {
    "block_matmul": ("ragged", "ragged_base", "one_row"),
    "grouped_matmul": ("ragged_base:up", "ragged_base:down", "two_tiles:up", "two_tiles:down"),
    "mhc": ("one_token:mix", "chunk_border:mix", "chunk_border:spread"),
}


def shapes_of(op: str):
    return importlib.import_module(f"pallas_kernels.{op}.shapes")


def compiled(op: str, names) -> list[aot.Report]:
    """Reports of all chips from one process: its start costs more than a kernel."""
    reports = aot.compile_isolated(f"pallas_kernels.{op}.shapes:build", names, aot.CHIPS, 1800)
    errors = [f"{r.case} on {r.chip}: {r.error}" for r in reports if r.error]
    assert not errors, "\n".join(errors)
    return reports


@pytest.mark.parametrize("op", OPS)
def test_model_sizes_compile_without_copies(op):
    names = shapes_of(op).REPRESENTATIVE
    if OPS[op]:
        names = [f"{name}:{stage}" for name in names for stage in OPS[op]]
    for report in compiled(op, names):
        assert report.vmem_bytes <= aot.CHIPS[report.chip].vmem_bytes
        moved = [copy for copy in report.copies if not copy.startswith("f32")]  # block scales
        if report.chip != "TPU7x":  # there XLA may prefetch a lone kernel's operands into VMEM
            assert not moved, f"{report.case}: {moved}"
        assert report.hbm_bytes > 0 and report.flops > 0


@pytest.mark.parametrize("op", OPS)
def test_ragged_sizes_compile(op):
    compiled(op, RAGGED[op])


def test_routing_around_the_experts_copies_no_weight():
    """The whole operation, as the model calls it: weights reach the kernels as they lie."""
    for report in compiled("grouped_matmul", ["pro_decode_8:all"]):
        assert not [copy for copy in report.copies if copy.startswith(("u8", "f8"))]
        assert report.temp_bytes < 64 << 20
