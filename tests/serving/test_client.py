"""The standard-library client: what it makes of chunks, refusals and broken connections."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dsv4_jax.serving.client import Answer, Client, ServerError
from tests.serving.fakes import FakeModel, answer, make_service
from tests.serving.live import serving

ASK = {"messages": [{"role": "user", "content": "q"}]}


@contextmanager
def scripted(status: int, body: bytes, **headers: str) -> Iterator[str]:
    """Serves one reply to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def ask(url: str) -> Answer:
    made = Answer()
    for _ in Client(url).chat(made, ASK):
        pass
    return made


def test_an_answer_is_put_together():
    with serving(make_service(FakeModel(answer("four", reasoning="2 + 2")))) as url:
        made = Answer()
        parts = list(Client(url).chat(made, ASK))
        assert "".join(text for kind, text in parts if kind == "reasoning") == "2 + 2"
        assert "".join(text for kind, text in parts if kind == "content") == "four"
        assert made.finish_reason == "stop"
        assert made.usage is not None and made.usage["completion_tokens"] == 11
        assert made.first_s is not None and 0 < made.first_s <= made.total_s


def test_a_warning_is_kept():
    with scripted(200, b"data: [DONE]\n\n", x_dsv4_warning="A small context.") as url:
        assert ask(url).warning == "A small context."


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (429, b'{"error": {"message": "The queue is full."}}', "The queue is full."),
        (502, b"<html>Bad gateway</html>", "status 502: <html>Bad gateway"),
        (500, b"[]", r"status 500: \[\]"),
    ],
)
def test_refusals(status, body, problem):
    with scripted(status, body) as url, pytest.raises(ServerError, match=problem) as caught:
        ask(url)
    assert caught.value.status == status


def test_an_error_in_the_stream():
    body = b'data: {"error": {"message": "It broke."}}\n\ndata: [DONE]\n\n'
    with scripted(200, body) as url, pytest.raises(ServerError, match="It broke."):
        ask(url)


def test_a_stream_that_ends_too_soon():
    with scripted(200, b": keep-alive\n\n") as url, pytest.raises(ServerError, match="broke off"):
        ask(url)


def test_nobody_there():
    with pytest.raises(ServerError, match="no connection to") as caught:
        ask("http://127.0.0.1:1")
    assert caught.value.status is None


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:8000", "http://", ""])
def test_wrong_addresses(url):
    with pytest.raises(ValueError, match="must look like http://"):
        Client(url)
