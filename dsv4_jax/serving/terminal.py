"""A conversation in a terminal: what is typed, the commands, and how answers are shown."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsv4_jax.serving.client import Answer, Client, ServerError

DIM, BOLD, RED, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"
MODES = {
    "off": {"thinking": {"type": "disabled"}},
    "on": {"thinking": {"type": "enabled"}},
    "max": {"thinking": {"type": "enabled"}, "reasoning_effort": "max"},
}
HELP = """\
/think off|on|max   how much it thinks (also /nothink, /max)
/reasoning          show or hide what it thinks
/system [TEXT]      set the system prompt; without TEXT remove it
/undo               take back the last question and its answer
/clear              start again, system prompt kept
/save FILE          write the conversation as JSON
/load FILE          go on with a saved conversation
/stats              tokens and times
/exit               leave (also Ctrl-D)
A line that ends in \\ goes on in the next. Ctrl-C stops an answer."""
# A model must not steer the terminal: escape sequences and other controls become visible.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Screen:
    """Where text goes.

    `is_rich` allows colours and reasoning; without it `out` gets answers only, and everything
    else goes to `err`.
    """

    out: TextIO
    err: TextIO
    is_rich: bool

    def write(self, text: str, style: str = "") -> None:
        self._put(self.out, text, style)

    def note(self, text: str, style: str = DIM) -> None:
        self._put(self.out if self.is_rich else self.err, f"{text}\n", style)

    def _put(self, out: TextIO, text: str, style: str) -> None:
        text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
        out.write(f"{style}{text}{PLAIN}" if self.is_rich and style else text)
        out.flush()


class Show:
    """Shows the parts of one answer, with line breaks where its parts meet."""

    def __init__(self, screen: Screen, with_reasoning: bool) -> None:
        self._screen = screen
        self._with_reasoning = with_reasoning
        self._last = ""
        self._is_open = False  # the line has text

    def part(self, kind: str, text: str) -> None:
        if kind == "reasoning" and not self._with_reasoning:
            if self._last != kind:
                self._write("thinking …", DIM)
        elif kind == "call":
            self.end_line()
            self._write(f"→ {text} ", BOLD)
        else:
            if kind != self._last and kind != "arguments":
                self.end_line()
            self._write(text, DIM if kind == "reasoning" else "")
        self._last = kind

    def end_line(self) -> None:
        if self._is_open:
            self._write("\n")

    def _write(self, text: str, style: str = "") -> None:
        self._screen.write(text, style)
        self._is_open = not text.endswith("\n")


@dataclass
class Chat:
    """A conversation with one server.

    `ask` reads a line from the user, given a prompt. `answers_calls`: the user makes up what
    called tools return; otherwise a turn ends with the calls.
    """

    client: Client
    screen: Screen
    ask: Callable[[str], str] = input
    answers_calls: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    mode: str = "on"
    system: str = ""
    with_reasoning: bool = True
    messages: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def run(self) -> None:
        """Talks until the input ends or /exit."""
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                self.screen.note("\n(Ctrl-D leaves)")
                continue
            except EOFError:
                return self.screen.write("\n")
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self.say(line)

    def _read(self) -> str:
        line = self.ask("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self.ask("… ")
        return line.strip()

    def say(self, text: str) -> bool:
        """Sends `text` and shows the answer.

        Returns:
            Whether the answer came to its end. What failed is taken back.
        """
        start = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            while (calls := self._answer().calls) and self.answers_calls:
                for call in calls:
                    result = self.ask(f"result of {call['function']['name']}: ")
                    message = {"role": "tool", "tool_call_id": call["id"], "content": result}
                    self.messages.append(message)
            return True
        except ServerError as error:
            self.screen.note(str(error), RED)
        except (KeyboardInterrupt, EOFError):
            self.screen.note("stopped")
        self._take_back(start)
        return False

    def _take_back(self, start: int) -> None:
        """Keeps a stopped answer that has text; otherwise forgets the question too."""
        last = self.messages[-1]
        if last["role"] != "assistant" or last.get("tool_calls"):
            del self.messages[start:]

    def _answer(self) -> Answer:
        answer = Answer()
        shown = Show(self.screen, self.with_reasoning and self.screen.is_rich)
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"messages": system + self.messages, **self.fields, **MODES[self.mode]}
        parts = self.client.chat(answer, body)
        try:
            for kind, text in parts:
                if kind != "reasoning" or self.screen.is_rich:
                    shown.part(kind, text)
        except (KeyboardInterrupt, ServerError):
            if answer.content:
                self.messages.append({"role": "assistant", "content": answer.content})
            raise
        finally:
            parts.close()
            shown.end_line()
        if answer.warning:
            self.screen.note(f"({answer.warning})")
        if answer.finish_reason == "length":
            self.screen.note("(cut off at the length limit)")
            answer.calls.clear()  # the last one is not whole
        self.messages.append(answer.message())
        self.answers.append(answer)
        return answer

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("nothink", "max"):
            name, rest = "think", {"nothink": "off"}.get(name, name)
        commands: dict[str, Callable[[str], str]] = {
            "think": self._think,
            "reasoning": self._reasoning,
            "system": self._system,
            "undo": self._undo,
            "clear": self._clear,
            "save": self._save,
            "load": self._load,
            "stats": lambda _: self.stats(),
            "help": lambda _: HELP,
        }
        if name not in commands:
            return self.screen.note(f"no command /{name}; /help lists them")
        try:
            self.screen.note(commands[name](rest))
        except (OSError, ValueError) as error:
            self.screen.note(str(error), RED)

    def _think(self, mode: str) -> str:
        if mode not in MODES:
            raise ValueError(f"/think takes one of {', '.join(MODES)}; now: {self.mode}")
        self.mode = mode
        return f"thinking {mode}"

    def _reasoning(self, _: str) -> str:
        self.with_reasoning = not self.with_reasoning
        return f"reasoning {'shown' if self.with_reasoning else 'hidden'}"

    def _system(self, text: str) -> str:
        self.system = text
        return "system prompt set" if text else "no system prompt"

    def _undo(self, _: str) -> str:
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return "nothing to take back"
        del self.messages[asked[-1] :]
        return f"taken back; {len(asked) - 1} questions left"

    def _clear(self, _: str) -> str:
        self.messages.clear()
        return "cleared"

    def _save(self, path: str) -> str:
        if not path:
            raise ValueError("/save needs a file name")
        kept = {"system": self.system, "messages": self.messages}
        Path(path).write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
        return f"saved {len(self.messages)} messages to {path}"

    def _load(self, path: str) -> str:
        if not path:
            raise ValueError("/load needs a file name")
        try:
            kept = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            kept = {}
        messages = kept.get("messages") if isinstance(kept, dict) else None
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and "role" in message for message in messages
        ):
            raise ValueError(f"{path} was not written by /save")
        self.system, self.messages = str(kept.get("system", "")), messages
        return f"loaded {len(messages)} messages"

    def stats(self) -> str:
        """Returns tokens and times of the last answer, and the totals."""
        counted = [answer for answer in self.answers if answer.usage]
        if not counted:
            return "no answer yet"
        last = counted[-1]
        usage = last.usage or {}
        decode_s = last.total_s - (last.first_s or 0)
        speed = f"{(usage['completion_tokens'] - 1) / decode_s:.1f}" if decode_s > 0 else "–"
        made = sum((answer.usage or {})["completion_tokens"] for answer in counted)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return (
            f"last: {usage['prompt_tokens']} tokens in ({cached} cached), "
            f"{usage['completion_tokens']} out, first after {last.first_s or 0:.2f} s, "
            f"{speed} tokens/s\nall:  {len(counted)} answers, {made} tokens out"
        )
