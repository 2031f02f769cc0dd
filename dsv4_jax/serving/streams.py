"""Sending an answer while it is made, and noticing when the client leaves."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from starlette.types import Receive, Scope, Send

from dsv4_jax.serving.errors import ApiError, internal

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_in = TypeVar("T_in", contravariant=True)
Reading = asyncio.Future[Sequence[T] | None]
_log = logging.getLogger(__name__)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns the result of `work`, or None if the client left first; then work is cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Source(Protocol[T_co]):
    """Where the items of a stream come from."""

    async def next(self) -> Sequence[T_co] | None:
        """Waits for items; None after the last ones."""
        ...

    def cancel(self) -> None: ...


class Encoder(Protocol[T_in]):
    """How the items of a stream look."""

    done: bytes  # the last bytes of every stream
    beat: bytes  # sent while there is nothing to say

    def encode(self, items: Sequence[T_in]) -> bytes: ...

    def error(self, error: ApiError) -> bytes: ...


@dataclass
class EventStream(Generic[T]):
    """An ASGI response of server-sent events.

    Headers wait for the first items, at most `hold_s`, so that early failures keep their status;
    later failures become an error event. Every `beat_s` without items a sign of life is sent, and
    what `how_far` says, in a comment, which clients of server-sent events pass over.
    """

    job: Source[T]
    encoder: Encoder[T]
    request_id: str
    hold_s: float
    beat_s: float
    headers: dict[str, str] = field(default_factory=dict)
    how_far: Callable[[], str] = str
    was_left: bool = field(default=False, init=False)  # the client did not wait for the end
    error: ApiError | None = field(default=None, init=False)  # that ended it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.was_left = await unless_disconnected(receive, self._send_all(send)) is None
            if self.error is not None:
                scope["dsv4.error"] = self.error.code  # to be counted
        finally:
            self.job.cancel()

    async def _send_all(self, send: Send) -> bool:
        following = asyncio.ensure_future(self.job.next())
        try:
            await asyncio.wait({following}, timeout=self.hold_s)
            if following.done():
                following.result()  # raises what went wrong before the first token
            await self._send_headers(send)
            await self._send_items(send, following)
        finally:
            following.cancel()
        return True

    async def _send_headers(self, send: Send) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **self.headers,
        }
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _send_items(self, send: Send, following: "Reading[T]") -> None:
        async def send_bytes(data: bytes, is_last: bool = False) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})

        try:
            while (items := await self._wait(following, send_bytes)) is not None:
                await send_bytes(self.encoder.encode(items))
                following = asyncio.ensure_future(self.job.next())
        except ApiError as error:
            self.error = error
        except Exception:
            _log.exception("request %s failed", self.request_id)
            self.error = internal(self.request_id)
        finally:
            following.cancel()
        if self.error is not None:
            await send_bytes(self.encoder.error(self.error))
        await send_bytes(self.encoder.done, is_last=True)

    async def _wait(
        self,
        following: "Reading[T]",
        send_bytes: Callable[[bytes], Coroutine[Any, Any, None]],
    ) -> Sequence[T] | None:
        while not (await asyncio.wait({following}, timeout=self.beat_s))[0]:
            told = self.how_far()
            await send_bytes(self.encoder.beat + (f": {told}\n\n".encode() if told else b""))
        return following.result()
