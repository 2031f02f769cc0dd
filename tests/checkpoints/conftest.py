"""Fixtures shared by the checkpoint tests."""

from pathlib import Path

import pytest

from checkpoints.convert import convert
from tests.checkpoints.support import (
    BASE,
    INSTRUCT,
    read_raw,
    to_bf16_variant,
    to_fp8_variant,
    write_raw,
)


@pytest.fixture(scope="session")
def variants(tmp_path_factory) -> dict[str, Path]:
    """Official directories of every storage variant, by name."""
    root = tmp_path_factory.mktemp("variants")
    raw = read_raw(INSTRUCT)
    return {
        "instruct": INSTRUCT,
        "base": BASE,
        "bf16": write_raw(to_bf16_variant(raw), root / "bf16"),
        "fp8": write_raw(to_fp8_variant(raw), root / "fp8"),
        "single": write_raw(read_raw(BASE), root / "single", single=True),
    }


@pytest.fixture(scope="session")
def converted(variants, tmp_path_factory) -> dict[str, Path]:
    """The variants converted as they are. Tests must not change them."""
    root = tmp_path_factory.mktemp("converted")
    for name, src in variants.items():
        convert(src, root / name)
    return {name: root / name for name in variants}
