"""Rules for the tool calls of an answer.

A block of calls consists of short texts between DSML tokens. Line ends are rules of their own:
the lexer is greedy, so a text must never begin like another one that is possible in its place.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.grammar.compiler import MAX_CHARS
from dsv4_jax.serving.grammar.parameters import has_refs, json_parameter, kinds_of, text_lexeme


class ToolGrammar:
    """Writes the rules of one request.

    A tool that says `strict` gets exactly the calls its schema allows, parameters in the order of
    the schema. Of others, names, parameter names and types are held to.

    Args:
        dsml: how rules spell the DSML token.
        tools: as in the request.
        only: the one tool that may be called.
        is_parallel: several calls may follow one another.

    Raises:
        ApiError: 400 `invalid_schema`, a strict schema that cannot be followed, or rules that
            become too large; then it stops at once.
    """

    def __init__(
        self,
        dsml: str,
        tools: Sequence[Mapping[str, Any]],
        only: str | None = None,
        is_parallel: bool = True,
    ) -> None:
        self._dsml = dsml
        self._is_parallel = is_parallel
        self._rules: list[str] = []
        self._size = 0
        names = [
            self._tool(index, tool["function"])
            for index, tool in enumerate(tools)
            if only in (None, tool["function"]["name"])
        ]
        self._add(f"call: {' | '.join(names)}\n", "tools")

    def after_marker(self) -> str:
        """Rules that begin behind the DSML token of the block's own tag."""
        return f"start: block\n{self._text()}"

    def whole_block(self, reply_rule: str = "") -> str:
        """Rules of content that is a block of calls, or else what the rule `reply` says."""
        either = " | reply" if reply_rule else ""
        return f'start: NL NL "<" {self._dsml} block{either}\n{reply_rule}{self._text()}'

    def _text(self) -> str:
        more = "(NL call)*" if self._is_parallel else ""
        block = f'block: "tool_calls>" NL call {more} NL "</" {self._dsml} "tool_calls>"\n'
        return block + "".join(self._rules) + 'NL: "\\n"\n'

    def _add(self, rule: str, param: str) -> None:
        self._size += len(rule)
        self._check_size(self._size, param)
        self._rules.append(rule)

    def _check_size(self, size: int, param: str) -> None:
        if size > MAX_CHARS:
            problem = f"is too large: more than {MAX_CHARS} characters of grammar"
            raise invalid(param, problem, "invalid_schema")

    def _tool(self, index: int, function: Mapping[str, Any]) -> str:
        schema = function.get("parameters") or {}
        is_strict = function.get("strict") is True
        where = f"tools[{index}].function.parameters"
        rule = f"tool_{index}"
        open_tag = json.dumps(f'invoke name="{function["name"]}">')
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        refs = has_refs(schema)
        values = {
            key: self._parameter(f"{rule}_p{place}", key, schema, refs, where, is_strict)
            for place, key in enumerate(properties)
        }
        if is_strict:
            body = self._strict_body(values, schema.get("required"), where)
        else:
            body = self._body(rule, values, schema, where)
        end = f'NL "</" {self._dsml} "invoke>"'
        self._add(f'{rule}: "<" {self._dsml} {open_tag} {body} {end}\n', where)
        return rule

    def _body(
        self, rule: str, values: Mapping[str, str], schema: Mapping[str, Any], param: str
    ) -> str:
        """What stands between the tags of a call: lines, at least an empty one."""
        if not values and schema.get("additionalProperties") is not False:
            values = {"": self._free_parameter(rule, param)}
        if not values:
            return "NL"
        line = f"NL ({' | '.join(values.values())})"
        return f"(({line})+ | NL)"

    def _strict_body(self, values: Mapping[str, str], required: Any, param: str) -> str:
        """Parameters in order, each at most once, the required ones exactly once."""
        needed = set(required) if isinstance(required, list) else set()
        parts = [f"(NL {v})" if key in needed else f"(NL {v})?" for key, v in values.items()]
        if needed & values.keys():
            return " ".join(parts)
        if not parts:
            return "NL"
        # All may be missing, and then an empty line takes their place.
        self._check_size(len(parts) * len("".join(parts)) // 2, param)
        some = [
            " ".join([f"(NL {name})", *parts[place + 1 :]])
            for place, name in enumerate(values.values())
        ]
        return f"({' | '.join([*some, 'NL'])})"

    def _parameter(
        self, rule: str, key: str, schema: Mapping[str, Any], refs: bool, param: str, strict: bool
    ) -> str:
        """Adds the rule of parameter `key`; `param` names its tool's schema in errors."""
        value = schema["properties"][key]
        kinds = kinds_of(value, schema)
        where = f"{param}.properties.{key}" if strict else None
        ways = []
        if "string" in kinds:
            is_only = kinds == {"string"}
            lexeme = text_lexeme(value, schema, where if is_only else None)
            ways.append(self._tagged(key, "true", lexeme))
        if "other" in kinds:
            self._add(f"{rule}_json: {json_parameter(key, schema, refs, strict)}\n", param)
            ways.append(self._tagged(key, "false", f'{rule}_json "</"'))
        self._add(f"{rule}: {' | '.join(ways)}\n", param)
        return rule

    def _free_parameter(self, rule: str, param: str) -> str:
        """Adds the rule of parameters of any name and type."""
        self._add(
            f'{rule}_any: "<" {self._dsml} "parameter name=\\"" /[^"<>\\n]+/ {rule}_value\n'
            f'{rule}_value: "\\" string=\\"true\\">" /(?s:.*)<\\// {self._dsml} "parameter>"'
            f' | "\\" string=\\"false\\">" {rule}_json "</" {self._dsml} "parameter>"\n'
            f"{rule}_json: %json {{}}\n",
            param,
        )
        return f"{rule}_any"

    def _tagged(self, key: str, is_string: str, value: str) -> str:
        tag = json.dumps(f'parameter name="{key}" string="{is_string}">', ensure_ascii=False)
        return f'"<" {self._dsml} {tag} {value} {self._dsml} "parameter>"'
