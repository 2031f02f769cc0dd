"""Answers that must have a form: JSON, tool calls, whatever a grammar says."""

from dsv4_jax.serving.grammar.compiler import Grammar, GrammarCompiler
from dsv4_jax.serving.grammar.reply import reply_rules
from dsv4_jax.serving.grammar.tools import ToolGrammar

__all__ = ["Grammar", "GrammarCompiler", "ToolGrammar", "reply_rules"]
