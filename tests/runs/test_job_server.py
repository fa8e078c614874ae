"""What answers at the address of a job server: another program, another version, text that a terminal would obey."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.command_line import avss

from avss_dist.errors import ConfigError, RunFailed
from avss_dist.runs import submission
from avss_dist.runs.job_file import read_job
from avss_dist.runs.submission import Cluster

Avss = Callable[..., subprocess.CompletedProcess[str]]
VERSION = {"version": "4", "ray_version": "2.52.0", "ray_commit": "0" * 40, "session_name": "session"}
JOB = {"type": "SUBMISSION", "submission_id": "avss-a", "status": "RUNNING", "entrypoint": "avss run"}
SILENCE = b"the server keeps the connection and says nothing"
HOSTILE = "\x1b]0;owned\x07\x1b[31m\u202e"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        answers: dict[str, bytes] = server.answers
        body = answers.get(self.path.rstrip("/"), answers.get("*", b"{}"))
        if body is SILENCE:
            server.over.wait()
            return
        self.send_response(302 if body.startswith(b"http") else 200)
        self.send_header("Location", body.decode("latin-1"))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.answers, made.over = {}, threading.Event()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.over.set()
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


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("command", [["status"], ["logs", "a"], ["logs", "a", "--follow"], ["stop", "a"]], ids=" ".join)
def test_a_server_that_never_answers_ends_a_command(command: list[str], silent: str) -> None:
    done = avss(*command, "--address", silent, "--answer-seconds", "0.2")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: The job server at {silent} broke off, or did not answer in time.\n")
    assert "larger --connect-seconds or --answer-seconds" in done.stderr


@pytest.mark.parametrize("call", ["jobs", "job", "logs", "follow", "stop", "submit"])
def test_every_request_has_a_limit(call: str, server: Any, tmp_path: Path) -> None:
    """The server answered first, and is silent from then on."""
    server.answers = {"/api/version": json.dumps(VERSION).encode(), "*": SILENCE}
    cluster = Cluster(f"http://127.0.0.1:{server.server_port}", answer_seconds=0.2)
    (tmp_path / "job.yaml").write_text("warehouse: /w\nmodels: [/m]\ncorpora: ['builtin:pydoc']\n")
    arguments = {"jobs": (), "submit": (read_job(tmp_path / "job.yaml", expand=False),)}
    with pytest.raises(RunFailed, match="did not answer in time"):
        list(getattr(cluster, call)(*arguments.get(call, ("avss-a",))))


def test_a_log_that_says_nothing_ends_with_its_job(server: Any) -> None:
    """The log's connection was lost without a word; the job has ended meanwhile."""
    jobs = "/api/jobs/avss-a"
    version, running = json.dumps(VERSION).encode(), json.dumps(JOB).encode()
    server.answers = {"/api/version": version, jobs: running, f"{jobs}/logs/tail": SILENCE}
    cluster = Cluster(f"http://127.0.0.1:{server.server_port}", answer_seconds=0.2)
    log = cluster.follow("avss-a")
    threading.Timer(0.5, server.answers.update, [{jobs: json.dumps({**JOB, "status": "SUCCEEDED"}).encode()}]).start()
    assert list(log) == []


def test_a_job_that_does_not_stop_is_reported(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = "/api/jobs/avss-a"
    server.answers = {"/api/version": json.dumps(VERSION).encode(), f"{jobs}/stop": b'{"stopped": true}'}
    server.answers[jobs] = json.dumps(JOB).encode()
    monkeypatch.setattr(submission, "STOP_SECONDS", 0.5)
    assert Cluster(f"http://127.0.0.1:{server.server_port}").stop("avss-a") == "it was signalled, and has not ended."


@pytest.mark.parametrize("redirected", ["/api/version", "/api/jobs"])
def test_a_redirect_is_not_followed(redirected: str, server: Any, silent: str) -> None:
    server.answers = {"/api/version": json.dumps(VERSION).encode(), redirected: f"{silent}/login".encode()}
    with pytest.raises(ConfigError, match=f"leads to another address: {silent}/login"):
        Cluster(f"http://127.0.0.1:{server.server_port}").jobs()
