"""A job server that dies while a job is submitted: the job may run, and the error says under which name."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.job_server import SILENCE, VERSION_ANSWER, Answer, job_server

from avss_dist.core.errors import RunFailed
from avss_dist.runs.job_file import read_job
from avss_dist.runs.submission import Cluster


@pytest.mark.parametrize("answer", [SILENCE, Answer(body=b"the head is restarting", status=502)])
def test_a_job_whose_submission_got_no_answer_is_named(
    answer: bytes | Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVSS_ANSWER_SECONDS", "0.2")
    (tmp_path / "job.yaml").write_text("warehouse: /w\nmodels: [/m]\ncorpora: ['builtin:pydoc']\n")
    with job_server() as server:
        server.answers = {"/api/version": VERSION_ANSWER, "*": b"{}", "/api/jobs": answer}
        cluster = Cluster(server.address)
        with pytest.raises(RunFailed) as caught:
            cluster.submit(read_job(tmp_path / "job.yaml", expand=False))
    assert caught.value.hint and "The job may have started as avss-job-" in caught.value.hint
    assert f"avss jobs list --address {server.address}" in caught.value.hint
