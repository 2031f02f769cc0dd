"""One request, resolved once: what is rendered, sampled and parsed follows from one object.

Whether thinking is on is decided here and nowhere else, so prompt and parser cannot disagree.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dsv4_jax.encoding import (
    EncodingError,
    Profile,
    Segment,
    normalize_messages,
    render_segments,
    resolve_effort,
    starts_in_reasoning,
)
from dsv4_jax.encoding import constants as C
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.constraints import Constrainer, Constraints
from dsv4_jax.serving.errors import ApiError, context_too_long, invalid
from dsv4_jax.serving.grammar import GrammarCompiler
from dsv4_jax.serving.masks import Masks
from dsv4_jax.serving.model import Allowed
from dsv4_jax.serving.parser import CompletionParser, ControlIds
from dsv4_jax.serving.replay import Find, ReplayStore, spliced
from dsv4_jax.serving.rules import Rules
from dsv4_jax.serving.schema import ChatRequest
from dsv4_jax.tokenizer import Tokenizer, TokenizerError

MAX_ANSWER_TOKENS = 393_216
TASK_TOKENS = 64  # of the answer to a quick instruction, unless asked otherwise
RULES = Rules()
_FIXED_WHILE_THINKING = ("temperature", "top_p", "top_k", "min_p")  # if sampling is official
# Names of the public API that choose a mode; they answer beside the served names.
MODE_OF_NAME = {"deepseek-chat": False, "deepseek-reasoner": True}


def _single(urls: tuple[str, ...]) -> str | None:
    """The URL of a prompt, which is about one."""
    if len(urls) > 1:
        raise invalid("extracted_urls", "takes one URL here: each makes a prompt of its own")
    return urls[0] if urls else None


def seed_of(seed: int, index: int) -> int:
    """The seed of answer `index`; the first one's is the request's own."""
    name = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(name[:8], "big", signed=True) if index else seed


@dataclass(frozen=True)
class PromptPlan:
    """Everything an answer depends on.

    `effort` is the encoder's name for it; `stop` applies to content, and to reasoning if
    `stop_in_reasoning`, both behind `min_tokens`; `thinking_budget` is the number of reasoning
    tokens after which reasoning is closed, as it is with `loop_guard` once the model repeats
    itself; `checkpoints` are positions of the prompt behind which other prompts may differ;
    `tenant` is who shares cached prompts, larger `priority` which of theirs start first; `allowed`
    are the tokens an answer may consist of; `restored` earlier answers stand in the prompt as the
    model said them; `warning` is for the client.
    """

    prompt_ids: tuple[int, ...]
    thinking: bool
    effort: str | None
    starts_in_reasoning: bool
    has_tools: bool
    tool_names: frozenset[str]
    sampling: SamplingParams
    n: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    stop_in_reasoning: bool
    keep_stop: bool
    constraints: Constraints
    thinking_budget: int | None
    loop_guard: bool
    checkpoints: tuple[int, ...]
    tenant: str
    priority: int
    min_tokens: int
    allowed: Allowed | None
    restored: int
    warning: str | None

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens

    def choice(self, index: int) -> "PromptPlan":
        """The plan of answer `index`: with a seed, every answer gets its own."""
        if self.sampling.seed is None:
            return self
        seed = seed_of(self.sampling.seed, index)
        return replace(self, sampling=replace(self.sampling, seed=seed))


@dataclass(frozen=True)
class Draft:
    """A rendered request; fields as in `PromptPlan`. `continues`: so does its last message."""

    request: ChatRequest
    prompt_ids: tuple[int, ...]
    thinking: bool
    effort: str | None
    starts_in_reasoning: bool
    tools: tuple[dict[str, Any], ...]
    continues: bool
    checkpoints: tuple[int, ...]
    tenant: str
    restored: int

    @property
    def needs_grammar(self) -> bool:
        asked = self.request
        return bool(self.tools or asked.reply_format) or asked.tool_choice.mode == "required"


class Planner:
    """Makes plans for one model: its tokenizer, prompt profile and context limit in tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        profile: Profile,
        max_len: int,
        rules: Rules = RULES,
    ) -> None:
        self.tokenizer = tokenizer
        self.profile: Profile = profile
        self.max_len = max_len
        self.rules = rules
        self._constrainer = Constrainer(GrammarCompiler(tokenizer), mode=rules.tool_grammar)
        self._longest_token = max(
            len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)
        )
        self._user_id = tokenizer.control_id(C.USER)
        self._assistant_id = tokenizer.control_id(C.ASSISTANT)
        self.controls = ControlIds(
            think_end=tokenizer.control_id(C.THINK_END),
            dsml=tokenizer.control_id(C.DSML),
            eos=tokenizer.eos_id,
            all=tokenizer.control_ids,
        )
        self.masks = Masks(self.controls, tokenizer.vocab_size, rules.frees_controls)

    def prepare(self) -> None:
        """Does once what grammars need, so that no request waits for it."""
        self._constrainer.prepare()

    def plan(
        self, request: ChatRequest, tenant: str = "", replay: ReplayStore | None = None
    ) -> PromptPlan:
        """Does all there is to do: see `draft` and `finished`."""
        return self.finished(self.draft(request, tenant, replay))

    def draft(
        self, request: ChatRequest, tenant: str = "", replay: ReplayStore | None = None
    ) -> Draft:
        """Renders and tokenises; takes seconds for a very long prompt.

        Args:
            tenant: who may use the cached prompt, beside the user the request names.
            replay: knows what the model said in earlier turns.

        Raises:
            ApiError: 400, the conversation cannot be rendered or does not fit.
        """
        thinking = self._is_thinking(request)
        effort = self._effort(request) if thinking else None
        tenant = f"{tenant}:{request.user}"
        find = partial((replay or ReplayStore(0)).find, tenant)
        messages, segments = self._rendered(request, thinking, effort, find)
        self._refuse_hopeless(segments, request.max_tokens)
        ids, restored = spliced(segments, messages, find, partial(self.encoded, "messages"))
        prompt_ids = tuple(ids)
        tools = [tool for turn in messages for tool in turn.get("tools", ())]
        if request.task is not None:  # its answer is a few plain words
            self._check_task(request)
            tools = []
        return Draft(
            request,
            prompt_ids,
            thinking,
            effort,
            starts_in_reasoning(segments),
            tuple(tools),
            bool(messages[-1].get("wo_eos")),
            self._checkpoints(prompt_ids),
            tenant,
            restored,
        )

    def finished(self, draft: Draft) -> PromptPlan:
        """Adds how to sample and which forms hold; grammars may take seconds.

        Raises:
            ApiError: 400, the answer does not fit, or a form cannot be followed.
        """
        request, tools = draft.request, draft.tools
        constraints = self._constraints(draft)
        asked = request.max_tokens or (TASK_TOKENS if request.task is not None else None)
        sampling = self._honoured(request, draft.thinking)
        prompt = len(draft.prompt_ids)
        return PromptPlan(
            prompt_ids=draft.prompt_ids,
            thinking=draft.thinking,
            effort=draft.effort,
            starts_in_reasoning=draft.starts_in_reasoning,
            has_tools=bool(tools),
            tool_names=frozenset(tool["function"]["name"] for tool in tools),
            sampling=self.sampling(sampling, prompt, asked, request.logprobs),
            n=request.n,
            stop=request.stop,
            stop_ids=request.stop_ids,
            stop_in_reasoning=request.stop_in_reasoning,
            keep_stop=request.keep_stop,
            constraints=constraints,
            thinking_budget=request.thinking_budget,
            loop_guard=self.rules.loop_guard,
            checkpoints=draft.checkpoints,
            tenant=draft.tenant,
            priority=-request.priority,
            min_tokens=request.min_tokens,
            allowed=self._allowed(request, bool(tools), constraints),
            restored=draft.restored,
            warning=self._warning(draft.effort),
        )

    def _checkpoints(self, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Where the first user speaks, and where the answer begins.

        What the system says is shared by chats; the answer may come back without its reasoning.
        """
        places = []
        if self._user_id in prompt_ids:
            places.append(prompt_ids.index(self._user_id))
        if self._assistant_id in prompt_ids:
            places.append(len(prompt_ids) - 1 - prompt_ids[::-1].index(self._assistant_id))
        return tuple(place for place in places if place)

    def _check_task(self, request: ChatRequest) -> None:
        given = {
            "response_format": request.reply_format is not None,
            "tool_choice": request.tool_choice.mode == "required",
        }
        for name, is_given in given.items():
            if is_given:
                raise invalid(name, "cannot be combined with a task")

    def _honoured(self, request: ChatRequest, thinking: bool) -> dict[str, Any]:
        """The sampling fields of a request that count."""
        if not (thinking and self.rules.official_sampling):
            return request.sampling
        return {k: v for k, v in request.sampling.items() if k not in _FIXED_WHILE_THINKING}

    def sampling(
        self, given: Mapping[str, Any], prompt: int, asked: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Returns how to sample behind `prompt` tokens, as many as asked for or as fit.

        Raises:
            ApiError: 400, they do not fit, or a field is out of range.
        """
        for index, _ in given.get("logit_bias", ()):
            if index >= self.tokenizer.vocab_size:
                raise invalid("logit_bias", f"{index} is not a token of this model")
        fields = {**self.rules.sampling, **given}
        return SamplingParams(
            max_tokens=self._answer_tokens(prompt, asked), logprobs=logprobs, **fields
        )

    def _rendered(
        self, request: ChatRequest, thinking: bool, effort: str | None, find: Find
    ) -> tuple[list[dict[str, Any]], list[Segment]]:
        reply = request.reply_format
        schema = {"type": "json_schema", "json_schema": {"schema": reply and reply.value}}
        try:
            messages = normalize_messages(
                request.messages,
                tools=request.tools or None,
                show_tools=request.tool_choice.mode != "none",
                response_format=schema if reply and reply.kind == "json_schema" else None,
                continue_final_message=request.continue_final_message,
                task=request.task,
                extracted_url=_single(request.extracted_urls),
                internal_roles=self.rules.internal_roles,
                require_reasoning=self.rules.requires_reasoning,
                restore_reasoning=lambda ids: said.reasoning if (said := find(ids)) else None,
            )
            segments = render_segments(
                messages,
                "thinking" if thinking else "chat",
                drop_thinking=request.drop_thinking is not False,
                reasoning_effort=effort,
                profile=self.profile,
            )
        except EncodingError as error:
            raise ApiError(400, error.code, str(error), error.where) from None
        return messages, segments

    def tokens(
        self, segments: Sequence[Segment], requested: int | None, param: str = "messages"
    ) -> tuple[int, ...]:
        """Tokenises a prompt unless it is far too long; `param` names it in errors.

        Raises:
            ApiError: 400.
        """
        self._refuse_hopeless(segments, requested)
        return tuple(self.encoded(param, segments))

    def encoded(self, param: str, segments: Sequence[Segment]) -> list[int]:
        """Tokenises segments; `param` names them in errors.

        Raises:
            ApiError: 400.
        """
        try:
            return self.tokenizer.encode_segments(segments, self.rules.special_tokens_in_text)
        except TokenizerError as error:
            raise ApiError(400, "invalid_value", str(error), param) from None

    def _constraints(self, draft: Draft) -> Constraints:
        """The tools are the request's own where it has some: those say which are strict."""
        request = draft.request
        constraints = self._constrainer.constraints(
            request.tools if draft.tools and request.tools else draft.tools,
            request.tool_choice,
            request.parallel_calls,
            request.reply_format,
        )
        if constraints.content is not None and draft.continues:
            param = "response_format" if request.reply_format else "tool_choice"
            raise invalid(param, "cannot be combined with a message that is continued")
        return constraints

    def _allowed(
        self, request: ChatRequest, has_tools: bool, constraints: Constraints
    ) -> Allowed | None:
        asked = {"ignore_eos": request.ignore_eos, "min_tokens": request.min_tokens}
        if constraints.content is not None or constraints.calls is not None:
            for name in (name for name, value in asked.items() if value):
                raise invalid(name, "cannot be combined with tools or a response_format")
        base = self.masks.chat(has_tools)
        return self.masks.allowed(base, **asked, stop_ids=request.stop_ids)

    def parser(self, plan: PromptPlan) -> CompletionParser:
        return CompletionParser(
            self.controls,
            reasoning=plan.starts_in_reasoning,
            tools=plan.has_tools,
            known_tools=plan.tool_names,
            spelled_markers=self.rules.recovers_lookalikes,
        )

    def _is_thinking(self, request: ChatRequest) -> bool:
        efforts = (request.effort, request.template_effort)
        choices = (
            request.thinking,
            False if request.effort == "none" else None,
            request.template_thinking,
            False if request.template_effort == "none" else None,
            MODE_OF_NAME.get(request.model or ""),
            True if any(efforts) else None,
        )
        default = self.rules.default_effort != "none"
        return next((choice for choice in choices if choice is not None), default)

    def _effort(self, request: ChatRequest) -> str | None:
        asked = [e for e in (request.effort, request.template_effort) if e not in (None, "none")]
        default = self.rules.default_effort
        try:
            return resolve_effort(asked[0] if asked else None, self.profile, default)
        except EncodingError as error:
            raise ApiError(400, error.code, str(error), error.where) from None

    def _refuse_hopeless(self, segments: Sequence[Segment], requested: int | None) -> None:
        """Refuses without tokenising what cannot fit even in the longest tokens there are."""
        at_least = sum(len(s.text.encode()) for s in segments) // self._longest_token
        if at_least >= self.max_len:
            raise context_too_long(self.max_len, at_least, requested, is_exact=False)

    def _answer_tokens(self, prompt: int, requested: int | None) -> int:
        left = self.max_len - prompt
        if left < 1 or (requested is not None and requested > left):
            raise context_too_long(self.max_len, prompt, requested)
        return requested or min(left, MAX_ANSWER_TOKENS)

    def _warning(self, effort: str | None) -> str | None:
        if effort != "max" or self.max_len >= MAX_ANSWER_TOKENS:
            return None
        return f"maximum effort is meant for {MAX_ANSWER_TOKENS} tokens; this server has " + str(
            self.max_len
        )
