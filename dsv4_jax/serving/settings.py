"""Settings that come from the command line, the environment, a YAML file, or a default.

The first of these that names a setting wins. All give text, which the setting's own reader checks,
so a value means the same wherever it stands.
"""

import argparse
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import yaml

PREFIX = "DSV4_"
_NEAR = 0.75  # how alike two names are, 0 to 1, before one is offered or suspected


@dataclass(frozen=True)
class Option:
    """One setting: `max-len` is the flag --max-len, the key max-len and DSV4_MAX_LEN.

    `read` turns text into the value and raises ValueError saying what is allowed. A repeatable
    setting is a tuple: a flag given several times, a list in YAML, commas in the environment.
    Secrets are never shown. `unset` says in words what a default of None means.
    """

    name: str
    group: str
    help: str
    default: Any = None
    read: Callable[[str], Any] = str
    metavar: str = "X"
    is_repeatable: bool = False
    is_secret: bool = False
    unset: str = ""

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return PREFIX + self.attribute.upper()

    @property
    def described_default(self) -> str:
        if self.default in (None, ()):
            return self.unset
        return str(self.default).lower() if self.read is switch else str(self.default)


class UsageError(ValueError):
    """A mistake in how the program was called; the message is one line."""


@dataclass(frozen=True)
class Resolved:
    """What was settled, and where each setting came from, both by its name."""

    options: tuple[Option, ...]
    values: dict[str, Any]
    origins: dict[str, str]
    wants_print: bool = False

    def namespace(self) -> SimpleNamespace:
        """Returns the values under names that are valid in Python."""
        return SimpleNamespace(**{o.attribute: self.values[o.name] for o in self.options})

    def to_yaml(self) -> str:
        """Returns a file for --config with the origin of each setting; secrets are left out."""
        width = max(len(option.name) for option in self.options)
        lines: list[str] = []
        for option in self.options:
            value, origin = self.values[option.name], self.origins[option.name]
            if value in (None, ()):
                shown = f"# {option.name}: {option.unset or 'not set'}"
            elif option.is_secret:
                shown = f"# {option.name}: hidden"
            else:
                plain = list(value) if option.is_repeatable else value
                shown = f"{option.name}: {json.dumps(plain, ensure_ascii=False)}"
            lines.append(f"{shown:<{width + 24}}  # {origin}")
        return "\n".join(lines)


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns a reader of whole numbers; 1_000 and 1000 are the same."""
    allowed = f"from {least} to {most}" if most is not None else f"of at least {least}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise ValueError(f"must be a whole number {allowed}")
        return value

    return read


def number(least: float) -> Callable[[str], float]:
    """Returns a reader of finite numbers of at least `least`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise ValueError(f"must be a number of at least {least:g}")
        return value

    return read


def metric_name(text: str) -> str:
    """Reads a name that can begin those of metrics."""
    if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", text):
        raise ValueError("must be letters, digits and underscores, no digit first")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return read


def switch(text: str) -> bool:
    """Reads a setting that is on or off; as a flag it stands alone."""
    known = {"true": True, "yes": True, "on": True, "1": True}
    known |= {"false": False, "no": False, "off": False, "0": False}
    if text.lower() not in known:
        raise ValueError("must be true or false")
    return known[text.lower()]


def resolve(
    options: Sequence[Option],
    argv: Sequence[str] | None,
    environ: Mapping[str, str] = os.environ,
    **about: Any,
) -> Resolved:
    """Settles every option; `about` describes the program to argparse (prog, description, …).

    Raises:
        UsageError: an unknown name or a wrong value, and where it stands.
        SystemExit: after --help.
    """
    flags = _parser(options, **about).read(argv)
    variables = _from_environment(options, environ)
    path = flags.get("config") or environ.get(f"{PREFIX}CONFIG")
    file = _from_file(options, path) if path else {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in options:
        sources = (
            (flags.get(option.attribute), f"--{option.name}", "flag"),
            (variables.get(option.name), option.variable, f"environment {option.variable}"),
            (file.get(option.name), f"{option.name} in {path}", f"file {path}"),
        )
        given = [source for source in sources if source[0] is not None]
        values[option.name], origins[option.name] = option.default, "default"
        if given:
            text, where, origins[option.name] = given[0]
            values[option.name] = _read(option, text, where)
    return Resolved(tuple(options), values, origins, "print_config" in flags)


def _read(option: Option, text: Any, where: str) -> Any:
    texts = text if isinstance(text, list) else [text]
    try:
        if "" in texts:
            raise ValueError("must not be empty")
        values = tuple(option.read(one) for one in texts)
    except ValueError as error:
        shown = "" if option.is_secret else f" {' '.join(texts)[:80]!r}"
        raise UsageError(f"{where}{shown}: {error}") from None
    return values if option.is_repeatable else values[0]


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as an exception instead of leaving the program."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def read(self, argv: Sequence[str] | None) -> dict[str, Any]:
        parsed, rest = self.parse_known_args(argv)
        if rest:
            known = [name for action in self._actions for name in action.option_strings]
            raise UsageError(f"unknown argument {rest[0]}{_hint(rest[0].split('=')[0], known)}")
        return vars(parsed)


def _parser(options: Sequence[Option], **about: Any) -> _Parser:
    parser = _Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="%(prog)s [SETTING ...]",
        **about,
    )
    groups: dict[str, Any] = {}
    for option in options:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        how: dict[str, Any] = {"metavar": option.metavar}
        if option.read is switch:
            how = {"action": "store_const", "const": "true"}
        elif option.is_repeatable:
            how["action"] = "append"
        shown = option.described_default
        text = f"{option.help} (default: {shown})" if shown else option.help
        groups[option.group].add_argument(f"--{option.name}", help=text.replace("%", "%%"), **how)
    own = parser.add_argument_group("settings")
    own.add_argument(
        "--config", metavar="FILE", help="YAML file whose keys are the flags above, without dashes"
    )
    shown = "show every setting and where it comes from, then stop"
    own.add_argument("--print-config", action="store_true", help=shown)
    return parser


def _from_environment(options: Sequence[Option], environ: Mapping[str, str]) -> dict[str, Any]:
    known = {option.variable: option for option in options}
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        if option := known.get(variable):
            found[option.name] = text.split(",") if option.is_repeatable else text
        elif variable.startswith(PREFIX) and variable != f"{PREFIX}CONFIG":
            # Other programs may own the prefix too; a near miss is a typing error.
            if hint := _hint(variable, [*known, f"{PREFIX}CONFIG"]):
                raise UsageError(f"unknown environment variable {variable}{hint}")
    return found


class _Loader(yaml.BaseLoader):
    """Leaves every scalar as text and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands twice")
        return super().construct_mapping(node, deep)


def _from_file(options: Sequence[Option], path: str) -> dict[str, Any]:
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if found in (None, ""):
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold keys and values, such as port: 8000")
    known = {option.name: option for option in options}
    settled: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise UsageError(f"unknown key {key} in {path}{_hint(name, known)}")
        if name in settled:
            raise UsageError(f"{path}: {name} stands twice")
        _check_shape(known[name], value, f"{key} in {path}")
        settled[name] = value
    return settled


def _check_shape(option: Option, value: Any, where: str) -> None:
    parts = value if option.is_repeatable and isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str) for part in parts):
        kind = "a value or a list of values" if option.is_repeatable else "a single value"
        raise UsageError(f"{where}: must be {kind}")


def _hint(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, _NEAR)
    return f": did you mean {near[0]}?" if near else ""
