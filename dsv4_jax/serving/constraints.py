"""Which grammars an answer must follow, decided once from the request."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.errors import ApiError, invalid
from dsv4_jax.serving.grammar import Grammar, GrammarCompiler, ToolGrammar, reply_rules
from dsv4_jax.serving.grammar.pool import Pool, TooSlow
from dsv4_jax.serving.tool_fields import ReplyFormat, ToolChoice

Tools = Sequence[Mapping[str, Any]]
ToolGrammarMode = Literal["off", "structure", "strict"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Constraints:
    """`content` holds from the first token of the content; `calls` from the first DSML token on."""

    content: Grammar | None = None
    calls: Grammar | None = None


class Constrainer:
    """Makes constraints for one tokenizer; safe to use from several threads.

    `mode` is `Rules.tool_grammar`.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        pool: Pool | None = None,
        mode: ToolGrammarMode = "structure",
    ) -> None:
        self._compiler = compiler
        self._mode: ToolGrammarMode = mode
        self._pool = pool or Pool()

    def prepare(self) -> None:
        """Does once what takes a second."""
        self._compiler.prepare()

    def constraints(
        self,
        tools: Tools,
        choice: ToolChoice,
        is_parallel: bool,
        reply: ReplyFormat | None,
    ) -> Constraints:
        """Waits until they are made, within the limit of the pool.

        Raises:
            ApiError: 400, a schema or a choice that cannot be followed.
        """
        is_off = self._mode == "off" and not _has_strict(tools)
        is_free = not tools or choice.mode == "none" or is_off
        if is_free and reply is None and choice.mode != "required":
            return Constraints()
        self._compiler.prepare()
        asked = tools, choice, is_parallel, reply
        try:
            return self._pool.run(lambda is_late: self._made(is_late, *asked))
        except TooSlow:
            problem = f"takes more than {self._pool.limit_s:g} s to prepare; simplify it"
            error = invalid("response_format" if reply else "tools", problem, "invalid_schema")
        if reply is not None or choice.mode == "required":
            raise error
        _let_pass(tools, error)
        return Constraints()

    def _made(
        self,
        is_late: Callable[[], bool],
        tools: Tools,
        choice: ToolChoice,
        is_parallel: bool,
        reply: ReplyFormat | None,
    ) -> Constraints:
        maker = _Maker(self._compiler, is_late)
        if self._mode == "strict":
            try:
                return maker.make(_all_strict(tools), choice, is_parallel, reply)
            except ApiError as error:
                _log.info("tools are not held to all of their schemas: %s", error.message)
        return maker.make(tools, choice, is_parallel, reply)


def _all_strict(tools: Tools) -> Tools:
    return [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]


def _has_strict(tools: Tools) -> bool:
    return any(tool["function"].get("strict") for tool in tools)


def _let_pass(tools: Tools, error: ApiError) -> None:
    """Says that calls are free; raises if one of the tools is strict."""
    if _has_strict(tools):
        raise error
    _log.info("calls are not held to their tools: %s", error.message)


class _Maker:
    """Makes the constraints of one request.

    Grammars bind where the request asks for a form. Tool calls are always held to the names and
    types of the request's tools once they have begun.
    """

    def __init__(self, compiler: GrammarCompiler, is_late: Callable[[], bool]) -> None:
        self._compiler = compiler
        self._is_late = is_late

    def make(
        self,
        tools: Tools,
        choice: ToolChoice,
        is_parallel: bool,
        reply: ReplyFormat | None,
    ) -> Constraints:
        """See `Constrainer.constraints`."""
        names = [tool["function"]["name"] for tool in tools]
        if choice.mode == "required" and not tools:
            raise invalid("tool_choice", "asks for a call, but there are no tools")
        if choice.name is not None and choice.name not in names:
            raise invalid("tool_choice.function.name", f"there is no tool {choice.name!r:.100}")
        if choice.mode == "required" and reply is not None:
            problem = "cannot be combined with a tool_choice that asks for a call"
            raise invalid("response_format", problem)
        rules = None
        if tools and choice.mode != "none":
            must_hold = choice.mode == "required" or reply is not None
            rules = self._tool_rules(tools, choice.name, is_parallel, must_hold)
        return Constraints(self._content(rules, choice, reply), self._calls(rules, tools))

    def _calls(self, rules: ToolGrammar | None, tools: Tools) -> Grammar | None:
        """Returns what holds once a call has begun; nothing if that is too much and not strict."""
        try:
            return self._compile(rules.after_marker(), "tools") if rules else None
        except ApiError as error:
            _let_pass(tools, error)
            return None

    def _compile(self, rules: str, param: str) -> Grammar:
        if self._is_late():
            raise TooSlow
        return self._compiler.compile(rules, param)

    def _content(
        self, rules: ToolGrammar | None, choice: ToolChoice, reply: ReplyFormat | None
    ) -> Grammar | None:
        if reply is None:
            if rules is None or choice.mode != "required":
                return None
            return self._compile(rules.whole_block(), "tools")
        param = "response_format" + (".json_schema.schema" if reply.kind == "json_schema" else "")
        if rules is None:
            return self._compile(reply_rules(reply), param)
        if reply.kind == "grammar":
            raise invalid("response_format", "a grammar cannot be combined with tools")
        return self._compile(rules.whole_block(reply_rules(reply, "reply")), param)

    def _tool_rules(
        self, tools: Tools, only: str | None, is_parallel: bool, must_hold: bool
    ) -> ToolGrammar | None:
        """Returns rules that compile: schemas we cannot follow are left out, unless strict.

        Nothing at all if there are too many of them, unless they must hold.
        """
        dsml = self._compiler.control(C.DSML)
        try:
            rules = ToolGrammar(dsml, tools, only, is_parallel)
            self._compile(rules.after_marker(), "tools")
            return rules
        except ApiError:
            usable = self._usable(tools)
        try:
            return ToolGrammar(dsml, usable, only, is_parallel)
        except ApiError as error:
            if must_hold:
                raise
            _let_pass(tools, error)
            return None

    def _usable(self, tools: Tools) -> list[Mapping[str, Any]]:
        dsml = self._compiler.control(C.DSML)
        usable: list[Mapping[str, Any]] = []
        for index, tool in enumerate(tools):
            try:
                rules = ToolGrammar(dsml, [tool]).after_marker()
                self._compile(rules, f"tools[{index}].function.parameters")
            except ApiError as error:
                function = tool["function"]
                if function.get("strict"):
                    raise
                _log.info("the parameters of a tool are not enforced: %s", error.message)
                tool = {"function": {"name": function["name"]}}
            usable.append(tool)
        return usable
