"""Strings of the DeepSeek-V4 prompt protocol.

They are read by a trained model, so every byte counts: do not edit, rewrap or translate them.
`SHA256` pins the five long texts. In the token names the bars are U+FF5C and the low blocks
U+2581; an ASCII bar would be ordinary text. Token *ids* never appear here: they are looked up by
name in the tokenizer that travels with a checkpoint.
"""

from typing import Final

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
PAD: Final = "<｜▁pad▁｜>"
FIM_HOLE: Final = "<｜fim▁hole｜>"
FIM_BEGIN: Final = "<｜fim▁begin｜>"
FIM_END: Final = "<｜fim▁end｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
THINK_START: Final = "<think>"
THINK_END: Final = "</think>"
DSML: Final = "｜DSML｜"  # stands inside ordinary angle brackets: <｜DSML｜invoke …>
LATEST_REMINDER: Final = "<｜latest_reminder｜>"
EXTRACTED_URL: Final = "<｜extracted_url｜>"

# Quick-instruction tasks: the value of a message's "task" and the token it adds.
TASK_TOKENS: Final[dict[str, str]] = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

# Every control token this package writes, in the order of the official ids.
CONTROL_TOKENS: Final[tuple[str, ...]] = (
    BOS,
    EOS,
    PAD,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
    THINK_START,
    THINK_END,
    DSML,
    LATEST_REMINDER,
    TASK_TOKENS["action"],
    TASK_TOKENS["query"],
    TASK_TOKENS["authority"],
    TASK_TOKENS["domain"],
    TASK_TOKENS["title"],
    EXTRACTED_URL,
    TASK_TOKENS["read_url"],
)

# What a vocabulary must have for chat; the others are asked for when they are first used.
CHAT_TOKENS: Final[tuple[str, ...]] = (
    BOS,
    EOS,
    USER,
    ASSISTANT,
    THINK_START,
    THINK_END,
    DSML,
)

TOOL_BLOCK: Final = "tool_calls"
TOOL_RESULT_OPEN: Final = "<tool_result>"  # ordinary text, like its closer
TOOL_RESULT_CLOSE: Final = "</tool_result>"

# fmt: off
# First effort text: "max" of the preview profile, "high" of the official one.
EFFORT_ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the "
    "problem to resolve the root cause, rigorously stress-testing your logic against all "
    "potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every "
    "intermediate step, considered alternative, and rejected hypothesis to ensure "
    "absolutely no assumption is left unchecked.\n\n"
)

# Second effort text: "max" of the official profile.
EFFORT_BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to "
    "chance: exhaustively decompose the problem into its most fundamental components, "
    "trace every causal chain to its root, and resolve the underlying cause rather than "
    "any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from "
    "multiple angles and are certain that no assumption remains unchecked and no error "
    "remains undiscovered.\n\n"
)

# From the heading to the blank line before the first tool schema.
TOOLS_HEAD = (
    "## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. You can "
    'invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:\n\n'
    "<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="$TOOL_NAME">\n'
    '<｜DSML｜parameter name="$PARAMETER_NAME" '
    'string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>\n'
    "...\n"
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="$TOOL_NAME2">\n'
    "...\n"
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>\n\n"
    'String parameters should be specified as is and set `string="true"`. For all other '
    "types (numbers, booleans, arrays, objects), pass the value in JSON format and set "
    '`string="false"`.\n\n'
    "If thinking_mode is enabled (triggered by <think>), you MUST output your complete "
    "reasoning inside <think>...</think> BEFORE any tool calls or final response.\n\n"
    "Otherwise, output directly after </think> with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n"
)

# After the last tool schema.
TOOLS_TAIL = (
    "\n\n"
    "You MUST strictly follow the above defined tool name and parameter schemas to "
    "invoke tool calls.\n"
)

# Before the JSON schema of the reply.
RESPONSE_FORMAT_HEAD = (
    "## Response Format:\n\n"
    "You MUST strictly adhere to the following schema to reply:\n"
)
# fmt: on

SHA256: Final[dict[str, str]] = {
    "EFFORT_ABSOLUTE": "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
    "EFFORT_BEYOND": "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
    "TOOLS_HEAD": "c7c9042638154a237b5d1bd48be772374a35a4d24c5cacfd1ffbd92703da329c",
    "TOOLS_TAIL": "690702850fe256512cb1ee67c4e436ecb3e735c71ebee77ca45ff357a75fb5a7",
    "RESPONSE_FORMAT_HEAD": "5200f58413f49f3957c43beddbc97bead023232cb5934fad0c1997c30c139112",
}

# tokenizer.json as published with the V4 checkpoints (129,280 ids).
OFFICIAL_TOKENIZER_SHA256: Final = (
    "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"
)
