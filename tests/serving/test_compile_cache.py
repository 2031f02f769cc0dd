"""Where compiled programs are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_jax.serving.compile_cache import default_folder, use_compile_cache

CODE = """
import jax, sys
from dsv4_jax.serving.compile_cache import use_compile_cache
print(use_compile_cache(*sys.argv[1:] or [None]))
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
"""

BREAK = {
    "removed": "import shutil; shutil.rmtree(sys.argv[1])",
    "full": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
}


def run(*args: str, code: str = CODE, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_programs_are_kept_where_they_should_be(tmp_path):
    home = run(XDG_CACHE_HOME=str(tmp_path / "home"))
    assert home == str(tmp_path / "home" / "dsv4_jax" / "xla")
    assert list(Path(home).iterdir())
    named = tmp_path / "a" / "b"
    assert run(str(named)) == str(named) and list(named.iterdir())
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax")) == str(tmp_path / "jax")


@pytest.mark.parametrize("fault", BREAK)
def test_programs_are_compiled_although_none_can_be_kept(fault, tmp_path):
    first, second = CODE.rsplit("jax.jit", 1)
    code = f"{first}{BREAK[fault]}\njax.jit{second}print('compiled')"
    assert run(str(tmp_path / "cache"), code=code).endswith("compiled")
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]
    assert fault == "removed" or not left


def test_off_keeps_nothing(tmp_path):
    assert run("off", XDG_CACHE_HOME=str(tmp_path)) == "None"
    assert not list(tmp_path.iterdir())


def test_a_relative_cache_home_does_not_count(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert default_folder() == Path.home() / ".cache" / "dsv4_jax" / "xla"


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(ValueError, match="--compile-cache .*file.*'off'"):
        use_compile_cache(str(taken))
