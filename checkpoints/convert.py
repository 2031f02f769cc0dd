"""Official checkpoint → Orbax units, streamed one unit at a time, resumable at unit boundaries."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoints import files, resume, store
from checkpoints.check import check_tensors, check_values, detect_formats
from checkpoints.errors import CheckpointError, writing
from checkpoints.hf_reader import HfReader, open_checkpoint
from checkpoints.manifest import (
    PLAN_FOLDER,
    Leaf,
    Manifest,
    check_leaves,
    config_from_hf,
    describe,
    write_manifest,
)
from checkpoints.names import Entry, copy_names, leaf_structs
from checkpoints.progress import Progress
from checkpoints.transforms import InexactError, fp4_to_fp8, to_bf16
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import unit_specs

EXPERT_MODES = ("keep", "fp8", "bf16")
UNIT_OVERHEAD = 256 << 10  # bytes of metadata and partly filled blocks beside a unit's arrays
Leaves = dict[str, dict[str, Leaf]]


@dataclass(frozen=True)
class Job:
    """A checked conversion: source, stored and wanted configuration, official tensors per unit."""

    reader: HfReader
    stored: ModelConfig
    wanted: ModelConfig
    entries: dict[str, list[Entry]]
    experts: str
    dst: Path

    def unit_bytes(self, unit: str) -> int:
        """Bytes of the unit as it will be written."""
        structs = leaf_structs(self.wanted, unit_specs(self.wanted)[unit]).values()
        return sum(s.size * s.dtype.itemsize for s in structs)


def convert(
    src: str | Path,
    dst: str | Path,
    experts: str = "keep",
    workers: int = 1,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Converts the official checkpoint at `src` into an Orbax checkpoint at `dst`.

    experts: "keep" stores routed experts as they are, "fp8" turns FP4 into FP8 without loss,
        "bf16" dequantises them. workers: units in flight; each takes up to twice the bytes of the
        largest unit. A killed call continues when repeated. `overwrite` replaces a finished
        checkpoint, or an unfinished one of another source.

    Raises:
        CheckpointError: damaged or mismatching source, refused destination, full disk.
        ValueError: the source's config.json is of another architecture or not supported.
    """
    src, dst = Path(src), Path(dst)
    progress = progress or Progress("convert", quiet=True)
    job = prepare(src, dst, experts)
    plan = resume.make_plan(job.reader, experts)
    if not (src / "tokenizer.json").is_file():
        progress.note(
            f"warning: {src} has no tokenizer.json; the result will run on token ids only"
        )
    with writing(str(dst)):
        resume.check_destination(dst, plan, overwrite)
        (dst / PLAN_FOLDER).mkdir(parents=True, exist_ok=True)
        with files.exclusive(dst / PLAN_FOLDER / resume.LOCK_NAME):
            resume.check_destination(dst, plan, overwrite)
            finished = resume.open_destination(dst, plan, job.entries)
            leaves = _convert_units(job, finished, workers, progress)
            if verify:
                verify_units(dst, job.wanted, leaves, progress)
            manifest = _finish(job, leaves)
            shutil.rmtree(dst / PLAN_FOLDER)
    return manifest


def prepare(src: Path, dst: Path, experts: str) -> Job:
    """Opens and checks everything that can be checked before anything is written."""
    if experts not in EXPERT_MODES:
        raise ValueError(f"experts={experts!r} must be one of {EXPERT_MODES}")
    reader = open_checkpoint(src)
    files.check_separate(src, dst)
    stored = detect_formats(reader, config_from_hf(reader.config))
    entries = check_tensors(reader, stored)
    check_values(reader, entries, stored)
    wanted = stored
    if experts == "fp8" and stored.expert_format != "fp8":
        if stored.expert_format != "fp4":
            raise CheckpointError(
                f"{src}: experts are stored as bf16; --experts fp8 is a lossless change of FP4 only"
            )
        wanted = stored.replace(expert_format="fp8")
    elif experts == "bf16":
        wanted = stored.replace(expert_format=None)
    copies = copy_names(stored)
    by_unit: dict[str, list[Entry]] = {unit: [] for unit in unit_specs(stored)}
    for entry in entries:
        if entry.name not in copies:
            by_unit[entry.unit].append(entry)
    return Job(reader, stored, wanted, by_unit, experts, dst)


def read_unit(job: Job, unit: str) -> dict[str, np.ndarray]:
    """The unit's arrays by leaf path in the wanted format, experts stacked along dimension 0."""
    structs = leaf_structs(job.wanted, unit_specs(job.wanted)[unit])
    out = {leaf: np.empty(s.shape, s.dtype) for leaf, s in structs.items()}
    is_changed = job.stored.expert_format != job.wanted.expert_format
    entries = {(e.leaf, e.expert): e for e in job.entries[unit]}
    for (leaf, expert), entry in entries.items():
        if entry.role == "expert" and is_changed:
            if leaf.endswith("/codes"):
                scale = entries[leaf.removesuffix("codes") + "scales", expert]
                _transform_expert(job, entry, scale, out)
            continue
        target = out[leaf] if expert is None else out[leaf][expert]
        if entry.dtype == "I64":
            target[...] = job.reader.view(entry.name)
        else:
            job.reader.read_into(entry.name, target)
    return out


def _transform_expert(job: Job, weight: Entry, scale: Entry, out: dict[str, np.ndarray]) -> None:
    codes = job.reader.view(weight.name)
    codes = codes.view(np.uint8) if weight.dtype == "I8" else codes
    scales = job.reader.view(scale.name)
    stem = weight.leaf.removesuffix("/codes")
    try:
        if job.wanted.expert_format == "fp8":
            new_codes, new_scales = fp4_to_fp8(codes, scales)
            out[f"{stem}/codes"][weight.expert] = new_codes
            out[f"{stem}/scales"][weight.expert] = new_scales
        else:
            out[stem][weight.expert] = to_bf16(codes, scales)
    except InexactError as error:
        raise CheckpointError(
            f"{weight.name} cannot be converted with --experts {job.experts}: {error}"
        ) from None


def verify_units(path: Path, cfg: ModelConfig, leaves: Leaves, progress: Progress) -> None:
    """Reads every unit back and compares all checksums.

    Raises:
        CheckpointError: names the first array that differs.
    """
    sizes = {unit: sum(x.nbytes for x in recorded.values()) for unit, recorded in leaves.items()}
    progress.start(sum(sizes.values()), what="verify")
    for unit, recorded in leaves.items():
        check_leaves(store.unit_path(path, unit), recorded, store.load_unit_numpy(path, unit, cfg))
        progress.advance(unit, sizes[unit])
    progress.finish()


def _convert_units(job: Job, finished: list[str], workers: int, progress: Progress) -> Leaves:
    """Converts the units that are not finished; returns the leaves of all, in unit order."""
    sizes = {unit: job.unit_bytes(unit) for unit in job.entries}
    todo = [unit for unit in job.entries if unit not in finished]
    files.check_space(job.dst, sum(sizes[unit] + UNIT_OVERHEAD for unit in todo))
    if finished:
        progress.note(f"continuing: {len(finished)} of {len(sizes)} units are done")
    progress.start(sum(sizes.values()), sum(sizes[unit] for unit in finished))
    with ThreadPoolExecutor(workers) as pool:
        jobs: dict[Future[None], str] = {pool.submit(_convert_unit, job, u): u for u in todo}
        try:
            for future in as_completed(jobs):
                future.result()
                progress.advance(jobs[future], sizes[jobs[future]])
        except BaseException:  # also Ctrl-C: let units in flight end, start no others
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.finish()
    return {unit: resume.read_record(job.dst, unit) for unit in job.entries}


def _convert_unit(job: Job, unit: str) -> None:
    flat = read_unit(job, unit)
    leaves = describe(flat)
    store.check_stored(leaves, unit, job.wanted)
    store.save_unit(job.dst, unit, flat)
    del flat
    files.fsync_tree(store.unit_path(job.dst, unit))
    resume.write_record(job.dst, unit, leaves)


def _finish(job: Job, leaves: Leaves) -> Manifest:
    """Writes what lies beside the arrays, the manifest last."""
    files.write_atomic(job.dst / "config.json", job.reader.config_bytes)
    files.copy_companions(job.reader.path, job.dst)
    manifest = Manifest(
        job.wanted.dense_format,
        job.wanted.expert_format,
        job.wanted.scale_dtype,
        leaves,
        config_experts=job.stored.expert_format,
        mtp_copies=any(name in job.reader.tensors for name in copy_names(job.stored)),
        index_metadata=job.reader.index_metadata,
        shards={
            name: {"metadata": s.metadata, "tensors": [t.name for t in s.tensors]}
            for name, s in job.reader.shards.items()
        },
    )
    write_manifest(job.dst, manifest)
    return manifest
