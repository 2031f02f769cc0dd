"""The state of an unfinished conversion on disk, and what a new run may do with a destination.

`DST/.convert/plan.json` says what the source was and what was asked; `DST/.convert/<unit>.json`
appears when that unit is on the disk in full. The manifest beside them ends the conversion.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from checkpoints import files
from checkpoints.errors import CheckpointError
from checkpoints.hf_reader import HfReader
from checkpoints.manifest import (
    MANIFEST_NAME,
    PARAMS_FOLDER,
    PLAN_FOLDER,
    Leaf,
    leaves_from_json,
    leaves_to_json,
)

PLAN_NAME, LOCK_NAME = "plan.json", "lock"
PLAN_WAIT_S, POLL_S = 600.0, 1.0  # for host 0 to begin; between looks at a shared directory
Plan = dict[str, Any]


def make_plan(reader: HfReader, experts: str) -> Plan:
    """What must be unchanged for finished units to count."""
    return {
        "version": 1,
        "experts": experts,
        "config": hashlib.sha256(reader.config_bytes).hexdigest(),
        "shards": {
            name: {"size": s.size, "mtime_ns": s.mtime_ns, "header": s.header_hash}
            for name, s in reader.shards.items()
        },
    }


def check_destination(dst: Path, plan: Plan, overwrite: bool) -> None:
    """Changes nothing.

    Raises:
        CheckpointError: `dst` must not be written to; the message says why and what to do.
    """
    if dst.exists() and not dst.is_dir():
        raise CheckpointError(f"DST {dst} exists and is not a directory")
    if (dst / MANIFEST_NAME).exists():
        if not overwrite:
            raise CheckpointError(
                f"DST {dst} holds a complete checkpoint already: choose another directory or pass "
                "--overwrite to replace it"
            )
    elif (dst / PLAN_FOLDER / PLAN_NAME).exists():
        changed = _difference(_old_plan(dst), plan)
        if changed and not overwrite:
            raise CheckpointError(
                f"DST {dst} holds an unfinished conversion, and since it began {changed}: pass "
                "--overwrite to start again"
            )
    elif dst.is_dir() and any(p.name != PLAN_FOLDER for p in dst.iterdir()):
        raise CheckpointError(
            f"DST {dst} is not empty and holds no checkpoint of this program: choose another "
            "directory"
        )


def open_destination(
    dst: Path, plan: Plan, units: Iterable[str], foreign: Collection[str] = ()
) -> list[str]:
    """Brings an accepted destination into a state to write to; returns the finished `units`.

    foreign: units of other hosts, which may be at work on them.

    Killed anywhere, it leaves a complete checkpoint, or a plan that no stale record belongs to.
    """
    plan_path = dst / PLAN_FOLDER / PLAN_NAME
    is_complete = (dst / MANIFEST_NAME).exists()
    if is_complete or not plan_path.exists() or _old_plan(dst) != plan:
        for record in (dst / PLAN_FOLDER).glob("*.json"):
            if record != plan_path:
                record.unlink()
        files.write_json(plan_path, plan)
        (dst / MANIFEST_NAME).unlink(missing_ok=True)
        files.remove_companions(dst)
    return _finished_units(dst, units, foreign)


def await_destination(
    dst: Path, plan: Plan, units: Iterable[str], foreign: Collection[str]
) -> list[str]:
    """`open_destination` of a host other than the first, which has to begin.

    Raises:
        CheckpointError: host 0 did not begin in time.
    """
    path, until = dst / PLAN_FOLDER / PLAN_NAME, time.monotonic() + PLAN_WAIT_S
    while not (path.exists() and _old_plan(dst) == plan):
        if time.monotonic() > until:
            raise CheckpointError(
                f"host 0 has not begun to convert the same source to {dst}: start the same "
                "command on every host, with SRC and DST that all of them share"
            )
        time.sleep(POLL_S)
    return _finished_units(dst, units, foreign)


def mark_path(dst: Path, index: int, hosts: int) -> Path:
    """The file that says that a host has done its share."""
    return dst / PLAN_FOLDER / f"host_{index}_of_{hosts}.json"


def await_hosts(dst: Path, hosts: int, verified: bool, note: Callable[[str], None]) -> None:
    """Waits, as long as it takes, until every other host has done its share.

    Raises:
        CheckpointError: a host was told otherwise whether to verify.
    """
    waiting: list[int] = []
    while left := [i for i in range(1, hosts) if not mark_path(dst, i, hosts).exists()]:
        if left != waiting:
            note(f"waiting for hosts {', '.join(map(str, left))}")
            waiting = left
        time.sleep(POLL_S)
    for index in range(1, hosts):
        path = mark_path(dst, index, hosts)
        if files.read_json(path, "convert again")["verified"] != verified:
            raise CheckpointError(f"host {index} was started with another --verify than host 0")


def _finished_units(dst: Path, units: Iterable[str], foreign: Collection[str]) -> list[str]:
    """Units with a record and data; what a killed run left half-written is removed."""
    params = dst / PARAMS_FOLDER
    params.mkdir(exist_ok=True)
    recorded = [unit for unit in units if record_path(dst, unit).exists()]
    for folder in params.iterdir():
        if folder.name not in recorded and folder.name.partition(".")[0] not in foreign:
            shutil.rmtree(folder)
    return [unit for unit in recorded if (params / unit).is_dir()]


def record_path(dst: Path, unit: str) -> Path:
    """The file that says that a unit is finished."""
    return dst / PLAN_FOLDER / f"{unit}.json"


def write_record(dst: Path, unit: str, leaves: dict[str, Leaf]) -> None:
    """Marks a unit as finished. Call it when the unit's data have reached the disk."""
    files.write_json(record_path(dst, unit), leaves_to_json(leaves))


def read_record(dst: Path, unit: str) -> dict[str, Leaf]:
    """Leaves of a finished unit."""
    raw = files.read_json(record_path(dst, unit), f"delete {dst} and start again")
    return leaves_from_json(raw)


def _old_plan(dst: Path) -> Plan:
    return files.read_json(dst / PLAN_FOLDER / PLAN_NAME, f"delete {dst} and start again")


def _difference(old: Plan, new: Plan) -> str | None:
    if old == new:
        return None
    if old.get("version") != new["version"]:
        return "the program changed"
    if old.get("experts") != new["experts"]:
        return f"--experts changed from {old.get('experts')} to {new['experts']}"
    if old.get("config") != new["config"]:
        return "config.json of SRC changed"
    before, now = old.get("shards", {}), new["shards"]
    odd = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    return f"SRC changed ({', '.join(odd[:3])}{', …' if len(odd) > 3 else ''})"
