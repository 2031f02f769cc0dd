"""Settings from flags, variables and files: which wins, and what is refused."""

from pathlib import Path

import pytest

from dsv4_jax.serving.options import OPTIONS, page
from dsv4_jax.serving.settings import (
    Option,
    Resolved,
    UsageError,
    integer,
    number,
    one_of,
    resolve,
    switch,
)

TABLE = (
    Option("port", "HTTP", "where", 8000, integer(0, 65535), "P"),
    Option("wait-s", "HTTP", "how long; 100% sure", 1.5, number(0), "S"),
    Option("name", "HTTP", "who", (), is_repeatable=True),
    Option("key", "HTTP", "password", (), is_repeatable=True, is_secret=True),
    Option("quiet", "HTTP", "say less", False, switch),
    Option("kind", "HTTP", "sort", "a", one_of("a", "b")),
)


@pytest.fixture
def settle(tmp_path):
    """Returns a function of (flags, variables, YAML text)."""
    file = tmp_path / "s.yaml"

    def run(flags: str = "", text: str | None = None, **variables: str) -> Resolved:
        argv = flags.split()
        if text is not None:
            file.write_text(text)
            argv += ["--config", str(file)]
        return resolve(TABLE, argv, {f"DSV4_{k}": v for k, v in variables.items()})

    return run


@pytest.mark.parametrize("flag", [None, "1"])
@pytest.mark.parametrize("variable", [None, "2"])
@pytest.mark.parametrize("key", [None, "3"])
def test_flag_before_variable_before_file_before_default(settle, flag, variable, key):
    found = settle(
        f"--port {flag}" if flag else "",
        f"port: {key}" if key else "",
        **({"PORT": variable} if variable else {}),
    )
    assert found.values["port"] == int(flag or variable or key or 8000)
    want = "flag" if flag else "environment" if variable else "file" if key else "default"
    assert found.origins["port"].split()[0] == want


@pytest.mark.parametrize(
    ("flags", "text", "variables"),
    [
        ("--name a --name b", None, {}),
        ("", "name: [a, b]", {}),
        ("", "name:\n- a\n- b\n", {}),
        ("", None, {"NAME": "a,b"}),
    ],
)
def test_several_values(settle, flags, text, variables):
    assert settle(flags, text, **variables).values["name"] == ("a", "b")


@pytest.mark.parametrize(
    ("flags", "text", "variables"),
    [("--quiet", None, {}), ("", "quiet: yes", {}), ("", None, {"QUIET": "1"})],
)
def test_switches(settle, flags, text, variables):
    assert settle(flags, text, **variables).values["quiet"] is True
    assert settle().values["quiet"] is False


def test_yaml_scalars_stay_as_written(settle):
    assert settle(text="name: 1.10").values["name"] == ("1.10",)
    assert settle(text="wait_s: 2").namespace().wait_s == 2.0
    assert settle(text="# nothing\n").values["port"] == 8000


def test_the_file_may_be_named_by_a_variable(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("port: 5")
    assert resolve(TABLE, [], {"DSV4_CONFIG": str(file)}).values["port"] == 5


@pytest.mark.parametrize(
    ("flags", "text", "variables", "problem"),
    [
        ("", "prot: 1", {}, "unknown key prot in .*: did you mean port?"),
        ("", "zebra: 1", {}, "unknown key zebra in [^?]*$"),
        ("", "port: 1\nport: 2", {}, "port stands twice"),
        ("", "wait-s: 1\nwait_s: 2", {}, "wait-s stands twice"),
        ("", "port: [1]", {}, "port in .*: must be a single value"),
        ("", "name: {a: b}", {}, "must be a value or a list"),
        ("", "name: []", {}, "must be a value or a list"),
        ("", "port: high", {}, "port in .* 'high': must be a whole number"),
        ("", "port:", {}, "must not be empty"),
        ("", "- port", {}, "must hold keys and values"),
        ("", "port: [1", {}, "is not valid YAML"),
        ("", "port: !!python/object:os.system x", {}, "must be a whole number"),
        ("", None, {"PORTT": "1"}, "DSV4_PORTT: did you mean DSV4_PORT?"),
        ("", None, {"PORT": "70000"}, "DSV4_PORT '70000': .* from 0 to 65535"),
        ("--wait-s nan", None, {}, "must be a number of at least 0"),
        ("--kind c", None, {}, "must be one of a, b"),
        ("--quit", None, {}, "did you mean --quiet"),
        ("", "quiet: perhaps", {}, "must be true or false"),
        ("--por 1", None, {}, "unknown argument --por: did you mean --port"),
    ],
)
def test_mistakes(settle, flags, text, variables, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        settle(flags, text, **variables)
    assert "\n" not in str(caught.value)


def test_variables_of_other_programs_are_left_alone(settle):
    assert settle(TELESCOPE="1").values["port"] == 8000


def test_what_is_printed_can_be_read_back(settle):
    first = settle("--name x: --name #y --quiet --key hush", PORT="9")
    printed = first.to_yaml()
    assert "hush" not in printed
    second = settle(text=printed)
    assert second.values == first.values | {"key": ()}


def test_a_wrong_secret_is_not_repeated():
    table = (Option("key", "g", "h", read=one_of("right"), is_secret=True),)
    with pytest.raises(UsageError) as caught:
        resolve(table, ["--key", "hush"], {})
    assert "hush" not in str(caught.value)


def test_every_setting_of_the_server_reads_its_own_default():
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        assert option.default not in (None, ()) or option.unset, option.name
        if option.default not in (None, ()):
            assert option.read(str(option.default)) == option.default


def test_the_settings_page_is_up_to_date():
    kept = Path(__file__).parents[2] / "docs" / "settings.md"
    how = "make it anew: python -m dsv4_jax.serving.options > docs/settings.md"
    assert kept.read_text(encoding="utf-8") == page(), how
