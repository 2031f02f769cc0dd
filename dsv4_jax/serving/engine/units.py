"""Units of 128 tokens, the grain of prefix matching, and the chained keys that name them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

UNIT = 128  # least common multiple of the compression ratios 4 and 128
KEY_BYTES = 16


class UnitChain:
    """Keys of the complete units of one token sequence.

    A key names a unit and everything in front of it: BLAKE2b of the previous key and the 128 ids.
    The first link carries a salt of model and tenant, so neither can see the other's prefixes.
    """

    def __init__(self, fingerprint: str, tenant: str) -> None:
        salt = b"".join(blake2b(part.encode()).digest() for part in (fingerprint, tenant))
        self._last = blake2b(salt, digest_size=KEY_BYTES).digest()
        self.keys: list[bytes] = []
        self.ids: list[bytes] = []  # int32 of each unit, compared on a hit

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds the units of `tokens`, which begin with the tokens of the units there are."""
        for start in range(len(self.keys) * UNIT, len(tokens) - UNIT + 1, UNIT):
            ids = array("i", tokens[start : start + UNIT]).tobytes()
            self._last = blake2b(self._last + ids, digest_size=KEY_BYTES).digest()
            self.keys.append(self._last)
            self.ids.append(ids)
