"""The settings of the server, as `settings.py` reads them."""

from types import SimpleNamespace

from dsv4_jax.serving.schema import EFFORTS
from dsv4_jax.serving.settings import Option, integer, metric_name, number, one_of, switch

NUMERICS = ("reference", "plain")
DTYPES = ("bfloat16", "float32")
IMPLEMENTATIONS = ("reference", "pallas", "interpret")
PROFILES = ("auto", "preview", "official")
REASONING_FIELDS = ("both", "reasoning_content", "reasoning")
TOOL_GRAMMARS = ("off", "structure", "strict")
DECODING = ("auto", "on", "off")
TEXT_POLICIES = ("text", "control", "reject")


WAITING_PER_SLOT, MAX_WAITING = 4, 256  # unless asked otherwise


def most_waiting(args: SimpleNamespace) -> int:
    """Requests that may wait for a slot."""
    return args.max_waiting or min(WAITING_PER_SLOT * args.slots, MAX_WAITING)


def reasoning_fields(args: SimpleNamespace) -> tuple[str, ...]:
    """Names of reasoning in replies."""
    return REASONING_FIELDS[1:] if args.reasoning_field == "both" else (args.reasoning_field,)


MODES = ("coupled", "rejection")  # of judging guesses
GENERATION = ("auto", "off")


def choices(names: tuple[str, ...]) -> str:
    return "{" + ",".join(names) + "}"


OPTIONS = (
    Option("checkpoint", "model", "made by convert_hf.py", metavar="DIR", unset="the demo"),
    Option(
        "max-len",
        "model",
        "context limit in tokens",
        read=integer(1),
        metavar="N",
        unset="the model's own, at most 131072",
    ),
    Option("slots", "model", "requests at a time", 8, integer(1), "N"),
    Option(
        "cache-tokens",
        "model",
        "tokens of context kept, in use or for reuse",
        read=integer(1),
        metavar="N",
        unset="two full contexts",
    ),
    Option(
        "host-cache-gib",
        "model",
        "host memory for reusable context that leaves the device, in GiB; 0: none",
        0.0,
        number(0),
        "G",
    ),
    Option(
        "disk-cache",
        "model",
        "folder that keeps reusable context and answers with tool calls when the server ends; "
        "anything in it may be deleted at any time",
        metavar="DIR",
        unset="none",
    ),
    Option(
        "disk-cache-gib",
        "model",
        "what the disk cache may take, in GiB; the least recently used goes first",
        64.0,
        number(0.001),
        "G",
    ),
    Option(
        "speculate",
        "model",
        "tokens that the MTP block guesses ahead for a step to verify; 0: none",
        read=integer(0, 7),
        metavar="K",
        unset="1 if the checkpoint has such a block, 0 on a CPU",
    ),
    Option(
        "speculate-mode",
        "model",
        "coupled: the same tokens as without guesses; rejection: more guesses stand",
        "coupled",
        one_of(*MODES),
        choices(MODES),
    ),
    Option(
        "speculate-always",
        "model",
        "guess even where that costs more than it brings",
        False,
        switch,
    ),
    Option(
        "decode-steps",
        "model",
        "tokens that one call of the device decodes of each request while no prompt waits: less "
        "work for the host, but tokens come in groups; not with --speculate",
        1,
        integer(1, 32),
        "N",
    ),
    Option(
        "mesh",
        "model",
        "devices that share the model: heads over tensor, experts over both",
        metavar="expert=N,tensor=N",
        unset="all devices",
    ),
    Option(
        "coordinator",
        "hosts",
        "address of host 0, which owns HTTP; start the same command on every host; auto: ask the "
        "environment (TPU pods, Slurm)",
        metavar="HOST:PORT|auto",
        unset="one host",
    ),
    Option("hosts", "hosts", "how many there are", read=integer(1), metavar="N", unset="1"),
    Option("host-index", "hosts", "which one this is", read=integer(0), metavar="I", unset="0"),
    Option("numerics", "model", "arithmetic", "reference", one_of(*NUMERICS), choices(NUMERICS)),
    Option("dtype", "model", "of activations", "bfloat16", one_of(*DTYPES), choices(DTYPES)),
    Option(
        "decode-weights",
        "model",
        "decode FP8 and FP4 weights once, to float32; auto: on a CPU, if they take 1 GiB at most",
        "auto",
        one_of(*DECODING),
        choices(DECODING),
    ),
    Option(
        "compile-cache",
        "operation",
        "folder of compiled programs; 'off' keeps none",
        metavar="DIR|off",
        unset="the user's cache folder",
    ),
    Option(
        "drain-timeout",
        "operation",
        "seconds to finish running answers after SIGTERM",
        60.0,
        number(0),
        "S",
    ),
    Option(
        "step-timeout",
        "operation",
        "seconds after which a step of the engine is given up",
        300.0,
        number(0),
        "S",
    ),
    Option(
        "implementation",
        "model",
        "of the hot path; interpret is slow",
        read=one_of(*IMPLEMENTATIONS),
        metavar=choices(IMPLEMENTATIONS),
        unset="pallas on TPU, reference elsewhere",
    ),
    Option("dry-run", "model", "show the plan, memory included, then stop", False, switch),
    Option(
        "compile-only",
        "operation",
        "load, compile into the cache of programs, then stop",
        False,
        switch,
    ),
    Option(
        "health-timeout",
        "operation",
        "seconds without a step, though there is work, after which /health is 503",
        60.0,
        number(1),
        "S",
    ),
    Option(
        "metrics-prefix",
        "operation",
        "first part of the names at /metrics; vllm gives names that its dashboards know",
        "dsv4",
        metric_name,
        "NAME",
    ),
    Option(
        "log-prompts",
        "operation",
        "write the text of every prompt to the log; otherwise it is never there",
        False,
        switch,
    ),
    Option(
        "max-waiting",
        "queue",
        "requests that may wait; more get 429",
        read=integer(1),
        metavar="N",
        unset="4 for each slot, at most 256",
    ),
    Option(
        "max-waiting-tokens",
        "queue",
        "prompt tokens that may wait; one request may always",
        4_000_000,
        integer(1),
        "N",
    ),
    Option(
        "tenant-running",
        "queue",
        "slots that one user's requests may have at a time; more of them wait",
        read=integer(1),
        metavar="N",
        unset="all",
    ),
    Option(
        "tenant-waiting",
        "queue",
        "requests of one user that may wait; more get 429",
        read=integer(1),
        metavar="N",
        unset="all that may wait",
    ),
    Option(
        "queue-timeout",
        "queue",
        "seconds a request may wait for its first slot",
        600.0,
        number(1),
        "S",
    ),
    Option("host", "HTTP", "address to listen on", "127.0.0.1", metavar="H"),
    Option("port", "HTTP", "0 takes any free one", 8000, integer(0, 65535), "P"),
    Option(
        "client-stall-timeout",
        "HTTP",
        "seconds after which a client that does not read its answer is dropped",
        120.0,
        number(1),
        "S",
    ),
    Option(
        "api-key",
        "HTTP",
        "clients need one of these; repeatable",
        default=(),
        metavar="K",
        is_repeatable=True,
        is_secret=True,
        unset="none needed",
    ),
    Option(
        "admin-key",
        "HTTP",
        "who drains the server or empties its cache needs one of these; repeatable",
        default=(),
        metavar="K",
        is_repeatable=True,
        is_secret=True,
        unset="only from this machine, and not at all with --api-key",
    ),
    Option(
        "served-model-name",
        "HTTP",
        "name that clients use; repeatable",
        default=(),
        metavar="NAME",
        is_repeatable=True,
        unset="the folder's name",
    ),
    Option("any-model", "HTTP", "answer whatever model a request names", False, switch),
    Option("strict-fields", "HTTP", "refuse requests with unknown fields", False, switch),
    Option(
        "reasoning-field",
        "HTTP",
        "what reasoning is called in chat replies",
        "both",
        one_of(*REASONING_FIELDS),
        choices(REASONING_FIELDS),
    ),
    Option(
        "default-effort",
        "prompt",
        f"thinking where a request names none: {', '.join(EFFORTS)}",
        "high",
        one_of(*EFFORTS),
        "E",
    ),
    Option(
        "free-controls",
        "prompt",
        "let chats draw control tokens that have no place in an answer; hides less",
        False,
        switch,
    ),
    Option("loop-guard", "prompt", "close reasoning that goes in circles", False, switch),
    Option(
        "generation-config",
        "prompt",
        "auto: sampling fields that a request does not name are those of the checkpoint's "
        "generation_config.json; off: those of the API",
        "auto",
        one_of(*GENERATION),
        choices(GENERATION),
    ),
    Option(
        "official-sampling",
        "prompt",
        "while thinking, ignore temperature, top_p, top_k and min_p, as the public API does",
        False,
        switch,
    ),
    Option(
        "require-reasoning",
        "prompt",
        "refuse earlier tool calls that come without their reasoning, as the public API does",
        False,
        switch,
    ),
    Option(
        "internal-roles",
        "prompt",
        "render developer as the published encoder does, admit latest_reminder",
        False,
        switch,
    ),
    Option(
        "tool-grammar",
        "prompt",
        "what tool calls are held to once begun: names and types, or whole schemas where possible",
        "structure",
        one_of(*TOOL_GRAMMARS),
        choices(TOOL_GRAMMARS),
    ),
    Option(
        "recover-lookalike-dsml",
        "prompt",
        "take tool markup in answers for calls though its marker is spelled out as text",
        False,
        switch,
    ),
    Option(
        "special-tokens-in-text",
        "prompt",
        "what the spelling of a control token in a client's text is; control is for trusted text",
        "text",
        one_of(*TEXT_POLICIES),
        choices(TEXT_POLICIES),
    ),
    Option(
        "prompt-profile",
        "prompt",
        "prompts the model was trained on; auto looks at the checkpoint",
        "auto",
        one_of(*PROFILES),
        choices(PROFILES),
    ),
)


def page() -> str:
    """Returns docs/settings.md."""
    lines = [
        "# Settings of the server",
        "",
        "Made from the code by `python -m dsv4_jax.serving.options > docs/settings.md`.",
        "",
        "A setting is a flag (`--max-len 4096`), a variable (`DSV4_MAX_LEN=4096`) or a key of the",
        "YAML file that `--config` or `DSV4_CONFIG` names (`max-len: 4096`). A flag wins over a",
        "variable, a variable over the file. Where several values are possible, give the flag",
        "several times, a YAML list, or commas in the variable. `--print-config` shows what was",
        "settled and where each value came from, as a file that `--config` reads; secrets are left",
        "out. Unknown names are errors that offer the nearest known one.",
    ]
    for group in dict.fromkeys(option.group for option in OPTIONS):
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += ["| setting | variable | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(option) for option in OPTIONS if option.group == group]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    flag = f"--{option.name}" if option.read is switch else f"--{option.name} {option.metavar}"
    cells = (f"`{flag}`", f"`{option.variable}`", option.described_default, option.help)
    return "".join(f"| {cell.replace('|', chr(92) + '|')} " for cell in cells) + "|"


if __name__ == "__main__":
    print(page(), end="")
