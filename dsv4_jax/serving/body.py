"""Reading a request body as JSON, without trusting it."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request

from dsv4_jax.serving.errors import ApiError, invalid

T = TypeVar("T")
MAX_DEPTH = 64
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_json(
    request: Request, max_bytes: int, timeout_s: float, read: Callable[[Any], T]
) -> T:
    """Returns what `read` makes of the parsed body, both done off the event loop.

    Raises:
        ApiError: 400, 408, 413 or 415, with what is wrong; what `read` raises.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        problem = "Send the body as JSON, with the header content-type: application/json."
        raise ApiError(415, "unsupported_media_type", problem)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, "body_timeout", "The request body did not arrive in time.") from None
    return await asyncio.to_thread(lambda: read(parse_json(body)))


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, "body_too_large", f"The body must not exceed {max_bytes} bytes.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Parses strict JSON: UTF-8, no NaN, no lone surrogates, nested at most `MAX_DEPTH` deep.

    Raises:
        ApiError: 400.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        problem = f"The body is not valid JSON: {str(error)[:200]}."
        raise invalid(None, problem, "invalid_json") from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE_ESCAPE.search(body):
        _check_surrogates(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    if any(isinstance(item, dict | list) for item in level):
        raise _too_deep()


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        problem = "The body holds a lone surrogate, which is not text."
        raise invalid(None, problem, "invalid_json") from None


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> ApiError:
    return invalid(None, f"The body is nested deeper than {MAX_DEPTH} levels.", "invalid_json")
