"""Compiling grammars for one tokenizer, and remembering them."""

import re
import threading
from collections import OrderedDict
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.grammar.guide import GrammarError, GrammarGuide
from dsv4_jax.tokenizer import Tokenizer

MAX_CHARS = 1 << 19  # of one grammar, schemas included: about a second of work
KEPT = 64  # compiled grammars
_UNKNOWN_KEYS = re.compile(r"Unimplemented keys: \[(?P<keys>.*)\]")


class Grammar:
    """A compiled grammar; every answer gets its own guide."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def guide(self) -> GrammarGuide:
        return GrammarGuide(self._matcher.deep_copy(), self._vocab_size)


class GrammarCompiler:
    """Compiles Lark rules; safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()

    def control(self, token: str) -> str:
        """How rules spell a control token."""
        return f"<[{self._tokenizer.control_id(token)}]>"

    def compile(self, rules: str, param: str) -> Grammar:
        """Returns the grammar of `rules`; `param` is the request's field they come from.

        Raises:
            ApiError: 400 `invalid_schema`, saying what is not supported.
        """
        with self._lock:
            if rules in self._kept:
                self._kept.move_to_end(rules)
                return self._kept[rules]
        grammar = self._compiled(rules, param)
        with self._lock:
            self._kept[rules] = grammar
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _compiled(self, rules: str, param: str) -> Grammar:
        if len(rules) > MAX_CHARS:
            problem = f"is too large: {len(rules)} characters of grammar, limit {MAX_CHARS}"
            raise invalid(param, problem, "invalid_schema")
        source = LLMatcher.grammar_from_lark(rules)
        matcher = LLMatcher(self._vocabulary, source, log_level=0)  # lets other threads run
        problem = matcher.get_error()
        if not problem:
            grammar = Grammar(matcher, self._tokenizer.vocab_size)
            problem = _dead_end(grammar, self._tokenizer.vocab_size)
            if not problem:
                return grammar
        raise invalid(param, _readable(problem), "invalid_schema")

    def prepare(self) -> None:
        """Reads the vocabulary, which takes a second; later calls do nothing."""
        with self._vocabulary_lock:
            assert self._vocabulary is not None

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._tokenizer)),
            n_vocab=self._tokenizer.vocab_size,
            eos_token=self._tokenizer.eos_id,
        )


class _Vocabulary:
    """What the library asks of a tokenizer. Control tokens are never spelled by text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode_text(text)


def _dead_end(grammar: Grammar, vocab_size: int) -> str:
    """Returns why no answer can begin, or nothing."""
    words_W = np.zeros((vocab_size + 31) // 32, np.uint32)
    try:
        grammar.guide().fill(words_W)
    except GrammarError as error:
        return str(error)
    return "" if words_W.any() else "nothing can satisfy it"


def _readable(problem: str) -> str:
    if found := _UNKNOWN_KEYS.search(problem):
        return f"uses keywords that are not supported: {found['keys'].replace(chr(34), '')}"
    return f"is not supported: {problem[:300]}"
