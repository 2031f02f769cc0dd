"""The record beside the arrays: what a converted checkpoint holds, and that it is complete."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.files import read_json, write_json
from checkpoints.hf_reader import INDEX_NAME, SINGLE_NAME
from dsv4_jax.config import ModelConfig

MANIFEST_NAME, PLAN_FOLDER, PARAMS_FOLDER = "manifest.json", ".convert", "params"
KIND, VERSION = "dsv4_jax checkpoint", 1


@dataclass(frozen=True)
class Leaf:
    """One stored array: its shape, numpy dtype name and SHA-256 checksum of its bytes."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """`units` maps unit → leaf path → Leaf. The rest is what an export needs.

    `config_experts` is the expert format that config.json speaks of: the source's. `mtp_copies`
    says that MTP blocks repeat embedding and head.
    `shards` lists the source's files, each with its metadata and tensor names in byte order; empty
    for checkpoints that were not converted. `index_metadata` is None when there was no index.
    """

    dense_format: str | None
    expert_format: str | None
    scale_dtype: str
    units: dict[str, dict[str, Leaf]]
    config_experts: str | None = None
    mtp_copies: bool = False
    index_metadata: dict[str, Any] | None = None
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    def formats(self) -> dict[str, str | None]:
        """The ModelConfig fields that say how the arrays are stored."""
        return {
            "dense_format": self.dense_format,
            "expert_format": self.expert_format,
            "scale_dtype": self.scale_dtype,
        }


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(raw.data).hexdigest()


def describe(flat: dict[str, np.ndarray]) -> dict[str, Leaf]:
    """Leaves of a unit given as arrays by path."""
    return {path: Leaf(a.shape, a.dtype.name, checksum(a)) for path, a in flat.items()}


def check_leaves(where: Path, recorded: dict[str, Leaf], flat: dict[str, np.ndarray]) -> None:
    """Compares the arrays of a unit with their recorded checksums.

    Raises:
        CheckpointError: names the first array that differs.
    """
    for path, array in flat.items():
        if path not in recorded or checksum(array) != recorded[path].checksum:
            raise CheckpointError(
                f"{where}: {path} differs from its recorded checksum; the checkpoint is damaged, "
                "convert it again with --overwrite"
            )


def leaves_to_json(leaves: dict[str, Leaf]) -> dict[str, Any]:
    return {path: asdict(leaf) for path, leaf in leaves.items()}


def leaves_from_json(raw: dict[str, Any]) -> dict[str, Leaf]:
    return {
        path: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"])
        for path, leaf in raw.items()
    }


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Writes it atomically. Its presence is what makes a checkpoint complete: write it last."""
    raw = {"kind": KIND, "version": VERSION} | asdict(manifest)
    write_json(root / MANIFEST_NAME, raw)


def read_manifest(root: Path) -> Manifest:
    """Reads and checks the manifest of a complete checkpoint.

    Raises:
        CheckpointError: the directory is something else; the message says what to do.
    """
    if not (root / MANIFEST_NAME).is_file():
        raise CheckpointError(_why_not(root))
    raw = read_json(root / MANIFEST_NAME, "the checkpoint is damaged; convert it again")
    if not isinstance(raw, dict) or raw.pop("kind", None) != KIND:
        raise CheckpointError(f"{root / MANIFEST_NAME} is not a manifest of this program")
    if raw.pop("version", None) != VERSION:
        raise CheckpointError(
            f"{root} was written in another format version than {VERSION}: convert it again"
        )
    try:
        units = {name: leaves_from_json(leaves) for name, leaves in raw.pop("units").items()}
        return Manifest(units=units, **raw)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{root / MANIFEST_NAME} is damaged ({error!r})") from None


def _why_not(root: Path) -> str:
    if not root.exists():
        return f"checkpoint {root} does not exist"
    if not root.is_dir():
        return f"checkpoint {root} is not a directory"
    if (root / PLAN_FOLDER).is_dir():
        return (
            f"{root} is an incomplete conversion: run the same convert_hf.py command again to "
            "finish it"
        )
    if (root / INDEX_NAME).exists() or (root / SINGLE_NAME).exists():
        return (
            f"{root} is an official checkpoint, which must be converted first: "
            f"python scripts/convert_hf.py {root} runs/{root.resolve().name}"
        )
    return f"{root} is not a checkpoint: it has no {MANIFEST_NAME}"


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json whose claims on expert storage are left aside.

    Some published configurations lack `expert_dtype` or contradict their weights; the caller sets
    the formats from the stored dtypes.
    """
    neutral = {name: value for name, value in raw.items() if name != "expert_dtype"}
    if raw.get("quantization_config"):
        neutral["expert_dtype"] = "fp8"  # the format that asks nothing of the sizes
    return ModelConfig.from_hf(neutral)


def load_config(path: str | Path) -> ModelConfig:
    """Configuration of a complete checkpoint, with the formats its arrays are stored in.

    Raises:
        CheckpointError: `path` is no complete checkpoint; the message says what to do.
        ValueError: its config.json asks for something this model does not compute.
    """
    root = Path(path)
    manifest = read_manifest(root)
    raw = read_json(root / "config.json", "the checkpoint is damaged; convert it again")
    return config_from_hf(raw).replace(**manifest.formats())
