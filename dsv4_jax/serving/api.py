"""The HTTP routes."""

import asyncio
import base64
import hashlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4_jax.serving.admin import drain, flush_cache
from dsv4_jax.serving.anthropic.errors import error_body, is_anthropic, status_of
from dsv4_jax.serving.anthropic.routes import count_tokens, messages
from dsv4_jax.serving.chat import chat_completions
from dsv4_jax.serving.completions import completions
from dsv4_jax.serving.counters import BUILD, Counters
from dsv4_jax.serving.errors import ApiError, internal
from dsv4_jax.serving.openapi import document
from dsv4_jax.serving.service import Service
from dsv4_jax.serving.texts import detokenize, render, tokenize

POSTS: dict[str, Callable[[Service, Request], Awaitable[Any]]] = {
    **dict.fromkeys(
        ("/v1/chat/completions", "/chat/completions", "/beta/chat/completions"), chat_completions
    ),
    **dict.fromkeys(("/v1/completions", "/completions", "/beta/completions"), completions),
    **dict.fromkeys(("/v1/messages", "/anthropic/v1/messages"), messages),
    **dict.fromkeys(
        ("/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"), count_tokens
    ),
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/v1/chat/render": render,
}
ADMIN = {"/admin/drain": drain, "/admin/flush_cache": flush_cache}
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Any]]


def create_app(service: Service) -> ASGIApp:
    """Returns the ASGI application of one server."""

    def guarded(handler: Callable[[Service, Request], Awaitable[Any]]) -> Handler:
        async def endpoint(request: Request) -> Any:
            request.scope["dsv4.tenant"] = service.check_key(request)
            return await handler(service, request)

        return endpoint

    def administered(handler: Callable[[Service, Request], Awaitable[Any]]) -> Handler:
        async def endpoint(request: Request) -> Any:
            return await handler(service, request)

        return endpoint

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await service.thread.close()

    open_routes = {
        "/health": _health,
        "/ready": _ready,
        "/version": _version,
        "/metrics": _metrics,
        "/openapi.json": _openapi,
    }
    app = Starlette(
        routes=[
            *(Route(path, guarded(handler), methods=["POST"]) for path, handler in POSTS.items()),
            *(Route(path, administered(run), methods=["POST"]) for path, run in ADMIN.items()),
            Route("/v1/requests/{name}/cancel", guarded(_cancel), methods=["POST"]),
            Route("/v1/models", guarded(_models)),
            Route("/v1/server_info", guarded(_server_info)),
            Route("/v1/models/{name:path}", guarded(_model)),
            *(Route(path, _with(service, handler)) for path, handler in open_routes.items()),
            Route("/", _page),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _bug},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return _Outermost(app, service.counters)


def _with(service: Service, handler: Callable[[Service], Response]) -> Handler:
    async def endpoint(_: Request) -> Response:
        return handler(service)

    return endpoint


def _health(service: Service) -> Response:
    """200 while the engine lives (loading included); 503 once it has failed or goes no further."""
    if service.has_failed:
        reason = str(service.loaded().model.failure)
        return JSONResponse({"status": "failed", "reason": reason}, 503)
    if service.is_stuck:
        reason = f"no step for {service.settings.health_timeout_s:g} s"
        return JSONResponse({"status": "stuck", "reason": reason}, 503)
    return JSONResponse({"status": "ok"})


def _metrics(service: Service) -> Response:
    """The engine's metrics, and what the event loop holds."""
    name = f"{service.settings.metrics_prefix}asyncio_tasks"
    head = f"# HELP {name} Tasks of the HTTP event loop.\n# TYPE {name} gauge\n"
    tasks = f"{head}{name} {len(asyncio.all_tasks())}\n".encode()
    return Response(service.metrics() + tasks, media_type="text/plain; version=0.0.4")


def _ready(service: Service) -> Response:
    is_ready = service.phase == "ready"
    state = {
        "phase": service.phase,
        "percent": service.percent,
        "notice": service.settings.notice,
        "examples": service.settings.examples,
    }
    headers = {} if is_ready else {"retry-after": "1"}
    return JSONResponse(state, 200 if is_ready else 503, headers)


def _version(_: Service) -> Response:
    return JSONResponse({"version": BUILD["dsv4_jax"]})


def _openapi(service: Service) -> Response:
    return JSONResponse(document(BUILD["dsv4_jax"], bool(service.settings.api_keys)))


async def _models(service: Service, _: Request) -> Response:
    names = service.settings.names
    return JSONResponse({"object": "list", "data": [_entry(service, name) for name in names]})


async def _model(service: Service, request: Request) -> Response:
    name = service.model_name(request.path_params["name"])
    return JSONResponse(_entry(service, name))


async def _cancel(service: Service, request: Request) -> Response:
    """Ends a request by its `x-request-id` or the id of its reply; again and again if you like."""
    name = request.path_params["name"]
    was_running = service.cancel(request.scope["dsv4.tenant"], name)
    return JSONResponse({"id": name, "cancelled": was_running})


async def _server_info(service: Service, _: Request) -> Response:
    """What was decided when the server started."""
    loaded, settings = service.loaded(), service.settings
    planner = loaded.planner
    return JSONResponse(
        {
            "version": BUILD["dsv4_jax"],
            "models": list(settings.names),
            "max_model_len": planner.max_len,
            "prompt_profile": planner.profile,
            "default_effort": planner.rules.default_effort,
            "loop_guard": planner.rules.loop_guard,
            "replay_tokens": settings.replay_tokens,
            "system_fingerprint": loaded.fingerprint,
            "tokenizer_sha256": planner.tokenizer.sha256,
        }
    )


def _entry(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "dsv4_jax",
        "max_model_len": service.loaded().planner.max_len,
    }


def _read_page() -> tuple[str, dict[str, str]]:
    """Returns the chat page and headers that allow its own script and nothing else."""
    page = (resources.files("dsv4_jax.serving") / "page.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, {"content-security-policy": policy, "x-content-type-options": "nosniff"}


_PAGE, _PAGE_HEADERS = _read_page()


async def _page(_: Request) -> Response:
    return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["dsv4.error"] = error.code
    if is_anthropic(request.url.path):
        body = {**error_body(error), "request_id": request.scope["dsv4.request_id"]}
        return JSONResponse(body, status_of(error), error.headers)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        known = ApiError(404, "not_found", f"There is nothing at {shown}.")
    else:
        problem = f"{shown}: {error.detail}."
        known = ApiError(error.status_code, "invalid_request", problem, headers=error.headers)
    return await _api_error(request, known)


async def _bug(request: Request, _: Exception) -> Response:
    return await _api_error(request, internal(request.scope["dsv4.request_id"]))


class _Outermost:
    """Names every request (`x-request-id`, the client's own if it sent one), counts, logs bugs."""

    def __init__(self, app: ASGIApp, counters: Counters) -> None:
        self.app = app
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope["dsv4.request_id"] = name
        start, status = time.monotonic(), 499

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except ClientDisconnect:
            _log.info("%s finish=disconnected", name)
        except Exception:
            _log.exception("request %s failed", name)
        finally:
            path = scope["path"] if scope["path"] in _COUNTED else "other"
            self._counters.http(path, status, time.monotonic() - start)
            if code := scope.get("dsv4.error"):
                self._counters.error(code)


_COUNTED = {
    *(*POSTS, *ADMIN, "/v1/models", "/v1/server_info", "/health", "/ready", "/version"),
    *("/metrics", "/openapi.json", "/"),
}
