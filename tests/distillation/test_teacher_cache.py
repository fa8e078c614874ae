"""A teacher whose predictions are measured once: the same students as with the teacher beside them, and its error."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import avss, files
from support.distilling import SMALL

import avss_dist
from avss_dist.core.errors import ConfigError
from avss_dist.distillation.distill import Distilled
from avss_dist.distillation.events import Preparing
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.warehouse.reader import Warehouse

pytestmark = pytest.mark.nightly

VOCABULARY = 512  # of the tiny models


@pytest.fixture
def distill(student: Path, teacher: Path, corpus: Path, tmp_path: Path) -> Callable[..., Distilled]:
    """Distill the tiny student with predictions in ``tmp_path / "warehouse"``."""

    def run(output: str, **options: Any) -> Distilled:
        given = {"student": student, "teacher": teacher, "corpora": [corpus], "warehouse": tmp_path / "warehouse"}
        return avss_dist.distill(**given | SMALL | options, output=tmp_path / output)

    return run


def test_the_whole_vocabulary_gives_the_student_of_the_teacher_itself(
    distill: Callable[..., Distilled], other_corpus: Path, tmp_path: Path
) -> None:
    beside = distill("beside", watch=[other_corpus])
    cached = distill("cached", watch=[other_corpus], teacher_top=10**6)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("beside", "cached")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-4) for name in weights[0])
    assert any(
        not torch.equal(load_file(tmp_path / "beside" / "model.safetensors")[n], w) for n, w in weights[1].items()
    )
    for one, other in zip(beside.record.curve, cached.record.curve, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-3)
        assert other.kept == pytest.approx(one.kept, rel=1e-3)
        assert one.missed is None and other.missed == {"trained.txt": 0.0}
    assert [text.others for text in cached.record.texts] == [0.0, None]
    assert beside.memory.teacher > 0 == cached.memory.teacher
    assert "teacher" not in cached.memory.describe()
    assert "teacher_top" not in (tmp_path / "beside" / "avss_distill.json").read_text()


def test_the_error_of_few_tokens_is_what_the_divergence_lacks(distill: Callable[..., Distilled]) -> None:
    whole = distill("beside").record.before
    done = distill("cached", teacher_top=4)
    before, text = done.record.before, done.record.texts[0]
    assert before.missed is not None and text.others is not None and 0.05 < text.others < 0.95
    assert before.kept == pytest.approx(whole.kept, rel=1e-5)
    assert before.loss < whole.loss
    assert before.loss + before.missed["trained.txt"] == pytest.approx(whole.loss, rel=0.02)
    assert done.record.after.loss < before.loss
    assert f"beyond its 4 most probable ones have {text.others:.2%} of the probability" in str(done.record.describe())


def test_predictions_are_measured_once(
    distill: Callable[..., Distilled], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other_corpus: Path
) -> None:
    """Other students of the same teacher and text read them; a file that is cut off or gone is measured again."""
    passes, measure = [], LanguageModel.top_predictions

    def count(*arguments: Any, **options: Any) -> Any:
        passes.append(arguments)
        return measure(*arguments, **options)

    monkeypatch.setattr(LanguageModel, "top_predictions", count)
    events: list[Any] = []
    first = distill("first", teacher_top=8, watch=[other_corpus], on_event=events.append)
    told = [event.step for event in events if isinstance(event, Preparing) and "up to" in event.step]
    assert passes and len(set(told)) == 1 and told[0].endswith("kB")
    stored = files(tmp_path / "warehouse" / "predictions")
    passes.clear()
    distill("second", teacher_top=8, watch=[other_corpus], train="near")
    assert not passes and files(tmp_path / "warehouse" / "predictions") == stored
    damaged, gone, *_ = sorted((tmp_path / "warehouse" / "predictions").rglob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    gone.unlink()
    assert distill("third", teacher_top=8).record.after.loss == first.record.after.loss
    assert passes and files(tmp_path / "warehouse" / "predictions") == stored


def test_only_shards_that_training_reads_are_measured(distill: Callable[..., Distilled], tmp_path: Path) -> None:
    distill("short", teacher_top=2, tokens=32, batch_size=1, evaluations=1)
    tables = [Warehouse(tmp_path / "warehouse").table("predictions", columns=["run_id", "part", "drawn_ids"])]
    distill("long", teacher_top=2)
    tables.append(Warehouse(tmp_path / "warehouse").table("predictions", columns=["run_id", "part", "drawn_ids"]))
    parts = [{(row["run_id"], row["part"]) for row in table.to_pylist() if not row["drawn_ids"]} for table in tables]
    assert len(parts[0]) == 1 and parts[0] < parts[1]


def test_the_warehouse_lists_and_queries_predictions(distill: Callable[..., Distilled], tmp_path: Path) -> None:
    distill("out", teacher_top=3)
    run = avss(
        "query", "-w", tmp_path / "warehouse", "--format", "csv", "SELECT DISTINCT len(token_ids) FROM predictions"
    )
    assert run.exit_code == 0 and run.output.split()[-1] == "3", run.output
    query = "SELECT max(list_sum(list_transform(log_probs, lambda p: exp(p))) + exp(others)) AS total FROM predictions"
    assert Warehouse(tmp_path / "warehouse").sql(query)["total"][0].as_py() == pytest.approx(1, abs=1e-4)
    assert avss("ls", "evaluations", "-w", tmp_path / "warehouse").exit_code == 0


def test_too_little_space_is_told_before_anything_is_measured(
    distill: Callable[..., Distilled], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ConfigError, match=r"tokens take up to .* MB .*, 134 bytes for each; there are 1 kB") as caught:
        distill("out", teacher_top=16)
    assert "teacher_top" in str(caught.value)
    assert not [*(tmp_path / "warehouse").rglob("*.parquet")]


def test_options_that_exclude_each_other(distill: Callable[..., Distilled]) -> None:
    with pytest.raises(ConfigError, match="`hidden_loss` needs the teacher's hidden states, which no cache holds"):
        distill("out", teacher_top=16, hidden_loss=0.1)
    with pytest.raises(ConfigError, match="`partition` has no effect without a cache of the teacher's predictions"):
        distill("out", partition="streaming")


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize("options", [{"partition": "streaming"}, {"executor": "ray", "replicas": 2}])
def test_a_teacher_that_is_streamed_or_on_workers_predicts_the_same(
    distill: Callable[..., Distilled], tmp_path: Path, options: dict[str, Any]
) -> None:
    distill("whole", teacher_top=8)
    stored = files(tmp_path / "warehouse" / "predictions")
    distill("other", teacher_top=8, warehouse=tmp_path / "elsewhere", **options)
    assert files(tmp_path / "elsewhere" / "predictions") == stored
