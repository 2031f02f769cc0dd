"""HTTP/1.1 parsing as uvicorn does it, with our error shape and a time limit for headers."""

import json
from asyncio import TimerHandle, Transport

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv4_jax.serving.errors import ApiError

HEADER_TIMEOUT_S = 10.0


class Http11(H11Protocol):
    """Closes connections whose request headers do not arrive in time."""

    _header_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
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
