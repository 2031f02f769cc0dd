"""serve.py as several processes: one answer, one end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest

from scripts.convert_hf import main as convert
from scripts.serve import DEMO, main

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300
ASK = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 24}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("demo") / "converted"
    assert convert([str(DEMO), str(target)]) == 0
    return target


@contextmanager
def job(checkpoint: Path, count: int, folder: Path) -> Iterator[list[subprocess.Popen]]:
    """Processes of one job, of four devices; what they say goes to FOLDER/I."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // count)}
    line = "--port 0 --max-len 512 --slots 2 --served-model-name m --dtype float32"
    command = [sys.executable, "scripts/serve.py", "--checkpoint", str(checkpoint), *line.split()]
    address = f"localhost:{free_port()}"
    processes = []
    with ExitStack() as files:
        for index in range(count):
            hosts = ["--coordinator", address, "--hosts", str(count), "--host-index", str(index)]
            out = files.enter_context((folder / str(index)).open("w"))
            where = {"cwd": ROOT, "env": env, "stdout": out, "stderr": out}
            processes.append(subprocess.Popen(command + hosts * (count > 1), **where))
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def ready(process: subprocess.Popen, folder: Path) -> str:
    """The first process's address, once it answers."""
    while process.poll() is None:
        if found := re.search(r"API +(\S+)", (folder / "0").read_text()):
            return found[1]
        threading.Event().wait(0.1)
    pytest.fail((folder / "0").read_text())


def answers(url: str) -> list[str]:
    """Greedy and drawn ones; two at a time share the slots, the second turn a prefix."""
    with openai.OpenAI(base_url=url, api_key="none") as client:
        said = []
        for more in ({"temperature": 0}, {"seed": 5, "n": 2}, {"seed": 6, "frequency_penalty": 1}):
            reply = client.chat.completions.create(**ASK, **more)
            said += [choice.message.content for choice in reply.choices]
        return said


@pytest.mark.slow
def test_two_processes_answer_as_one_and_stop_together(checkpoint, tmp_path):
    said = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        with job(checkpoint, count, folder) as processes:
            said.append(answers(ready(processes[0], folder)))
            for process in processes:
                process.send_signal(signal.SIGTERM)
            assert [process.wait(TIMEOUT_S) for process in processes] == [0] * count
    assert said[0] == said[1]


@pytest.mark.slow
def test_a_lost_process_ends_the_job(checkpoint, tmp_path):
    with job(checkpoint, 2, tmp_path) as processes:
        ready(processes[0], tmp_path)
        processes[1].kill()
        assert processes[0].wait(TIMEOUT_S) == 1
    shown = (tmp_path / "0").read_text()
    assert "serve.py: process 1 of 2 is gone" in shown and "Traceback" not in shown


@pytest.mark.slow
def test_the_job_ends_with_its_first_process(checkpoint, tmp_path):
    """By our own notice or, if that is quicker, by JAX's, which aborts."""
    with job(checkpoint, 2, tmp_path) as processes:
        ready(processes[0], tmp_path)
        processes[0].kill()
        assert processes[1].wait(TIMEOUT_S) in (1, -signal.SIGABRT)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--hosts 2", "need --coordinator"),
        ("--coordinator h:1 --hosts 2", "needs --hosts and --host-index"),
        ("--coordinator h:1 --hosts 2 --host-index 2", "less than --hosts 2"),
        ("--coordinator auto --hosts 2", "finds --hosts and --host-index itself"),
    ],
)
def test_settings_that_contradict_each_other(flags, problem, capsys):
    assert main(["--checkpoint", "/nowhere", *flags.split()]) == 1
    line = capsys.readouterr().err
    assert problem in line and line.count("\n") == 1


def test_the_demo_is_for_one_host(capsys):
    assert main(["--coordinator", "h:1", "--hosts", "2", "--host-index", "0"]) == 1
    assert "need --checkpoint" in capsys.readouterr().err
