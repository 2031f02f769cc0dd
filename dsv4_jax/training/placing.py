"""Where a run's state and batches lie on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.config import ModelConfig
from dsv4_jax.placement import param_specs, shardings
from dsv4_jax.training.batch import Batch, from_fields
from sharding.mesh import AXES, MeshShape, make_mesh
from sharding.rules import BY_COMPILER, TRAIN, manual_spec
from sharding.shards import SINGLE, Shards


def make_shards(text: str) -> Shards:
    """The mesh that `text` ("fsdp=2,expert=4") names, with the rules of training; "": one device.

    Raises:
        ValueError: unknown axes, or devices that do not fit.
    """
    shape = MeshShape.parse(text) if text else MeshShape()
    if shape.num_devices == 1 and jax.process_count() == 1:
        return SINGLE
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: shape.num_devices]
    return Shards(make_mesh(shape, devices), TRAIN, split=True)


def row_spec(shards: Shards) -> PartitionSpec:
    """Of batches `[microbatches, B, T]`."""
    return PartitionSpec(None, shards.axes("batch") or None, shards.axes("context") or None)


def route_spec(shards: Shards, ndim: int) -> PartitionSpec:
    """Of chosen experts `[…, B, T, A]`."""
    return PartitionSpec(*[None] * (ndim - 4), *row_spec(shards))


def state_specs(cfg: ModelConfig, state: Any, shards: Shards, scan: bool) -> Any:
    """PartitionSpecs of a training state (or its shapes): slots lie where their parameter does."""
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    specs = param_specs(cfg, shards, scan)
    placed = dict(jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec))

    def one(path: tuple[Any, ...], _: Any) -> PartitionSpec:
        ends = (path[start:] for start in range(len(path)))
        return next((placed[end] for end in ends if end in placed), PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def state_shardings(cfg: ModelConfig, state: Any, shards: Shards, scan: bool) -> Any:
    """Shardings of a state or its parameters; without a mesh all is on the first device."""
    if shards.mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: device, state)
    return shardings(state_specs(cfg, state, shards, scan), shards)


def manual_axes(shards: Shards) -> set[str]:
    """Axes that programs speak across: all, unless the compiler has one to split heads over."""
    return {axis for axis in AXES if axis != BY_COMPILER or shards.size(axis) == 1}


def manual_specs(specs: Any) -> Any:
    """Placements without the axis that the compiler splits."""
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(manual_spec, specs, is_leaf=is_spec)


def placed_shapes(cfg: ModelConfig, state: Any, shards: Shards, scan: bool) -> Any:
    """Shapes of a state or its parameters together with where they are to lie."""
    where = state_shardings(cfg, state, shards, scan)
    return jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), state, where
    )


def placed_routes(shards: Shards, routes: Any) -> Any:
    """Shapes of chosen experts together with where they lie."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(shape: Any) -> jax.ShapeDtypeStruct:
        at = named(shards, route_spec(shards, shape.ndim)) if shards.mesh is not None else device
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=at)

    return jax.tree.map(one, routes)


def rows_here(shards: Shards, micro: int, rows: int) -> np.ndarray:
    """Rows of a batch, cut into `micro` parts, that devices of this process work on; ascending."""
    number = np.arange(rows).reshape(micro, -1, 1)
    if shards.mesh is None:
        return number.reshape(-1)
    spec = PartitionSpec(*row_spec(shards)[:2])
    where = named(shards, spec).addressable_devices_indices_map(number.shape)
    return np.unique(np.concatenate([number[index].reshape(-1) for index in where.values()]))


def place_rows(shards: Shards, micro: int, rows: int, fields: np.ndarray) -> Batch:
    """A batch `[micro, rows ÷ micro, T]` of which this process has `rows_here`: see `from_fields`.

    Which row lies where depends on the mesh alone, not on how many processes share it.
    """
    shape = (micro, rows // micro, fields.shape[-1])
    if shards.mesh is None:
        return jax.tree.map(lambda field: jnp.asarray(field.reshape(shape)), from_fields(fields))
    mine, number = rows_here(shards, micro, rows), np.arange(rows).reshape(micro, -1)

    def one(field: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return field[np.searchsorted(mine, number[index[:2]])][..., index[2]]

        return jax.make_array_from_callback(shape, named(shards, row_spec(shards)), part)

    return jax.tree.map(one, from_fields(fields))


def named(shards: Shards, spec: PartitionSpec) -> NamedSharding:
    assert isinstance(shards.mesh, Mesh)
    return NamedSharding(shards.mesh, spec)
