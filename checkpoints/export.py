"""Orbax units → official checkpoint: the inverse of `convert`, one unit in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints import files, store
from checkpoints.errors import CheckpointError, writing
from checkpoints.hf_reader import INDEX_NAME, SINGLE_NAME
from checkpoints.hf_writer import (
    PART_SUFFIX,
    ShardPlan,
    ShardWriter,
    byte_order,
    official_layout,
    plan_shard,
    write_index,
)
from checkpoints.manifest import (
    MANIFEST_NAME,
    PLAN_FOLDER,
    Manifest,
    check_leaves,
    load_config,
    read_manifest,
)
from checkpoints.names import Entry, official_tensors
from checkpoints.progress import Progress
from checkpoints.transforms import InexactError, fp4_to_fp8, quantize, to_bf16, to_float32
from dsv4_jax.config import ModelConfig

FORMATS = ("fp4", "fp8", "bf16")
MARKER_NAME = ".export"  # lies in DST while it is incomplete
_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def export(
    src: str | Path,
    dst: str | Path,
    fmt: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Writes the checkpoint at `src` as an official-layout directory; returns its shard names.

    fmt: None keeps the stored formats: an unmodified conversion gives back every tensor, the shard
        map and config.json bit for bit. "fp4" means FP8 with FP4 experts, "fp8" FP8 throughout,
        "bf16" no quantisation. FP4 → FP8 is lossless or an error; towards fewer bits values are
        rounded with the official block sizes and power-of-two scales.

    Raises:
        CheckpointError: `src` is no complete checkpoint or is damaged, `dst` is refused, disk full.
    """
    src, dst = Path(src), Path(dst)
    progress = progress or Progress("export", quiet=True)
    manifest, stored = read_manifest(src), load_config(src)
    files.check_separate(src, dst)
    wanted = _with_format(stored, fmt)
    entries = official_tensors(wanted, manifest.mtp_copies)
    plans = _layout(manifest, wanted, entries)
    _check_destination(dst, overwrite)
    with writing(str(dst)):
        dst.mkdir(parents=True, exist_ok=True)
        with files.exclusive(dst / MARKER_NAME):
            _clear(dst)
            files.check_space(dst, sum(plan.size for plan in plans))
            writer = ShardWriter(dst, plans)
            progress.start(sum(entry.nbytes for entry in entries))
            for unit in manifest.units:
                flat = store.load_unit_numpy(src, unit, stored)
                check_leaves(store.unit_path(src, unit), manifest.units[unit], flat)
                mine = [entry for entry in entries if entry.unit == unit]
                for name, array in official_arrays(flat, mine, stored, wanted):
                    writer.write(name, array)
                del flat
                progress.advance(unit, sum(entry.nbytes for entry in mine))
            progress.finish()
            writer.finish()
            _write_rest(src, dst, plans, manifest, wanted)
            (dst / MARKER_NAME).unlink()
    return [plan.file for plan in plans]


def official_arrays(
    flat: dict[str, np.ndarray], entries: Iterable[Entry], stored: ModelConfig, wanted: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (official name, array in official dtype) of a unit's arrays, requantised if asked.

    Raises:
        CheckpointError: FP4 values that FP8 cannot hold exactly; names the tensor.
    """
    groups: dict[tuple[Any, Any], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.path, entry.expert), []).append(entry)
    for (path, expert), group in groups.items():
        role = group[0].role
        have, want = _format_of(stored, role), _format_of(wanted, role)
        stem = "/".join(path)
        leaves = [stem] if have is None else [f"{stem}/codes", f"{stem}/scales"]
        arrays = [flat[leaf] if expert is None else flat[leaf][expert] for leaf in leaves]
        if have != want:
            try:
                arrays = _requantise(arrays, have, want, wanted.scale_dtype)
            except InexactError as error:
                raise CheckpointError(f"{group[0].name} cannot become {want}: {error}") from None
            leaves = [stem] if want is None else [f"{stem}/codes", f"{stem}/scales"]
        by_leaf = dict(zip(leaves, arrays, strict=True))
        for entry in group:
            yield entry.name, _official(by_leaf[entry.leaf], entry.dtype)


def _format_of(cfg: ModelConfig, role: str) -> str | None:
    return {"dense": cfg.dense_format, "expert": cfg.expert_format}.get(role)


def _requantise(
    arrays: list[np.ndarray], have: str | None, want: str | None, scale_dtype: str
) -> list[np.ndarray]:
    if want is None:
        return [to_bf16(*arrays)]
    if (have, want) == ("fp4", "fp8"):
        return list(fp4_to_fp8(*arrays))
    values = arrays[0] if have is None else to_float32(*arrays)
    return list(quantize(values, want, jnp.dtype(scale_dtype)))


def _official(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "I64":
        return array.astype(np.int64)
    return array.view(np.int8) if dtype == "I8" else array


def _with_format(cfg: ModelConfig, fmt: str | None) -> ModelConfig:
    if fmt is None:
        return cfg
    if fmt not in FORMATS:
        raise ValueError(f"format={fmt!r} must be one of {FORMATS}")
    if fmt == "bf16":
        return cfg.replace(dense_format=None, expert_format=None)
    quantised = cfg.dense_format or cfg.expert_format
    scale_dtype = cfg.scale_dtype if quantised else "float8_e8m0fnu"
    return cfg.replace(dense_format="fp8", expert_format=fmt, scale_dtype=scale_dtype)


def _is_original(manifest: Manifest, cfg: ModelConfig) -> bool:
    formats = (manifest.dense_format, manifest.config_experts, manifest.scale_dtype)
    return (cfg.dense_format, cfg.expert_format, cfg.scale_dtype) == formats


def _layout(manifest: Manifest, cfg: ModelConfig, entries: list[Entry]) -> list[ShardPlan]:
    """The source's shards in the source's order where formats are the same, else the best match."""
    by_name = {entry.name: entry for entry in entries}
    shards = manifest.shards
    if not shards:
        layout = official_layout(cfg, entries)
    elif _is_original(manifest, cfg):
        layout = {file: shard["tensors"] for file, shard in shards.items()}
    else:
        file_of = {name: file for file, shard in shards.items() for name in shard["tensors"]}
        groups: dict[str, list[Entry]] = {file: [] for file in shards}
        for entry in entries:
            weight = entry.name.removesuffix(".scale") + ".weight"  # new scales join their weight
            groups[file_of.get(entry.name) or file_of[weight]].append(entry)
        layout = {file: byte_order(group) for file, group in groups.items()}
    return [
        plan_shard(file, names, by_name, shards[file]["metadata"] if shards else {"format": "pt"})
        for file, names in layout.items()
    ]


def _check_destination(dst: Path, overwrite: bool) -> None:
    if not dst.exists():
        return
    if not dst.is_dir():
        raise CheckpointError(f"DST {dst} exists and is not a directory")
    if (dst / MANIFEST_NAME).exists() or (dst / PLAN_FOLDER).exists():
        raise CheckpointError(f"DST {dst} holds a converted checkpoint: choose another directory")
    if (dst / MARKER_NAME).exists() or not any(dst.iterdir()):
        return
    if not any((dst / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        raise CheckpointError(
            f"DST {dst} is not empty and holds no official checkpoint: choose another directory"
        )
    if not overwrite:
        raise CheckpointError(
            f"DST {dst} holds an official checkpoint already: choose another directory or pass "
            "--overwrite to replace it"
        )


def _clear(dst: Path) -> None:
    """Removes the weights of an earlier export, the index first."""
    (dst / INDEX_NAME).unlink(missing_ok=True)
    for pattern in ("*.safetensors", "*" + PART_SUFFIX):
        for path in dst.glob(pattern):
            path.unlink()


def _write_rest(
    src: Path, dst: Path, plans: list[ShardPlan], manifest: Manifest, cfg: ModelConfig
) -> None:
    """Tokenizer files, config.json and, last, the index."""
    files.copy_companions(src, dst)
    raw = (src / "config.json").read_bytes()
    original = _is_original(manifest, cfg)
    files.write_atomic(dst / "config.json", raw if original else _edit_config(raw, cfg))
    if [plan.file for plan in plans] == [SINGLE_NAME]:
        return
    metadata = dict(manifest.index_metadata or {})
    if not original or "total_size" not in metadata:
        metadata["total_size"] = sum(n for plan in plans for _, n in plan.spans.values())
    write_index(dst, plans, metadata)


def _edit_config(raw: bytes, cfg: ModelConfig) -> bytes:
    """config.json with the fields that speak of storage changed to what is stored now."""
    config = json.loads(raw)
    config.pop("expert_dtype", None)
    config.get("quantization_config", {}).pop("expert_dtype", None)
    if cfg.dense_format is None:
        config.pop("quantization_config", None)
    else:
        config.setdefault("quantization_config", _QUANTIZATION)
    if cfg.expert_format:
        config["expert_dtype"] = cfg.expert_format
    return json.dumps(config, indent=2).encode()
