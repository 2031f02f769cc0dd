"""Chats with a server in the terminal.

python scripts/chat.py                                 the server on this machine
python scripts/chat.py --url http://10.0.0.5:8000
python scripts/chat.py --checkpoint runs/v4-flash      a server of its own, stopped at the end
python scripts/chat.py -p "Why is the sky blue?"       one answer; only its text goes to a pipe
git diff | python scripts/chat.py --system "Review this." --think max
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dsv4_jax.serving.child import own_server
from dsv4_jax.serving.client import Client, ServerError
from dsv4_jax.serving.terminal import MODES, Chat, Screen

SERVE = Path(__file__).with_name("serve.py")


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="chat.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="/help lists the commands. Exit status: 0 fine, 1 failed or stopped, 2 usage.",
    )
    where = ap.add_argument_group("server (one of)").add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    where.add_argument("--checkpoint", metavar="DIR", help="serve this one while chatting")
    where.add_argument("--demo", action="store_true", help="serve the demo while chatting")
    ap.add_argument("--api-key", metavar="K", help="default: $DSV4_API_KEY")
    talk = ap.add_argument_group("conversation")
    talk.add_argument("-p", "--prompt", metavar="TEXT", help="ask this, show the answer, leave")
    talk.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    talk.add_argument("--think", choices=MODES, default="on", help="default: on")
    talk.add_argument("--tools", metavar="FILE.json", help="OpenAI tools; you answer the calls")
    talk.add_argument("--temperature", type=float, metavar="T", help="default: the server's")
    talk.add_argument("--max-tokens", type=int, metavar="N", help="default: what fits")
    talk.add_argument("--seed", type=int, metavar="S")
    return ap


def request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields that every request carries."""
    names = ("temperature", "max_tokens", "seed")
    fields = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.tools:
        try:
            fields["tools"] = json.loads(Path(args.tools).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read {args.tools}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{args.tools} is not valid JSON: {error}") from None
    return fields


def whisper(text: str) -> None:
    """Reports progress where it does not mix with answers."""
    print(text, file=sys.stderr)


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    fields = request_fields(args)
    url = args.url
    if args.checkpoint or args.demo:
        flags = ["--checkpoint", args.checkpoint] if args.checkpoint else []
        url, _ = stack.enter_context(own_server(SERVE, flags, whisper))
    client = Client(url, args.api_key or os.environ.get("DSV4_API_KEY"))
    client.wait_ready(whisper)
    is_rich = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    is_one_shot = args.prompt is not None or not sys.stdin.isatty()
    chat = Chat(
        client,
        Screen(sys.stdout, sys.stderr, is_rich),
        answers_calls=not is_one_shot,
        fields=fields,
        mode=args.think,
        system=args.system,
    )
    if is_one_shot:
        return 0 if chat.say(args.prompt if args.prompt is not None else sys.stdin.read()) else 1
    model = client.model()
    chat.screen.note(f"{model['id']}, {model['max_model_len']:,} tokens. /help lists commands.")
    chat.run()
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        import readline  # noqa: F401 (gives input() line editing and history)
    except ImportError:
        whisper("no line editing here")
    try:
        with ExitStack() as stack:
            return run(args, stack)
    except (ValueError, ServerError) as error:
        print(f"chat.py: {error}", file=sys.stderr)
        if isinstance(error, ServerError) and error.status is None:
            print("Start one with scripts/serve.py, or chat with --demo.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # whoever read the answer has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
