"""What answers at the address of a job server: another program, another version, text that a terminal would obey."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Avss = Callable[..., subprocess.CompletedProcess[str]]
VERSION = {"version": "4", "ray_version": "2.52.0", "ray_commit": "0" * 40, "session_name": "session"}
HOSTILE = "\x1b]0;owned\x07\x1b[31m\u202e"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers: dict[str, bytes] = self.server.answers  # type: ignore[attr-defined]
        body = answers.get(self.path.rstrip("/"), answers.get("*", b"{}"))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.answers = {}
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(
    "answers",
    [
        {"*": b"[]"},
        {"*": b"<html>a router</html>"},
        {"/api/version": json.dumps(VERSION).encode(), "/api/jobs": b'{"jobs": 3}'},
        {"/api/version": json.dumps(VERSION).encode(), "/api/jobs": b'[{"status": "DANCING"}]'},
    ],
    ids=["list", "html", "other", "status"],
)
def test_another_server_is_an_error_without_a_traceback(answers: dict[str, bytes], server: Any, run_avss: Avss) -> None:
    server.answers = answers
    done = run_avss("status", "--address", f"http://127.0.0.1:{server.server_port}")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr


def test_a_terminal_obeys_no_job(server: Any, run_avss: Avss) -> None:
    job = {"type": "SUBMISSION", "submission_id": f"avss-{HOSTILE}", "status": "SUCCEEDED", "entrypoint": f"x{HOSTILE}"}
    server.answers = {"/api/version": json.dumps(VERSION).encode(), "/api/jobs": json.dumps([job]).encode()}
    done = run_avss("status", "--address", f"http://127.0.0.1:{server.server_port}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "owned" in done.stdout and not set(HOSTILE) & {"\x1b", "\x07", "\u202e"} & set(done.stdout)
