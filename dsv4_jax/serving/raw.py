"""Plain completions: a prompt as it is, and the text that follows it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from dsv4_jax.encoding import Segment, render_fim, render_raw
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.completion_schema import CompletionRequest, Prompt
from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.events import Content, Event, Finish
from dsv4_jax.serving.leader import Cancelled, Leader, started
from dsv4_jax.serving.model import Allowed, Token, TokenModel, TokenStream
from dsv4_jax.serving.plan import Planner, seed_of
from dsv4_jax.serving.stop import StopMatcher


@dataclass(frozen=True)
class RawPlan:
    """Everything one completion depends on.

    `echoed` is the prompt's text if it is part of the answer; `unseen` tokens at its start are
    not. `priority`, `min_tokens` and `allowed` are as in `PromptPlan`. Without `sampling` nothing
    is asked of the model.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams | None
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    keep_stop: bool
    tenant: str
    priority: int
    min_tokens: int
    allowed: Allowed | None
    echoed: str | None
    unseen: int

    def choice(self, index: int) -> "RawPlan":
        """The plan of answer `index` to this prompt."""
        if self.sampling is None or self.sampling.seed is None:
            return self
        seed = seed_of(self.sampling.seed, index)
        return replace(self, sampling=replace(self.sampling, seed=seed))


def raw_plan(planner: Planner, ask: CompletionRequest, prompt: Prompt, tenant: str) -> RawPlan:
    """Tokenises one of the prompts.

    Raises:
        ApiError: 400, it cannot be tokenised or does not fit.
    """
    tokenizer = planner.tokenizer
    if isinstance(prompt, str):
        add_bos = ask.add_bos is not False
        prompt_ids = planner.tokens(_segments(ask, prompt, add_bos), ask.max_tokens, "prompt")
        text = prompt
    else:
        if ask.suffix is not None:
            raise invalid("suffix", "needs a prompt of text")
        if any(token >= tokenizer.vocab_size for token in prompt):
            raise invalid("prompt", "holds ids that are not tokens of this model")
        add_bos = ask.add_bos is True
        prompt_ids = ((tokenizer.bos_id,) if add_bos else ()) + prompt
        text = tokenizer.decode(prompt)
    if not prompt_ids:
        raise invalid("prompt", "must hold at least one token")
    if ask.echo and ask.suffix is not None:
        raise invalid("echo", "cannot be combined with suffix")
    return RawPlan(
        prompt_ids,
        _sampling(planner, ask, len(prompt_ids)),
        ask.stop,
        ask.stop_ids,
        ask.keep_stop,
        f"{tenant}:{ask.user}",
        -ask.priority,
        ask.min_tokens,
        planner.masks.allowed(None, ask.ignore_eos, ask.min_tokens, ask.stop_ids),
        text if ask.echo else None,
        int(add_bos),
    )


def _segments(ask: CompletionRequest, prompt: str, add_bos: bool) -> list[Segment]:
    if ask.suffix is not None:
        return render_fim(prompt, ask.suffix)
    return render_raw(prompt, add_bos)


def _sampling(planner: Planner, ask: CompletionRequest, prompt: int) -> SamplingParams | None:
    wants_prompt = ask.echo and ask.logprobs is not None
    sampling = planner.sampling(ask.sampling, prompt, max(ask.max_tokens, 1), ask.logprobs)
    if wants_prompt:
        return replace(sampling, max_tokens=ask.max_tokens, prompt_logprobs=ask.logprobs)
    return sampling if ask.max_tokens else None


class RawTurn:
    """One completion in the making; iterate it once, on a thread of its own."""

    def __init__(
        self,
        plan: RawPlan,
        planner: Planner,
        model: TokenModel,
        is_cancelled: Callable[[], bool],
        *,
        request_id: str | None = None,
        leads: Leader | None = None,
        follows: Leader | None = None,
    ) -> None:
        self.plan = plan
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.cached_tokens: int | None = None
        self.guards: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self._eos = planner.tokenizer.eos_id
        self._controls = planner.tokenizer.control_ids
        self._decoder = planner.tokenizer.incremental_decoder(skip_control=True)
        self._stop = StopMatcher(plan.stop, plan.keep_stop)
        self._pending: list[Token] = []
        self._model = model
        self._is_cancelled = is_cancelled
        self._request_id = request_id
        self._leads, self._follows = leads, follows
        self._stream: TokenStream | None = None

    @property
    def prompt_done(self) -> int:
        """Tokens of the prompt that are computed so far; from any thread."""
        return 0 if self._stream is None else self._stream.prompt_done

    def close(self) -> None:
        """Ends the work; from any thread, once `is_cancelled` says so."""
        if self._stream is not None:
            self._stream.close()

    def __iter__(self) -> Iterator[Event | Finish]:
        if self.plan.sampling is None:
            yield Content(self.plan.echoed or "")
            yield Finish("length", 0, 0)
            return
        has_ended = False
        with closing(self._started(self.plan.sampling)) as stream:
            self._stream = stream
            if self._is_cancelled():  # before `close` could know of the stream
                raise Cancelled
            is_first = True
            for token in self._tokens(stream):
                if is_first:
                    yield from self._echo(stream)
                    is_first = False
                self.completion_tokens += 1
                has_ended = token.id == self._eos or token.id in self.plan.stop_ids
                if not has_ended:
                    yield from self._text(token)
                if has_ended or self._stop.is_hit:
                    break
            if is_first:
                yield from self._echo(stream)
        if not self._stop.is_hit:
            yield from self._passed(self._stop.push(self._decoder.flush()) + self._stop.flush())
        is_cut = not (has_ended or self._stop.is_hit)
        counts = (self.completion_tokens, 0, self.cached_tokens or 0)
        yield Finish("length" if is_cut else "stop", *counts, self._stop.hit)

    def _started(self, sampling: SamplingParams) -> TokenStream:
        plan, follows = self.plan, self._follows
        return started(
            self._leads,
            lambda: self._model.stream(
                list(plan.prompt_ids),
                sampling,
                frozenset({self._eos}) | plan.stop_ids,
                tenant=plan.tenant,
                request_id=self._request_id,
                after=follows.wait(self._is_cancelled) if follows else None,
                allowed=plan.allowed,
                priority=plan.priority,
            ),
        )

    def _tokens(self, stream: TokenStream) -> Iterator[Token]:
        try:
            for token in stream:
                if self._is_cancelled():
                    raise Cancelled
                self.cached_tokens = stream.cached_tokens
                yield token
        except Exception:
            if self._is_cancelled():
                raise Cancelled from None
            raise
        if self._is_cancelled():  # a closed stream just ends
            raise Cancelled

    def _echo(self, stream: TokenStream) -> Iterator[Event]:
        if self.plan.echoed is not None:
            known = stream.prompt_logprobs or ()
            tokens = [
                Token(self.plan.prompt_ids[index]) if token is None else token
                for index, token in enumerate(known)
            ]
            yield Content(self.plan.echoed, tuple(tokens[self.plan.unseen :]))

    def _text(self, token: Token) -> Iterator[Event]:
        if token.logprob is not None and token.id not in self._controls:
            self._pending.append(token)
        text = self._decoder.push(token.id)
        is_early = self.completion_tokens <= self.plan.min_tokens
        yield from self._passed(text if is_early else self._stop.push(text))

    def _passed(self, text: str) -> Iterator[Event]:
        if text:
            tokens = tuple(self._pending)
            self._pending.clear()
            yield Content(text, tokens)
