"""Producing one answer: tokens from the model, through parser and stop strings, to events."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace

from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.events import Content, Event, Finish, ToolStart
from dsv4_jax.serving.model import TokenModel
from dsv4_jax.serving.parser import State
from dsv4_jax.serving.plan import Planner, PromptPlan
from dsv4_jax.serving.stop import StopMatcher


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Turn:
    """One answer in the making; iterate it once, on the thread that owns the model.

    An end token inside open reasoning, or a spent thinking budget, becomes the end of reasoning,
    so an answer always follows.
    """

    def __init__(
        self,
        plan: PromptPlan,
        planner: Planner,
        model: TokenModel,
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.plan = plan
        self.reasoning_tokens = 0
        self.completion_tokens = 0
        self.has_calls = False
        self._controls = planner.controls
        self._token_bytes = planner.tokenizer.token_bytes
        self._parser = planner.parser(plan)
        self._stop = StopMatcher(plan.stop)
        self._model = model
        self._is_cancelled = is_cancelled

    @property
    def repairs(self) -> Counter[str]:
        """How often the parser had to repair what, by kind."""
        return self._parser.counts

    def __iter__(self) -> Iterator[Event | Finish]:
        has_ended = False
        with closing(self._tokens()) as tokens:
            for token in tokens:
                has_ended = token == self._controls.eos
                if not has_ended:
                    data = self._token_bytes(token)
                    yield from self._checked(self._parser.feed(token, data))
                if has_ended or self._stop.is_hit:
                    break
        is_cut = not (has_ended or self._stop.is_hit)
        yield from self._checked(self._parser.finish(is_cut))
        if rest := self._stop.flush():
            yield Content(rest)
        yield Finish(self._reason(is_cut), self.completion_tokens, self.reasoning_tokens)

    def _reason(self, is_cut: bool) -> str:
        if is_cut:
            return "length"
        return "tool_calls" if self.has_calls else "stop"

    def _tokens(self) -> Generator[int]:
        """Yields the tokens of the completion, the end token included."""
        done: list[int] = []
        while True:
            is_forced = False
            with closing(self._sampled(done)) as sampled:
                for token in sampled:
                    self.completion_tokens += 1
                    is_reasoning = self._parser.state is State.REASONING
                    is_forced = is_reasoning and self._must_close_reasoning(token)
                    done.append(self._controls.think_end if is_forced else token)
                    self.reasoning_tokens += is_reasoning
                    yield done[-1]
                    if is_forced:
                        break
            if not is_forced or len(done) >= self.plan.max_tokens:
                return

    def _sampled(self, done: list[int]) -> Generator[int]:
        """Yields tokens as the model continues the prompt and what is done of the answer."""
        plan = self.plan
        sampling = SamplingParams(
            max_tokens=plan.max_tokens - len(done),
            temperature=plan.temperature,
            top_p=plan.top_p,
            top_k=plan.top_k,
            seed=plan.seed,
        )
        stop_ids = frozenset({self._controls.eos})
        with closing(self._model.stream([*plan.prompt_ids, *done], sampling, stop_ids)) as stream:
            for token in stream:
                if self._is_cancelled():
                    raise Cancelled
                yield token.id

    def _must_close_reasoning(self, token: int) -> bool:
        if token == self._controls.eos:
            self.repairs["closed_reasoning"] += 1
            return True
        budget = self.plan.thinking_budget
        return budget is not None and self.reasoning_tokens >= budget

    def _checked(self, events: list[Event]) -> Iterator[Event]:
        """Passes events on up to a stop string in the content."""
        for event in events:
            if self._stop.is_hit:
                return
            if isinstance(event, Content):
                event = replace(event, text=self._stop.push(event.text))
                if not event.text:
                    continue
            elif isinstance(event, ToolStart):
                self.has_calls = True
                if held := self._stop.flush():
                    yield Content(held)
            yield event
