"""`train.py` as two processes trains what one process with as many devices trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import ONE_LAYER, SPARSE_ONLY, lines_of, write_config

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
MESH = "fsdp=2,expert=2"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def train(path: Path, run_dir: Path, processes: int, *args: str) -> list[str]:
    """What each process of a run on four devices writes; all must succeed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // processes),
        "JAX_COMPILATION_CACHE_DIR": str(path.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "scripts/train.py", "--config", str(path), "--run-dir", str(run_dir)]
    command += ["--mesh", MESH, *args]
    if processes > 1:
        command += ["--coordinator", f"localhost:{free_port()}", "--hosts", str(processes)]
    started = [
        subprocess.Popen(
            command + (["--host-index", str(index)] if processes > 1 else []),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        written = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(written)
    return written


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Stopped in between, too; a checkpoint of two processes goes on in one."""
    path = write_config(tmp_path, SPARSE_ONLY, model=ONE_LAYER)
    train(path, tmp_path / "one", 1)
    first, second = train(path, tmp_path / "two", 2, "--until", "4")
    assert "at step 4 of 10" in first and "at step" not in second
    train(path, tmp_path / "two", 2, "--until", "7")
    train(path, tmp_path / "two", 1)
    ours, theirs = ([line["loss"] for line in lines_of(tmp_path / name)] for name in ("two", "one"))
    assert len(ours) == 10
    assert ours[:6] == pytest.approx(theirs[:6], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hosts", "2"], "need --coordinator"),
        (["--coordinator", "localhost:1", "--hosts", "2", "--host-index", "2"], "less than"),
        (["--mesh", "heads=2"], "with an axis of data"),
    ],
)
def test_flags_that_contradict_each_other(args, message, tmp_path, capsys):
    from scripts.train import main

    path = write_config(tmp_path, SPARSE_ONLY, model=ONE_LAYER)
    assert main(["--config", str(path), "--run-dir", str(tmp_path / "run"), *args]) == 1
    assert message in capsys.readouterr().err
