"""A long run, killed again and again, equals one that never was: every leaf and metric.

    python -m tests.training.long_resume --steps 2000 --mesh fsdp=2,expert=4
    python -m tests.training.long_resume --steps 300 --mesh fsdp=2,expert=2 --processes 2

The model has every layer kind, the run every kind of border: batch ramp, dense to indexer warm-up
to sparse, longer rows, λ and learning rate, experts chosen ahead, rounding. SIGKILL comes near each
border and at random steps between, a moment after the step was reported, so that some checkpoints
are cut off while they are written.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv4_jax.training.loop import Trainer
from dsv4_jax.training.run import load_run
from sharding.mesh import MeshShape
from tests.training.runs import lines_of, write_config

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 3600
ROWS, SHORT, LONG = 16, 32, 64  # a batch has ROWS · SHORT tokens in every phase
DECAY_FROM = 0.7  # as the configuration says: where λ and the rate begin to fall
KEEP_EVERY = 29  # steps between checkpoints; no divisor of the borders
# Shares of the steps: ramp (within the first phase), and phases with their fields.
RAMP, PHASES = (
    0.05,
    (
        ("dense", 0.2, f'{SHORT}, {ROWS}, ((8, RAMP),), attention="dense", learn="trunk"'),
        ("warm-up", 0.1, f'{SHORT}, {ROWS}, attention="dense", learn="indexer", lr=1e-2'),
        ("sparse", 0.2, f"{SHORT}, {ROWS}"),
        ("long", 0.15, f"{LONG}, {ROWS // 2}"),
        ("ahead", 0.2, f"{LONG}, {ROWS // 2}, route_ahead=2"),
        ("decay", 0.15, f"{LONG}, {ROWS // 2}, quantise=True"),
    ),
)


def phases(steps: int) -> str:
    """Phases of a configuration file, about `steps` long together."""
    full, ramp = ROWS * SHORT, round(RAMP * steps)
    parts = []
    for name, share, fields in PHASES:
        tokens = round(share * steps) * full
        if "RAMP" in fields:  # half a batch a step
            tokens -= ramp * full // 2
            fields = fields.replace("RAMP", str(ramp * full // 2))
        parts.append(f'Phase("{name}", {tokens}, {fields})')
    return f"({', '.join(parts)},)"


@dataclass(frozen=True)
class Job:
    """How the run is started. devices: of all processes together."""

    config: Path
    mesh: str
    processes: int
    cache: Path

    @property
    def changes(self) -> list[str]:
        return [f"mesh={self.mesh}", f"checkpoint_every={KEEP_EVERY}"]

    @property
    def devices(self) -> int:
        return MeshShape.parse(self.mesh).num_devices

    @contextmanager
    def started(self, run_dir: Path) -> Iterator[list[subprocess.Popen[str]]]:
        """The run's processes, the one that reports first; killed at the end, if they live."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(self.devices // self.processes),
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "scripts/train.py", "--config", str(self.config)]
        command += ["--run-dir", str(run_dir), *self.changes]
        if self.processes > 1:
            command += ["--coordinator", f"localhost:{free_port()}"]
            command += ["--hosts", str(self.processes)]
        running = []
        for index in range(self.processes):
            own = ["--host-index", str(index)] if self.processes > 1 else []
            log = open(run_dir.parent / f"{run_dir.name}-{index}.log", "a")  # noqa: SIM115
            running.append(
                subprocess.Popen(
                    command + own,
                    cwd=ROOT,
                    env=environment,
                    stdout=log if index else subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
            log.close()
        try:
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()

    def finish(self, run_dir: Path) -> None:
        """Runs to the end.

        Raises:
            RuntimeError: a process failed.
        """
        with self.started(run_dir) as running:
            out = running[0].communicate(timeout=TIMEOUT_S)[0]
            codes = [process.wait(timeout=TIMEOUT_S) for process in running]
        if any(codes):
            raise RuntimeError(f"processes ended with {codes}; see {run_dir}-*.log\n{out[-2000:]}")

    def kill_after(self, run_dir: Path, step: int, order: random.Random) -> None:
        """Runs until `step` or a later one is reported, then kills all processes, in any order.

        Raises:
            RuntimeError: the run ended before.
        """
        with self.started(run_dir) as running:
            assert running[0].stdout is not None
            if not any(_step_of(line) >= step for line in running[0].stdout):
                raise RuntimeError(f"step {step} was not reported; see {run_dir}-*.log")
            time.sleep(order.uniform(0, 0.3))  # into the next steps, or into a checkpoint
            for process in order.sample(running, len(running)):
                process.send_signal(signal.SIGKILL)
            codes = [process.wait() for process in running]
        assert -signal.SIGKILL in codes, codes

    def final_state(self, run_dir: Path) -> Any:
        trainer = Trainer(load_run(str(self.config), self.changes), run_dir, io.StringIO())
        try:
            assert trainer.step == trainer.plan.steps, trainer.step
            return jax.tree.map(np.asarray, trainer.state)
        finally:
            trainer.close()


def _step_of(line: str) -> int:
    """The step that a line of the console reports; -1: none."""
    word = line.split()[:1]
    return int(word[0]) if word and word[0].isdigit() else -1


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def kill_steps(job: Job, extra: int, order: random.Random) -> list[int]:
    """Steps after which the run is killed: near each border, and `extra` others."""
    plan = load_run(str(job.config), job.changes).plan()
    rates = next(s for s in range(plan.steps) if plan.at(s).tokens >= DECAY_FROM * plan.tokens)
    near = [border + order.randint(-2, 2) for border in (*plan.borders(), rates)]
    others = [order.randrange(1, plan.steps - 1) for _ in range(extra)]
    return sorted(set(near + others))


def run(folder: Path, steps: int, mesh: str, processes: int = 1, kills: int = 6) -> str:
    """Trains both runs in `folder` and compares them; returns a line of figures.

    Raises:
        AssertionError: a metric or a leaf differs.
    """
    order = random.Random(0)
    config = write_config(folder, phases(steps))
    job = Job(config, mesh, processes, folder / "cache")
    job.finish(folder / "straight")
    stops = kill_steps(job, kills, order)
    for stop in stops:
        job.kill_after(folder / "killed", stop, order)
    job.finish(folder / "killed")
    ours, theirs = (lines_of(folder / name) for name in ("killed", "straight"))
    assert len(ours) == len(theirs)
    for line, other in zip(ours, theirs, strict=True):
        assert line == other, f"{line}\n{other}"
    states = [job.final_state(folder / name) for name in ("killed", "straight")]
    leaves = [jax.tree_util.tree_leaves_with_path(state) for state in states]
    for (path, got), (_, want) in zip(*leaves, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=jax.tree_util.keystr(path))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        f"{len(ours)} steps, {job.devices} devices, {processes} process(es), killed after steps "
        f"{', '.join(map(str, stops))}: all {len(leaves[0])} leaves and {sum(map(len, ours))} "
        f"metrics are the same (loss {ours[0]['loss']:.4f} to {ours[-1]['loss']:.4f}); "
        f"{used.ru_utime + used.ru_stime:.0f} CPU-seconds"
    )


def main(argv: Sequence[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="long_resume", description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--steps", type=int, default=2000)
    ap.add_argument("--mesh", default="fsdp=2,expert=4")
    ap.add_argument("--processes", type=int, default=1)
    ap.add_argument("--kills", type=int, default=6, help="besides those at borders")
    ap.add_argument("--dir", type=Path, help="keeps runs and logs there; default: a temporary one")
    args = ap.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MeshShape.parse(args.mesh).num_devices)
    sizes = (args.steps, args.mesh, args.processes, args.kills)
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
        print(run(args.dir, *sizes))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), *sizes))


if __name__ == "__main__":
    main()
