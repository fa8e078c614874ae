"""Whatever answers at the address of a job server, a command that asks it ends in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import HOSTILE, damaged_bytes, fuzzed, hold_with_one_error, mutated, values
from support.job_server import JOB, VERSION, VERSION_ANSWER, Answer, JobServer, job_server

pytestmark = pytest.mark.nightly

TIMES = {"start_time": 1_700_000_000_000, "end_time": 1_700_000_001_000}
ENDED = {**JOB, **TIMES, "status": "FAILED", "driver_exit_code": 1}
JOBS = "/api/jobs"
WHOLE: dict[str, Any] = {
    "/api/version": VERSION,
    JOBS: [JOB, ENDED],
    f"{JOBS}/avss-a": ENDED,
    f"{JOBS}/avss-a/logs": {"logs": "a line\nanother\n"},
    f"{JOBS}/avss-a/stop": {"stopped": True},
}
COMMANDS = [
    *(
        ["jobs", "list"],
        ["jobs", "list", "avss-a"],
        ["jobs", "stop", "avss-a"],
        ["jobs", "submit", "job.yaml"],
        ["jobs", "submit", "job.yaml", "--follow"],
    ),
    *(["jobs", "logs", "avss-a"], ["jobs", "logs", "avss-a", "--follow"]),
]


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with job_server() as made:
        yield made


@st.composite
def answers(draw: Any, whole: Any) -> Answer:
    """An answer: as it should be, of other values or types, damaged, half, empty, huge, or of another server."""
    body = json.dumps(draw(mutated(whole) | values()), default=str).encode()
    kind = draw(st.sampled_from(["json", "json", "damaged", "half", "huge", "redirect", "text", "status"]))
    status = draw(st.sampled_from([200, 201, 204, 302, 304, 400, 401, 403, 404, 500, 503]))
    if kind == "damaged":
        return Answer(body=damaged_bytes(draw, json.dumps(whole).encode()))
    if kind == "half":
        return Answer(body=body[: len(body) // 2], length=len(body) + draw(st.sampled_from([0, 1, 2**40])))
    if kind == "huge":
        return Answer(body=draw(st.sampled_from([b"[" * 5000, b"9" * 5000, b"x" * 2**20])), repeat=70)
    if kind == "redirect":
        return Answer(body=draw(st.sampled_from([b"http://127.0.0.1:9/", b"https://", b"http://\xff/"])))
    if kind == "text":
        text = draw(st.sampled_from(HOSTILE)).encode(errors="replace")
        return Answer(body=text, kind=draw(st.sampled_from(["text/html", "", "application/json; charset=utf-16"])))
    return Answer(body=body, status=status if kind == "status" else 200)


@fuzzed(40)
@given(data=st.data())
def test_whatever_answers_a_command_ends_in_order(
    data: Any, server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVSS_ANSWER_SECONDS", "0.3")
    for name in ("STOP_SECONDS", "POLL_SECONDS"):
        monkeypatch.setattr(f"avss_dist.runs.submission.{name}", 0.1)
    Path("job.yaml").write_text("warehouse: /w\nmodels: [/m]\ncorpora: ['builtin:pydoc']\n")
    server.answers = {path: data.draw(answers(whole)) for path, whole in WHOLE.items()}
    server.answers["*"] = data.draw(answers({"submission_id": "avss-a"}))
    if data.draw(st.integers(0, 4)):
        server.answers["/api/version"] = VERSION_ANSWER
    command = data.draw(st.sampled_from(COMMANDS))
    hold_with_one_error(*command, "--address", server.address)
