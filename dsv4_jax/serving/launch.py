"""Running the server: its port, and loading the model behind it."""

import atexit
import errno
import hashlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from dsv4_jax.serving.api import create_app
from dsv4_jax.serving.errors import ServerFailed
from dsv4_jax.serving.http11 import STALL_TIMEOUT_S, Http11
from dsv4_jax.serving.service import Service

GRACE_S = 5  # for connections to end once nothing is being answered any more
DRAIN_TIMEOUT_S = 60.0
TRIED_PORTS = 50
log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """Opens the port, 0 meaning any free one.

    Raises:
        ValueError: it cannot be opened; the message says what to do.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port} must lie between 0 and 65535")
    try:
        socket.getaddrinfo(host, port)
        return _open(host, port)
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"host {host!r} is not an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = _free_port(host, port)
            hint = f": try --port {free}" if free else ""
            raise ValueError(f"port {port} of {host} is in use{hint}") from None
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def _open(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def _free_port(host: str, port: int) -> int | None:
    for other in range(port + 1, min(port + TRIED_PORTS, 65536)):
        try:
            _open(host, other).close()
        except OSError:
            continue
        return other
    return None


def url_of(listener: socket.socket) -> str:
    """Returns the address to open in a browser of this machine."""
    host, port = str(listener.getsockname()[0]), listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host) or host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def fingerprint(*parts: bytes) -> str:
    """Returns a short name for everything in `parts` together."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return f"fp_{digest.hexdigest()[:16]}"


def how_to_use(url: str, needs_key: bool, model: str) -> str:
    """Returns what the terminal shows once the server is ready."""
    key = " -H 'authorization: Bearer KEY'" if needs_key else ""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200}
    return "\n".join(
        [
            f"chat page  {url}/",
            f"API        {url}/v1",
            f"try        curl {url}/v1/chat/completions{key} \\",
            f"             -H 'content-type: application/json' -d '{json.dumps(body)}'",
            "Python     from openai import OpenAI",
            f'           client = OpenAI(base_url="{url}/v1", api_key="KEY")',
            f"           messages = {json.dumps(body['messages'])}",
            f"           chat = client.chat.completions.create(model={json.dumps(model)}, "
            "messages=messages)",
            "           print(chat.choices[0].message.content)",
        ]
    )


class _Server(uvicorn.Server):
    """Stops at once on Ctrl-C; on SIGTERM once what was taken is answered, or time is up."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_timeout_s = drain_timeout_s
        self._drained_at: float | None = None  # at the latest

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        is_first = self._drained_at is None and not self.should_exit
        if sig == signal.SIGTERM and is_first and self._service.phase in ("ready", "draining"):
            self._drained_at = time.monotonic() + self._drain_timeout_s
            log.info("draining: %d to finish", self._service.drain())
            return
        self._service.thread.stop()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._service.fatal is not None and not self.should_exit:
            self._service.thread.stop()
            self.should_exit = True
        if _failure(self._service) is not None:  # those who wait were told
            self.should_exit = True
        if self._drained_at is not None and not self.should_exit:
            left = self._service.thread.admitted
            if not left or time.monotonic() >= self._drained_at:
                log.info("drained, %d unfinished", left)
                self.handle_exit(signal.SIGTERM, None)
        return await super().on_tick(counter)


def serve(
    service: Service,
    listener: socket.socket,
    load: Callable[[], None],
    drain_timeout_s: float = DRAIN_TIMEOUT_S,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> None:
    """Answers on `listener` until a signal; `load` runs on a thread and makes `service` ready.

    After SIGTERM new requests get 503, and running ones have `drain_timeout_s` to finish; a second
    signal, or Ctrl-C, ends them at once. A client that reads nothing for `stall_timeout_s` while
    there is something to read is dropped.

    Raises:
        ServerFailed: the engine stopped with an error.
        Exception: what `load` raised, or what the service calls fatal; the server is stopped then.
        KeyboardInterrupt: after a clean stop by Ctrl-C.
    """
    config = uvicorn.Config(
        create_app(service),
        http=partial(Http11, stall_timeout_s=stall_timeout_s),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config, service, drain_timeout_s)
    failures: list[BaseException] = []

    def loading() -> None:
        try:
            load()
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    thread = threading.Thread(target=loading, name="load", daemon=True)
    thread.start()
    try:
        server.run(sockets=[listener])
    finally:
        service.thread.stop()
        if thread.is_alive():
            atexit.register(_leave_at_once)
    if service.fatal is not None:
        raise service.fatal
    if failures:
        raise failures[0]
    if (reason := _failure(service)) is not None:
        raise ServerFailed(f"the engine stopped: {reason}") from reason


def _failure(service: Service) -> BaseException | None:
    """What stopped the engine, but for a lost process, of which the service is told apart."""
    reason = service.loaded().model.failure if service.has_failed else None
    return None if isinstance(reason, ConnectionError) else reason


def _leave_at_once() -> None:
    """Ends a process that is still compiling: the compiler would abort if it were torn down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
