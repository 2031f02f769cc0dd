"""A short training step through the TPU compiler, for a slice that is not there."""

import pytest

from dsv4_jax import exchange, presets
from dsv4_jax.training import preflight
from pallas_kernels import aot
from sharding.mesh import MeshShape

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(bool(aot.skip_reason()), reason=str(aot.skip_reason())),
]
ROWS, LENGTH = 4, 256
CFG = presets.tiny().replace(
    num_layers=1,
    compress_ratios=(0, 0),
    dim=256,
    head_dim=128,
    num_experts=16,
    expert_dim=128,
    num_hash_layers=0,
)


@pytest.mark.parametrize(
    "mesh", ["fsdp=2,expert=2", pytest.param("expert=2,tensor=2", marks=pytest.mark.slow)]
)
def test_a_step_compiles_with_waves_of_messages(mesh, monkeypatch):
    monkeypatch.setattr(exchange, "MAX_ROWS", LENGTH * CFG.experts_per_token * 2)
    sizes = preflight.sizes_of(CFG, ROWS, LENGTH, 1)
    shape = MeshShape.parse(mesh)
    report = preflight.run("small", CFG, "v5p:2x2x1", sizes, shape, "ragged")
    assert report.fits, report.reason
    # of the layer and the MTP block: there and back, that again backwards, and the transposes
    rows = LENGTH * CFG.experts_per_token * CFG.dim * 2 // 2
    assert report.sent["ragged-all-to-all"] >= 2 * 4 * rows
    assert shape.fsdp == 1 or {"all-gather", "reduce-scatter"} & set(report.sent)
