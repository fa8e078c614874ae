"""Jobs and the server at their address: requests, refusals, answers of other programs, and servers that say nothing.

And what is sent with a job: every local file that it names, at places where its names find them.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray  # noqa: F401  (before a test sets a token: Ray looks for it when it is imported)
from support.command_line import avss
from support.job_server import JOB, SILENCE, VERSION_ANSWER, Answer, JobServer, job_server
from support.json_files import write_json

from avss_dist.core.errors import ConfigError, CorpusError, RunFailed
from avss_dist.core.process import UMASK
from avss_dist.corpus.sources import documents, local_files
from avss_dist.runs import submission
from avss_dist.runs.job_file import JobFile, read_job
from avss_dist.runs.submission import Cluster, _entrypoint, _local_files, _pack
from avss_dist.tasks.harness_files import task_files

HOSTILE = "\x1b]0;owned\x07\x1b[31m\u202e"
NOBODY = "http://127.0.0.1:9"
JOBS = "/api/jobs"


@pytest.fixture
def server() -> Iterator[JobServer]:
    with job_server() as started:
        started.answers = {"/api/version": VERSION_ANSWER}
        yield started


def write_job(path: str = "job.yaml", **keys: Any) -> str:
    """Write a job file, by default into the working directory."""
    job = {"warehouse": "/w", "models": ["/m"], "corpora": ["builtin:pydoc"], **keys}
    Path(path).parent.mkdir(exist_ok=True)
    write_json(Path(path), job)
    return path


def job(path: str = "job.yaml", **keys: Any) -> JobFile:
    return read_job(write_job(path, **keys), expand=False)


def refused(done: Any, *says: str) -> None:
    assert done.exit_code == 2, done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    for part in says:
        assert part in done.stderr


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files of every kind, and a text beside it."""
    folder = tmp_path / "project"
    (folder / "texts").mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "u.txt").write_text("beside")
    (folder / "texts" / "a.csv").write_text("text\none\n")
    (folder / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    (folder / "texts" / "c.txt.zst").write_bytes(b"")
    (folder / "questions.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)
    return folder


# What is sent, and what is refused before.


def test_what_is_sent_is_a_command_without_a_key(server: JobServer) -> None:
    """The text that the job names is uploaded with it."""
    server.answers |= {"*": [Answer(status=404), b"{}"], JOBS: b'{"job_id": "avss-a", "submission_id": "avss-a"}'}
    Path("a.txt").write_text("text")
    job = write_job(warehouse="s3://SOMEKEY:SOMESECRET@bucket/w", corpora=["a.txt"])
    done = avss("jobs", "submit", job, "--replicas", 2, "--address", server.address)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "avss-a\n", done.stderr
    sent = json.loads(server.received[JOBS])
    assert sent["entrypoint"] == "avss run job.yaml --replicas 2"
    assert sent["metadata"]["avss_warehouse"] == "s3://bucket/w"
    assert sent["metadata"]["avss_runs"] == "1"
    assert "SOMESECRET" not in json.dumps(sent)
    (package,) = [body for path, body in server.received.items() if path.startswith("/api/packages")]
    assert b"a.txt" in package
    assert b"job.yaml" in package


def test_the_umask_of_who_submits_a_job_is_sent(server: JobServer) -> None:
    server.answers |= {"*": [Answer(status=404), b"{}"], JOBS: b'{"job_id": "avss-a", "submission_id": "avss-a"}'}
    before = os.umask(0o027)
    try:
        avss("jobs", "submit", write_job(warehouse="s3://bucket/w"), "--address", server.address)
    finally:
        os.umask(before)
    assert json.loads(server.received[JOBS])["runtime_env"]["env_vars"] == {UMASK: "027"}


@pytest.mark.parametrize(
    ("keys", "options", "says"),
    [
        ({}, [], [f"No job server answers at {NOBODY}"]),
        ({}, ["--address", "127.0.0.1:9"], ["Write http://HEAD:8265"]),
        ({}, ["--replicas", 0], ["--replicas must be at least 1, not 0."]),
        ({"settings": {"dtype": "half"}, "corpora": [1, [2]]}, [], ["job.yaml has 2 problems", "job.yaml:1: "]),
    ],
)
def test_a_mistake_is_told_before_a_job_is_sent(keys: dict[str, Any], options: list[Any], says: list[str]) -> None:
    refused(avss("jobs", "submit", write_job(**keys), "--address", NOBODY, *options), *says)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"warehouse": "w", "models": ["here", "other/step-*"]},
            [
                "the warehouse 'w' would be lost",
                "line 1: the model 'here' is a relative path",
                "'other/step-*' is a relative path",
            ],
        ),
        ({"corpora": ["texts/a.cvs"]}, ["'texts/a.cvs' is not a corpus source"]),
    ],
)
def test_a_job_that_means_this_machine_is_refused(keys: dict[str, Any], says: list[str], server: JobServer) -> None:
    Path("here").mkdir()
    refused(avss("jobs", "submit", write_job(**keys), "--address", server.address), *says)
    assert not server.received


@pytest.mark.parametrize("command", [["list"], ["logs"], ["logs", "--follow"], ["stop"]], ids=" ".join)
def test_an_unknown_job_is_named(command: list[str], server: JobServer) -> None:
    server.answers["*"] = Answer(status=404, body=b"Job avss-expired does not exist")
    done = avss("jobs", *command, "avss-expired", "--address", server.address)
    refused(done, f"{server.address} has no job 'avss-expired'", f"avss jobs list --address {server.address} lists")


def test_a_refused_token_is_told_and_not_shown(
    server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = {"*": Answer(status=403, body=b"Forbidden")}
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    refused(avss("jobs", "list", "--address", server.address), "requires a token", "RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    done = avss("jobs", "list", "--address", server.address)
    refused(done, "refuses this token")
    assert "0" * 64 not in done.stderr


def test_a_refused_address_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads of this process read it, too."""
    given = {"RAY_ADDRESS": "127.0.0.1:7", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8", "RAY_AUTH_TOKEN": "0" * 64}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ConfigError, match="No job server answers"):
        Cluster(NOBODY)
    assert {name: os.environ.get(name) for name in given} == given
    assert "RAY_AUTH_MODE" not in os.environ


# What answers.


@pytest.mark.parametrize(
    "answers",
    [
        {"*": b"[]"},
        {"*": b"<html>a router</html>"},
        {"/api/version": VERSION_ANSWER, JOBS: b'{"jobs": 3}'},
        {"/api/version": VERSION_ANSWER, JOBS: b'[{"status": "DANCING"}]'},
    ],
    ids=["list", "html", "other", "status"],
)
def test_another_server_is_an_error_without_a_traceback(answers: dict[str, Any], server: JobServer) -> None:
    server.answers = answers
    done = avss("jobs", "list", "--address", server.address)
    assert done.exit_code in (1, 2)
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_a_terminal_obeys_no_job(server: JobServer) -> None:
    job = {"type": "SUBMISSION", "submission_id": f"avss-{HOSTILE}", "status": "SUCCEEDED", "entrypoint": f"x{HOSTILE}"}
    server.answers[JOBS] = json.dumps([job]).encode()
    done = avss("jobs", "list", "--address", server.address)
    assert done.exit_code == 0
    assert done.stderr == ""
    assert "owned" in done.stdout
    assert not set(HOSTILE) & {"\x1b", "\x07", "\u202e"} & set(done.stdout)


REASON = "'nowhere' is no folder."
LOG = f"12:00:00 a line\nError: {REASON}\nRun avss doctor.\nError: a later one\n"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (LOG, REASON),
        ("a-0: failed. There is no memory.\n1 run: 1 failed.\n", "a-0: failed. There is no memory."),
        ("nothing that tells", "Job entrypoint command failed with exit code 2, last available logs"),
    ],
    ids=["error", "failed run", "unknown"],
)
def test_a_failed_job_is_listed_with_the_first_error_of_its_message(
    message: str, shown: str, server: JobServer
) -> None:
    says = f"Job entrypoint command failed with exit code 2, last available logs\n{message}"
    times = {"start_time": 1_000_000, "end_time": 1_042_400}
    job = {**JOB, "status": "FAILED", "message": says, "driver_exit_code": 2, **times}
    server.answers[JOBS] = json.dumps([job]).encode()
    done = avss("jobs", "list", "--address", server.address, "--format", "json")
    listed = json.loads(done.stdout)
    assert listed["message"] == shown
    assert listed["seconds"] == 42


def test_a_job_of_a_cluster_whose_clock_is_ahead_has_run_for_no_time(server: JobServer) -> None:
    later = int((time.time() + 3600) * 1000)
    server.answers[JOBS] = json.dumps([{**JOB, "status": "RUNNING", "start_time": later}]).encode()
    done = avss("jobs", "list", "--address", server.address, "--format", "json")
    assert json.loads(done.stdout)["seconds"] == 0


def test_a_job_that_does_not_stop_is_reported(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    running = json.dumps(JOB).encode()
    server.answers |= {f"{JOBS}/avss-a/stop": b'{"stopped": true}', f"{JOBS}/avss-a": running}
    monkeypatch.setattr(submission, "STOP_SECONDS", 0.1)
    assert Cluster(server.address).stop("avss-a") == "it was signalled, and has not ended."


# A server that says nothing.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSS_ANSWER_SECONDS", "0.2")


def test_a_limit_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSS_CONNECT_SECONDS", "soon")
    with pytest.raises(ConfigError, match="AVSS_CONNECT_SECONDS is 'soon': expected a number of seconds"):
        Cluster(NOBODY)


@pytest.mark.parametrize("call", ["jobs", "job", "logs", "follow", "stop", "submit"])
@pytest.mark.usefixtures("impatient")
def test_every_request_has_a_limit(call: str, server: JobServer) -> None:
    """The server answers the first request, and is silent from then on."""
    server.answers["*"] = SILENCE
    arguments = {"jobs": (), "submit": (job(),)}
    with pytest.raises(RunFailed, match="did not answer in time"):
        cluster = Cluster(server.address)
        list(getattr(cluster, call)(*arguments.get(call, ("avss-a",))))


def test_a_log_is_followed_until_its_job_ends(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[bytes | Answer]
    states = [json.dumps({**JOB, "status": status}).encode() for status in ("RUNNING", "RUNNING", "SUCCEEDED")]
    logs: list[bytes | Answer] = [json.dumps({"logs": text}).encode() for text in ("one\n", "one\n", "one\ntwo\n")]
    server.answers |= {f"{JOBS}/avss-a": states, f"{JOBS}/avss-a/logs": logs}
    monkeypatch.setattr(submission, "STATE_SECONDS", 0.01)
    assert list(Cluster(server.address).follow("avss-a")) == ["one\n", "", "two\n"]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_lost_while_a_log_is_followed_leaves_what_to_do(server: JobServer) -> None:
    server.answers |= {f"{JOBS}/avss-a": [json.dumps(JOB).encode(), SILENCE], f"{JOBS}/avss-a/logs": b'{"logs": ""}'}
    done = avss("jobs", "logs", "avss-a", "--address", server.address, "--follow")
    assert done.exit_code == 1
    assert "did not answer in time" in done.stderr
    assert f"avss jobs logs avss-a --address {server.address} --follow" in done.stderr
    assert "not what it has stored: submit it again to resume" in done.stderr


@pytest.mark.parametrize("answer", [SILENCE, Answer(body=b"the head is restarting", status=502)])
@pytest.mark.usefixtures("impatient")
def test_a_job_whose_submission_got_no_answer_is_named(answer: bytes | Answer, server: JobServer) -> None:
    """It may run."""
    server.answers |= {"*": b"{}", JOBS: answer}
    with pytest.raises(RunFailed) as caught:
        Cluster(server.address).submit(job())
    assert caught.value.hint
    assert "The job may have started as avss-job-" in caught.value.hint
    assert f"avss jobs list --address {server.address}" in caught.value.hint


# What is sent with a job.


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("texts/a.csv:text", ["texts/a.csv"]),
        ("texts/b.jsonl.gz", ["texts/b.jsonl.gz"]),
        ("texts/c.txt.zst", ["texts/c.txt.zst"]),
        ("texts/*.gz", None),
        ("texts/*.jsonl.gz", ["texts/b.jsonl.gz"]),
        ("../other/u.txt", ["../other/u.txt"]),
        ("truthfulqa:questions.jsonl:3", ["questions.jsonl"]),
        ("hf:texts", ["texts/a.csv", "texts/b.jsonl.gz", "texts/c.txt.zst"]),
        ("hf:org/name:config", []),
        ("wikitext2", []),
        ("builtin:pydoc", []),
        ("/shared/a.txt", []),
        ("~/a.txt", []),
        ("s3://bucket/a.txt", []),
        ("absent.txt", None),
        ("../absent/*.txt", None),
    ],
)
def test_every_kind_of_source_knows_its_files(source: str, files: list[str] | None) -> None:
    if files is None:
        with pytest.raises(CorpusError, match=r"no such file|is not a corpus source"):
            local_files(source)
    else:
        assert local_files(source) == files


def test_tasks_know_their_files() -> None:
    """Texts, questions, and of a task file what it includes, its data and the modules of its functions."""
    Path("tasks").mkdir()
    Path("tasks/common.yaml").write_text("dataset_path: json\n")
    Path("tasks/helpers.py").write_text("def shown(doc):\n    return doc\n")
    task = "include: common.yaml\ntask: t\ndoc_to_text: !function helpers.shown\n"
    Path("tasks/t.yaml").write_text(f"{task}dataset_kwargs: {{data_files: {{test: ../../other/u.txt}}}}\n")
    assert task_files("perplexity:../other/u.txt") == ["../other/u.txt"]
    assert task_files("truthfulqa:questions.jsonl") == ["questions.jsonl"]
    named = ["tasks/common.yaml", "tasks/t.yaml", "tasks/helpers.py", "tasks/../../other/u.txt"]
    assert task_files("tasks/t.yaml") == named
    assert task_files("hellaswag") == task_files("/shared/t.yaml") == []


def test_names_that_lead_out_of_the_folder_mean_the_same_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repair = {"repairs": ["map"], "repair_corpora": ["texts/b.jsonl.gz"]}
    packed_job = job(
        "jobs/job.yaml",
        corpora=["texts/a.csv", "../other/*.txt"],
        experiment={"tasks": ["truthfulqa:questions.jsonl"], **repair},
    )
    package = tmp_path / "package"
    directory, name = _pack(packed_job, package)
    assert _entrypoint(directory, name, ["--replicas=2"]) == "cd project && exec avss run job.yaml --replicas=2"
    monkeypatch.chdir(package / directory)
    assert [*documents("../other/*.txt"), *documents("texts/a.csv")] == ["beside", "one"]
    files = ["../other/u.txt", "questions.jsonl", "texts/a.csv", "texts/b.jsonl.gz"]
    assert _local_files(read_job(name, expand=False)) == files


def test_a_name_that_goes_above_the_root_stays_in_the_package(tmp_path: Path) -> None:
    up = "/".join([".."] * (len(Path.cwd().parts) + 3))
    source = f"{up}{tmp_path}/other/u.txt"
    _pack(job(corpora=[source]), tmp_path / "package")
    assert [path.name for path in tmp_path.glob("package/**/*.txt")] == ["u.txt"]


def test_no_file_takes_the_place_of_the_job_file(tmp_path: Path) -> None:
    """A task file has its name."""
    Path("job.yaml").write_text("task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\n")
    packed_job = job("jobs/job.yaml", experiment={"tasks": ["job.yaml"]})
    package = tmp_path / "package"
    directory, name = _pack(packed_job, package)
    assert directory == "."
    assert name == "job-job.yaml"
    assert (package / name).read_text() == packed_job.path.read_text()
    assert (package / "job.yaml").read_text() == Path("job.yaml").read_text()


def test_a_job_file_with_a_hyphen_is_no_option(tmp_path: Path) -> None:
    directory, name = _pack(job("./-x.yaml"), tmp_path / "package")
    assert _entrypoint(directory, name, ["--fresh"]) == "avss run ./-x.yaml --fresh"


def test_files_that_are_missing_are_named_before_anything_is_sent() -> None:
    """They are named together."""
    corpora = ["absent.txt", "texts/a.csv", "../other/absent-*.csv"]
    refused_job = job(corpora=corpora, experiment={"tasks": ["perplexity:gone.txt", "no.yaml"]})
    with pytest.raises(ConfigError) as caught:
        _local_files(refused_job)
    lines = caught.value.message.splitlines()
    told = [
        "job.yaml cannot be submitted.",
        "line 1: absent.txt: no such file.",
        "line 1: ../other/absent-*.csv: no such file.",
        "tasks: gone.txt: no such file.",
        "tasks: There is no task file no.yaml.",
    ]
    assert len(lines) == len(told)
    assert all(line.startswith(said) for line, said in zip(lines, told, strict=True))


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avss_dist.runs.submission.MOST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"The files of job.yaml have \d+ bytes; at most 10 can be sent with a job"):
        _local_files(job(corpora=["texts/a.csv", "texts/b.jsonl.gz"]))
