"""POST /admin/drain and /admin/flush_cache, for whoever runs the server."""

import asyncio
import ipaddress
import logging

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv4_jax.serving.engine.stream import EngineError
from dsv4_jax.serving.errors import ApiError, not_ready, wrong_key
from dsv4_jax.serving.service import Service, is_one_of, key_of

_log = logging.getLogger(__name__)


def check_admin(service: Service, request: Request) -> None:
    """Lets a request pass that carries an admin key.

    Where no such key was set, requests pass that come from this machine and not from a page in its
    browser; with API keys and no admin key nobody passes, since users' keys are not for this.

    Raises:
        ApiError: 401, there is no key or a wrong one; 403, it is not the right one for this.
    """
    settings, given = service.settings, key_of(request)
    if settings.admin_keys:
        if is_one_of(given, settings.admin_keys):
            return
        if settings.api_keys and is_one_of(given, settings.api_keys):
            raise _forbidden("This needs an admin key.")
        raise wrong_key("Send an admin key as 'Authorization: Bearer KEY'.")
    if settings.api_keys:
        raise _forbidden("This server was started without --admin-key.")
    if not _is_here(request) or "origin" in request.headers:
        raise _forbidden("Only programs on the server's own machine may do this.")


def _forbidden(problem: str) -> ApiError:
    return ApiError(403, "admin_only", problem)


def _is_here(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


async def drain(service: Service, request: Request) -> Response:
    """Refuses new requests from now on; those that were taken go on, and the server stays up."""
    check_admin(service, request)
    service.loaded()
    unfinished = service.drain()
    _log.info("draining: %d to finish", unfinished)
    return JSONResponse({"phase": service.phase, "unfinished": unfinished})


async def flush_cache(service: Service, request: Request) -> Response:
    """Forgets all cached prompts that no running request uses."""
    check_admin(service, request)
    model = service.loaded().model
    try:
        tokens = await asyncio.to_thread(model.flush_cache)
    except EngineError as error:
        raise not_ready("engine_unhealthy") from error
    _log.info("forgot %d cached tokens", tokens)
    return JSONResponse({"forgotten_tokens": tokens})
