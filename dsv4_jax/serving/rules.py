"""Choices of whoever runs the server that change what is asked of the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4_jax.serving.constraints import ToolGrammarMode
from dsv4_jax.tokenizer import TextPolicy


@dataclass(frozen=True)
class Rules:
    """How requests become prompts and how their answers are drawn.

    Args:
        default_effort: Where a request names none; "none" is without thinking.
        loop_guard: Closes reasoning that goes in circles.
        frees_controls: Lets chats draw control tokens that have no place in an answer.
        official_sampling: While thinking, temperature, top_p, top_k and min_p of requests have no
            effect, as on the public API.
        requires_reasoning: Refuses earlier tool calls that come without their reasoning.
        internal_roles: Renders `developer` as the published encoder does, admits `latest_reminder`.
        tool_grammar: What tool calls are held to once they have begun: "structure", their names,
            parameters and types; "strict", all of their schemas if those can be followed; "off",
            nothing, unless a request says `strict` itself or a form must hold.
        recovers_lookalikes: Takes tool markup in answers for calls though its marker is spelled out
            as text, with bars of either kind. Grammars do not hold such calls to anything.
        sampling: Sampling fields where a request names none; see `generation`.
        special_tokens_in_text: What the spelling of a control token in a client's text means.
    """

    default_effort: str = "high"
    loop_guard: bool = False
    frees_controls: bool = False
    official_sampling: bool = False
    requires_reasoning: bool = False
    internal_roles: bool = False
    tool_grammar: ToolGrammarMode = "structure"
    recovers_lookalikes: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_in_text: TextPolicy = "text"
