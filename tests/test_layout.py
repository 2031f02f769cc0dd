"""The layers of the project: who may import whom, where files are, and how long they get."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "pallas_kernels": set(),
    "sharding": set(),
    "dsv4_jax": {"pallas_kernels", "sharding"},
    "checkpoints": {"dsv4_jax", "sharding"},
    "scripts": {"dsv4_jax", "sharding", "pallas_kernels", "checkpoints"},
}
HTTP_LIBRARIES = {"starlette", "uvicorn"}
MAX_LINES = 500
MAX_KERNEL_LINES = 900


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> Iterator[str]:
    """Yields the dotted name of everything `path` imports, relative imports resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def layer_of(path: Path) -> str:
    """Returns the package or sub-package whose rule applies to `path`."""
    parts = path.relative_to(ROOT).parts
    is_sub = parts[0] == "dsv4_jax" and parts[1] in ("serving", "training")
    return ".".join(parts[:2]) if is_sub else parts[0]


def forbidden(path: Path) -> set[str]:
    """Returns the dotted prefixes that `path` must not import."""
    layer = layer_of(path)
    top = layer.split(".")[0]
    roots = ALLOWED.keys() - ALLOWED[top] - {top}
    special = {
        "dsv4_jax": {"dsv4_jax.serving", "dsv4_jax.training"},
        "dsv4_jax.serving": {"dsv4_jax.training"},
        "dsv4_jax.training": {"dsv4_jax.serving"},
        "checkpoints": {"dsv4_jax.serving", "dsv4_jax.training"},
        "pallas_kernels": {"flax"},
        "sharding": {"flax"},
    }
    http = HTTP_LIBRARIES if layer not in ("dsv4_jax.serving", "scripts") else set()
    return roots | special.get(layer, set()) | http


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_layers(package):
    for path in sources(package):
        for name in imported_names(path):
            illegal = [rule for rule in forbidden(path) if is_inside(name, rule)]
            assert not illegal, f"{path.relative_to(ROOT)} must not import {name}"


def test_the_model_uses_kernels_through_their_api_only():
    for path in sources("dsv4_jax"):
        if "preflight" in path.parts:  # compiles whole programs and reads what came out
            continue
        for name in imported_names(path):
            parts = name.split(".")
            if parts[0] == "pallas_kernels":
                rule = "import pallas_kernels.<op>.api"
                assert parts[2:3] == ["api"], f"{path.relative_to(ROOT)} imports {name}: {rule}"


def test_the_import_rule_sees_every_spelling(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    folder = tmp_path / "dsv4_jax" / "training"
    folder.mkdir(parents=True)
    path = folder / "step.py"
    path.write_text(
        "import dsv4_jax.serving.api\nfrom dsv4_jax import serving\nfrom .. import serving\n"
        "from ..serving import api\nfrom ..serving.api import build\nfrom . import loss\n"
    )
    names = list(imported_names(path))
    assert [is_inside(n, "dsv4_jax.serving") for n in names] == [True] * 5 + [False]
    assert "dsv4_jax.serving" in forbidden(path)


def test_packages_are_the_ones_in_this_repository():
    for package in ALLOWED:
        module = importlib.import_module(package)
        assert module.__file__ is not None
        assert Path(module.__file__).is_relative_to(ROOT), f"{package} is {module.__file__}"


def test_checkpoints_source_is_not_ignored_by_git():
    path = "checkpoints/__init__.py"
    assert (ROOT / path).exists()
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git working tree")
    done = subprocess.run(["git", "check-ignore", "-v", path], cwd=ROOT, capture_output=True)
    assert done.returncode == 1, f".gitignore drops our source: {done.stdout.decode()}"


def test_test_folders_are_packages():
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} needs an __init__.py"


def test_no_script_shadows_another_module():
    """`python scripts/x.py` puts scripts/ first on the import path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    distributions = {re.split(r"[\[<>=]", line)[0] for group in wanted for line in group}
    taken = {name.replace("-", "_") for name in distributions} | set(sys.stdlib_module_names)
    for path in (ROOT / "scripts").glob("*.py"):
        assert path.stem not in taken | ALLOWED.keys(), f"scripts/{path.name} hides a module"


@pytest.mark.parametrize("package", ALLOWED)
def test_files_stay_short(package):
    for path in sources(package):
        is_kernel = package == "pallas_kernels" and path.name.startswith("kernel")
        limit = MAX_KERNEL_LINES if is_kernel else MAX_LINES
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= limit, (
            f"{path.relative_to(ROOT)} has {lines} lines, limit {limit}: split it"
        )
