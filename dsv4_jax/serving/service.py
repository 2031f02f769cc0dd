"""What the routes share: settings, the loaded model, and the thread it runs on."""

import asyncio
import hmac
import logging
import time
from dataclasses import dataclass

from starlette.requests import Request

from dsv4_jax.serving.errors import ApiError, not_ready
from dsv4_jax.serving.events import Event, Finish
from dsv4_jax.serving.model import TokenModel
from dsv4_jax.serving.plan import MODE_OF_NAME, Planner
from dsv4_jax.serving.worker import ModelThread

_log = logging.getLogger(__name__)
PARALLEL_PLANS = 2  # requests that are tokenised at the same time


@dataclass(frozen=True)
class Settings:
    """Choices of whoever runs the server.

    `names` are the model's, the first one preferred; `notice` is what users should know of it.
    `parallel` answers are made at a time; `max_waiting` more requests may wait.
    """

    names: tuple[str, ...]
    notice: str | None = None
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 4
    parallel: int = 1
    max_body_bytes: int = 64 << 20
    body_timeout_s: float = 60.0
    hold_headers_s: float = 5.0
    keep_alive_s: float = 10.0


@dataclass(frozen=True)
class Loaded:
    """A model that can answer; `fingerprint` changes with anything that changes its answers."""

    planner: Planner
    model: TokenModel
    fingerprint: str


class Service:
    """The state of one server. `phase` says what it is doing until it is "ready"."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.phase = "loading"
        self.percent = 0
        self.started = int(time.time())
        self.thread: ModelThread[Event | Finish] = ModelThread(
            settings.max_waiting, workers=settings.parallel
        )
        self.planning = asyncio.Semaphore(PARALLEL_PLANS)
        self._loaded: Loaded | None = None
        self._warned: set[str] = set()

    def ready(self, planner: Planner, model: TokenModel, fingerprint: str) -> None:
        """Lets requests in; may be called from any thread."""
        self._loaded = Loaded(planner, model, fingerprint)
        self.phase, self.percent = "ready", 100

    @property
    def has_failed(self) -> bool:
        """Whether the model's engine stopped with an error."""
        return self._loaded is not None and self._loaded.model.failure is not None

    def metrics(self) -> bytes:
        """Prometheus text; empty until the model is there."""
        return b"" if self._loaded is None else self._loaded.model.metrics.text()

    def loaded(self) -> Loaded:
        """Returns the model.

        Raises:
            ApiError: 503, it is not there yet.
        """
        if self._loaded is None:
            raise not_ready(self.phase)
        return self._loaded

    def warn_once(self, warning: str) -> None:
        if warning not in self._warned:
            self._warned.add(warning)
            _log.warning("%s", warning)

    def model_name(self, asked: str | None) -> str:
        """Returns the name to answer under; without a name, the first one.

        Raises:
            ApiError: 404, no model of that name is served.
        """
        names = self.settings.names
        if asked is None:
            return names[0]
        if asked not in names and asked not in MODE_OF_NAME:
            problem = f"The model {asked[:100]!r} is not served here; this server has: "
            raise ApiError(404, "model_not_found", problem + ", ".join(names), "model")
        return asked

    def check_key(self, request: Request) -> None:
        """Lets a request pass that carries one of the keys, or any if there are none.

        Raises:
            ApiError: 401.
        """
        keys = self.settings.api_keys
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
        matches = [hmac.compare_digest((given or "").encode(), key.encode()) for key in keys]
        if keys and not any(matches):
            problem = "Send a valid API key as 'Authorization: Bearer KEY'."
            raise ApiError(401, "invalid_api_key", problem)
