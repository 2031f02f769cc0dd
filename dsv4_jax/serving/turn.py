"""Producing one answer: tokens from the model, through parser and stop strings, to events."""

from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace

from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.events import Content, Event, Finish, Reasoning, ToolStart
from dsv4_jax.serving.grammar.guide import GrammarGuide
from dsv4_jax.serving.leader import Cancelled, Leader, started
from dsv4_jax.serving.loops import LoopGuard
from dsv4_jax.serving.model import Allowed, Token, TokenModel, TokenStream
from dsv4_jax.serving.parser import State
from dsv4_jax.serving.plan import Planner, PromptPlan
from dsv4_jax.serving.replay import ReplayStore, Said
from dsv4_jax.serving.reply import message_of
from dsv4_jax.serving.stop import StopMatcher

MAX_STRAY_MARKERS = 8  # each one interrupts the model; later ones are left to the parser


class Turn:
    """One answer in the making; iterate it once, on a thread of its own.

    An end token inside open reasoning, a spent thinking budget, or reasoning that goes in circles
    becomes the end of reasoning, so an answer always follows. Where a grammar begins to hold, the
    model goes on behind what it has said with a guide.

    Args:
        is_cancelled: whether nobody waits any more.
        request_id: the engine's name for the request.
        leads, follows: the answer others follow; the one this follows.
        replay: remembers the answer if it calls tools.
    """

    def __init__(
        self,
        plan: PromptPlan,
        planner: Planner,
        model: TokenModel,
        is_cancelled: Callable[[], bool],
        *,
        request_id: str | None = None,
        leads: Leader | None = None,
        follows: Leader | None = None,
        replay: ReplayStore | None = None,
    ) -> None:
        self.plan = plan
        self.tokens: list[int] = []  # the completion, forced tokens in place of what they replaced
        self.reasoning_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens: int | None = None
        self.has_calls = False
        self.guards: Counter[str] = Counter()
        self._controls = planner.controls
        self._token_bytes = planner.tokenizer.token_bytes
        self._parser = planner.parser(plan)
        self._stop = StopMatcher(plan.stop, plan.keep_stop)
        self._reasoning_stop = StopMatcher(
            plan.stop if plan.stop_in_reasoning else (), plan.keep_stop
        )
        self._pending: list[Token] = []  # whose text is held back
        self._loops = LoopGuard() if plan.loop_guard else None
        self._model = model
        self._is_cancelled = is_cancelled
        self._request_id = request_id
        self._leads, self._follows = leads, follows
        self._replay = replay if plan.has_tools else None
        self._stream: TokenStream | None = None

    @property
    def repairs(self) -> Counter[str]:
        """How often the parser had to repair what, by kind."""
        return self._parser.counts

    @property
    def _is_stopped(self) -> bool:
        return self._stop.is_hit or self._reasoning_stop.is_hit

    @property
    def _is_early(self) -> bool:
        """Whether stop strings do not count yet."""
        return len(self.tokens) <= self.plan.min_tokens

    def __iter__(self) -> Iterator[Event | Finish]:
        told: list[Event] = []
        for item in self._items():
            if isinstance(item, Finish):
                self._remember(told)
            elif self._replay is not None:
                told.append(item)
            yield item

    def _remember(self, told: list[Event]) -> None:
        """Keeps an answer that calls tools and came to its own end."""
        calls = [event for event in told if isinstance(event, ToolStart)]
        begins = self.plan.prompt_ids[-1] in self._controls.all
        if self._replay is None or not (calls and begins) or self.tokens[-1] != self._controls.eos:
            return
        message = message_of(told)
        functions = [call["function"] for call in message["tool_calls"]]
        said = Said(
            array("i", self.tokens),
            self.plan.starts_in_reasoning,
            message.get("reasoning", ""),
            message["content"] or "",
            tuple((function["name"], function["arguments"]) for function in functions),
        )
        self._replay.keep(self.plan.tenant, [call.call_id for call in calls], said)

    def _items(self) -> Iterator[Event | Finish]:
        has_ended = False
        with closing(self._tokens()) as tokens:
            for token in tokens:
                has_ended = token.id == self._controls.eos or token.id in self.plan.stop_ids
                if not has_ended:
                    yield from self._events(token)
                if has_ended or self._is_stopped:
                    break
        is_cut = not (has_ended or self._is_stopped)
        yield from self._checked(self._parser.finish(is_cut))
        yield from self._released()
        yield self._finish(is_cut)

    def _finish(self, is_cut: bool) -> Finish:
        reason = "length" if is_cut else "tool_calls" if self.has_calls else "stop"
        stop = self._stop.hit or self._reasoning_stop.hit
        counts = (self.completion_tokens, self.reasoning_tokens, self.cached_tokens or 0)
        return Finish(reason, *counts, stop)

    @property
    def prompt_done(self) -> int:
        """Tokens of the prompt that are computed so far; from any thread."""
        return 0 if self._stream is None else self._stream.prompt_done

    def close(self) -> None:
        """Ends the work; from any thread, once `is_cancelled` says so."""
        if self._stream is not None:
            self._stream.close()

    # Tokens

    def _tokens(self) -> Generator[Token]:
        """Yields the tokens of the completion, the end token included."""
        guide = None if self._parser.state is State.REASONING else self._content_guide()
        while True:
            must_close = False
            switches = frozenset() if guide else self._switches()
            with closing(self._sampled(guide, switches)) as sampled:
                for token in sampled:
                    self.completion_tokens += 1
                    is_reasoning = self._parser.state is State.REASONING
                    must_close = is_reasoning and self._must_close_reasoning(token.id)
                    token = Token(self._controls.think_end) if must_close else token
                    self.tokens.append(token.id)
                    self.reasoning_tokens += is_reasoning
                    yield token
                    if must_close:
                        break
            last = self.tokens[-1] if self.tokens else None
            if len(self.tokens) >= self.plan.max_tokens or not (must_close or last in switches):
                return
            guide = self._next_guide(last)

    def _switches(self) -> frozenset[int]:
        """Tokens behind which a grammar may begin to hold."""
        constraints, controls = self.plan.constraints, self._controls
        switches = set()
        if constraints.content is not None and self._parser.state is State.REASONING:
            switches.add(controls.think_end)
        if constraints.calls is not None and self.guards["stray_marker"] < MAX_STRAY_MARKERS:
            switches.add(controls.dsml)
        return frozenset(switches)

    def _next_guide(self, last: int | None) -> GrammarGuide | None:
        """Returns the guide behind token `last`, which the parser has seen."""
        if last == self._controls.think_end:
            return self._content_guide()
        if self._parser.is_in_tag and self.plan.constraints.calls is not None:
            self.guards["tool_grammar"] += 1
            return self.plan.constraints.calls.guide()
        self.guards["stray_marker"] += 1
        return None

    def _content_guide(self) -> GrammarGuide | None:
        grammar = self.plan.constraints.content
        return None if grammar is None else grammar.guide()

    def _sampled(self, guide: GrammarGuide | None, switches: frozenset[int]) -> Generator[Token]:
        """Yields tokens as the model continues the prompt and what is done of the answer."""
        with closing(self._started(guide, switches)) as stream:
            self._stream = stream
            if self._is_cancelled():  # before `close` could know of the stream
                raise Cancelled
            try:
                for token in stream:
                    if self.cached_tokens is None:
                        self.cached_tokens = stream.cached_tokens
                    if self._is_cancelled():
                        raise Cancelled
                    yield token
            except Exception:
                if self._is_cancelled():
                    raise Cancelled from None
                if guide is not None and guide.failure is not None:
                    problem = f"the grammar of this request cannot be followed: {guide.failure}"
                    raise invalid(None, problem, "invalid_schema") from None
                raise
            if self._is_cancelled():  # a closed stream just ends
                raise Cancelled

    def _started(self, guide: GrammarGuide | None, switches: frozenset[int]) -> TokenStream:
        """Asks the model to continue; its answer is the leader's where there is one."""
        plan, name, done = self.plan, self._request_id, len(self.tokens)
        follows = None if done else self._follows
        return started(
            self._leads,
            lambda: self._model.stream(
                [*plan.prompt_ids, *self.tokens],
                replace(plan.sampling, max_tokens=plan.max_tokens - done),
                frozenset({self._controls.eos}) | plan.stop_ids | switches,
                tenant=plan.tenant,
                request_id=f"{name}+{done}" if name and done else name,
                guide=guide,
                after=follows.wait(self._is_cancelled) if follows else None,
                keep_output=plan.has_tools or bool(switches),
                checkpoints=plan.checkpoints,
                allowed=self._allowed(done),
                priority=plan.priority,
                continues=done > 0,
            ),
        )

    def _allowed(self, done: int) -> Allowed | None:
        """What may be drawn behind the tokens that are done."""
        allowed = self.plan.allowed
        if allowed is None or not (done and allowed.early):
            return allowed
        return replace(allowed, early=max(allowed.early - done, 0))

    def _must_close_reasoning(self, token: int) -> bool:
        budget = self.plan.thinking_budget
        if token == self._controls.eos:
            kind = "closed_reasoning"
        elif token == self._controls.think_end:
            return False
        elif budget is not None and self.reasoning_tokens >= budget:
            kind = "thinking_budget"
        elif self._loops is not None and self._loops.push(token):
            kind = "reasoning_loop"
        else:
            return False
        self.guards[kind] += 1
        return True

    # Events

    def _events(self, token: Token) -> Iterator[Event]:
        if token.logprob is not None and token.id not in self._controls.all:
            self._pending.append(token)
        yield from self._checked(self._parser.feed(token.id, self._token_bytes(token.id)))
        if self._parser.state not in (State.REASONING, State.CONTENT):
            self._pending.clear()  # markup

    def _checked(self, events: list[Event]) -> Iterator[Event]:
        """Passes events on up to a stop string, each text with the tokens that end with it."""
        for event in events:
            if self._is_stopped:
                return
            if isinstance(event, Reasoning | Content) and self._is_early:
                yield from self._passed(type(event), event.text)
                continue
            if isinstance(event, Reasoning):
                yield from self._passed(Reasoning, self._reasoning_stop.push(event.text))
                continue
            if rest := self._reasoning_stop.flush():
                yield from self._passed(Reasoning, rest)
            if isinstance(event, Content):
                yield from self._passed(Content, self._stop.push(event.text))
                continue
            if isinstance(event, ToolStart):
                self.has_calls = True
                yield from self._passed(Content, self._stop.flush())
            yield event

    def _released(self) -> Iterator[Event]:
        """The beginnings of stop strings that did not come."""
        yield from self._passed(Reasoning, self._reasoning_stop.flush())
        yield from self._passed(Content, self._stop.flush())

    def _passed(self, kind: type[Reasoning] | type[Content], text: str) -> Iterator[Event]:
        if text:
            tokens = tuple(self._pending)
            self._pending.clear()
            yield kind(text, tokens)
