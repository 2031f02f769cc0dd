"""Tokenizers as fixtures; the official one is skipped where its package is not installed."""

import pytest

from dsv4_jax.tokenizer import Tokenizer
from tests.encoding import support


@pytest.fixture(scope="session")
def official() -> Tokenizer:
    return support.official_tokenizer()


@pytest.fixture(scope="session")
def demo() -> Tokenizer:
    return support.demo_tokenizer()


@pytest.fixture(scope="session", params=["demo", "official"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    build = {"demo": support.demo_tokenizer, "official": support.official_tokenizer}
    return build[request.param]()
