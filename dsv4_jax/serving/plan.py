"""One request, resolved once: what is rendered, sampled and parsed follows from one object.

Whether thinking is on is decided here and nowhere else, so prompt and parser cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
from dsv4_jax.serving.errors import ApiError, context_too_long
from dsv4_jax.serving.parser import CompletionParser, ControlIds
from dsv4_jax.serving.schema import ChatRequest
from dsv4_jax.tokenizer import Tokenizer, TokenizerError

MAX_ANSWER_TOKENS = 393_216
# Names of the public API that choose a mode; they answer beside the served names.
MODE_OF_NAME = {"deepseek-chat": False, "deepseek-reasoner": True}


@dataclass(frozen=True)
class PromptPlan:
    """Everything an answer depends on.

    `effort` is the encoder's name for it; `stop` applies to content; `thinking_budget` is the
    number of reasoning tokens after which reasoning is closed; `warning` is for the client.
    """

    prompt_ids: tuple[int, ...]
    thinking: bool
    effort: str | None
    starts_in_reasoning: bool
    has_tools: bool
    tool_names: frozenset[str]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    thinking_budget: int | None
    warning: str | None


class Planner:
    """Makes plans for one model: its tokenizer, prompt profile and context limit in tokens."""

    def __init__(
        self, tokenizer: Tokenizer, profile: Profile, max_len: int, default_effort: str = "high"
    ) -> None:
        self.tokenizer = tokenizer
        self.profile: Profile = profile
        self.max_len = max_len
        self.default_effort = default_effort
        self._longest_token = max(
            len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)
        )
        self.controls = ControlIds(
            think_end=tokenizer.control_id(C.THINK_END),
            dsml=tokenizer.control_id(C.DSML),
            eos=tokenizer.eos_id,
            all=tokenizer.control_ids,
        )

    def plan(self, request: ChatRequest) -> PromptPlan:
        """Renders and tokenises; takes seconds for a very long prompt.

        Raises:
            ApiError: 400, the conversation cannot be rendered or does not fit.
        """
        thinking = self._is_thinking(request)
        try:
            effort = self._effort(request) if thinking else None
            messages = normalize_messages(
                request.messages,
                tools=request.tools or None,
                show_tools=request.tool_choice != "none",
                continue_final_message=request.continue_final_message,
            )
            segments = render_segments(
                messages,
                "thinking" if thinking else "chat",
                drop_thinking=request.drop_thinking is not False,
                reasoning_effort=effort,
                profile=self.profile,
            )
            self._refuse_hopeless(segments, request.max_tokens)
            prompt_ids = tuple(self.tokenizer.encode_segments(segments))
        except EncodingError as error:
            raise ApiError(400, error.code, str(error), error.where) from None
        except TokenizerError as error:
            raise ApiError(400, "invalid_value", str(error), "messages") from None
        tools = [tool for turn in messages for tool in turn.get("tools", ())]
        return PromptPlan(
            prompt_ids=prompt_ids,
            thinking=thinking,
            effort=effort,
            starts_in_reasoning=starts_in_reasoning(segments),
            has_tools=bool(tools),
            tool_names=frozenset(tool["function"]["name"] for tool in tools),
            max_tokens=self._answer_tokens(len(prompt_ids), request.max_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            stop=request.stop,
            thinking_budget=request.thinking_budget,
            warning=self._warning(effort),
        )

    def parser(self, plan: PromptPlan) -> CompletionParser:
        return CompletionParser(
            self.controls,
            reasoning=plan.starts_in_reasoning,
            tools=plan.has_tools,
            known_tools=plan.tool_names,
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
        default = self.default_effort != "none"
        return next((choice for choice in choices if choice is not None), default)

    def _effort(self, request: ChatRequest) -> str | None:
        asked = [e for e in (request.effort, request.template_effort) if e not in (None, "none")]
        return resolve_effort(asked[0] if asked else None, self.profile, self.default_effort)

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
