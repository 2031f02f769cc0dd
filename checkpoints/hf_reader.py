"""Official-layout checkpoint directories: config, index and safetensors shards, read in place.

Headers are parsed here because the numpy reader of safetensors knows no FP8 and no BF16:
8 bytes little-endian header length, a JSON header, raw bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError, listing
from checkpoints.files import read_json

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its shard and the absolute byte range in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: tensors in the order of their bytes, and what identifies the file."""

    file: str
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str] | None
    size: int
    mtime_ns: int
    header_hash: str


@dataclass(frozen=True)
class HfReader:
    """An opened checkpoint directory; `tensors` is what the index names, in file order."""

    path: Path
    config_bytes: bytes
    config: dict[str, Any]
    shards: dict[str, Shard]
    tensors: dict[str, StoredTensor]
    index_metadata: dict[str, Any] | None  # None: a single file without an index

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the memory-mapped file, in its stored dtype.

        The mapping lasts as long as the view: its pages do not pile up in resident memory.
        """
        tensor = self.tensors[name]
        with _readable(self.path / tensor.file):
            file = np.memmap(self.path / tensor.file, np.uint8, "r")
        raw = file[tensor.start : tensor.start + tensor.nbytes]
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads the tensor's bytes into a contiguous array of as many bytes; maps no pages.

        Raises:
            CheckpointError: the file ended early (it was changed since it was opened).
        """
        tensor = self.tensors[name]
        target = out.reshape(-1).view(np.uint8).data
        assert target.nbytes == tensor.nbytes, (name, target.nbytes, tensor.nbytes)
        path = self.path / tensor.file
        with _readable(path), open(path, "rb", buffering=0) as file:
            file.seek(tensor.start)
            done = 0
            while done < tensor.nbytes:
                count = file.readinto(target[done:])
                if not count:
                    raise CheckpointError(f"shard {path} ended inside {name}: it was changed")
                done += count


def open_checkpoint(path: str | os.PathLike[str]) -> HfReader:
    """Opens a directory with config.json and either an index with shards or one single file.

    Raises:
        CheckpointError: anything is missing, truncated or inconsistent; all damage of the shards
            and of the index is listed at once.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory: give an official checkpoint directory")
    what = "an official checkpoint directory has config.json beside its weights"
    config = read_json(root / "config.json", what)
    if not isinstance(config, dict):
        raise CheckpointError(f"{root / 'config.json'} does not hold a JSON object")
    wanted, metadata = _read_index(root)
    files = sorted(set(wanted.values())) if wanted is not None else [SINGLE_NAME]
    shards, problems = {}, []
    for file in files:
        try:
            shards[file] = read_shard(root, file)
        except CheckpointError as error:
            problems.append(str(error))
    problems += _index_problems(shards, wanted) if wanted is not None else []
    if problems:
        if len(problems) == 1:
            raise CheckpointError(problems[0])
        raise listing(f"{root} is damaged, {len(problems)} problems", problems)
    tensors = {t.name: t for shard in shards.values() for t in shard.tensors}
    raw = (root / "config.json").read_bytes()
    return HfReader(root, raw, config, shards, tensors, metadata)


def _read_index(root: Path) -> tuple[dict[str, str] | None, dict[str, Any] | None]:
    path = root / INDEX_NAME
    if not path.exists():
        if (root / SINGLE_NAME).exists():
            return None, None
        raise CheckpointError(
            f"{path} is missing, and so is {SINGLE_NAME}: this is no official checkpoint directory"
        )
    index = read_json(path, "it must map tensor names to shards")
    wanted = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(wanted, dict) or not all(isinstance(f, str) for f in wanted.values()):
        raise CheckpointError(f"{path} has no 'weight_map' object of tensor names to file names")
    if not wanted:
        raise CheckpointError(f"{path} names no tensors")
    outside = sorted({f for f in wanted.values() if Path(f).name != f or f in (".", "..")})
    if outside:
        raise CheckpointError(f"{path} names files outside the directory: {outside[:5]}")
    metadata = index.get("metadata")
    return wanted, metadata if isinstance(metadata, dict) else {}


def _index_problems(shards: dict[str, Shard], wanted: dict[str, str]) -> list[str]:
    problems = []
    held = {file: {t.name for t in shard.tensors} for file, shard in shards.items()}
    for name, file in wanted.items():
        if file in held and name not in held[file]:
            problems.append(f"{INDEX_NAME} places {name} in {file}, which does not hold it")
    for file, names in held.items():
        for name in sorted(names):
            if name not in wanted:
                problems.append(f"{file} holds {name}, which {INDEX_NAME} does not name")
            elif wanted[name] != file and wanted[name] in held and name in held[wanted[name]]:
                problems.append(f"{name} is in {file} as well as in {wanted[name]}")
    return problems


def read_shard(root: Path, file: str) -> Shard:
    """Parses and checks the header of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header contradicts itself.
    """
    path = root / file
    with _readable(path), open(path, "rb") as handle:
        stat = os.fstat(handle.fileno())
        length = _header_length(path, handle.read(8), stat.st_size)
        raw = handle.read(length)
    header = _parse_header(path, raw)
    metadata = header.pop("__metadata__", None)
    base = 8 + length
    tensors = sorted(
        (_entry(path, file, name, value, base) for name, value in header.items()),
        key=lambda t: (t.start, t.nbytes),
    )
    _check_ranges(path, tensors, base, stat.st_size)
    digest = hashlib.sha256(raw).hexdigest()
    return Shard(file, tuple(tensors), metadata, stat.st_size, stat.st_mtime_ns, digest)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"shard {path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"shard {path} cannot be read: {error.strerror}") from None


def _header_length(path: Path, head: bytes, size: int) -> int:
    if head.startswith(b"version "):
        raise CheckpointError(
            f"shard {path} is a Git LFS pointer, not the weights: run `git lfs pull`"
        )
    if len(head) < 8:
        raise CheckpointError(f"shard {path} is truncated: {size} bytes hold no header")
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"shard {path} has a bad header length {length}: this is no safetensors file"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"shard {path} is truncated: its header needs {8 + length} bytes, the file has {size}"
        )
    return length


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"shard {path} names a tensor or field twice in its header")
        return result

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"shard {path} has a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"shard {path} has a header that is not a JSON object")
    return header


def _entry(path: Path, file: str, name: str, value: Any, base: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"shard {path}: entry {name} lacks dtype, shape or data_offsets"
        ) from None
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise CheckpointError(f"shard {path}: {name} has bad numbers {numbers}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"shard {path}: {name} has unknown dtype {dtype!r}; known are {sorted(DTYPES)}"
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != nbytes:
        raise CheckpointError(
            f"shard {path}: {name} is {dtype} {shape}, {nbytes} bytes, but its offsets "
            f"[{start}, {stop}] span {stop - start}"
        )
    return StoredTensor(name, dtype, tuple(shape), file, base + start, nbytes)


def _check_ranges(path: Path, tensors: list[StoredTensor], base: int, size: int) -> None:
    position = base
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "follows a hole"
            raise CheckpointError(f"shard {path}: {tensor.name} {kind} (inconsistent offsets)")
        position += tensor.nbytes
    if position > size:
        raise CheckpointError(
            f"shard {path} is truncated: its tensors end at byte {position}, the file has {size}"
        )
    if position < size:
        raise CheckpointError(f"shard {path} has {size - position} bytes after its last tensor")
