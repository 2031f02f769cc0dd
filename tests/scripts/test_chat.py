"""The terminal chat, against a live server with a scripted model."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.child import own_server
from dsv4_jax.serving.client import Client
from dsv4_jax.serving.terminal import Chat, Screen
from scripts.chat import main
from tests.serving.browser import chromium, tab
from tests.serving.fakes import FakeModel, answer, chat_answer, make_service, prompt_text
from tests.serving.live import serving

ROOT = Path(__file__).parents[2]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = (
    f'<{C.DSML}tool_calls>\n<{C.DSML}invoke name="look">\n'
    f'<{C.DSML}parameter name="where" string="true">up</{C.DSML}parameter>\n'
    f"</{C.DSML}invoke>\n</{C.DSML}tool_calls>"
)


@pytest.fixture
def served():
    """Yields a function that serves completions and gives the address and the model."""
    with ExitStack() as stack:

        def start(*says: str, **kwargs) -> tuple[str, FakeModel]:
            model = FakeModel(*says, **kwargs)
            return stack.enter_context(serving(make_service(model))), model

        yield start


def talk(url: str, *lines: str, is_rich: bool = True, fields: dict | None = None):
    """Types `lines`, then ends the input; returns the chat and what was shown."""
    typed = iter(lines)

    def ask(_: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    out, err = io.StringIO(), io.StringIO()
    chat = Chat(Client(url), Screen(out, err, is_rich), ask, fields=fields or {})
    chat.run()
    return chat, out.getvalue()


def test_reasoning_is_dim_and_the_answer_is_not(served):
    url, _ = served(answer("four", reasoning="2 + 2"))
    chat, shown = talk(url, "sum?")
    assert "\x1b[2m" in shown and "\x1b[0m" in shown
    plain = shown.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert "2 + 2\nfour\n" in plain
    assert chat.messages[-1] == {
        "role": "assistant",
        "content": "four",
        "reasoning_content": "2 + 2",
    }


def test_turns_and_commands_shape_the_prompt(served):
    url, model = served(answer("one"), answer("two"), chat_answer("three"), answer("four"))
    chat, shown = talk(
        *(url, "/system Be kind.", "first", "second", "/undo", "/nothink", "thi\\", "rd"),
        *("/stats", "/clear", "/max", "last", "/bogus", "/think loud", "/help"),
    )
    second, third, last = map(prompt_text, model.prompts[1:])
    assert "Be kind." in second and "first" in second
    assert "second" not in third and "thi\nrd" in third and third.endswith(C.THINK_END)
    assert "Be kind." in last and "third" not in last and "Reasoning Effort" in last
    assert "1 questions left" in shown and "tokens/s" in shown and "3 answers" in shown
    assert "no command /bogus" in shown and "one of off, on, max" in shown and "/load" in shown
    assert [m["content"] for m in chat.messages] == ["last", "four"]


def test_hidden_reasoning(served):
    url, _ = served(answer("shown", reasoning="secret"))
    _, shown = talk(url, "/reasoning", "q")
    assert "secret" not in shown and "thinking …" in shown and "shown" in shown


def test_save_and_load(served, tmp_path):
    url, model = served(answer("one"))
    path = tmp_path / "talk.json"
    talk(url, "/system S", "first", f"/save {path}")
    chat, shown = talk(url, f"/load {path}", "second", "/load /nowhere", f"/load {__file__}")
    assert chat.system == "S" and len(chat.messages) == 4
    assert "first" in prompt_text(model.prompts[-1])
    assert "No such file" in shown and "was not written by /save" in shown
    path.write_text(json.dumps({"messages": ["hello"]}))
    assert "was not written by /save" in talk(url, f"/load {path}")[1]


def test_the_user_answers_tool_calls(served):
    url, model = served(answer(CALL), answer("blue"))
    chat, shown = talk(url, "what is up?", "sky", fields={"tools": TOOLS})
    assert "→ look" in shown and '{"where": "up"}' in shown and "blue" in shown
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert "sky" in prompt_text(model.prompts[-1])


def test_a_model_cannot_steer_the_terminal(served):
    url, _ = served(answer("a\x1b]0;title\x07b\rc\u202ed\te\nf"))
    _, shown = talk(url, "q", is_rich=False)
    assert "a\ufffd]0;title\ufffdb\ufffdc\ufffdd\te\nf" in shown


def test_a_refused_question_is_taken_back(served):
    url, _ = served(answer("x"))
    chat, shown = talk(url, "q" * 5000, "fine")
    assert "context" in shown
    assert [m["content"] for m in chat.messages] == ["fine", "x"]


def test_a_broken_answer_is_reported(served):
    url, model = served(answer("x" * 50))
    model.fails_after = 10
    chat, shown = talk(url, "q")
    assert "\x1b[31m" in shown
    assert [m["role"] for m in chat.messages] in ([], ["user", "assistant"])


def piped(capsys, monkeypatch, *args: str, stdin: str = "") -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    status = main(list(args))
    out, err = capsys.readouterr()
    return status, out, err


def test_one_shot_prints_the_answer_only(served, capsys, monkeypatch):
    url, _ = served(answer("four", reasoning="hm"))
    assert piped(capsys, monkeypatch, "--url", url, "-p", "q") == (0, "four\n", "")


def test_a_pipe_is_one_question(served, capsys, monkeypatch):
    url, model = served(chat_answer("ok"))
    args = ("--url", url, "--think", "off", "--max-tokens", "2", "--temperature", "0")
    status, out, err = piped(capsys, monkeypatch, *args, stdin="a\nb\n")
    assert (status, out) == (0, "ok\n")
    assert "cut off" in err
    assert "a\nb" in prompt_text(model.prompts[0])
    assert model.sampling[0].max_tokens == 2 and model.sampling[0].temperature == 0


def test_calls_end_a_one_shot_turn(served, capsys, monkeypatch, tmp_path):
    url, _ = served(answer(CALL))
    (tmp_path / "t.json").write_text(json.dumps(TOOLS))
    args = ("--url", url, "-p", "q", "--tools", str(tmp_path / "t.json"))
    assert piped(capsys, monkeypatch, *args)[:2] == (0, '→ look {"where": "up"}\n')


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--url", "http://127.0.0.1:1"], "no connection to http://127.0.0.1:1"),
        (["--url", "ftp://x"], "must look like http://"),
        (["--tools", "/nowhere"], "cannot read /nowhere"),
        (["--tools", __file__], "is not valid JSON"),
        (["--checkpoint", "/nowhere"], "the server did not start: serve.py: checkpoint /nowhere"),
    ],
)
def test_mistakes_are_said(args, problem, capsys, monkeypatch):
    status, out, err = piped(capsys, monkeypatch, *args, stdin="q")
    assert (status, out) == (1, "")
    assert problem in err


def test_a_wrong_key_is_said(capsys, monkeypatch):
    service = make_service(FakeModel(answer("x")), api_keys=("right",))
    with serving(service) as url:
        args = ("--url", url, "-p", "q")
        status, _, err = piped(capsys, monkeypatch, *args, "--api-key", "wrong")
        assert status == 1 and "API key" in err
        monkeypatch.setenv("DSV4_API_KEY", "right")
        assert piped(capsys, monkeypatch, *args)[:2] == (0, "x\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(served):
    gate = threading.Semaphore(20)
    url, model = served(chat_answer("long " * 50), gate=gate)
    parent, child = pty.openpty()
    command = [sys.executable, "scripts/chat.py", "--url", url, "--think", "off"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    with subprocess.Popen(
        command, cwd=ROOT, stdin=child, stdout=child, stderr=child, start_new_session=True
    ) as program:
        os.close(child)
        seen = read_until(parent, "> ")
        os.write(parent, b"talk\n")
        seen += read_until(parent, "long long ")
        program.send_signal(signal.SIGINT)
        seen += read_until(parent, "stopped")
        gate.release(10**6)
        assert model.closed.wait(60)
        assert model.streamed < 250
        os.write(parent, b"/exit\n")
        read_until(parent, "never shown")
    os.close(parent)
    assert program.returncode == 0, seen


def read_until(terminal: int, wanted: str) -> str:
    """Reads what the program shows up to `wanted`, or until it ends."""
    seen = ""
    while wanted not in seen:
        try:
            seen += os.read(terminal, 1024).decode()
        except OSError:  # how Linux says that the other side is closed
            break
    return seen


@pytest.mark.slow
def test_a_server_of_its_own(capsys, monkeypatch):
    """The demo, started as `--demo` does, answers in the terminal and on the page, and is gone."""
    lines: list[str] = []
    flags = ["--max-len", "512"]
    with own_server(ROOT / "scripts" / "serve.py", flags, lines.append) as (url, pid):
        assert Client(url).model()["max_model_len"] == 512
        args = ("--url", url, "--think", "off", "--max-tokens", "20", "--seed", "1")
        status, out, _ = piped(capsys, monkeypatch, *args, stdin="Hello")
        assert status == 0 and out.strip()
        with chromium() as browser, tab(browser, url) as shown:
            shown.page.get_by_text("ready ·").wait_for()
            assert "tiny model" in shown.page.locator("#notice").inner_text()
            shown.send("Hello")
            shown.page.keyboard.press("Escape")
            shown.wait_done()
            assert shown.complaints == []
    assert "demo" in lines[0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
