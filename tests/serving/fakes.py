"""A model that says what a test tells it to, and a server around it."""

import re
import threading
from collections.abc import Generator, Sequence
from functools import cache

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.metrics import Metrics
from dsv4_jax.serving.model import Token
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.service import Service, Settings
from dsv4_jax.tokenizer import Tokenizer

MODEL = "fake"
MAX_LEN = 4096
PATIENCE_S = 60  # a limit for what must happen soon; tests never wait this long when they pass


@cache
def tokenizer() -> Tokenizer:
    """One token per byte, so texts and token counts are easy to compare."""
    return Tokenizer(build_byte_tokenizer().to_str())


def ids(completion: str) -> list[int]:
    """Returns the ids of a completion, control tokens included."""
    return tokenizer().encode_text(completion, "control")


def prompt_text(prompt_ids: Sequence[int]) -> str:
    return tokenizer().decode(prompt_ids)


class FakeModel:
    """Streams the completions in `says`, one per call, the last one again and again.

    With a gate, every token waits until the test lets it through.
    """

    def __init__(self, *says: str, gate: threading.Semaphore | None = None) -> None:
        self.max_len = MAX_LEN
        self.failure = None
        self.metrics = Metrics()
        self.says = list(says)
        self.gate = gate
        self.prompts: list[list[int]] = []
        self.sampling: list[SamplingParams] = []
        self.streamed = 0
        self.started = threading.Event()
        self.closed = threading.Event()
        self.fails_after: int | None = None

    def stream(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, stop_ids: frozenset[int]
    ) -> Generator[Token]:
        self.prompts.append(list(prompt_ids))
        self.sampling.append(sampling)
        says = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        return self._tokens(ids(says)[: sampling.max_tokens], stop_ids)

    def _tokens(self, tokens: list[int], stop_ids: frozenset[int]) -> Generator[Token]:
        self.started.set()
        try:
            for index, token in enumerate(tokens):
                if self.gate is not None:
                    assert self.gate.acquire(timeout=PATIENCE_S)
                if index == self.fails_after:
                    raise RuntimeError("the model broke")
                self.streamed += 1
                yield Token(token)
                if token in stop_ids:
                    return
        finally:
            self.closed.set()


def answer(content: str, reasoning: str = "hm") -> str:
    """Returns what a model says in thinking mode."""
    return f"{reasoning}{C.THINK_END}{content}{C.EOS}"


def chat_answer(content: str) -> str:
    return content + C.EOS


def make_service(model: FakeModel, **settings) -> Service:
    service = Service(Settings((MODEL, "alias"), **settings))
    service.ready(Planner(tokenizer(), "official", model.max_len), model, "fp_fake")
    return service


def controls_in(text: str) -> list[str]:
    return re.findall("|".join(map(re.escape, C.CONTROL_TOKENS)), text)
