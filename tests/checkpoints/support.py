"""Helpers of the checkpoint tests: safetensors read and written without the code under test."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints.manifest import load_config
from checkpoints.names import official_tensors
from checkpoints.store import load_unit_numpy
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import unit_specs

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "tiny_v4"
INSTRUCT, BASE = DATA / "checkpoint", DATA / "checkpoint_base"
NUMPY = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I8": np.dtype(np.int8),
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass
class Raw:
    """A checkpoint directory in memory: config, tensors by name, file of each tensor."""

    config: dict
    tensors: dict[str, np.ndarray]
    files: dict[str, str]
    dtypes: dict[str, str]

    def put(self, name: str, dtype: str, array: np.ndarray, like: str | None = None) -> None:
        """Adds or replaces a tensor; a new one goes into the file of `like`."""
        self.tensors[name], self.dtypes[name] = array, dtype
        self.files.setdefault(name, self.files[like] if like else next(iter(self.files.values())))

    def drop(self, name: str) -> None:
        for table in (self.tensors, self.files, self.dtypes):
            del table[name]


def read_header(path: Path) -> tuple[dict, int]:
    """Header of one shard and the offset of its data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


def read_raw(root: Path) -> Raw:
    result = Raw(json.loads((root / "config.json").read_text()), {}, {}, {})
    for path in sorted(root.glob("*.safetensors")):
        header, base = read_header(path)
        header.pop("__metadata__", None)
        data = path.read_bytes()
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            array = np.frombuffer(data[base + start : base + stop], NUMPY[entry["dtype"]])
            result.tensors[name] = array.reshape(entry["shape"])
            result.dtypes[name], result.files[name] = entry["dtype"], path.name
    return result


def write_raw(raw: Raw, root: Path, single: bool = False) -> Path:
    """Writes the directory; `single` puts all tensors into one file without an index."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(raw.config, indent=1))
    groups: dict[str, list[str]] = {}
    for name, file in raw.files.items():
        groups.setdefault("model.safetensors" if single else file, []).append(name)
    for file, names in groups.items():
        write_shard(root / file, {n: (raw.dtypes[n], raw.tensors[n]) for n in names})
    if not single:
        index = {"metadata": {"total_size": 1}, "weight_map": raw.files}
        (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def write_shard(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header, position, parts = {}, 0, []
    for name, (dtype, array) in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        offsets = [position, position + len(data)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        position += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def tensor_files(root: Path) -> dict[str, tuple[str, str, tuple[int, ...], bytes]]:
    """Every tensor with its file, dtype, shape and bytes: what must survive a round trip."""
    raw = read_raw(root)
    return {n: (raw.files[n], raw.dtypes[n], a.shape, a.tobytes()) for n, a in raw.tensors.items()}


def values(raw: Raw, name: str) -> np.ndarray:
    """Float64 (or int64) values of a stored tensor, dequantised the plain way."""
    array, scale = raw.tensors[name], raw.tensors.get(name.removesuffix("weight") + "scale")
    if scale is None:
        return array.astype(np.int64 if array.dtype == np.int64 else np.float64)
    factors = scale.astype(np.float64)
    if raw.dtypes[name] == "I8":
        byte = array.view(np.uint8)
        codes = np.stack([E2M1[byte & 15], E2M1[byte >> 4]], -1).reshape(len(byte), -1)
        return codes * np.repeat(factors, 32, 1)
    out_dim, in_dim = array.shape
    full = np.repeat(np.repeat(factors, 128, 0), 128, 1)[:out_dim, :in_dim]
    return array.astype(np.float64) * full


def to_bf16_variant(raw: Raw) -> Raw:
    """The same model without quantisation, as an unquantised release would store it."""
    config = {
        k: v for k, v in raw.config.items() if k not in ("quantization_config", "expert_dtype")
    }
    result = Raw(config, {}, {}, {})
    for name in raw.tensors:
        if name.endswith(".scale") and name.removesuffix("scale") + "weight" in raw.tensors:
            continue
        is_scaled = name.removesuffix("weight") + "scale" in raw.tensors
        array, dtype = raw.tensors[name], raw.dtypes[name]
        if is_scaled and name.endswith(".weight"):
            array, dtype = values(raw, name).astype(NUMPY["BF16"]), "BF16"
        result.tensors[name], result.dtypes[name] = array, dtype
        result.files[name] = raw.files[name]
    return result


def to_fp8_variant(raw: Raw) -> Raw:
    """The same model with FP8 experts and E8M0 scales, by plain float arithmetic."""
    result = Raw(dict(raw.config, expert_dtype="fp8"), {}, {}, {})
    for name, array in raw.tensors.items():
        result.tensors[name], result.dtypes[name] = array, raw.dtypes[name]
        result.files[name] = raw.files[name]
    for name, dtype in raw.dtypes.items():
        if dtype != "I8":
            continue
        scale_name = name.removesuffix("weight") + "scale"
        dense, scale = values(raw, name), raw.tensors[scale_name].astype(np.float64)
        out_dim, in_dim = dense.shape
        grid = (math.ceil(out_dim / 128), math.ceil(in_dim / 128))
        new = np.empty(grid)
        codes = np.empty(dense.shape, NUMPY["F8_E4M3"])
        for i in range(grid[0]):
            for j in range(grid[1]):
                new[i, j] = scale[i * 128 : i * 128 + 128, j * 4 : j * 4 + 4].max() / 64
                tile = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
                codes[tile] = (dense[tile] / new[i, j]).astype(codes.dtype)
        result.put(name, "F8_E4M3", codes)
        result.put(scale_name, "F8_E8M0", new.astype(np.float32).astype(NUMPY["F8_E8M0"]))
    return result


def check_digest(name: str, array: np.ndarray, wanted: dict, rtol: float = 1e-12) -> None:
    """Compares values with a fixture digest: sums and exact values at some positions."""
    flat = array.reshape(-1)
    weights = (7919 * np.arange(flat.size) % 101) - 50
    assert list(array.shape) == wanted["shape"], name
    sums = [flat.sum(), np.abs(flat).sum(), (flat * weights).sum()]
    expected = [wanted[key] for key in ("sum", "abs_sum", "mix")]
    assert np.allclose(sums, expected, rtol=0, atol=50 * rtol * wanted["abs_sum"]), name
    for position, value in wanted["probe"].items():
        assert abs(flat[int(position)] - value) <= rtol * abs(value), (name, position)


def stored_arrays(root: Path) -> dict[tuple[str, str], bytes]:
    """Every array of a converted checkpoint as bytes, by unit and leaf path."""
    cfg = load_config(root)
    return {
        (unit, leaf): array.tobytes()
        for unit in unit_specs(cfg)
        for leaf, array in load_unit_numpy(root, unit, cfg).items()
    }


def write_synthetic(root: Path, cfg: ModelConfig, seed: int = 0) -> Path:
    """An official directory of any size with random codes, written shard by shard."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True)
    weight_map = {}
    groups: dict[str, list] = {}
    for entry in official_tensors(cfg):
        groups.setdefault(entry.unit, []).append(entry)
    for unit, entries in groups.items():
        tensors = {}
        for entry in entries:
            low, high = {"F8_E8M0": (118, 124), "F8_E4M3": (0, 120)}.get(entry.dtype, (0, 256))
            if entry.dtype in ("F32", "BF16"):
                array = np.zeros(entry.shape, NUMPY[entry.dtype])
            else:
                array = rng.integers(low, high, entry.nbytes, dtype=np.uint8)
                array = array.view(NUMPY[entry.dtype]).reshape(entry.shape)
            tensors[entry.name] = (entry.dtype, array)
            weight_map[entry.name] = f"{unit}.safetensors"
        write_shard(root / f"{unit}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text(json.dumps(cfg.to_hf()))
    return root


def run_script(name: str, *args: object, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """Runs scripts/NAME in a fresh process, on the CPU."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
