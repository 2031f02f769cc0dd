"""Errors as Anthropic clients read them."""

from typing import Any

from dsv4_jax.serving.errors import ApiError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
OVERLOADED = 529


def is_anthropic(path: str) -> bool:
    """Whether clients of this path speak the Anthropic shape."""
    return path.startswith(("/v1/messages", "/anthropic/"))


def status_of(error: ApiError) -> int:
    return OVERLOADED if error.status == 503 else error.status


def error_body(error: ApiError) -> dict[str, Any]:
    kind = _TYPES.get(status_of(error), "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
