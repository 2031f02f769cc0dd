"""Which devices serve, and how the model is spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv4_jax.config import ModelConfig
from dsv4_jax.placement import param_specs
from sharding.mesh import MeshShape, MeshSizes, make_mesh, meshes_of, nearest
from sharding.rules import ENGINE
from sharding.shards import SINGLE, Shards

SPLITS = ("expert", "tensor")  # axes that a server may use: every device sees every request


def shards_for(cfg: ModelConfig, mesh: str | None, devices: Sequence[Any]) -> Shards:
    """The mesh to serve on: `mesh` ("expert=2,tensor=4"), or one over all devices.

    Of its own accord it splits heads over as many devices as divide them, experts over all.

    Raises:
        ValueError: an axis that serving does not split, too few devices, or sizes that do not
            divide the model; the message names meshes that do.
    """
    shape = _best(cfg, len(devices)) if mesh is None else _checked(cfg, mesh, len(devices))
    if shape.num_devices == 1:
        return SINGLE
    return Shards(make_mesh(shape, devices[: shape.num_devices]), ENGINE)


def _problem(cfg: ModelConfig, shape: MeshShape) -> str | None:
    others = [f"{axis}={n}" for axis, n in shape.sizes().items() if n > 1 and axis not in SPLITS]
    if others:
        return f"serving splits over {' and '.join(SPLITS)} only, not {', '.join(others)}"
    try:
        param_specs(cfg, Shards(MeshSizes(shape), ENGINE))
    except ValueError as error:
        return str(error)
    return None


def _best(cfg: ModelConfig, count: int) -> MeshShape:
    found = [shape for shape in meshes_of(count) if _problem(cfg, shape) is None]
    if not found:
        raise ValueError(
            f"{count} devices cannot share this model: name a mesh of fewer with --mesh"
        )
    return max(found, key=lambda shape: shape.tensor)


def _checked(cfg: ModelConfig, text: str, count: int) -> MeshShape:
    shape = MeshShape.parse(text)
    if shape.num_devices > count:
        raise ValueError(f"--mesh {shape} needs {shape.num_devices} devices, there are {count}")
    if problem := _problem(cfg, shape):
        others = nearest(shape, lambda other: _problem(cfg, other) is None)
        names = "; ".join(str(other) for other in others) or "none"
        raise ValueError(f"--mesh {shape}: {problem}. Of as many devices would do: {names}")
    return shape
