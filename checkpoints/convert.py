"""Official checkpoint → Orbax units, streamed one unit at a time, resumable at unit boundaries.

Several hosts may share the work and a directory: each converts its units, the first one begins and
ends. They speak through the files of `resume.py` alone.
"""

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
    MANIFEST_NAME,
    PLAN_FOLDER,
    Leaf,
    Manifest,
    check_leaves,
    config_from_hf,
    describe,
    write_manifest,
)
from checkpoints.names import Entry, copy_names, leaf_structs
from checkpoints.plan import unit_bytes, units_of
from checkpoints.progress import Progress
from checkpoints.transforms import InexactError, fp4_to_fp8, to_bf16
from dsv4_jax.config import ModelConfig
from dsv4_jax.params import unit_specs

EXPERT_MODES = ("keep", "fp8", "bf16")
UNIT_OVERHEAD = 256 << 10  # bytes of metadata and partly filled blocks beside a unit's arrays
Leaves = dict[str, dict[str, Leaf]]


@dataclass(frozen=True)
class Job:
    """A checked conversion: source, stored and wanted configuration, official tensors per unit, and
    the units that this host converts."""

    reader: HfReader
    stored: ModelConfig
    wanted: ModelConfig
    entries: dict[str, list[Entry]]
    experts: str
    dst: Path
    units: list[str]

    def unit_bytes(self, unit: str) -> int:
        """Bytes of the unit as it will be written."""
        return unit_bytes(self.wanted, unit)

    @property
    def foreign(self) -> list[str]:
        """Units of other hosts."""
        return [unit for unit in self.entries if unit not in self.units]


@dataclass(frozen=True)
class Host:
    """One of `count` hosts that convert together; they share source and destination.

    Raises:
        ValueError: no such host.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"--host-index {self.index} must be at least 0 and less than --hosts {self.count}"
            )


ALONE = Host()


def convert(
    src: str | Path,
    dst: str | Path,
    experts: str = "keep",
    workers: int = 1,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """`convert_share` of a host that is alone: returns the manifest."""
    manifest = convert_share(src, dst, ALONE, experts, workers, verify, overwrite, progress)
    assert manifest is not None
    return manifest


def convert_share(
    src: str | Path,
    dst: str | Path,
    host: Host,
    experts: str = "keep",
    workers: int = 1,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest | None:
    """Converts this host's units of the official checkpoint at `src` into an Orbax checkpoint at
    `dst`. Host 0 waits for the others and returns the manifest, which ends the conversion.

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
    job = prepare(src, dst, experts, host)
    plan = resume.make_plan(job.reader, experts)
    is_first = host.index == 0
    if is_first and not (src / "tokenizer.json").is_file():
        progress.note(
            f"warning: {src} has no tokenizer.json; the result will run on token ids only"
        )
    with writing(str(dst)):
        if is_first or (dst / MANIFEST_NAME).exists():
            resume.check_destination(dst, plan, overwrite)
        (dst / PLAN_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = resume.LOCK_NAME if is_first else f"{resume.LOCK_NAME}_{host.index}"
        with files.exclusive(dst / PLAN_FOLDER / lock):
            if is_first:
                resume.check_destination(dst, plan, overwrite)
                finished = resume.open_destination(dst, plan, job.units, job.foreign)
            else:
                finished = resume.await_destination(dst, plan, job.units, job.foreign)
            mark = resume.mark_path(dst, host.index, host.count)
            mark.unlink(missing_ok=True)
            leaves = _convert_units(job, finished, workers, progress)
            if verify:
                verify_units(dst, job.wanted, leaves, progress)
            if not is_first:
                files.write_json(mark, {"verified": verify})
                return None
            resume.await_hosts(dst, host.count, verify, progress.note)
            manifest = _finish(job, {u: resume.read_record(dst, u) for u in job.entries})
            shutil.rmtree(dst / PLAN_FOLDER)
    return manifest


def prepare(src: Path, dst: Path, experts: str, host: Host = ALONE) -> Job:
    """Opens and checks everything that can be checked before anything is written: of all tensors
    what their headers say, values of this host's units."""
    if experts not in EXPERT_MODES:
        raise ValueError(f"experts={experts!r} must be one of {EXPERT_MODES}")
    reader = open_checkpoint(src)
    files.check_separate(src, dst)
    stored = detect_formats(reader, config_from_hf(reader.config))
    entries = check_tensors(reader, stored)
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
    sizes = {unit: unit_bytes(wanted, unit) for unit in by_unit}
    units = units_of(sizes, host.count, host.index)
    check_values(reader, [e for e in entries if e.unit in units], stored)
    return Job(reader, stored, wanted, by_unit, experts, dst, units)


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
    """Converts this host's units that are not finished; returns the leaves of all of them."""
    sizes = {unit: job.unit_bytes(unit) for unit in job.units}
    todo = [unit for unit in job.units if unit not in finished]
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
    return {unit: resume.read_record(job.dst, unit) for unit in job.units}


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
