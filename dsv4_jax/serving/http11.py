"""HTTP/1.1 parsing as uvicorn does it, with our error shape and a time limit for headers."""

import json
import logging
from asyncio import TimerHandle, Transport
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv4_jax.serving.errors import ApiError

HEADER_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 120.0
log = logging.getLogger(__name__)


class Http11(H11Protocol):
    """Drops connections whose request headers do not arrive in time, or whose reader stalls.

    Args:
        stall_timeout_s: How long a reader may take nothing while a full buffer waits for it.
    """

    _header_timer: TimerHandle | None = None
    _stall_timer: TimerHandle | None = None

    def __init__(self, *args: Any, stall_timeout_s: float = STALL_TIMEOUT_S, **others: Any) -> None:
        super().__init__(*args, **others)
        self._stall_timeout_s = stall_timeout_s

    def pause_writing(self) -> None:
        """Called when the buffer is full; what wants to write waits from here on."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._stall_timeout_s, self._drop)

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def _drop(self) -> None:
        """Forgets what is buffered: to close in order would wait for the reader again."""
        log.info("dropped a client that did not read for %g s", self._stall_timeout_s)
        self.transport.abort()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._watch_headers()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, "invalid_http", msg).body()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            start = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_headers(self) -> None:
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def _stop_watching(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
