"""What is sent with a job: every local file that it names, at places where its names find them; or a refusal."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from avss_dist.core.errors import ConfigError, CorpusError
from avss_dist.corpus.sources import documents, local_files
from avss_dist.runs.job_file import JobFile, read_job
from avss_dist.runs.submission import _entrypoint, _local_files, _pack
from avss_dist.tasks.harness_files import task_files


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files of every kind, and a text beside it."""
    folder = tmp_path / "project"
    (folder / "texts").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "u.txt").write_text("beside")
    (folder / "texts" / "a.csv").write_text("text\none\n")
    (folder / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    (folder / "texts" / "c.txt.zst").write_bytes(b"")
    (folder / "questions.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)
    return folder


def job(path: str = "job.yaml", corpora: tuple[str, ...] = ("builtin:pydoc",), **experiment: Any) -> JobFile:
    raw = {"warehouse": "/w", "models": ["org/a"], "corpora": corpora}
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps({**raw, **({"experiment": experiment} if experiment else {})}))
    return read_job(path, expand=False)


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
    made = job("jobs/job.yaml", ("texts/a.csv", "../other/*.txt"), tasks=["truthfulqa:questions.jsonl"], **repair)
    directory, name = _pack(made, tmp_path / "package")
    assert _entrypoint(directory, name, ["--replicas=2"]) == "cd project && exec avss run job.yaml --replicas=2"
    monkeypatch.chdir(tmp_path / "package" / directory)
    assert [*documents("../other/*.txt"), *documents("texts/a.csv")] == ["beside", "one"]
    files = ["../other/u.txt", "questions.jsonl", "texts/a.csv", "texts/b.jsonl.gz"]
    assert _local_files(read_job(name, expand=False)) == files


def test_a_name_that_goes_above_the_root_stays_in_the_package(tmp_path: Path) -> None:
    up = "/".join([".."] * (len(Path.cwd().parts) + 3))
    source = f"{up}{tmp_path}/other/u.txt"
    _pack(job(corpora=(source,)), tmp_path / "package")
    assert [path.name for path in tmp_path.glob("package/**/*.txt")] == ["u.txt"]


def test_no_file_takes_the_place_of_the_job_file(tmp_path: Path) -> None:
    """A task file has its name."""
    Path("job.yaml").write_text("task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\n")
    made = job("jobs/job.yaml", tasks=["job.yaml"])
    directory, name = _pack(made, tmp_path / "package")
    assert (directory, name) == (".", "job-job.yaml")
    assert (tmp_path / "package" / name).read_text() == made.path.read_text()
    assert (tmp_path / "package" / "job.yaml").read_text() == Path("job.yaml").read_text()


def test_a_job_file_with_a_hyphen_is_no_option(tmp_path: Path) -> None:
    directory, name = _pack(job("./-x.yaml"), tmp_path / "package")
    assert _entrypoint(directory, name, ["--fresh"]) == "avss run ./-x.yaml --fresh"


def test_files_that_are_missing_are_named_before_anything_is_sent() -> None:
    """They are named together."""
    made = job(corpora=("absent.txt", "texts/a.csv", "../other/absent-*.csv"), tasks=["perplexity:gone.txt", "no.yaml"])
    with pytest.raises(ConfigError) as caught:
        _local_files(made)
    lines = caught.value.message.splitlines()
    told = [
        "job.yaml cannot be submitted.",
        "line 1: absent.txt: no such file.",
        "line 1: ../other/absent-*.csv: no such file.",
        "tasks: gone.txt: no such file.",
        "tasks: There is no task file no.yaml.",
    ]
    assert len(lines) == len(told) and all(line.startswith(said) for line, said in zip(lines, told, strict=True))


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avss_dist.runs.submission.MOST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"The files of job.yaml have \d+ bytes; at most 10 can be sent with a job"):
        _local_files(job(corpora=("texts/a.csv", "texts/b.jsonl.gz")))
