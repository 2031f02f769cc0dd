"""The attention kernels go through the real TPU compiler for every generation, without a TPU."""

import pytest

from pallas_kernels import aot

REASON = aot.skip_reason()
pytestmark = [pytest.mark.tpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

TOPK = (
    "flash_decode_b8_128k",
    "flash_decode_b1_1m",
    "pro_decode_b64_8k",
    "pro_decode_b8_1m",
    "flash_prefill_t2048_8k",
    "pro_prefill_t2048_1m",
    "flash_decode_b8_128k_plain",
    "flash_prefill_t2048_128k_plain",
    "flash_verify_b8_t4_128k",
    "flash_decode_b256_1m_paged",
    "flash_prefill_t2048_128k_paged",
)
ATTENTION = (
    "flash_decode_b64_window",
    "flash_decode_b8_128k_hca",
    "flash_decode_b8_128k_csa_masked",
    "flash_decode_b8_128k_csa_masked_plain",
    "flash_decode_b8_1m_csa_gathered",
    "pro_decode_b64_8k_hca",
    "pro_decode_b1_1m_csa_masked",
    "pro_decode_b8_128k_csa_gathered",
    "flash_prefill_t2048_128k_hca",
    "pro_prefill_t2048_1m_csa_masked",
    "flash_verify_b8_t4_128k_csa_masked",
    "flash_heads8_prefill_t2048_128k_csa_masked",
    "flash_decode_b8_128k_hca_paged",
    "flash_decode_b256_1m_csa_masked_paged",
    "flash_decode_b8_128k_csa_gathered_paged",
    "flash_prefill_t2048_128k_csa_masked_paged",
)


def check(reports):
    for report in reports:
        where = f"{report.case} on {report.chip}"
        assert report.error is None, f"{where}: {report.error}"
        assert 0 < report.vmem_bytes < aot.CHIPS[report.chip].vmem_bytes, where
        pools = [c for c in report.copies if c.startswith(("u8", "u16"))]  # rows, keys, rings
        assert not pools, f"{where}: {pools} copied"
        assert report.temp_bytes < 32 << 20, f"{where}: {report.temp_bytes} bytes of temporaries"


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_index_topk_compiles(chip):
    target = "pallas_kernels.index_topk.shapes:build"
    check(aot.compile_isolated(target, TOPK, [chip]))


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_sparse_attention_compiles(chip):
    target = "pallas_kernels.sparse_attention.shapes:build"
    check(aot.compile_isolated(target, ATTENTION, [chip]))
