"""A decoding step through the real TPU compiler: what it moves, and what it does not make."""

import pytest

from dsv4_jax.bench import step
from pallas_kernels import aot

REASON = aot.skip_reason()
pytestmark = [pytest.mark.tpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

MAX_SURPLUS = 1.35  # bytes moved ÷ unavoidable; few experts leave much to activations
MAX_BUFFER = 64 << 20  # logits of 64 sequences are half of it


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_a_step_reads_weights_and_caches_once_and_makes_no_large_array(chip):
    for name in step.REPRESENTATIVE:
        (report,) = aot.compile_isolated("dsv4_jax.bench.step:build", [name], [chip], 600)
        assert report.error is None, report.error
        assert report.temp_bytes < MAX_BUFFER, report.buffers
        assert report.hbm_bytes < MAX_SURPLUS * step.unavoidable_bytes(name), report.moved
        stored = [copy for copy in report.copies if copy.startswith(("u8", "u16", "f8"))]
        assert not stored, f"{stored} copied"
