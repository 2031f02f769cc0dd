"""Official tensor names and our parameter tree, as data, in both directions.

Everything follows from `params.unit_specs`: a parameter at `path` in a unit is one official tensor,
or codes and scales (`.weight`, `.scale`), or, for stacked experts, as many of them as experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from checkpoints.hf_reader import DTYPES
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import ParamSpec, unit_specs
from dsv4_jax.quant import QuantizedArray

# Official spelling of the first steps of a path; other steps are spelt alike and joined by dots.
RENAMED: dict[tuple[str, ...], str] = {
    ("attn", "sink"): "attn.attn_sink",
    ("ffn", "shared"): "ffn.shared_experts",
    ("hc_attn", "fn"): "hc_attn_fn",
    ("hc_attn", "base"): "hc_attn_base",
    ("hc_attn", "scale"): "hc_attn_scale",
    ("hc_ffn", "fn"): "hc_ffn_fn",
    ("hc_ffn", "base"): "hc_ffn_base",
    ("hc_ffn", "scale"): "hc_ffn_scale",
    ("hc_head", "fn"): "hc_head_fn",
    ("hc_head", "base"): "hc_head_base",
    ("hc_head", "scale"): "hc_head_scale",
}
# Last steps whose official name takes no ".weight"; `gate.weight` ends in it already.
BARE = {"sink", "ape", "bias", "tid2eid", "weight", "fn", "base", "scale"}
STACKED = ("ffn", "experts")  # one official tensor per entry of the first dimension
# Copies of embedding and head that -Base checkpoints carry in every MTP block: suffix, original.
MTP_COPIES = {"emb.tok_emb.weight": "embed.weight", "head.weight": "head.weight"}

# Official dtype where it is not the one of the bytes we keep: packed FP4 is signed there, and
# hash tables are 64-bit.
_OFFICIAL = {"uint8": "I8", "int32": "I64"}
_BY_DTYPE = {dtype.name: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One official tensor and where its values live in our tree.

    `leaf` is the path of the stored array inside its unit, joined by "/"; quantised parameters have
    two, ".../codes" and ".../scales". `expert` indexes the leaf's first dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: str
    path: tuple[str, ...]
    leaf: str
    expert: int | None
    role: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def unit_prefix(unit: str) -> str:
    """ "top" → "", "layer_07" → "layers.7.", "mtp_0" → "mtp.0."."""
    if unit == "top":
        return ""
    kind, index = unit.split("_")
    return f"{'layers' if kind == 'layer' else 'mtp'}.{int(index)}."


def official_stem(unit: str, path: tuple[str, ...], expert: int | None = None) -> str:
    """Official name of a parameter without ".weight" or ".scale"."""
    for length in range(len(path), 0, -1):
        if path[:length] in RENAMED:
            steps = [RENAMED[path[:length]], *path[length:]]
            break
    else:
        steps = list(path)
    if expert is not None:
        steps.insert(len(STACKED), str(expert))
    return unit_prefix(unit) + ".".join(steps)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a unit by path; a QuantizedArray gives ".../codes" and ".../scales"."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, f"{path}/{key}" if path else key)
        elif isinstance(node, QuantizedArray):
            flat[f"{path}/codes"], flat[f"{path}/scales"] = node.codes, node.scales
        else:
            flat[path] = node

    walk(tree, "")
    return flat


def unflatten(flat: dict[str, Any], specs: Any, cfg: ModelConfig) -> Any:
    """The inverse of `flatten` for a unit with these specs."""

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, dict):
            return {k: walk(child, f"{path}/{k}" if path else k) for k, child in node.items()}
        fmt = node.fmt(cfg)
        if fmt is None:
            return flat[path]
        return QuantizedArray(flat[f"{path}/codes"], flat[f"{path}/scales"], fmt)

    return walk(specs, "")


def spec_leaves(specs: Any) -> Iterator[tuple[tuple[str, ...], ParamSpec]]:
    """Every parameter of a unit's spec tree with its path."""
    for key, node in specs.items():
        if isinstance(node, dict):
            yield from (((key, *path), spec) for path, spec in spec_leaves(node))
        else:
            yield (key,), node


def unit_entries(cfg: ModelConfig, unit: str, specs: Any) -> Iterator[Entry]:
    """The official tensors of one unit, in tree order, experts one after the other."""
    for path, spec in spec_leaves(specs):
        stored = spec.abstract(cfg)
        leaf = "/".join(path)
        if isinstance(stored, QuantizedArray):
            parts = [
                (".weight", f"{leaf}/codes", stored.codes),
                (".scale", f"{leaf}/scales", stored.scales),
            ]
        else:
            parts = [("" if path[-1] in BARE else ".weight", leaf, stored)]
        experts: Any = [None]
        if path[: len(STACKED)] == STACKED:
            experts = range(spec.shape[0])
        for expert in experts:
            stem = official_stem(unit, path, expert)
            for suffix, part_leaf, array in parts:
                shape = array.shape if expert is None else array.shape[1:]
                dtype = official_dtype(array.dtype)
                yield Entry(stem + suffix, dtype, shape, unit, path, part_leaf, expert, spec.role)


def official_dtype(dtype: Any) -> str:
    """The safetensors dtype under which our stored dtype appears in official files."""
    name = np.dtype(dtype).name
    return _OFFICIAL.get(name) or _BY_DTYPE[name]


def official_tensors(cfg: ModelConfig, mtp_copies: bool = False) -> list[Entry]:
    """Every tensor of the official checkpoint of this model, in unit order.

    `mtp_copies` adds the copies of embedding and head that -Base checkpoints repeat per MTP block;
    they point at the leaves of the originals.
    """
    units = unit_specs(cfg)
    entries = [e for unit, specs in units.items() for e in unit_entries(cfg, unit, specs)]
    if mtp_copies:
        top = {e.name: e for e in entries if e.unit == "top"}
        entries += [
            Entry(copy, **{k: v for k, v in vars(top[original]).items() if k != "name"})
            for copy, original in copy_names(cfg).items()
        ]
    return entries


def copy_names(cfg: ModelConfig) -> dict[str, str]:
    """Names of the possible copies in MTP blocks, each with the tensor it repeats."""
    return {
        f"mtp.{index}.{suffix}": original
        for index in range(cfg.num_mtp_layers)
        for suffix, original in MTP_COPIES.items()
    }


def leaf_structs(cfg: ModelConfig, specs: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every stored array of a unit, by leaf path."""
    return {
        leaf: struct
        for path, spec in spec_leaves(specs)
        for leaf, struct in flatten({"/".join(path): spec.abstract(cfg)}).items()
    }
