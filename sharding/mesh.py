"""Meshes over real devices or over a described TPU slice. The only place that builds one.

Axes, outermost first: `data` (replicas), `fsdp` (batch; in training also storage of weights),
`expert` (batch, and the experts), `context` (positions of long sequences), `tensor` (heads).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")
TOPOLOGY = re.compile(r"(v4|v5e|v5p|v6e|TPU7x):(\d+)x(\d+)(?:x(\d+))?", re.IGNORECASE)
EXAMPLES = "v5e:4x4, v5p:2x2x2, v6e:2x4, TPU7x:2x2x1"
NUM_SUGGESTIONS = 5


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis.

    Raises:
        ValueError: a size is not a positive integer.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.sizes().items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"mesh axis {axis}={size!r} must be a positive integer")

    def sizes(self) -> dict[str, int]:
        """Devices by axis, in mesh order."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes().values())

    def __str__(self) -> str:
        used = [f"{axis}={size}" for axis, size in self.sizes().items() if size > 1]
        return ",".join(used) or "data=1"

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Reads "data=1,expert=8".

        Raises:
            ValueError: an unknown or repeated axis, or no positive integer.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, found, size = part.strip().partition("=")
            if not found or axis not in AXES or axis in sizes or not size.isdecimal():
                raise ValueError(
                    f"mesh {text!r}: {part.strip()!r} must be AXIS=N, each axis once, with an "
                    f"axis of {', '.join(AXES)}"
                )
            sizes[axis] = int(size)
        return cls(**sizes)


class MeshSizes:
    """As much of a mesh as placement needs, without devices."""

    def __init__(self, shape: MeshShape) -> None:
        self.shape = shape.sizes()


def shape_of(mesh: Mesh | MeshSizes) -> MeshShape:
    """The sizes of a mesh made here."""
    return MeshShape(**{str(axis): int(size) for axis, size in mesh.shape.items()})


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all five axes over `devices` (default: all of this job).

    Slices of a multi-slice job lie along `data`, else along `fsdp`.

    Raises:
        ValueError: the shape does not use exactly these devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if shape.num_devices != len(devices):
        raise ValueError(
            f"mesh {shape} has {shape.num_devices} devices, but there are {len(devices)}"
        )
    sizes = tuple(shape.sizes().values())
    if devices[0].platform == "cpu":
        array = np.array(devices).reshape(sizes)
    elif (slices := len({getattr(d, "slice_index", 0) for d in devices})) > 1:
        array = _over_slices(shape, slices, devices)
    else:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _over_slices(shape: MeshShape, slices: int, devices: list[Any]) -> np.ndarray:
    for axis in ("data", "fsdp"):
        size = shape.sizes()[axis]
        if size % slices == 0:
            inner = shape.sizes() | {axis: size // slices}
            outer = {name: slices if name == axis else 1 for name in AXES}
            return mesh_utils.create_hybrid_device_mesh(
                tuple(inner.values()),
                tuple(outer.values()),
                devices,
                allow_split_physical_axes=True,
            )
    raise ValueError(
        f"mesh {shape}: {slices} slices must divide data or fsdp; other axes stay inside a slice"
    )


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Devices of a TPU slice that need not exist, such as "v6e:2x4". Needs libtpu.

    Raises:
        ValueError: no such topology.
    """
    from jax.experimental import topologies

    if not TOPOLOGY.fullmatch(name):
        raise ValueError(f"topology {name!r} must look like {EXAMPLES}")
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **more).devices)
    except Exception as refused:  # libtpu's refusals have many types
        reason = str(refused).strip().splitlines()[0]
        raise ValueError(f"topology {name!r} does not exist: {reason}; examples: {EXAMPLES}") from (
            refused
        )


def generation(name: str) -> str:
    """Chip generation of a topology name, as public tables spell it."""
    found = TOPOLOGY.fullmatch(name)
    if not found:
        raise ValueError(f"topology {name!r} must look like {EXAMPLES}")
    return "TPU7x" if found[1].lower() == "tpu7x" else found[1].lower()


def num_chips(name: str) -> int:
    """Chips of a topology name. TPU7x has two devices on each."""
    found = TOPOLOGY.fullmatch(name)
    if not found:
        raise ValueError(f"topology {name!r} must look like {EXAMPLES}")
    return math.prod(int(size) for size in found.groups()[1:] if size)


def meshes_of(devices: int) -> Iterator[MeshShape]:
    """Every mesh of this many devices."""

    def splits(count: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (count,)
            return
        for first in (n for n in range(1, count + 1) if count % n == 0):
            for rest in splits(count // first, parts - 1):
                yield (first, *rest)

    for sizes in splits(devices, len(AXES)):
        yield MeshShape(*sizes)


def nearest(shape: MeshShape, fits: Callable[[MeshShape], bool]) -> list[MeshShape]:
    """Meshes of as many devices that fit, the most similar first."""

    def distance(other: MeshShape) -> float:
        pairs = zip(shape.sizes().values(), other.sizes().values(), strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    found = [other for other in meshes_of(shape.num_devices) if fits(other)]
    return sorted(found, key=distance)[:NUM_SUGGESTIONS]
