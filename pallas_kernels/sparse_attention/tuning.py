"""Where a chip reads only the groups of 128 rows that hold chosen ones: counted, not measured.

A group of packed rows is 74,752 bytes. It takes the time of its bytes at full bandwidth, or of its
products at the peak of the matrix unit; listed, also of issuing its two copies (values, scales), at
an assumed 30 ns each. Streamed, four groups share two copies.

    chip     bytes    products, 64 heads / 128    copies    listed up to this share, 64 / 128
    v5e      91 ns    85 / 170 ns                 60 ns     7/8   7/8
    v5p      27 ns    37 / 73 ns                            0.61  7/8
    v6e      46 ns    18 / 37 ns                            0.76  0.76
    TPU7x    20 ns    15 / 29 ns (half a chip)              0.34  0.49
"""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels import chip

COPIES_NS = 60.0  # to issue the copies of one group


class Tuning(NamedTuple):
    """Counts of a chip. group_ns: bytes of a group. row_ns: products of a group with one query of
    one head.

    most: listing more of the groups than this never pays: the list has its cost too.
    least_groups: caches of fewer are always streamed. In 128 of them (64K tokens), 512 rows chosen
    at random leave 2 without one.
    """

    group_ns: float = 30.0
    row_ns: float = 0.0
    most: float = 7 / 8
    least_groups: int = 128

    def share(self, rows: int) -> float:
        """Up to this share of the visible groups, listing is faster than reading all of them.

        rows: queries times heads of a block.
        """
        group_ns = max(self.group_ns, rows * self.row_ns)
        return min(self.most, group_ns / max(group_ns, COPIES_NS))


TABLE = {
    "v5e": Tuning(91.3, 1.33),
    "v5p": Tuning(27.0, 0.571),
    "v6e": Tuning(45.6, 0.286),
    "7x": Tuning(20.3, 0.227),
}
DEFAULT = Tuning()


def of_this_chip() -> Tuning:
    """Tuning of the chip that a program is traced for."""
    return chip.of_this_chip(TABLE, DEFAULT)


def live_groups(groups: int, chosen: int) -> float:
    """How many groups hold one of `chosen` rows that are drawn at random, on average."""
    return groups * (1 - (1 - 1 / groups) ** chosen)
