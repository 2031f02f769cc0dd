"""What each host of a job converts and reads, from sizes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from checkpoints.names import STACKED, flatten, leaf_structs
from checkpoints.store import chunk_shape
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import unit_specs
from dsv4_jax.placement import unit_placement
from sharding.mesh import AXES
from sharding.rules import entry_axes
from sharding.shards import Shards

Coordinates = tuple[int, ...]  # of a device along AXES


def units_of(sizes: dict[str, int], hosts: int, index: int) -> list[str]:
    """The units that host `index` converts, in order: the largest first go to whom has least.

    sizes: bytes by unit. No host gets more than total ÷ hosts plus the largest unit.

    Raises:
        ValueError: no such host.
    """
    if hosts < 1 or not 0 <= index < hosts:
        raise ValueError(f"host {index} must be at least 0 and less than {hosts} hosts")
    loads, owner = [0] * hosts, {}
    for unit in sorted(sizes, key=lambda unit: -sizes[unit]):
        owner[unit] = loads.index(min(loads))
        loads[owner[unit]] += sizes[unit]
    return [unit for unit in sizes if owner[unit] == index]


class Reads(NamedTuple):
    """Bytes that one host reads of a checkpoint: of routed experts, and of everything else."""

    experts: int
    others: int


def reads(cfg: ModelConfig, shards: Shards, hosts: int | None = None) -> list[Reads]:
    """What each host reads to load a checkpoint onto a mesh: every chunk that one of its devices
    holds a part of, once.

    hosts: for a mesh without devices: consecutive devices are of one host. Else the devices know.

    Raises:
        ValueError: devices do not divide by `hosts`, or parameters not over the mesh.
    """
    groups = _devices_by_host(shards, hosts)
    totals = [[0, 0] for _ in groups]
    known: dict[tuple, list[int]] = {}  # layers repeat
    for unit, specs in unit_specs(cfg).items():
        placed = flatten(unit_placement(cfg, unit, shards))
        for leaf, struct in leaf_structs(cfg, specs).items():
            key = (struct.shape, struct.dtype.itemsize, placed[leaf])
            if key not in known:
                known[key] = [_read_bytes(*key, shards, devices) for devices in groups]
            kind = 0 if leaf.startswith("/".join(STACKED)) else 1
            for total, count in zip(totals, known[key], strict=True):
                total[kind] += count
    return [Reads(*total) for total in totals]


def unit_bytes(cfg: ModelConfig, unit: str) -> int:
    """Bytes of the stored arrays of one unit."""
    structs = leaf_structs(cfg, unit_specs(cfg)[unit]).values()
    return sum(s.size * s.dtype.itemsize for s in structs)


def describe(cfg: ModelConfig, shards: Shards, hosts: int) -> str:
    """One line about loading onto a mesh whose consecutive devices are of one host.

    Raises:
        ValueError: as `reads`.
    """
    per_host, total = reads(cfg, shards, hosts), sum(unit_bytes(cfg, u) for u in unit_specs(cfg))
    most = max(per_host, key=sum)
    return (
        f"loading: each of {hosts} hosts reads up to {sum(most) / 1e9:.2f} of "
        f"{total / 1e9:.2f} GB: {most.experts / 1e9:.2f} GB of experts, "
        f"{most.others / 1e9:.2f} GB of all else"
    )


def _devices_by_host(shards: Shards, hosts: int | None) -> list[list[Coordinates]]:
    mesh = shards.mesh
    sizes = [shards.size(axis) for axis in AXES]
    places = list(np.ndindex(*sizes))
    if isinstance(mesh, Mesh):
        if hosts is not None:
            raise ValueError(f"hosts={hosts}: the devices of this mesh know their hosts")
        owners = [device.process_index for device in mesh.devices.flat]
        return [
            [place for place, owner in zip(places, owners, strict=True) if owner == host]
            for host in sorted(set(owners))
        ]
    hosts = 1 if hosts is None else hosts
    if hosts < 1 or len(places) % hosts:
        raise ValueError(f"{len(places)} devices do not divide among {hosts} hosts")
    count = len(places) // hosts
    return [places[at : at + count] for at in range(0, len(places), count)]


def _read_bytes(
    shape: Sequence[int],
    itemsize: int,
    spec: PartitionSpec,
    shards: Shards,
    devices: Iterable[Coordinates],
) -> int:
    piece = chunk_shape(shape, itemsize)
    is_read = np.zeros([size // length for size, length in zip(shape, piece, strict=True)], bool)
    local = shards.local_shape(spec, shape)
    for device in devices:
        starts = _starts(spec, local, shards, device)
        is_read[
            tuple(
                slice(start // length, -(-(start + size) // length))
                for start, size, length in zip(starts, local, piece, strict=True)
            )
        ] = True
    return int(is_read.sum()) * math.prod(piece) * itemsize


def _starts(
    spec: PartitionSpec, local: Sequence[int], shards: Shards, device: Coordinates
) -> list[int]:
    """Where the part of a device begins in each dimension."""
    entries = [*spec, *[None] * (len(local) - len(spec))]
    starts = []
    for entry, size in zip(entries, local, strict=True):
        rank = 0
        for axis in entry_axes(entry):
            rank = rank * shards.size(axis) + device[AXES.index(axis)]
        starts.append(rank * size)
    return starts
