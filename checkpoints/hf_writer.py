"""Writing official-layout checkpoints: shards whose headers are laid out before any data arrive."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.files import fsync_path, write_json
from checkpoints.hf_reader import DTYPES, INDEX_NAME
from checkpoints.names import Entry
from dsv4_jax.config import ModelConfig

PART_SUFFIX = ".part"


@dataclass(frozen=True)
class ShardPlan:
    """One file to write: its head (length and JSON header), and start and length of each tensor."""

    file: str
    head: bytes
    spans: dict[str, tuple[int, int]]
    size: int


def official_layout(cfg: ModelConfig, entries: Iterable[Entry]) -> dict[str, list[str]]:
    """Tensor names by file in the official order: embedding, layers, the rest, MTP blocks."""
    groups: dict[tuple[int, int], list[Entry]] = {(0, 0): []}
    for entry in entries:
        name = entry.name.split(".")
        if name[0] == "layers":
            key = (1, int(name[1]))
        elif name[0] == "mtp":
            key = (3, int(name[1]))
        else:
            key = (0 if name[0] == "embed" else 2, 0)
        groups.setdefault(key, []).append(entry)
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": byte_order(group)
        for number, (_, group) in enumerate(sorted(groups.items()), 1)
    }


def byte_order(entries: Iterable[Entry]) -> list[str]:
    """Names with wide elements first, so that every tensor starts at a multiple of its width."""
    ordered = sorted(entries, key=lambda e: (-DTYPES[e.dtype].itemsize, e.name))
    return [entry.name for entry in ordered]


def plan_shard(
    file: str, names: list[str], entries: dict[str, Entry], metadata: dict[str, str] | None
) -> ShardPlan:
    """Lays out one file with the tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position, spans = 0, {}
    for name in names:
        entry = entries[name]
        spans[name] = (position, entry.nbytes)
        stop = position + entry.nbytes
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    spans = {name: (len(head) + start, nbytes) for name, (start, nbytes) in spans.items()}
    return ShardPlan(file, head, spans, len(head) + position)


class ShardWriter:
    """Takes tensors in any order and puts each where its shard has room for it.

    Files carry a temporary name until `finish`, which checks that every tensor came once.
    """

    def __init__(self, root: Path, plans: list[ShardPlan]) -> None:
        self._root = root
        self._plans = plans
        self._missing = {name: plan for plan in plans for name in plan.spans}
        for plan in plans:
            with open(self._part(plan), "wb") as file:
                file.write(plan.head)
                file.truncate(plan.size)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor's bytes, given in its official dtype or as a view of equal bytes."""
        plan = self._missing.pop(name)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        start, nbytes = plan.spans[name]
        assert data.nbytes == nbytes, (name, data.nbytes, nbytes)
        with open(self._part(plan), "r+b", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < data.nbytes:
                done += file.write(data[done:])

    def finish(self) -> None:
        """Flushes all files and gives them their names."""
        assert not self._missing, sorted(self._missing)[:5]
        for plan in self._plans:
            fsync_path(self._part(plan))
        for plan in self._plans:
            os.replace(self._part(plan), self._root / plan.file)
        fsync_path(self._root)

    def _part(self, plan: ShardPlan) -> Path:
        return self._root / (plan.file + PART_SUFFIX)


def write_index(root: Path, plans: list[ShardPlan], metadata: dict[str, Any]) -> None:
    """Writes the index of all shards."""
    weight_map = {name: plan.file for plan in plans for name in plan.spans}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(root / INDEX_NAME, index, indent=1)
