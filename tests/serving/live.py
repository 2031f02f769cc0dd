"""A real server on a free port, run by a thread of the test process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from dsv4_jax.serving.api import create_app
from dsv4_jax.serving.http11 import Http11
from dsv4_jax.serving.service import Service
from tests.serving.fakes import PATIENCE_S


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextmanager
def serving(service: Service, stall_timeout_s: float = 60.0, send_buffer: int = 0) -> Iterator[str]:
    """Yields the address, such as http://127.0.0.1:12345."""
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer:  # of the kernel
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    config = uvicorn.Config(
        create_app(service),
        http=partial(Http11, stall_timeout_s=stall_timeout_s),  # pyright: ignore
        ws="none",
        log_config=None,  # or it would close the handlers of others
        log_level="critical",
        lifespan="on",
        timeout_graceful_shutdown=5,
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert server.is_up.wait(PATIENCE_S)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
