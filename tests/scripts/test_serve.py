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
    assert all(group in text for group in ("model:", "HTTP:", "prompt:", "default: 8000"))


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--port", "x"], "--port 'x': must be a whole number from 0 to 65535"),
        (["--slots", "0"], "of at least 1"),
        (["--dtype", "int8"], "one of bfloat16, float32"),
        (["--default-effort", "huge"], "one of none, minimal"),
        (["--prot", "1"], "unknown argument --prot: did you mean --port?"),
        (["--config", "/nowhere.yaml"], "cannot read /nowhere.yaml"),
        (["--host", ""], "must not be empty"),
        (["--port"], "expected one argument"),
        (["extra"], "unknown argument extra"),
    ],
)
def test_usage_errors_are_one_line(args, problem, capsys):
    assert main(args) == 2
    line = capsys.readouterr().err
    assert line.startswith("serve.py: error: ") and line.count("\n") == 1
    assert problem in line


def test_print_config_names_every_origin(tmp_path, monkeypatch, capsys):
    file = tmp_path / "server.yaml"
    file.write_text("port: 9000\nslots: 2\nmax_len: 512\n")
    monkeypatch.setenv("DSV4_SLOTS", "3")
    monkeypatch.setenv("DSV4_MAX_LEN", "600")
    flags = ["--max-len", "700", "--api-key", "top-secret", "--print-config"]
    assert main(["--config", str(file), *flags]) == 0
    shown = capsys.readouterr().out
    assert "top-secret" not in shown
    lines = {line.split(":")[0].lstrip("# "): line.split() for line in shown.splitlines()}
    assert lines["max-len"][1:] == ["700", "#", "flag"]
    assert lines["slots"][1:] == ["3", "#", "environment", "DSV4_SLOTS"]
    assert lines["port"][1:] == ["9000", "#", "file", str(file)]
    assert lines["dtype"][1:] == ['"bfloat16"', "#", "default"]


@pytest.mark.parametrize(
    ("checkpoint", "problem"),
    [("/nowhere", "does not exist"), (str(DEMO), "convert"), (str(ROOT / "tests"), "")],
)
def test_a_wrong_checkpoint_is_one_line(checkpoint, problem, capsys):
    assert main(["--checkpoint", checkpoint, "--port", "0"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("serve.py: ") and line.count("\n") == 1
    assert problem in line


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--disk-cache", str(tmp_path / "file"), "--port", "0", "--dry-run"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("serve.py: --disk-cache: cannot use") and line.count("\n") == 1


def test_a_port_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--checkpoint", "/nowhere", "--port", port]) == 1
    assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_opens_no_port(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = ["--dry-run", "--max-len", "512", "--port", port, "--mesh"]
        assert main([*command, "tensor=1"]) == 0
        shown = capsys.readouterr().out
        command += ["expert=4", "--decode-weights", "off", "--generation-config", "off"]
        assert main(command) == 0
    elsewhere = capsys.readouterr().out
    assert "mesh expert=4" in elsewhere and "memory   weights 4.6 MB," in elsewhere
    assert "context  512 of 32,768 tokens" in shown
    assert "memory   weights 14.0 MB (decoded once)," in shown
    assert "sampling temperature 0.2 unless" in shown and "sampling" not in elsewhere
    assert "loading" not in shown


def test_a_context_beyond_the_model_s_is_refused(capsys):
    assert main(["--dry-run", "--max-len", "40000"]) == 1
    assert "--max-len 40000 must not exceed the model's 32768" in capsys.readouterr().err


def test_stopping_is_clean_although_nobody_reads_any_more():
    program = """
import os, sys
from scripts import serve
def interrupted(args):
    sys.stdout.flush()
    sys.stdin.read()  # until the reader of stdout is gone
    raise KeyboardInterrupt
serve.run_demo = interrupted
sys.exit(serve.main([]))
"""
    command = [sys.executable, "-W", "error", "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        child.stdout.close()
        child.stdin.close()
        errors = child.stderr.read()
    assert (child.returncode, errors) == (0, b"")


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
        assert "demo" in lines[0]
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
            if line.startswith("compiling 0 of "):
                server.send_signal(signal.SIGTERM)
        errors = server.stderr.read()
    assert (server.returncode, errors) == (0, "")
    assert lines[-1] == "stopped\n"
