"""The experiment: methods and controls, each cell once, the score card, contrasts, and the options of a section."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import VOCABULARY, llama, one_thread
from support.command_line import avss, in_one_line, json_rows, mistake, succeed
from support.experiments import cell_times, comparable, experiment_of, run_job_in
from support.json_files import write_json_lines
from support.rows import only_row, values_in, where
from support.tables import evaluation_rows, run_rows, table_rows
from support.warehouses import identity_of
from tasks.test_truthfulqa import QUESTIONS

from avss_dist.analysis.contrast import contrast
from avss_dist.analysis.experiment_choices import Experiment, choices, describe_method, parse_score
from avss_dist.analysis.scorecard import best_readings, score_cards
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.evaluation.placed import PlannedTask
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.partition.placement import Placement
from avss_dist.plans.choice import Choice
from avss_dist.plans.run_layers import RunLayers
from avss_dist.requests import PlanRequest
from avss_dist.runs.job_file import read_job
from avss_dist.runs.result import Run
from avss_dist.studies.experiment import NOT_HASHED, Trial
from avss_dist.studies.search import search
from avss_dist.tasks.task import Measure, Task
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

Done = tuple[Path, list[dict[str, Any]]]
TASK = "perplexity:builtin:pydoc"
JOB = """
warehouse: {warehouse}
models: [{model}]
corpora: ["builtin:pydoc"]
settings: {{max_sequences: 12, sequence_length: 32, batch_size: 4, sequences_per_shard: 4, device: cpu}}
experiment:
  tasks: ["perplexity:builtin:pydoc"]
  shares: [0.25, 0.5]
  random: 2
  scores: [avss, block_influence, angular_distance, relative_magnitude, update_variance_ratio, greedy]
  search_max_sequences: 8
  max_sequences: 12
  skip_sequences: 12
"""


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    return save_checkpoint(llama(num_hidden_layers=6), tmp_path_factory.mktemp("models") / "deep-llama")


@pytest.fixture(scope="module")
def done(deep_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A warehouse, and the rows of its experiment."""
    return run_job_in(tmp_path_factory.mktemp("experiment"), JOB, deep_llama)


def test_every_method_is_compared_with_the_whole_model(done: Done) -> None:
    _, rows = done
    guess = only_row(rows, metric="chance")
    assert guess["value"] == pytest.approx(np.log(VOCABULARY))
    assert guess["drop"] == []
    losses = where(rows, metric="loss")
    assert len(losses) == len(rows) - 1
    by_choice = {(row["method"], row["share"]): row for row in losses}
    whole = by_choice["whole model", 0.0]
    assert whole["retention"] == 1.0
    expected = {"avss", "block influence", "angular distance", "relative magnitude", "update variance ratio"}
    searches = {"greedy search", "greedy search, ends kept"}
    expected |= {"leave one out"}
    reversed_controls = {f"{name}, reversed" for name in expected}
    with_ends = {f"{name}, ends kept" for name in expected}
    chances = {"random 0", "random 0, ends kept", "random 1", "random 1, ends kept"}
    controls = {"whole model", "last"} | reversed_controls | with_ends | chances
    assert values_in(losses, "method") == searches | expected | controls
    for (method, share), row in by_choice.items():
        if share:
            rise = row["value"] - whole["value"]
            assert len(row["drop"]) == round(6 * share), method
            assert row["retention"] == pytest.approx(np.exp(-rise))
            assert row["retention_low"] <= row["retention"] <= row["retention_high"]
        if "ends kept" in method:
            assert 0 not in row["drop"]
            assert 5 not in row["drop"]
    lowest = set(by_choice["avss", 0.5]["drop"])
    highest = set(by_choice["avss, reversed", 0.5]["drop"])
    assert lowest | highest == set(range(6))


def test_the_reading_of_avss_has_columns_of_its_own(done: Done) -> None:
    job, _ = done
    rows = table_rows(read_job(job).warehouse, "experiments")
    reading = itemgetter("score", "site", "recipe", "threshold", "threshold_kind")
    readings = {reading(row) for row in rows}
    assert ("avss", "block", "pooled", 1e-5, "absolute") in readings
    for score, *columns in readings:
        if score != "avss":
            assert columns == [None, None, None, None]


def test_leave_one_out_drops_the_layers_without_which_the_loss_is_least(done: Done) -> None:
    job, rows = done
    ablation = evaluation_rows(read_job(job).warehouse, "ablation:builtin:pydoc")
    losses = {tuple(row["drop"]): row["value"] for row in where(ablation, metric="loss")}
    losses.pop(())
    lowest = sorted(losses, key=lambda drop: losses[drop])[:3]
    row = only_row(rows, method="leave one out", share=0.5)
    assert {(layer,) for layer in row["drop"]} == set(lowest)


@pytest.mark.nightly
def test_a_search_finds_what_a_plan_finds(done: Done) -> None:
    """And measures nothing for it: their losses are the same."""
    job, rows = done
    warehouse = read_job(job).warehouse
    (run,) = run_rows(warehouse)
    cells = cell_times(warehouse)
    sizes = {"sequence_length": 32, "batch_size": 4, "sequences_per_shard": 4, "device": "cpu", "max_sequences": 8}
    request = PlanRequest(warehouse=warehouse, by="greedy", corpus=run["corpus"], **sizes)
    for name, ends in (("greedy search", 0), ("greedy search, ends kept", 1)):
        choice = Choice(by="greedy", share=0.5, first=ends, last=ends)
        plan, _ = search(request, run, choice)
        row = only_row(rows, method=name, share=0.5)
        assert tuple(row["drop"]) == plan.drop
    assert cell_times(warehouse) == cells


@pytest.mark.nightly
def test_what_is_lost_is_measured_again_and_each_cell_is_measured_once(done: Done) -> None:
    job, rows = done
    warehouse = read_job(job).warehouse
    times = cell_times(warehouse)
    lost = sorted(times)[:: len(times) // 3]
    for file in lost:
        file.unlink()
    _, again = experiment_of(job)
    times_after = cell_times(warehouse)
    assert times_after.keys() == times.keys()
    for file, time in times.items():
        assert (times_after[file] != time) == (file in lost)
    assert comparable(again) == comparable(rows)


def test_sets_with_sublayers_are_beside_the_point_of_a_score_card(done: Done, tmp_path: Path) -> None:
    """Scores are of layers: the same card, with such a set in the very evaluation that it reads."""
    job, _ = done
    warehouse = read_job(job).warehouse
    copy = shutil.copytree(warehouse, tmp_path / "w")
    (run_id,) = values_in(evaluation_rows(warehouse, TASK), "run_id")
    rows = where(table_rows(copy, "evaluations"), run_id=run_id)
    identity = identity_of(rows[0])
    for row in rows:
        for name in vars(identity):
            row.pop(name)
    whole = only_row(rows, metric="loss", drop=[])
    another = whole | {"drop": [1], "drop_parts": ["attention.0"]}
    Store(copy).write_rows("evaluations", identity, [*rows, another])
    (copied,) = where(table_rows(copy, "evaluations"), drop_parts=["attention.0"])
    assert copied["run_id"] == run_id
    assert json.dumps(cards_of(copy)) == json.dumps(cards_of(warehouse))


def cards_of(warehouse: str | Path) -> list[dict[str, Any]]:
    """The score cards of all runs of a warehouse."""
    cards = score_cards(Warehouse(warehouse), run_rows(warehouse))
    return cards.to_pylist()


def test_the_score_card_has_the_truth(done: Done) -> None:
    job, _ = done
    store = Warehouse(read_job(job).warehouse)
    cards = score_cards(store, store.runs().to_pylist())
    rows = cards.to_pylist()
    own = only_row(rows, score="loss")
    assert own["spearman_loss"] == pytest.approx(1.0)
    others = [row for row in rows if row["score"] != "loss"]
    assert len(values_in(others, "ceiling")) == 1
    for row in others:
        spearman = row["spearman_loss"]
        if spearman is not None and row["ceiling"] is not None:
            assert row["share_of_ceiling"] == pytest.approx(spearman / row["ceiling"])
            assert 0 <= row["misranked"] <= 1
    best = best_readings(cards).to_pylist()
    for site in ("update", "mlp"):
        spearmans = values_in(where(rows, site=site), "spearman_loss")
        best_of_site = only_row(best, site=site)
        assert best_of_site["spearman_loss"] == max(spearmans - {None})


def test_the_command_line_tells_the_verdict(done: Done) -> None:
    job, _ = done
    told = succeed("run", job)
    words = in_one_line(told.stdout)
    assert "without the 2 layers of the lowest AVSS (25%)" in words
    assert "Of 2 random choices" in words
    card = succeed("findings", "--truth", "-w", read_job(job).warehouse, "--format", "csv")
    assert "spearman_loss" in card.stdout


def test_methods_of_every_reading() -> None:
    scores = []
    for site in ("block", "update"):
        reading = {"site": site, "recipe": "pooled", "threshold": 1e-5, "threshold_kind": "absolute"}
        scores += [{"layer": layer, **reading} for layer in range(3)]
    no_controls = {"random": 0, "leave_one_out": False, "reversed": False, "keep_ends": 0}
    wanted = Experiment(tasks=("x",), scores=("avss:all",), **no_controls)
    methods = [describe_method(choice) for choice in choices(wanted, scores)]
    assert methods == ["avss", "avss (update, pooled, 1e-05)", "last"]
    _, reading = parse_score("avss:update:unit:0.1rms")
    assert reading == ("update", "unit", 0.1, "rms")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{}", "tasks is missing"),
        ("{tasks: [], shares: [0.5]}", "tasks must not be empty"),
        ("{tasks: [x], shares: [1.5]}", "shares must be less than 1, not 1.5"),
        ("{tasks: [x], scores: [avs]}", "Did you mean 'avss'"),
        ("{tasks: [x], scores: ['avss:blok:pooled:1e-5']}", "Did you mean 'block'"),
        ("{tasks: [x], randoms: 3}", "Did you mean 'random'"),
        ("{tasks: [x], random: many}", "random must be a whole number"),
        ("{tasks: [x], scores: [greed]}", "Unknown score 'greed'"),
        ("{tasks: [x], repairs: [map]}", "repairs map needs text to be fitted on"),
        ("{tasks: [x], repairs: []}", "repairs must not be empty"),
        ("{tasks: [x], repairs: [mapp], repair_corpora: [x]}", "Did you mean 'map'"),
    ],
)
def test_mistakes_in_a_section_are_told_with_their_line(tmp_path: Path, section: str, message: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"warehouse: w\nmodels: [m]\ncorpora: ['builtin:pydoc']\nexperiment: {section}\n")
    with pytest.raises(ConfigError, match=message) as error:
        read_job(job)
    assert ":4:" in str(error.value)


def test_a_job_without_an_experiment_is_a_mistake(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("warehouse: w\nmodels: [m]\ncorpora: ['builtin:pydoc']\n")
    with pytest.raises(ConfigError, match="has no section 'experiment'"):
        experiment_of(job)
    assert "--allow-overlap applies to an experiment" in mistake("run", job, "--allow-overlap")


@pytest.mark.parametrize(
    ("number", "options", "told"),
    [
        ("100000", [], "makes up to 400,045 evaluations (models: 1, sets of layers to drop: 400,044, repairs: 1"),
        ("100000000", ["--allow-many"], "400,000,045 evaluations are more than one command"),
    ],
)
def test_a_huge_experiment_says_its_size_first(number: str, options: list[str], told: str, tmp_path: Path) -> None:
    """The choices are neither made nor counted one by one; scoring has not begun."""
    job = tmp_path / "job.yaml"
    warehouse = tmp_path / "w"
    text = JOB.format(warehouse=warehouse, model="nowhere")
    job.write_text(text.replace("random: 2", f"random: {number}"))
    done = mistake("run", job, *options)
    assert told in done
    if not options:
        assert "Lower `random`" in done
        assert "More than 10,000 need --allow-many." in done
    assert not warehouse.exists()


def test_a_large_experiment_is_run_if_it_is_wanted(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    text = JOB.format(warehouse=tmp_path / "w", model="nowhere")
    job.write_text(text.replace("random: 2", "random: 3000") + "  allow_many: true\n")
    runs, rows = experiment_of(job)
    (run,) = runs
    assert run.status == "failed"
    assert not rows


@pytest.mark.parametrize("scores", [("avss", "block_influence"), ("avss:all",), ("avss:all", "avss")])
@pytest.mark.parametrize("keep_ends", [0, 1])
def test_choices_are_counted_as_methods_make_them(scores: tuple[str, ...], keep_ends: int) -> None:
    row = {"layer": 0, "site": "block", "recipe": "pooled", "threshold_kind": "absolute"}
    rows = [{**row, "threshold": threshold} for threshold in (1e-5, 1e-4, 1e-3)]
    experiment = Experiment(tasks=(TASK,), scores=scores, shares=(0.25, 0.5), random=3, keep_ends=keep_ends)
    number = len(choices(experiment, rows))
    assert number <= experiment.count_choices(3) <= number + 2 * 3  # a reading that is named twice counts once


# Layers that a contrast names, beside as many others

ASKING_JOB = """
warehouse: {warehouse}
models: [{model}]
corpora: ["truthfulqa:{questions}"]
settings: {{max_sequences: 8, sequence_length: 48, batch_size: 4, sequences_per_shard: 4, dtype: float32, device: cpu}}
experiment:
  tasks: ["truthfulqa:{questions}"]
  scores: [avss, contrast]
  shares: [0.34]
  random: 2
  reversed: false
  keep_ends: 0
  last: false
  leave_one_out: false
  skip_questions: 2
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions; the first two are contrasted."""
    file = tmp_path_factory.mktemp("text") / "t.jsonl"
    more = []
    for question in QUESTIONS[:2]:
        text = f"Again: {question['question']}"
        more.append({**question, "question": text})
    write_json_lines(file, [*more, *QUESTIONS])
    return file


@pytest.fixture(scope="module")
def asked(tiny_llama: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("interventions")
    job = ASKING_JOB.replace("{questions}", str(questions))
    return run_job_in(folder, job, tiny_llama)


@pytest.mark.nightly
def test_named_layers_are_beside_as_many_others(asked: Done) -> None:
    job, rows = asked
    warehouse = Warehouse(read_job(job).warehouse)
    (run,) = warehouse.runs().to_pylist()
    assert values_in(rows, "method") == {"whole model", "avss", "contrast", "random 0", "random 1"}
    assert values_in(rows, "metric") == {"mc1", "mc2", "chance"}
    for row in rows:
        if row["share"]:
            assert len(row["drop"]) == 1
    ranks = contrast(warehouse, run).layers.to_pylist()
    named = only_row(ranks, rank=1)
    by_contrast = only_row(rows, method="contrast", metric="mc2")
    assert by_contrast["drop"] == [named["layer"]]
    guess = only_row(rows, method="whole model", metric="chance")
    assert guess["value"] == pytest.approx(np.mean([2 / 3, 1 / 3, 2 / 4]))


@pytest.mark.nightly
def test_a_plan_is_not_asked_the_questions_that_its_layers_were_scored_on(
    asked: Done, questions: Path, tmp_path: Path
) -> None:
    job, rows = asked
    warehouse = read_job(job).warehouse
    plan = tmp_path / "plan.yaml"
    task = f"truthfulqa:{questions}"
    succeed("plan", "-w", warehouse, "--by", "avss", "--share", 0.34, "-o", plan)
    options = ["-w", warehouse, "--sequence-length", 48, "--batch-size", 4, "--sequences-per-shard", 4,
               "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    refused = mistake("evaluate", plan, "--tasks", task, *options)
    assert "2 of the 5 questions of truthfulqa:" in refused
    assert "Ask others: with --skip-questions 2" in refused
    with one_thread():
        shown = avss("evaluate", plan, "--tasks", task, "--skip-questions", 2, "--format", "json", *options)
    in_experiment = only_row(rows, method="avss", metric="mc2")
    of_plan = only_row(json_rows(shown.stdout), subject=str(plan), metric="mc2")
    assert of_plan["value"] == in_experiment["value"]


def test_a_reading_of_a_contrast_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a reading of AVSS") as caught:
        parse_score("contrast:block")
    assert "contrast:SITE:RECIPE:THRESHOLD" in str(caught.value.hint)


# Ids of experiments

OPTIONS: dict[str, Any] = {
    "scores": ("avss",),
    "shares": (0.25, 0.5),
    "random": 3,
    "reversed": False,
    "keep_ends": 2,
    "last": False,
    "keep_pattern": True,
    "leave_one_out": False,
    "search_max_sequences": 8,
    "repairs": ("map",),
    "repair_max_sequences": 8,
    "repair_skip_sequences": 8,
    "max_sequences": 8,
    "skip_sequences": 8,
    "skip_questions": 8,
    "limit": 8,
    "num_fewshot": 8,
}
"""Another value of each option of an experiment that can change a number."""


class Part(Measure):
    def __init__(self, text: str) -> None:
        self.text = text

    def identity(self) -> dict[str, Any]:
        return {"text": self.text}


def trial(*, run_id: str = "a-1", text: str = "text", dtype: str = "float32", **options: Any) -> Trial:
    """A trial of a model that is nowhere."""
    checkpoint = Checkpoint(name="org/a", source="hub", path="/a", revision="0" * 40)
    settings = Settings(dtype=dtype, device="cpu")
    placement = Placement()
    task = Task(name="t", parts=(Part(text),))
    planned = PlannedTask(checkpoint=checkpoint, settings=settings, task=task, placement=placement)
    experiment = Experiment(tasks=("t",), repair_corpora=("other.txt",), **options)
    run = Run(run_id=run_id, model="org/a", warehouse="w", status="done")
    layers = RunLayers(run={}, rows=[])
    return Trial(experiment=experiment, run=run, model=planned, layers=layers, corpus="", planned={"t": planned})


def test_an_experiment_has_the_id_that_warehouses_know() -> None:
    assert trial().experiment_id == "9e743f95c850cebff278"


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_an_experiment_changes_its_id(option: str) -> None:
    changed = {option: OPTIONS[option]}
    assert trial(**changed).experiment_id != trial().experiment_id


def test_every_option_of_an_experiment_that_can_change_a_number_is_tried() -> None:
    options = {field.name for field in fields(Experiment)}
    assert OPTIONS.keys() == options - {*NOT_HASHED}


@pytest.mark.parametrize("change", [{"run_id": "a-2"}, {"text": "other"}, {"dtype": "bfloat16"}])
def test_what_an_experiment_is_made_with_changes_its_id(change: dict[str, Any]) -> None:
    assert trial(**change).experiment_id != trial().experiment_id


def test_another_measurement_of_a_score_changes_the_id_of_an_experiment() -> None:
    measured = replace(trial(), measured_by={"damage": "a-damage"})
    assert measured.experiment_id != trial().experiment_id


def test_a_permission_does_not_change_the_id_of_an_experiment() -> None:
    assert trial(allow_many=True).experiment_id == trial().experiment_id


def test_an_experiment_is_one_file_with_one_id(done: Done) -> None:
    job, rows = done
    (file,) = Path(read_job(job).warehouse, "experiments").rglob("*.parquet")
    assert {row["experiment_id"] for row in rows} == {file.stem}
