"""Runs one sequence at a time: token streams, and logits at every position for checks."""

from __future__ import annotations

from collections.abc import Generator as Stream
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.cache import Cache, init_cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams, sample

PREFILL_SIZES = (32, 256)  # chunk shapes that prompts are padded to: one compilation each
ONE_SHOT_SIZES = (64, 512, 2048)  # of whole-prompt logits; longer prompts take several
MAX_LOGIT_ELEMENTS = 1 << 28  # of one chunk's logits; bounds memory at large vocabularies
MIN_CAPACITY = 128


class Piece(NamedTuple):
    """Tokens `start` … `start + length` of a sequence, run as a chunk of `size`."""

    start: int
    length: int
    size: int


def parse_mode(mode: str) -> int:
    """Chunk size of a logits mode: 0 for "prefill", 1 for "decode", N for "chunk:N".

    Raises:
        ValueError: any other text.
    """
    if mode == "prefill":
        return 0
    if mode == "decode":
        return 1
    name, _, size = mode.partition(":")
    if name == "chunk" and size.isdecimal() and int(size) > 0:
        return int(size)
    raise ValueError(f"logits mode {mode!r} must be 'prefill', 'decode' or 'chunk:N' with N ≥ 1")


class Generator:
    """A loaded model that continues token sequences.

    max_len: context limit in tokens; caches are allocated for it.

    Raises:
        ValueError: `max_len` exceeds what the model was made for.
    """

    def __init__(self, cfg: ModelConfig, num: Numerics, params: model.Params, max_len: int) -> None:
        self.cfg, self.num, self.params, self.max_len = cfg, num, params, max_len
        if not 1 <= max_len <= cfg.max_len:
            raise ValueError(f"max_len={max_len} must lie between 1 and the model's {cfg.max_len}")
        self.capacity = min(max(max_len, MIN_CAPACITY), cfg.max_len)
        fixed = (cfg, num)
        self._prefill = jax.jit(partial(model.prefill, *fixed), donate_argnums=2)
        self._prefill_all = jax.jit(
            partial(model.prefill, *fixed, all_logits=True), donate_argnums=2
        )
        self._decode = jax.jit(partial(model.decode_step, *fixed), donate_argnums=2)
        self._draft = jax.jit(partial(model.draft, *fixed, all_logits=True), donate_argnums=3)
        self._sample = jax.jit(sample)

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    def new_cache(self) -> Cache:
        """Empty state for one sequence."""
        scanned = model.is_scanned(self.cfg, self.params)
        return init_cache(self.cfg, 1, self.capacity, self.num, scanned)

    def warm_up(self) -> None:
        """Compiles every shape that `stream` uses."""
        lengths = [min(size, self.max_len - 1) for size in PREFILL_SIZES]
        for length in sorted(set(lengths)):
            if length > 0:
                list(self.stream([0] * length, SamplingParams(max_tokens=2), frozenset()))

    def stream(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, stop_ids: frozenset[int]
    ) -> Stream[int]:
        """Yields sampled ids one at a time, the final stop id included.

        Ends after `max_tokens`, at a stop id, or when the context is full. Closing the iterator
        stops the work.

        Raises:
            ValueError: the prompt is empty, too long, or holds an id outside the vocabulary, or
                `sampling` asks for what only the serving engine has.
        """
        self._check(prompt_ids)
        if not sampling.only_draws():
            raise ValueError(
                "a generator knows temperature, top_p, top_k and seed; min_p, penalties, bias and "
                "log-probabilities need the serving engine"
            )
        if len(prompt_ids) >= self.max_len:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room in a context of "
                f"{self.max_len}"
            )
        return self._stream(list(prompt_ids), sampling, stop_ids)

    def _stream(
        self, prompt: list[int], sampling: SamplingParams, stop_ids: frozenset[int]
    ) -> Stream[int]:
        knobs = (
            jnp.float32(sampling.temperature),
            jnp.float32(sampling.top_p),
            jnp.int32(sampling.top_k),
        )
        key, cache, logits = sampling.key(), self.new_cache(), None
        for piece in _prompt_pieces(len(prompt)):
            out, cache = self._prefill(self.params, *self._chunk(prompt, piece, cache))
            logits = out.logits
        assert logits is not None
        room = min(sampling.max_tokens, self.max_len - len(prompt))
        for position in range(len(prompt), len(prompt) + room):
            token = self._sample(logits[0], key, jnp.int32(position), *knobs)
            yield int(token)
            if int(token) in stop_ids or position + 1 == len(prompt) + room:
                return
            out, cache = self._decode(self.params, token[None], cache)
            logits = out.logits

    def logits(self, tokens: Sequence[int], mode: str = "prefill") -> np.ndarray:
        """Next-token logits at every position, float32 `[len(tokens), V]`.

        `mode` says how they are computed ("prefill", "decode", "chunk:N"); all must agree.
        """
        main, _ = self._all_logits(tokens, mode, mtp=False)
        return main

    def mtp_logits(self, tokens: Sequence[int], mode: str = "prefill") -> np.ndarray:
        """Logits of the MTP head, float32 `[len(tokens) - 1, V]`: row i predicts token i + 2.

        Raises:
            ValueError: the model has no MTP block.
        """
        if not self.params["mtp"]:
            raise ValueError("this checkpoint has no MTP block: there are no MTP logits")
        return self._all_logits(tokens, mode, mtp=True)[1]

    def greedy(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Exactly `max_tokens` greedy ids, not stopped by any id.

        Raises:
            ValueError: the context is too short for them.
        """
        if len(tokens) + max_tokens > self.max_len:
            raise ValueError(
                f"{len(tokens)} prompt tokens and {max_tokens} new ones exceed the context of "
                f"{self.max_len}"
            )
        return list(self.stream(tokens, SamplingParams(max_tokens, temperature=0.0), frozenset()))

    def _all_logits(
        self, tokens: Sequence[int], mode: str, mtp: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        self._check(tokens)
        if len(tokens) > self.max_len:
            raise ValueError(f"{len(tokens)} tokens exceed the context of {self.max_len}")
        tokens, cache = list(tokens), self.new_cache()
        shape = (0, self.vocab_size)
        main, drafted = [np.zeros(shape, np.float32)], [np.zeros(shape, np.float32)]
        for piece in self._pieces(len(tokens), parse_mode(mode)):
            out, cache = self._prefill_all(self.params, *self._chunk(tokens, piece, cache))
            if not mtp:
                main.append(np.asarray(out.logits[0, : piece.length]))
                continue
            # the last token has no successor to draft with
            count = min(piece.length, len(tokens) - 1 - piece.start)
            following = _padded(tokens[piece.start + 1 :][:count], piece.size)
            out, cache = self._draft(
                self.params, out.streams_BTMD, following, cache, jnp.array([count], jnp.int32)
            )
            drafted.append(np.asarray(out.logits[0, :count]))
        return np.concatenate(main), np.concatenate(drafted)

    def _pieces(self, length: int, size: int) -> Iterator[Piece]:
        if not size:
            limit = MAX_LOGIT_ELEMENTS // self.vocab_size
            fitting = [s for s in ONE_SHOT_SIZES if s <= limit] or [1]
            size = next((s for s in fitting if s >= length), fitting[-1])
        for start in range(0, length, size):
            yield Piece(start, min(size, length - start), size)

    @staticmethod
    def _chunk(tokens: list[int], piece: Piece, cache: Cache):
        part = _padded(tokens[piece.start : piece.start + piece.length], piece.size)
        return part, cache, jnp.array([piece.length], jnp.int32)

    def _check(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ValueError("an empty token sequence has nothing to continue")
        wrong = next((t for t in tokens if not 0 <= t < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} lies outside the vocabulary of {self.vocab_size}")


def _prompt_pieces(length: int) -> Iterator[Piece]:
    """Cuts a prompt into the compiled chunk shapes."""
    small, large = PREFILL_SIZES
    start = 0
    while start < length:
        left = length - start
        size = small if left <= small else large
        yield Piece(start, min(left, size), size)
        start += size


def _padded(tokens: Sequence[int], size: int) -> jax.Array:
    row = np.zeros((1, size), np.int32)
    row[0, : len(tokens)] = tokens
    return jnp.asarray(row)
