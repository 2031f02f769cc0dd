"""What the compiler said of a program, kept so that the same program need not be compiled again.

Executables themselves cannot be: libtpu loads them next to a TPU only. An answer belongs to a
program's text, the slice it is for, the versions of JAX and libtpu, and their settings.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TPU_")  # beginnings of variables that compilers may read
IGNORED = ("JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS", "TPU_STDERR_LOG_LEVEL")


@dataclass(frozen=True)
class Answer:
    """The optimised program's text and bytes of one device, or why the compiler refused; and what
    compiling took."""

    text: str = ""
    arguments: int = 0
    fresh_outputs: int = 0  # that take no argument's place
    temporaries: int = 0
    code: int = 0
    refusal: str = ""
    compile_s: float = 0.0
    host_gb: float = 0.0


def key_of(lowered: Any, topology: str) -> str:
    """Name of the answer for a lowered program."""
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(SETTINGS) and name not in IGNORED
    }
    versions = [jax.__version__, importlib.metadata.version("libtpu")]
    facts = json.dumps([topology, versions, settings])
    return hashlib.sha256((facts + lowered.as_text()).encode()).hexdigest()


def find(folder: Path, key: str) -> Answer | None:
    """The answer of an earlier compilation, or None.

    Raises:
        ValueError: the file holds something else.
    """
    path = _path(folder, key)
    if not path.is_file():
        return None
    try:
        return Answer(**json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error}): delete it") from error


def keep(folder: Path, key: str, answer: Answer) -> None:
    """Writes an answer, in full or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, key)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(gzip.compress(json.dumps(asdict(answer)).encode()))
    part.replace(path)


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.json.gz"
