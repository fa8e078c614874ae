"""What answers at the address of a job server: whatever a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SILENCE = b"the server keeps the connection and says nothing"
VERSION = {"version": "4", "ray_version": "2.52.0", "ray_commit": "0" * 40, "session_name": "session"}
VERSION_ANSWER = json.dumps(VERSION).encode()
JOB = {"type": "SUBMISSION", "submission_id": "avss-a", "status": "RUNNING", "entrypoint": "avss run"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer.

    Attributes:
        body: sent as it is; a web address is a redirect, `SILENCE` is none.
        length: what the header says of the body; None is the truth.
        repeat: how often the body is sent.
    """

    body: bytes = b""
    status: int = 200
    kind: str = "application/json"
    length: int | None = None
    repeat: int = 1


@dataclass
class JobServer:
    """A job server in this process.

    Attributes:
        answers: answers by path; ``*`` answers all other requests. A list has an answer for each request, and the last
            of them for all later ones.
        received: the bodies of requests by path.
    """

    port: int
    answers: dict[str, bytes | Answer | list[bytes | Answer]] = field(default_factory=dict)
    received: dict[str, bytes] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        """``http://HOST:PORT``."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str) -> Answer:
        """The answer to a request."""
        given = self.answers.get(path.rstrip("/"), self.answers.get("*", b"{}"))
        if isinstance(given, list):
            given = given.pop(0) if len(given) > 1 else given[0]
        return given if isinstance(given, Answer) else Answer(body=given)


@contextmanager
def job_server() -> Iterator[JobServer]:
    """A server in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(ConnectionError):  # the client has had enough
                self._answer(server.answer(self.path))

        def do_POST(self) -> None:
            server.received[self.path.rstrip("/")] = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_POST()

        def _answer(self, answer: Answer) -> None:
            if answer.body is SILENCE:
                server.over.wait()
                return
            leads_elsewhere = answer.body.startswith(b"http")
            self.send_response(302 if leads_elsewhere else answer.status)
            if leads_elsewhere:
                self.send_header("Location", answer.body.decode("latin-1"))
            self.send_header("Content-Type", answer.kind)
            length = len(answer.body) * answer.repeat if answer.length is None else answer.length
            self.send_header("Content-Length", str(length))
            self.end_headers()
            for _ in range(answer.repeat):
                self.wfile.write(answer.body)

        def log_message(self, *_: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = JobServer(http.server_port)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        http.shutdown()
        http.server_close()
