"""What the routes share: settings, the loaded model, and the thread it runs on."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request

from dsv4_jax.serving.body import read_json
from dsv4_jax.serving.counters import Counters
from dsv4_jax.serving.errors import ApiError, not_ready, wrong_key
from dsv4_jax.serving.events import Event, Finish, Progress
from dsv4_jax.serving.model import TokenModel
from dsv4_jax.serving.plan import MODE_OF_NAME, Planner
from dsv4_jax.serving.replay import ReplayStore
from dsv4_jax.serving.reply import REASONING_FIELDS
from dsv4_jax.serving.worker import ModelThread

T = TypeVar("T")
_log = logging.getLogger(__name__)
PARALLEL_PLANS = 2  # requests that are tokenised at the same time
FINISHING = 8  # requests that wait for their grammars at the same time; more wait for these


@dataclass(frozen=True)
class Settings:
    """Choices of whoever runs the server.

    `names` are the model's, the first one preferred; `notice` is what users should know of it,
    and `examples` are questions that the chat page offers.
    `parallel` answers are followed at a time, those included that wait inside the model;
    `max_waiting` more requests may wait before it. Of answers that
    called tools, `replay_tokens` tokens are remembered to restore them in later prompts; 0: none.
    `admin_keys` open the paths below /admin; without any, see `admin.check_admin`. A model that has
    work and shows no sign of life for `health_timeout_s` counts as dead. `reasoning_fields` are the
    names of reasoning in chat replies.
    """

    names: tuple[str, ...]
    notice: str | None = None
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    answers_any_name: bool = False
    refuses_unknown_fields: bool = False
    reasoning_fields: tuple[str, ...] = REASONING_FIELDS
    examples: tuple[str, ...] = ()
    metrics_prefix: str = "dsv4:"
    health_timeout_s: float = 60.0
    logs_prompts: bool = False
    max_waiting: int = 4
    parallel: int = 1
    max_body_bytes: int = 64 << 20
    body_timeout_s: float = 60.0
    hold_headers_s: float = 5.0
    keep_alive_s: float = 10.0
    replay_tokens: int = 1 << 22


@dataclass(frozen=True)
class Loaded:
    """A model that can answer; `fingerprint` changes with anything that changes its answers."""

    planner: Planner
    model: TokenModel
    fingerprint: str


class Cancellable(Protocol):
    """A request that is being answered."""

    def abort(self) -> None: ...


class Service:
    """The state of one server. `phase` says what it is doing until it is "ready"."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.phase = "loading"
        self.percent = 0
        self.started = int(time.time())
        self.thread: ModelThread[Event | Finish | Progress] = ModelThread(
            settings.max_waiting, workers=settings.parallel
        )
        self.planning = asyncio.Semaphore(PARALLEL_PLANS)
        self.finishing = ThreadPoolExecutor(FINISHING, thread_name_prefix="finish")
        self.counters = Counters(settings.metrics_prefix, settings.names[0])
        self.fatal: Exception | None = None  # ends the server
        self.on_fatal: Callable[[Exception], object] = lambda reason: None
        self.replay = ReplayStore(settings.replay_tokens)
        self._running: dict[tuple[str, str], Cancellable] = {}
        self._loaded: Loaded | None = None
        self._warned: set[str] = set()

    def ready(self, planner: Planner, model: TokenModel, fingerprint: str) -> None:
        """Lets requests in; may be called from any thread."""
        self._loaded = Loaded(planner, model, fingerprint)
        self.phase, self.percent = "ready", 100

    def fail(self, reason: Exception) -> None:
        """Ends the server; may be called from any thread."""
        self.fatal = reason
        self.on_fatal(reason)

    @property
    def has_failed(self) -> bool:
        """Whether the model's engine stopped with an error."""
        return self._loaded is not None and self._loaded.model.failure is not None

    @property
    def is_stuck(self) -> bool:
        """Whether the model has work and has not shown for too long that it goes on."""
        busy_s = 0.0 if self._loaded is None else self._loaded.model.busy_s
        return busy_s > self.settings.health_timeout_s

    def drain(self) -> int:
        """Refuses new requests from now on; returns how many answers are still to finish."""
        self.phase = "draining"
        self.thread.drain()
        return self.thread.admitted

    @property
    def is_open(self) -> bool:
        """Whether new requests are let in: not once the server is told to stop."""
        return not self.thread.is_stopping

    def metrics(self) -> bytes:
        """Prometheus text: the server's, and the engine's once it is there."""
        engine = b"" if self._loaded is None else self._loaded.model.metrics.text()
        return engine + self.counters.text(self.phase)

    def register(self, tenant: str, names: Iterable[str], running: "Cancellable") -> None:
        """Makes a running request known to its tenant by its names, until `unregister`."""
        self._running |= {(tenant, name): running for name in names}

    def unregister(self, running: "Cancellable") -> None:
        self._running = {name: r for name, r in self._running.items() if r is not running}

    def cancel(self, tenant: str, name: str) -> bool:
        """Cancels a running request; False if there is none of that name (any more)."""
        running = self._running.get((tenant, name))
        if running is None:
            return False
        running.abort()
        return True

    def loaded(self) -> Loaded:
        """Returns the model.

        Raises:
            ApiError: 503, it is not there yet.
        """
        if self._loaded is None:
            raise not_ready(self.phase)
        return self._loaded

    async def read(self, request: Request, read: Callable[[Any, bool], T]) -> T:
        """Returns what `read` makes of a request's body; it also gets whether unknown fields count.

        Raises:
            ApiError: 4xx, something is wrong with it.
        """
        settings = self.settings
        limits = settings.max_body_bytes, settings.body_timeout_s
        return await read_json(
            request, *limits, lambda body: read(body, settings.refuses_unknown_fields)
        )

    def check_room(self) -> None:
        """Does nothing if a request would be taken now.

        Raises:
            ApiError: 429, too many wait; 503, the server is shutting down.
        """
        try:
            self.thread.check_room()
        except ApiError as error:
            if self._loaded is not None:
                self._loaded.model.metrics.count("admission_rejections", reason=error.code)
            raise

    def log_prompt(self, request_id: str, prompt_ids: Sequence[int]) -> None:
        """Writes a prompt to the log, if whoever runs the server wants that."""
        if self.settings.logs_prompts:
            text = self.loaded().planner.tokenizer.decode(prompt_ids)
            _log.info("id=%s prompt_text=%s", request_id, json.dumps(text, ensure_ascii=False))

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
        if self.settings.answers_any_name:
            return asked
        if asked not in names and asked not in MODE_OF_NAME:
            problem = f"The model {asked[:100]!r} is not served here; this server has: "
            raise ApiError(404, "model_not_found", problem + ", ".join(names), "model")
        return asked

    def check_key(self, request: Request) -> str:
        """Lets a request pass that carries one of the keys, or any if there are none.

        Returns:
            A name for the key, "" without keys; it is not the key.

        Raises:
            ApiError: 401.
        """
        keys, given = self.settings.api_keys, key_of(request)
        if keys and not is_one_of(given, keys):
            raise wrong_key("Send a valid API key as 'Authorization: Bearer KEY'.")
        return hashlib.sha256(given.encode()).hexdigest()[:16] if keys else ""


def key_of(request: Request) -> str:
    """Returns the key a request carries, "" if none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def is_one_of(given: str, keys: Iterable[str]) -> bool:
    """Whether `given` is one of the keys; takes as long whichever it is."""
    return any([hmac.compare_digest(given.encode(), key.encode()) for key in keys])
