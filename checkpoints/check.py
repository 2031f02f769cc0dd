"""Strict comparison of a checkpoint with its configuration: one error lists every difference."""

from __future__ import annotations

from collections import Counter

import numpy as np

from checkpoints.errors import CheckpointError, listing
from checkpoints.hf_reader import HfReader
from checkpoints.names import Entry, copy_names, official_tensors
from checkpoints.transforms import hash_table_problem
from dsv4_jax.config import ModelConfig

_FORMATS = {"F8_E4M3": "fp8", "I8": "fp4", "BF16": None}
_SCALES = {"F8_E8M0": "float8_e8m0fnu", "F32": "float32"}
_COPY_BYTES = 1 << 26


def detect_formats(reader: HfReader, cfg: ModelConfig) -> ModelConfig:
    """The configuration with storage formats decided by the stored dtypes, whatever it claims.

    Where tensors disagree, the most frequent dtype wins and `check_tensors` reports the others.
    """
    weights: dict[str, Counter[str]] = {"dense": Counter(), "expert": Counter()}
    others: dict[str, str] = {}
    scales: Counter[str] = Counter()
    plain = cfg.replace(dense_format=None, expert_format=None)
    for entry in official_tensors(plain):
        if entry.role not in weights:
            continue
        stored = reader.tensors.get(entry.name)
        if stored is not None and stored.dtype in _FORMATS:
            weights[entry.role][stored.dtype] += 1
        elif stored is not None:
            others.setdefault(entry.role, f"{entry.name} is {stored.dtype}")
        scale = reader.tensors.get(entry.name.removesuffix(".weight") + ".scale")
        if scale is not None and scale.dtype in _SCALES:
            scales[scale.dtype] += 1
    changes = {}
    for role, field in (("dense", "dense_format"), ("expert", "expert_format")):
        if weights[role]:
            changes[field] = _FORMATS[weights[role].most_common(1)[0][0]]
        elif role in others:
            raise CheckpointError(
                f"{reader.path}: {others[role]}; matrices must be stored as F8_E4M3 or BF16, "
                "routed experts also as packed FP4 (I8)"
            )
    if scales:
        changes["scale_dtype"] = _SCALES[scales.most_common(1)[0][0]]
    if changes.get("dense_format") == "fp4":
        raise CheckpointError(
            f"{reader.path}: dense matrices are stored as I8; FP8 or BF16 expected"
        )
    return cfg.replace(**changes)


def check_tensors(reader: HfReader, cfg: ModelConfig) -> list[Entry]:
    """Compares names, shapes and dtypes in both directions; returns the entries of all tensors.

    Copies of embedding and head in the MTP blocks are optional.

    Raises:
        CheckpointError: lists every missing, unexpected, wrong-shape and wrong-dtype tensor.
    """
    has_copies = any(name in reader.tensors for name in copy_names(cfg))
    entries = official_tensors(cfg, mtp_copies=has_copies)
    problems = []
    for entry in entries:
        stored = reader.tensors.get(entry.name)
        wanted = f"{entry.dtype} {list(entry.shape)}"
        if stored is None:
            problems.append(f"missing: {entry.name} ({wanted})")
            continue
        if stored.shape != entry.shape:
            problems.append(
                f"wrong shape: {entry.name} is {list(stored.shape)}, expected {list(entry.shape)}"
            )
        if stored.dtype != entry.dtype:
            problems.append(f"wrong dtype: {entry.name} is {stored.dtype}, expected {entry.dtype}")
    expected = {entry.name for entry in entries}
    for name, stored in reader.tensors.items():
        if name not in expected:
            problems.append(f"unexpected: {name} ({stored.dtype} {list(stored.shape)})")
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise listing(f"{reader.path} does not match its config.json, {count}", problems)
    return entries


def check_values(reader: HfReader, entries: list[Entry], cfg: ModelConfig) -> None:
    """Checks the few values of `entries` that must obey a rule: hash tables, and copies equal to
    originals.

    Raises:
        CheckpointError: lists every table with bad ids and every copy that differs.
    """
    problems, names = [], {entry.name for entry in entries}
    for entry in entries:
        if entry.path[-1] == "tid2eid":
            problem = hash_table_problem(reader.view(entry.name), cfg.num_experts)
            problems += [f"{entry.name} {problem}"] if problem else []
    for copy, original in copy_names(cfg).items():
        if copy in names and not _same_bytes(reader, copy, original):
            problems.append(f"{copy} differs from {original}, of which it must be a copy")
    if problems:
        raise listing(f"{reader.path} holds values that break a rule", problems)


def _same_bytes(reader: HfReader, a: str, b: str) -> bool:
    left, right = (reader.view(name).reshape(-1).view(np.uint8) for name in (a, b))
    return all(
        np.array_equal(left[i : i + _COPY_BYTES], right[i : i + _COPY_BYTES])
        for i in range(0, left.size, _COPY_BYTES)
    )
