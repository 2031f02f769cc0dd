"""Following one answer through its grammar, token by token."""

import numpy as np
from llguidance import LLMatcher


class GrammarError(RuntimeError):
    """The grammar cannot go on: a token it forbids, or a limit of the matcher."""


class GrammarGuide:
    """A `TokenGuide`: allows what continues the grammar, and the end token where it may end.

    A mask is made when it is asked for. The matcher's own limits bound the work per token.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.failure: str | None = None  # why it cannot go on
        self._matcher = matcher
        self._words = (vocab_size + 31) // 32

    def fill(self, words_W: np.ndarray) -> bool:
        """See `TokenGuide.fill`; ids the tokenizer does not have are not allowed.

        Raises:
            GrammarError: the matcher gave up.
        """
        own = words_W[: self._words]
        if not own.flags["C_CONTIGUOUS"] or own.dtype.itemsize != 4:
            raise ValueError(f"words_W must be contiguous 32-bit words, not {own.dtype}")
        words_W[self._words :] = 0
        self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, own.size * 4)
        self._check()
        return True

    def advance(self, token: int) -> None:
        """See `TokenGuide.advance`.

        Raises:
            GrammarError: the grammar does not allow `token`.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            self.failure = self._matcher.get_error().partition("\n")[0][:300]
            raise GrammarError(self.failure)
