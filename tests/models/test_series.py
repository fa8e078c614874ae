"""Checkpoints of a training: what their names tell, and which revisions of a hub a pattern means."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file
from support.command_line import avss

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoints import Checkpoint, TrainingPoint, matching_revisions, training_point
from avss_dist.runs.job_file import JobError, read_job
from avss_dist.warehouse.reader import Warehouse

FORMAT = {"format": "pt"}

BRANCHES = [
    "main",
    "stage1-step9000-tokens19B",
    "stage1-step1000-tokens3B",
    "stage1-step10000-tokens21B",
    "stage2-step5",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step3000", TrainingPoint("org/a@step*", 3000, None)),
        ("step-240000", TrainingPoint("org/a@step-*", 240_000, None)),
        ("stage1-step140000-tokens294B", TrainingPoint("org/a@stage1-step*-tokens*", 140_000, 294 * 10**9)),
        ("global_step20k", TrainingPoint("org/a@global_step*", 20_000, None)),
        ("ckpt_358", TrainingPoint("org/a@ckpt_*", 358, None)),
        ("iter_0001000", TrainingPoint("org/a@iter_*", 1000, None)),
        ("tokens-1.5T", TrainingPoint("org/a@tokens-*", None, 1_500_000_000_000)),
        ("12B-tokens", TrainingPoint("org/a@*-tokens", None, 12 * 10**9)),
        ("main", TrainingPoint("org/a", None, None)),
        ("v2", TrainingPoint("org/a", None, None)),
        ("", TrainingPoint("org/a", None, None)),
        ("footstep3", TrainingPoint("org/a", None, None)),
    ],
)
def test_a_revision_tells_when_it_was_saved(name: str, expected: TrainingPoint) -> None:
    checkpoint = Checkpoint(name="org/a", source="hub", path="/x", revision="f00", revision_name=name)
    assert training_point(checkpoint) == expected


def test_folders_beside_each_other_are_a_series() -> None:
    def saved_in(path: str) -> Checkpoint:
        return Checkpoint(name=path.removeprefix("/data/"), source="folder", path=path, revision="")

    saved = [training_point(saved_in(f"/data/run7/checkpoint-{n}")) for n in (500, 1000)]
    assert [one.step for one in saved] == [500, 1000]
    assert {one.series for one in saved} == {"/data/run7/checkpoint-*"}
    assert training_point(saved_in("/data/models/llama")) == TrainingPoint("models/llama", None, None)


def test_a_series_of_folders_drifts_in_the_order_of_its_steps(tiny_llama: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "run7" / f"checkpoint-{step}" for step in (1000, 500)]
    for seed, folder in enumerate(folders):
        shutil.copytree(tiny_llama, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({name: tensor * (1 + seed) for name, tensor in tensors.items()}, folder / "model.safetensors", FORMAT)
    options = ("--max-sequences", 4, "--sequence-length", 16, "--sites", "block", "--executor", "local")
    done = avss("score", *folders, "--corpus", "builtin:pydoc", "-w", tmp_path / "w", *options)
    assert done.exit_code == 0, done.stderr
    rows = Warehouse(tmp_path / "w").sql("@drift").to_pylist()
    assert {row["series"] for row in rows} == {f"{tmp_path}/run7/checkpoint-*"}
    assert [row["training_step"] for row in rows if row["layer"] == 0] == [500, 1000]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that knows the branches of one model."""

    class Refs(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.startswith("/api/models/org/a/refs")
            refs = {"branches": [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": "0"} for b in BRANCHES]}
            body = json.dumps(refs | {"converts": [], "tags": []} if found else {"error": "not found"}).encode()
            self.send_response(200 if found else 404)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            for header, value in (headers if found else headers | {"X-Error-Code": "RepoNotFound"}).items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    yield endpoint
    server.shutdown()
    server.server_close()


def test_a_pattern_means_the_branches_that_match_in_the_order_of_their_numbers(
    hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert matching_revisions("org/a", "stage1-*") == [BRANCHES[2], BRANCHES[1], BRANCHES[3]]
    with pytest.raises(ModelError, match=r"No revision of 'org/a' matches 'stage9-\*'") as refused:
        matching_revisions("org/a", "stage9-*")
    assert "There are: main, stage1-step1000-tokens3B" in str(refused.value)
    with pytest.raises(ModelError, match="'org/none' is no folder here"):
        matching_revisions("org/none", "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelError, match="cannot be fetched from the hub"):
        matching_revisions("org/a", "*")


def test_a_job_takes_revisions_by_pattern(hub: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "warehouse: w\nmodels:\n- model: org/a\n  revisions: [stage1-*, stage2-step5]\ncorpora: [builtin:pydoc]\n"
    )
    names = [f"org/a@{BRANCHES[i]}" for i in (2, 1, 3, 4)]
    assert [spec.model for spec in read_job(job).specs] == names
    job.write_text("warehouse: w\nmodels:\n- model: org/a\n  revisions: [stage9-*]\ncorpora: [builtin:pydoc]\n")
    with pytest.raises(JobError, match=r"job\.yaml:4: No revision of 'org/a' matches 'stage9-\*'"):
        read_job(job)
