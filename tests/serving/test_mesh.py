"""Which devices serve."""

import jax
import pytest

from dsv4_jax import presets
from dsv4_jax.serving.mesh import shards_for
from sharding.mesh import shape_of
from sharding.shards import SINGLE

TINY = presets.tiny()


@pytest.mark.parametrize(
    ("cfg", "count", "want"),
    [
        (presets.v4_flash(), 8, "tensor=8"),
        (presets.v4_flash(), 4, "tensor=4"),
        (TINY, 8, None),
    ],
)
def test_all_devices_are_used(cfg, count, want):
    mesh = shards_for(cfg, None, jax.devices()[:count]).mesh
    assert mesh is not None
    shape = shape_of(mesh)
    assert shape.num_devices == count
    assert want is None or str(shape) == want


def test_one_device_needs_no_mesh():
    assert shards_for(TINY, None, jax.devices()[:1]) is SINGLE
    assert shards_for(TINY, "tensor=1", jax.devices()) is SINGLE


def test_a_mesh_may_leave_devices_out():
    mesh = shards_for(presets.v4_flash(), "expert=2,tensor=2", jax.devices()).mesh
    assert mesh is not None and mesh.size == 4


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=16", "needs 16 devices, there are 8"),
        ("context=2", "expert and tensor only, not context=2"),
        ("tensor=3", "Of as many devices would do"),
        ("heads=2", "AXIS=N"),
    ],
)
def test_what_does_not_fit_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        shards_for(presets.v4_flash(), mesh, jax.devices())
