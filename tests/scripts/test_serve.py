"""The command line of serve.py."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from scripts.serve import DEMO, main

ROOT = Path(__file__).parents[2]


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(group in text for group in ("model:", "HTTP:", "prompt:"))


@pytest.mark.parametrize(
    "args", [["--port", "x"], ["--dtype", "int8"], ["--default-effort", "huge"], ["extra"]]
)
def test_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "serve.py: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "problem"),
    [("/nowhere", "does not exist"), (str(DEMO), "convert"), (str(ROOT / "tests"), "")],
)
def test_a_wrong_checkpoint_is_one_line(checkpoint, problem, capsys):
    assert main(["--checkpoint", checkpoint, "--port", "0"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("serve.py: ") and line.count("\n") == 1
    assert problem in line


def test_a_port_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--checkpoint", "/nowhere", "--port", port]) == 1
    assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_answers_and_stops_cleanly():
    command = [sys.executable, "scripts/serve.py", "--port", "0", "--max-len", "512"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.match(r"API +(\S+)", line):
                check_answers(found[1])
                server.send_signal(signal.SIGTERM)
        assert "noise" in lines[0]
        assert "stopped" in lines[-1], server.stderr.read()
    assert server.returncode == 0


def check_answers(url: str) -> None:
    ask = {
        "model": "dsv4-demo",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 24,
        "seed": 5,
    }
    with openai.OpenAI(base_url=url, api_key="none") as client:
        whole = client.chat.completions.create(**ask)
        chunks = list(client.chat.completions.create(**ask, stream=True))
        assert whole.usage.completion_tokens <= 24
        content = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert content == whole.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="512 tokens"):
            client.chat.completions.create(**{**ask, "max_tokens": 512})


@pytest.mark.slow
def test_stopping_while_it_compiles_is_clean():
    command = [sys.executable, "scripts/serve.py", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("compiling"):
                server.send_signal(signal.SIGTERM)
        errors = server.stderr.read()
    assert (server.returncode, errors) == (0, "")
    assert lines[-1] == "stopped\n"
