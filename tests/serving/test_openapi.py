"""The description at /openapi.json, held against what the server does."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from dsv4_jax.serving import api
from dsv4_jax.serving.openapi import document
from tests.serving.fakes import FakeModel, answer, make_service
from tests.serving.live import serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(make_service(FakeModel(answer("fine")), parallel=2)) as address:
        yield address


def described() -> Iterator[tuple[str, str]]:
    for path, item in document("", False)["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield method.upper(), path


def test_every_route_is_described_and_nothing_else():
    app = api.create_app(make_service(FakeModel("x")))
    assert isinstance(app, api._Outermost)
    routes: list[Route] = app.app.routes  # type: ignore[attr-defined]
    served = {
        (method, route.path.replace(":path", ""))
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert set(described()) | {("GET", "/openapi.json")} == served


def test_keys_are_described():
    assert "security" not in document("1", False)
    assert document("1", True)["security"] == [{"key": []}]


def fuzz(address: str, path: str, mode: GenerationMode, count: int) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    (operation,) = [found.ok() for found in schema.get_all_operations() if found.ok().path == path]

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    check()


PATHS = sorted({path for _, path in described()} - {"/chat/completions", "/completions"})
BODIES = [path for path in PATHS if not path.startswith(("/beta", "/anthropic"))]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_a_few_requests(address, path, mode):
    fuzz(address, path, mode, 4)


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_many_requests(address, path, mode):
    has_body = ("POST", path) in set(described()) and "{" not in path
    if mode is GenerationMode.NEGATIVE and not has_body:
        pytest.skip("nothing can be wrong with it")
    fuzz(address, path, mode, 100 if has_body else 5)
    assert httpx.get(f"{address}/health").status_code == 200
