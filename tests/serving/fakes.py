"""A model that says what a test tells it to, and a server around it."""

import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.metrics import Metrics
from dsv4_jax.serving.model import Allowed, Token, TokenGuide, TokenStream
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.service import Service, Settings
from dsv4_jax.tokenizer import Tokenizer

MODEL = "fake"
MAX_LEN = 4096
PATIENCE_S = 60  # a limit for what must happen soon; tests never wait this long when they pass
Say = str | Callable[[Sequence[int]], str]


@cache
def tokenizer() -> Tokenizer:
    """One token per byte, so texts and token counts are easy to compare."""
    return Tokenizer(build_byte_tokenizer().to_str())


def ids(completion: str) -> list[int]:
    """Returns the ids of a completion, control tokens included."""
    return tokenizer().encode_text(completion, "control")


def prompt_text(prompt_ids: Sequence[int]) -> str:
    return tokenizer().decode(prompt_ids)


def allowed(guide: TokenGuide) -> list[int] | None:
    """Returns the ids a guide lets pass, None if all."""
    words_W = np.zeros((tokenizer().vocab_size + 31) // 32 + 1, np.uint32)
    if not guide.fill(words_W):
        return None
    return np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist()


def logprob(token: int) -> float:
    """The logprob that every token has wherever it stands."""
    return -(token % 7) / 4


# What a model says that wants to be done.
_OPEN, _SLASH, _DSML = ids(f"</{C.DSML}")
_CLOSERS = set(ids('</"}]'))


def ending(may: list[int], before: int, rng: random.Random) -> int:
    """One of the allowed ids, as a model chooses that wants to be done."""
    if tokenizer().eos_id in may:
        return tokenizer().eos_id
    if before == _OPEN and _SLASH in may:
        return _SLASH
    if _DSML in may:
        return _DSML
    liked = sorted(_CLOSERS.intersection(may)) if rng.random() < 0.8 else may
    return rng.choice(liked or may)


class FakeStream:
    """Tokens of one request, as a test wants them."""

    def __init__(self, model: "FakeModel", tokens: list[int], given: dict[str, Any]) -> None:
        self.given = given
        self.tokens = tokens
        self.cached_tokens = 0
        self.prompt_done = 3
        self.prompt_logprobs: Sequence[Token | None] | None = None
        self._model = model
        self._closed = threading.Event()
        self._draws = self._drawn(tokens)

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._draws)

    def close(self) -> None:
        self._closed.set()
        self._model.closed.set()

    def _drawn(self, tokens: list[int]) -> Iterator[Token]:
        model, sampling = self._model, self.given["sampling"]
        model.started.set()
        self.cached_tokens = model.cached_tokens
        if sampling.prompt_logprobs is not None:
            prompt = self.given["prompt_ids"]
            top = sampling.prompt_logprobs
            self.prompt_logprobs = [None, *(self._token(token, top) for token in prompt[1:])]
        for index, token in enumerate(self._guided(tokens)):
            if not self._may_go_on():
                return
            if index == model.fails_after:
                raise RuntimeError("the model broke")
            model.streamed += 1
            yield self._token(token, sampling.logprobs)
            if token in self.given["stop_ids"]:
                return

    def _may_go_on(self) -> bool:
        """Waits at the gate; False if the stream was closed meanwhile."""
        if self._model.gate is None:
            return True
        for _ in range(PATIENCE_S * 100):
            if self._model.gate.acquire(timeout=0.01):
                return True
            if self._closed.is_set():
                return False
        raise AssertionError("the gate did not open")

    def _guided(self, tokens: list[int]) -> Iterator[int]:
        """What the model wants to say as far as the guide lets it, then what the guide allows."""
        guide: TokenGuide | None = self.given["guide"]
        if guide is None:
            yield from tokens[: self.given["sampling"].max_tokens]
            return
        rng, wanted, token = random.Random(0), iter(tokens), -1
        for _ in range(self.given["sampling"].max_tokens):
            may, before = allowed(guide), token
            token = next(wanted, -1)
            if may is not None and token not in may:
                wanted = iter(())
                assert may, "the guide allows nothing"
                token = ending(may, before, rng)
            yield token
            if token in self.given["stop_ids"]:
                return
            guide.advance(token)

    def _token(self, token: int, top: int | None) -> Token:
        if top is None:
            return Token(token)
        best = sorted(range(top), key=lambda index: -logprob(index))
        return Token(token, logprob(token), tuple((index, logprob(index)) for index in best))


class FakeModel:
    """Streams the completions in `says`, one per call, the last one again and again.

    A completion may be a function of the prompt; asked to go on behind what it has said, the model
    does. With a gate, every token waits until the test
    lets it through. With a guide the model says what it wants to as far as it may.
    """

    def __init__(self, *says: Say, gate: threading.Semaphore | None = None) -> None:
        self.max_len = MAX_LEN
        self.failure: BaseException | None = None
        self.metrics = Metrics()
        self.says = list(says)
        self.gate = gate
        self.prompts: list[list[int]] = []
        self.sampling: list[SamplingParams] = []
        self.streams: list[FakeStream] = []
        self.streamed = 0
        self.cached_tokens = 0
        self.started = threading.Event()
        self.closed = threading.Event()
        self.fails_after: int | None = None
        self.busy_s = 0.0
        self.flushed = 0
        self._lock = threading.Lock()

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stop_ids: frozenset[int],
        *,
        tenant: str = "",
        request_id: str | None = None,
        guide: TokenGuide | None = None,
        after: TokenStream | None = None,
        keep_output: bool = False,
        checkpoints: Sequence[int] = (),
        allowed: Allowed | None = None,
        priority: int = 0,
        continues: bool = False,
    ) -> FakeStream:
        given = {k: v for k, v in locals().items() if k != "self"}
        given["prompt_ids"] = list(prompt_ids)
        with self._lock:
            self.prompts.append(list(prompt_ids))
            self.sampling.append(sampling)
            stream = FakeStream(self, self._tokens(list(prompt_ids)), given)
            self.streams.append(stream)
        return stream

    def flush_cache(self) -> int:
        self.flushed += 1
        return 128

    def _tokens(self, prompt: list[int]) -> list[int]:
        """What it wants to say: the rest of what it has begun, if that is in the prompt."""
        for stream in reversed(self.streams):
            said = len(stream.given["prompt_ids"])
            begun = prompt[said:]
            if begun and prompt[:said] == stream.given["prompt_ids"]:
                if stream.tokens[: len(begun)] == begun:
                    return stream.tokens[len(begun) :]
        says = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        return ids(says if isinstance(says, str) else says(prompt))


def counted(exposition: str, name: str, **labels: str) -> float:
    """The sum of the samples of a name whose labels include these."""
    families = text_string_to_metric_families(exposition)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def answer(content: str, reasoning: str = "hm") -> str:
    """Returns what a model says in thinking mode."""
    return f"{reasoning}{C.THINK_END}{content}{C.EOS}"


def chat_answer(content: str) -> str:
    return content + C.EOS


def make_service(model: FakeModel, **settings: Any) -> Service:
    service = Service(Settings((MODEL, "alias"), **settings))
    service.ready(Planner(tokenizer(), "official", model.max_len), model, "fp_fake")
    return service


def controls_in(text: str) -> list[str]:
    return re.findall("|".join(map(re.escape, C.CONTROL_TOKENS)), text)
