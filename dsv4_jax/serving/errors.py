"""What a client is told when something goes wrong, in the shape OpenAI clients read."""

from collections.abc import Mapping

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable",
}


class ServerFailed(RuntimeError):
    """The server cannot go on; whoever started it should start it again."""


class ApiError(Exception):
    """A reply other than success.

    `code` is one stable word for programs, `param` the field at fault as a path such as
    `messages[2].content`.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(param: str | None, problem: str, code: str = "invalid_value") -> ApiError:
    """A client's mistake; `problem` continues the sentence that `param` begins."""
    return ApiError(400, code, f"{param}: {problem}" if param else problem, param)


def unsupported(param: str, problem: str) -> ApiError:
    """A known feature that this server does not have."""
    return invalid(param, problem, "unsupported_value")


def context_too_long(
    limit: int, prompt: int, requested: int | None, is_exact: bool = True
) -> ApiError:
    """The prompt, or prompt and answer together, exceed the context; all in tokens."""
    asked = f" and {requested} were requested for the answer" if requested is not None else ""
    message = (
        f"This model's context is {limit} tokens, but the messages take "
        f"{'' if is_exact else 'at least '}{prompt}{asked}. "
        "Shorten the messages or ask for fewer tokens."
    )
    too_long = prompt >= limit or requested is None
    return ApiError(
        400, "context_length_exceeded", message, "messages" if too_long else "max_tokens"
    )


def queue_full(retry_after_s: int) -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    message = f"Too many requests are waiting. Try again in {retry_after_s} s."
    return ApiError(429, "queue_full", message, headers=headers)


def tenant_limit(retry_after_s: int) -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    message = f"Too many of your requests are waiting. Try again in {retry_after_s} s."
    return ApiError(429, "tenant_limit", message, headers=headers)


def wrong_key(message: str) -> ApiError:
    return ApiError(401, "invalid_api_key", message)


_PHASES = {
    "engine_unhealthy": "The engine has failed.",
    "testing": "The server is trying its model.",
    "queue_timeout": "The request waited too long for its turn.",
}


def not_ready(phase: str, retry_after_s: int = 5) -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    what = _PHASES.get(phase, f"The server is {phase}.")
    message = f"{what} Try again in {retry_after_s} s."
    return ApiError(503, phase, message, headers=headers)


def internal(request_id: str) -> ApiError:
    """A bug of ours. Retrying the same request would meet it again."""
    message = f"The server failed on this request ({request_id}); its log says why."
    return ApiError(500, "internal_error", message, headers={"x-should-retry": "false"})


def slow_reader() -> ApiError:
    """The client left so much of its answer unread that the rest was given up."""
    message = "The answer was read more slowly than it grew, and was given up."
    return ApiError(499, "slow_reader", message, headers={"x-should-retry": "false"})


def cancelled() -> ApiError:
    """Somebody asked to cancel the request."""
    headers = {"x-should-retry": "false"}
    return ApiError(499, "request_cancelled", "The request was cancelled.", headers=headers)
