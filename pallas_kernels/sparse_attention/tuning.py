"""Where a chip reads only the groups of 128 rows that hold chosen ones: counted, not measured.

A group of packed rows is 74,752 bytes. Streamed, four of them share two copies; listed, each takes
two. The time of a group is that of its bytes or of issuing its copies, at an assumed 30 ns each,
whichever is longer, and listing pays up to this share of the groups:

    chip    bytes at full bandwidth    copies, listed    share
    v5e     91 ns                      60 ns             7/8  (1, less the list)
    v5p     27 ns                      60 ns             7/16
    v6e     46 ns                      60 ns             3/4
    TPU7x   20 ns (half a chip)        60 ns             5/16
"""

from __future__ import annotations

from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu


class Tuning(NamedTuple):
    """share: of the visible groups of 128 rows, so many at most may be live to be listed.

    least_groups: caches of fewer are always streamed. In 128 of them (64K tokens), 512 rows chosen
    at random leave 2 without one.
    """

    share: float = 0.5
    least_groups: int = 128


TABLE = {
    "v5e": Tuning(7 / 8),
    "v5p": Tuning(7 / 16),
    "v6e": Tuning(3 / 4),
    "7x": Tuning(5 / 16),
}
DEFAULT = Tuning()


def of_this_chip() -> Tuning:
    """Tuning of the chip that a program is traced for: `jax.set_mesh`, else the default device."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # no TPU
        return DEFAULT
    return TABLE.get(str(info.chip_version), DEFAULT)


def live_groups(groups: int, chosen: int) -> float:
    """How many groups hold one of `chosen` rows that are drawn at random, on average."""
    return groups * (1 - (1 - 1 / groups) ** chosen)
