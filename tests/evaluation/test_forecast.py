"""`--dry-run`: what a command would do is what it then does, and nothing is computed or written before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import as_words, files, json_rows, mistake, succeed

from avss_dist import ablate, evaluate, score, shrink
from avss_dist.evaluation.events import CellsStarted
from avss_dist.evaluation.forecast import Forecast
from avss_dist.requests import AblateRequest, DistillRequest, EvaluateRequest, ShrinkRequest
from avss_dist.studies.ablate import forecast_ablation
from avss_dist.studies.distill_forecast import forecast_distillation
from avss_dist.studies.evaluate import forecast_evaluation
from avss_dist.studies.shrink_forecast import forecast_shrinking

TEXT = "builtin:pydoc"
TASK = f"perplexity:{TEXT}"
READ: dict[str, Any] = {
    "max_sequences": 8,
    "sequence_length": 16,
    "batch_size": 2,
    "sequences_per_shard": 4,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture
def plan(tiny_llama: Path, tmp_path: Path) -> Path:
    """A plan without layer 1, in a file with a space in its name."""
    file = tmp_path / "a plan.yaml"
    file.write_text(yaml.safe_dump({"model": str(tiny_llama), "layers": "layers", "num_layers": 3, "drop": [1]}))
    return file


def counted(forecast: Forecast) -> tuple[int, int]:
    """The evaluations of all steps, and those of them that are stored."""
    return sum(step.evaluations for step in forecast.steps), sum(step.stored for step in forecast.steps)


def forecast_plan(plan: Path, warehouse: Path) -> Forecast:
    return forecast_evaluation(EvaluateRequest([str(plan)], tasks=[TASK], warehouse=warehouse, **READ))


def test_an_evaluation_measures_what_was_forecast(plan: Path, tmp_path: Path) -> None:
    started: list[tuple[int, int]] = []

    def note(event: object) -> None:
        if isinstance(event, CellsStarted):
            started.append((len(event.cells), event.done))

    forecast = forecast_plan(plan, tmp_path / "w")
    evaluate([str(plan)], tasks=[TASK], warehouse=tmp_path / "w", on_event=note, **READ)
    assert started == [counted(forecast)]


def test_what_is_stored_is_not_forecast_again(plan: Path, tmp_path: Path) -> None:
    evaluate([str(plan)], tasks=[TASK], warehouse=tmp_path / "w", **READ)
    evaluations, stored = counted(forecast_plan(plan, tmp_path / "w"))
    assert stored == evaluations


def test_passes_are_batches_of_each_part_under_each_change(plan: Path, tmp_path: Path) -> None:
    step = forecast_plan(plan, tmp_path / "w").steps[0]
    assert (step.evaluations, step.passes, step.tokens) == (4, 8, 2 * 8 * 16)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 4 * (1 + 3)),
        ({"sublayers": True, "leave_one_out": False}, 4 * (1 + 2 * 3)),
        ({"gradients": True, "leave_one_out": False}, 4 * (1 + 2)),
        ({"shapley": 2, "leave_one_out": False}, 4 * 2 * (3 + 1)),
    ],
)
def test_passes_of_an_ablation(options: dict[str, Any], passes: int, tiny_llama: Path, tmp_path: Path) -> None:
    request = AblateRequest(str(tiny_llama), corpus=TEXT, warehouse=tmp_path / "w", **READ, **options)
    assert [step.passes for step in forecast_ablation(request).steps] == [passes]


def test_an_ablation_measures_what_was_forecast(tiny_llama: Path, tmp_path: Path) -> None:
    started: list[tuple[int, int]] = []

    def note(event: object) -> None:
        if isinstance(event, CellsStarted):
            started.append((len(event.cells), event.done))

    request = AblateRequest(str(tiny_llama), corpus=TEXT, warehouse=tmp_path / "w", **READ)
    forecast = forecast_ablation(request)
    ablate(str(tiny_llama), corpus=TEXT, warehouse=tmp_path / "w", on_event=note, **READ)
    assert started == [counted(forecast)]


def test_no_time_is_known_in_an_empty_warehouse(plan: Path, tmp_path: Path) -> None:
    assert forecast_plan(plan, tmp_path / "w").seconds is None


def test_the_time_is_that_of_a_run_of_the_same_shape(tiny_llama: Path, plan: Path, tmp_path: Path) -> None:
    run = score(tiny_llama, corpus=TEXT, warehouse=tmp_path / "w", **READ)
    assert forecast_plan(plan, tmp_path / "w").steps[0].reference == run.run_id


@pytest.mark.nightly
def test_the_time_is_that_of_stored_losses_before_that_of_runs(plan: Path, tiny_llama: Path, tmp_path: Path) -> None:
    run = score(tiny_llama, corpus=TEXT, warehouse=tmp_path / "w", **READ)
    other = {**READ, "skip_sequences": 40}
    evaluate([str(tiny_llama)], tasks=[TASK], warehouse=tmp_path / "w", **other)
    step = forecast_plan(plan, tmp_path / "w").steps[0]
    assert step.reference not in ("", run.run_id)


@pytest.mark.parametrize("command", ["evaluate", "ablate", "shrink"])
def test_a_dry_run_leaves_the_folder_as_it_is(command: str, plan: Path, tiny_llama: Path, tmp_path: Path) -> None:
    words = {
        "evaluate": [plan, "--tasks", TASK],
        "ablate": [tiny_llama, "--corpus", TEXT],
        "shrink": [tiny_llama, "--corpus", TEXT, "--repair", "none", "-o", tmp_path / "smaller"],
    }[command]
    before = files(tmp_path)
    told = succeed(command, *words, "--dry-run", "-w", tmp_path / "new warehouse", *as_words(READ))
    assert files(tmp_path) == before
    assert "to measure; the time is not known." in told.stdout


SHRINK: dict[str, Any] = {**READ, "max_sequences": 32, "repair": "channel", "corpus": TEXT, "speed": False, "first": 1}
"""With the first layer protected: a cut before it has nothing to repair, and fewer evaluations than are forecast."""


@pytest.mark.nightly
def test_shrinking_measures_what_was_forecast(tiny_llama: Path, tmp_path: Path) -> None:
    evaluations = 0

    def note(event: object) -> None:
        nonlocal evaluations
        if isinstance(event, CellsStarted):
            evaluations += len(event.cells) - event.done

    forecast = forecast_shrinking(ShrinkRequest(str(tiny_llama), output=str(tmp_path / "out"), **SHRINK))
    shrink(str(tiny_llama), output=tmp_path / "out", on_event=note, **SHRINK)
    assert sum(step.evaluations - step.stored for step in forecast.steps if step.step != "scores") == evaluations


@pytest.mark.nightly
def test_stored_scores_are_not_forecast_again(tiny_llama: Path, tmp_path: Path) -> None:
    shrink(str(tiny_llama), output=tmp_path / "out", warehouse=tmp_path / "w", **SHRINK)
    request = ShrinkRequest(str(tiny_llama), output=str(tmp_path / "again"), warehouse=tmp_path / "w", **SHRINK)
    scores, damage = forecast_shrinking(request).steps[:2]
    assert (scores.stored, damage.stored) == (scores.evaluations, damage.evaluations)


@pytest.mark.nightly
def test_a_greedy_search_is_forecast_by_its_sets(tiny_llama: Path, tmp_path: Path) -> None:
    options = {**SHRINK, "by": "greedy", "share": 0.34}
    request = ShrinkRequest(str(tiny_llama), output=str(tmp_path / "out"), **options)
    assert "greedy search, 2 sets at most" in [step.step for step in forecast_shrinking(request).steps]


def test_the_time_of_a_fit_is_more_than_that_of_its_passes(tiny_llama: Path, tmp_path: Path) -> None:
    score(tiny_llama, corpus=TEXT, warehouse=tmp_path / "w", **READ)
    options = {**SHRINK, "max_sequences": 64, "share": 0.34}
    seconds = {}
    for repair in ("none", "refit", "borrow"):
        of_repair = {**options, "repair": repair, "warehouse": str(tmp_path / "w"), "repair_corpora": [TEXT]}
        forecast = forecast_shrinking(ShrinkRequest(str(tiny_llama), output=str(tmp_path / "out"), **of_repair))
        seconds[repair] = {step.step: step.seconds / step.tokens for step in forecast.steps if step.seconds}
    of_pass = seconds["none"][f"{TASK}, without layers"]
    assert of_pass < seconds["refit"]["repair refit"] < seconds["borrow"]["repair borrow"]


def test_a_training_step_takes_four_passes(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"teacher": str(tiny_llama), "output": str(tmp_path / "out"), "tokens": 640, "sequence_length": 16}
    request = DistillRequest(str(tiny_llama), self_texts=3, device="cpu", **options)
    _, training, _ = forecast_distillation(request).steps
    assert (training.evaluations, training.passes, training.tokens) == (40, 160, 4 * 640)


def test_a_distillation_forecasts_the_text_that_its_tokens_take(tiny_llama: Path, tmp_path: Path) -> None:
    """Ten rows that are trained on, and four that are held out."""
    options = {"teacher": str(tiny_llama), "output": str(tmp_path / "out"), "tokens": 160, "sequence_length": 16}
    writing, *_ = forecast_distillation(DistillRequest(str(tiny_llama), held_out=4, device="cpu", **options)).steps
    assert (writing.evaluations, writing.passes, writing.tokens) == (14, 16, 14 * 16)


def test_a_dry_run_of_a_distillation_leaves_the_folder_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    words = [tiny_llama, "--teacher", tiny_llama, "--corpora", TEXT, "-o", tmp_path / "out", "--self-texts", "0"]
    reading = ["--sequence-length", "16", "--max-sequences", "40", "--held-out", "4", "--tokens", "64"]
    told = succeed("distill", *words, *reading, "--dry-run", "--device", "cpu")
    assert not list(tmp_path.iterdir())
    assert "training" in told.stdout


def test_an_output_that_is_not_free_is_refused_in_a_dry_run(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    mistake("shrink", tiny_llama, "--corpus", TEXT, "-o", tmp_path / "out", "--dry-run", *as_words(READ))


def test_json_has_a_row_for_each_step(plan: Path, tmp_path: Path) -> None:
    words = ["evaluate", plan, "--tasks", TASK, "--dry-run", "-w", tmp_path / "w", *as_words(READ)]
    rows = json_rows(succeed(*words, "--format", "json").stdout)
    assert [row["stored"] for row in rows] == [0, 0]


def test_mistakes_are_found_as_in_the_command(tiny_llama: Path, tmp_path: Path) -> None:
    words = [tiny_llama, "--tasks", "perplexity:nowhere.txt", "-w", tmp_path / "w", *as_words(READ)]
    assert mistake("evaluate", *words, "--dry-run") == mistake("evaluate", *words)
