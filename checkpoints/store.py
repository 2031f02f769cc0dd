"""Orbax storage of units: one PyTree checkpoint per layer, restored whole or sharded.

Nothing here ever needs more than one unit in memory; with shardings, each process reads only the
chunks its devices hold.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from checkpoints.errors import CheckpointError, listing, writing
from checkpoints.files import write_json
from checkpoints.manifest import (
    MANIFEST_NAME,
    PARAMS_FOLDER,
    Leaf,
    Manifest,
    describe,
    load_config,
    read_manifest,
    write_manifest,
)
from checkpoints.names import flatten, leaf_structs, unflatten
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import unit_specs
from dsv4_jax.quant import QuantizedArray, dequantize

__all__ = [
    "densify",
    "load_config",
    "load_unit",
    "load_unit_numpy",
    "load_units",
    "save_checkpoint",
    "save_unit",
]
CHUNK_BYTES = 16 << 20  # at most; what a device holds a part of is read in whole chunks
STACK_RANK = 3  # of experts' matrices
DATA_FILE_BYTES = 128 << 20  # Orbax buffers about this much; its default of 2 GiB doubles memory
RELEASE_BYTES = 64 << 20


def load_unit(
    path: str | Path,
    unit: str,
    cfg: ModelConfig,
    shardings: Any = None,
) -> Any:
    """One unit's parameter tree as jax arrays, QuantizedArray where stored quantised.

    `shardings` is a single Sharding, or a tree like the unit's with a Sharding per stored array
    (QuantizedArray nodes holding two); None places everything on the first device.

    Raises:
        CheckpointError: the unit is missing, damaged, or stored otherwise than `cfg` says.
    """
    if shardings is None:
        shardings = SingleDeviceSharding(jax.devices()[0])
    specs = _specs_of(unit, cfg)
    structs = leaf_structs(cfg, specs)
    if isinstance(shardings, Sharding):
        placed = dict.fromkeys(structs, shardings)
    else:
        placed = flatten(shardings)
        if placed.keys() != structs.keys():
            odd = sorted(placed.keys() ^ structs.keys())
            raise ValueError(f"shardings of unit {unit} do not match its tree, differing at {odd}")
    args = {
        leaf: ocp.ArrayRestoreArgs(sharding=placed[leaf], global_shape=s.shape, dtype=s.dtype)
        for leaf, s in structs.items()
    }
    return unflatten(_restore(Path(path), unit, structs, args), specs, cfg)


def load_unit_numpy(path: str | Path, unit: str, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """One unit as numpy arrays by leaf path ("attn/wq_a/codes"); touches no device."""
    structs = leaf_structs(cfg, _specs_of(unit, cfg))
    args = {leaf: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in structs}
    return _restore(Path(path), unit, structs, args)


def load_units(
    path: str | Path,
    cfg: ModelConfig,
    units: Iterable[str] | None = None,
    shardings: Callable[[str], Any] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yields (unit, tree) one after the other, all units in order unless some are named.

    `shardings` gives the placement of a unit by its name, as `load_unit` takes it.
    """
    for unit in unit_specs(cfg) if units is None else units:
        yield unit, load_unit(path, unit, cfg, shardings(unit) if shardings else None)


def save_unit(path: str | Path, unit: str, tree: Any) -> None:
    """Writes one unit's tree (or its arrays by leaf path) under `path`, replacing an older one.

    The unit's directory appears only when all of its data are written.

    Raises:
        CheckpointError: the disk is full, or `path` cannot be written.
    """
    folder = unit_path(path, unit)
    nested = _nest(flatten(tree))
    save_args = jax.tree.map(_save_args, nested)
    request = ocp.args.PyTreeSave(
        nested, save_args=save_args, ocdbt_target_data_file_size=DATA_FILE_BYTES
    )
    with writing(str(folder)), _checkpointer() as checkpointer:
        checkpointer.save(folder, args=request, force=True)
    _release(nested)


def save_checkpoint(path: str | Path, cfg: ModelConfig, units: Iterable[tuple[str, Any]]) -> None:
    """Writes a whole checkpoint from (unit, tree) pairs, config and manifest last.

    Raises:
        CheckpointError: units are missing or do not match `cfg`, or the disk is full.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    leaves = {}
    for unit, tree in units:
        flat = {leaf: np.asarray(a) for leaf, a in flatten(tree).items()}
        leaves[unit] = describe(flat)
        check_stored(leaves[unit], unit, cfg)
        save_unit(root, unit, flat)
    missing = sorted(unit_specs(cfg).keys() - leaves.keys())
    if missing:
        raise CheckpointError(f"{root} lacks units {missing}")
    write_json(root / "config.json", cfg.to_hf(), indent=2)
    formats = (cfg.dense_format, cfg.expert_format, cfg.scale_dtype)
    write_manifest(root, Manifest(*formats, leaves, config_experts=cfg.expert_format))


def densify(tree: Any, dtype: Any) -> Any:
    """The tree with every QuantizedArray replaced by its values in `dtype`."""

    def dense(node: Any) -> Any:
        return dequantize(node, dtype) if isinstance(node, QuantizedArray) else node

    return jax.tree.map(dense, tree, is_leaf=lambda n: isinstance(n, QuantizedArray))


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Shape of the pieces in which an array is stored and read: single experts of a stack, the
    largest dimension cut further until a piece has no more than `CHUNK_BYTES`."""
    piece = list(shape)
    if len(piece) == STACK_RANK:
        piece[0] = 1
    while math.prod(piece) * itemsize > CHUNK_BYTES:
        dim = piece.index(max(piece))
        piece[dim] = next(n for n in range(piece[dim] - 1, 0, -1) if shape[dim] % n == 0)
    return tuple(piece)


def unit_path(path: str | Path, unit: str) -> Path:
    """Absolute directory of one unit."""
    return Path(path).resolve() / PARAMS_FOLDER / unit


def check_stored(leaves: dict[str, Any], unit: str, cfg: ModelConfig) -> None:
    """Compares recorded or actual arrays with what `cfg` expects of the unit.

    Raises:
        CheckpointError: lists every missing, unexpected, wrong-shape and wrong-dtype array.
    """
    _compare(leaves, unit, leaf_structs(cfg, _specs_of(unit, cfg)))


@functools.lru_cache(maxsize=4)
def _recorded(root: Path, _changed_ns: int) -> dict[str, dict[str, Leaf]]:
    return read_manifest(root).units


def _compare(leaves: dict[str, Any], unit: str, structs: dict[str, Any]) -> None:
    problems = [f"missing: {leaf}" for leaf in structs if leaf not in leaves]
    problems += [f"unexpected: {leaf}" for leaf in leaves if leaf not in structs]
    for leaf, struct in structs.items():
        have = leaves.get(leaf)
        if have is not None and (tuple(have.shape), str(have.dtype)) != (
            struct.shape,
            str(struct.dtype),
        ):
            problems.append(
                f"{leaf} is {have.dtype} {list(have.shape)}, expected "
                f"{struct.dtype} {list(struct.shape)}"
            )
    if problems:
        raise listing(f"unit {unit} does not match the configuration", problems)


def _specs_of(unit: str, cfg: ModelConfig) -> Any:
    units = unit_specs(cfg)
    if unit not in units:
        raise CheckpointError(f"unit {unit!r} is none of {list(units)}")
    return units[unit]


def _restore(
    root: Path, unit: str, structs: dict[str, Any], args: dict[str, Any]
) -> dict[str, Any]:
    folder = unit_path(root, unit)
    manifest = root / MANIFEST_NAME
    if manifest.is_file():  # written last, so units are also read without one
        recorded = _recorded(root, manifest.stat().st_mtime_ns).get(unit, {})
        _compare(recorded, unit, structs)
    if not folder.is_dir():
        read_manifest(root)  # says what is wrong when this is no complete checkpoint
        raise CheckpointError(f"{folder} is missing: the checkpoint is damaged, convert it again")
    try:
        with _checkpointer() as checkpointer:
            request = ocp.args.PyTreeRestore(item=_nest(structs), restore_args=_nest(args))
            tree = checkpointer.restore(folder, args=request)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().splitlines()[:1] or [repr(error)]
        raise CheckpointError(
            f"{folder} cannot be restored as the configuration describes it: {first[0]}"
        ) from error
    _release(structs)
    return flatten(tree)


def _release(arrays: Any) -> None:
    """Gives the host buffers of a large unit back now, so that units do not add up.

    Orbax leaves them in reference cycles, and glibc keeps the freed write buffers of its threads.
    """
    if sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays)) > RELEASE_BYTES:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _save_args(array: Any) -> ocp.SaveArgs:
    """What makes Orbax choose `chunk_shape`. Its `shard_axes` are cut down to single entries, which
    is right for experts and would store a matrix row by row."""
    axes = (0,) if np.ndim(array) == STACK_RANK else ()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def _checkpointer() -> ocp.Checkpointer:
    """A checkpointer that neither copies host arrays nor compresses: codes have no slack."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    )
