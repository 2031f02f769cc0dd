"""The chip that a program is traced for, and what tuning tables say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from jax.experimental.pallas import tpu as pltpu

T = TypeVar("T")


def of_this_chip(table: Mapping[str, T], default: T) -> T:
    """The entry of a table by chip version ("v5p", "7x", …).

    The chip is that of `jax.set_mesh`, else of the default device; without a TPU, or for one that
    the table does not name, it is the default.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # no TPU
        return default
    return table.get(str(info.chip_version), default)
