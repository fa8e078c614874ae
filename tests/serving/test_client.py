"""Requests to servers: what is not an answer is explained, and a key goes to the named address alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from avss_dist.core.errors import ConfigError
from avss_dist.serving.client import KEY_VARIABLE, Client, ServerFailed, base_url, server_key

KEY = "sk-secret-0123456789"


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Answer every request by a function inside the block, and yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def reply(status: int, body: str, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a function that answers with a status and a text."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body.encode())

    return answer


def test_the_message_of_a_refusal_is_repeated() -> None:
    with (
        answering(reply(400, '{"error": {"message": "context too long"}}')) as url,
        pytest.raises(ServerFailed, match="400: context too long"),
    ):
        Client(url, 5.0).post("/completion", {})


def test_the_key_in_a_message_is_not_repeated() -> None:
    with answering(reply(400, f'{{"detail": "bad {KEY}"}}')) as url, pytest.raises(ServerFailed) as raised:
        Client(url, 5.0, KEY).post("/completion", {})

    assert KEY not in str(raised.value)


def test_a_redirect_is_not_followed() -> None:
    with (
        answering(reply(302, "", Location="http://elsewhere.example/")) as url,
        pytest.raises(ConfigError, match=r"redirects to http://elsewhere\.example/"),
    ):
        Client(url, 5.0, KEY).post("/completion", {})


def test_a_path_that_is_not_known_is_no_answer() -> None:
    with answering(reply(404, "{}")) as url:
        assert Client(url, 5.0).probe("/version") is None


def test_a_web_page_is_no_answer() -> None:
    with answering(reply(200, "<html>")) as url:
        assert Client(url, 5.0).probe("/version") is None


def test_a_web_page_is_refused_where_an_answer_is_needed() -> None:
    with answering(reply(200, "<html>")) as url, pytest.raises(ServerFailed, match="JSON"):
        Client(url, 5.0).post("/completion", {})


def test_a_server_that_does_not_answer_in_time_is_a_failure() -> None:
    with answering(lambda _: time.sleep(0.5)) as url, pytest.raises(ServerFailed, match=r"within 0\.1 seconds"):
        Client(url, 0.1).post("/completion", {})


def test_the_key_is_no_part_of_the_representation() -> None:
    assert KEY not in repr(Client("http://localhost:8000", 5.0, KEY))


def test_a_key_that_cannot_be_sent_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}\nother")
    with pytest.raises(ConfigError) as raised:
        server_key()

    assert KEY not in str(raised.value)


def test_the_path_of_the_interface_is_no_part_of_an_address() -> None:
    assert base_url("http://localhost:8000/v1/") == "http://localhost:8000"
