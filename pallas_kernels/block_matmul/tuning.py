"""What the kernel does differently on a generation of chips.

Only TPU7x multiplies bfloat16 by e4m3 codes directly: there the compiler needs no VMEM for such a
product; on v5e, v5p and v6e it decodes the whole operand first (16 to 20 bytes of VMEM per code).
"""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels import chip


class Tuning(NamedTuple):
    """native_rows: up to so many rows of x, codes go to the matrix unit as they are.

    Power-of-two scales then multiply x, once per 128 rows of W; decoding multiplies W instead,
    which is more work for fewer than 128 rows.
    """

    native_rows: int = 0


TABLE = {"7x": Tuning(native_rows=64)}
DEFAULT = Tuning()


def of_this_chip() -> Tuning:
    """Tuning of the chip that a program is traced for."""
    return chip.of_this_chip(TABLE, DEFAULT)
