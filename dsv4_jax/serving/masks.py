"""Which tokens an answer may consist of, as masks that are made once."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from dsv4_jax.serving.model import Allowed
from dsv4_jax.serving.parser import ControlIds

_BITS = 32


def words_of(allowed: Iterable[int], size: int) -> np.ndarray:
    """uint32 words in which bit i % 32 of word i // 32 is set for each allowed id i < size."""
    bits = np.zeros(-(-size // _BITS) * _BITS, bool)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


class Masks:
    """Masks for one tokenizer.

    In chats the only control tokens that mean something are the end, the end of reasoning, and with
    tools the marker of calls; the others cannot be drawn, unless `frees_controls`.
    """

    def __init__(self, controls: ControlIds, size: int, frees_controls: bool = False) -> None:
        self._controls, self._frees_controls = controls, frees_controls
        everything = set(range(size))
        chat = everything - controls.all | {controls.eos, controls.think_end}
        self._whole = words_of(everything, size)
        self._chat = words_of(chat, size)
        self._tools = words_of(chat | {controls.dsml}, size)

    def chat(self, has_tools: bool) -> np.ndarray | None:
        """For answers of chats; None allows everything."""
        if self._frees_controls:
            return None
        return self._tools if has_tools else self._chat

    def allowed(
        self,
        base: np.ndarray | None,
        ignore_eos: bool = False,
        min_tokens: int = 0,
        stop_ids: Collection[int] = (),
    ) -> Allowed | None:
        """What a request asks for on top of `base`; None allows everything.

        The end token may not be drawn with `ignore_eos`, nor may it or `stop_ids` as one of the
        first `min_tokens`.
        """
        if base is None and not ignore_eos and not min_tokens:
            return None
        words = self._whole if base is None else base
        if ignore_eos:
            words = _without(words, [self._controls.eos])
        if not min_tokens:
            return Allowed(words)
        return Allowed(words, _without(words, [self._controls.eos, *stop_ids]), min_tokens)


def _without(words_W: np.ndarray, ids: Iterable[int]) -> np.ndarray:
    fewer_W = words_W.copy()
    for index in ids:
        if index // _BITS < len(fewer_W):
            fewer_W[index // _BITS] &= ~np.uint32(1 << index % _BITS)
    return fewer_W
