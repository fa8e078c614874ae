"""Repairs in experiments: fitted once and kept, evaluated in place as the checkpoint that `avss prune` would write."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.checkpoints import checkpoint_at, llama
from support.command_line import avss, in_one_line, mistake, succeed
from support.experiments import cell_times, comparable, experiment_of, run_job_in
from support.families import lively, tiny_model
from support.json_files import write_json_lines
from support.planning import prune
from support.tables import table_rows
from support.tiers import nightly
from tasks.test_truthfulqa import QUESTIONS

from avss_dist import evaluate
from avss_dist.core.errors import AvssError, ConfigError, DamagedFile
from avss_dist.core.intervention import NO_INTERVENTION, InterventionKey
from avss_dist.core.settings import Settings
from avss_dist.evaluation.events import CellUnderway, Event
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import plan_text_task
from avss_dist.evaluation.repairs import fit_repairs, plan_fits, read_repaired
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.change.patches import decode_patch, encode_patch, patch_changes
from avss_dist.models.checkpoint.loading import open_module
from avss_dist.models.forward import changing
from avss_dist.partition import group
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import MAX_COPIES, Placement, with_copies
from avss_dist.partition.replica import open_replica
from avss_dist.plans.plan import Plan
from avss_dist.pruning.repair.registry import read_repairs
from avss_dist.pruning.repair.repair import Repair
from avss_dist.reports.terminal import progress as avss_progress
from avss_dist.reports.terminal.progress import CellProgress
from avss_dist.runs.job_file import read_job
from avss_dist.runs.local import Executor, LocalExecutor
from avss_dist.runs.ray.executor import RayExecutor
from avss_dist.runs.threads import Submissions
from avss_dist.tasks.task import Cell
from avss_dist.warehouse.storage import Storage
from avss_dist.warehouse.store import Store

Done = tuple[Path, list[dict[str, Any]]]
Save = Callable[[Any, Path], Path]
TEXT = "builtin:pydoc"
READ = {"sequence_length": 32, "batch_size": 4, "sequences_per_shard": 4, "device": "cpu"}
TASK = f"perplexity:{TEXT}"
JOB = """
warehouse: {warehouse}
models: [{model}]
corpora: ["builtin:pydoc"]
settings: {{max_sequences: 12, sequence_length: 32, batch_size: 4, sequences_per_shard: 4, dtype: float32, device: cpu}}
experiment:
  tasks: ["perplexity:builtin:pydoc"]
  scores: [avss, block_influence]
  random: 2
  keep_ends: 0
  reversed: false
  leave_one_out: false
  repairs: [none, channel, map]
  repair_corpora: ["builtin:pydoc"]
  repair_skip_sequences: 12
  repair_max_sequences: 60
  max_sequences: 8
  skip_sequences: 72
"""


@pytest.fixture(scope="module")
def done(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A job, and the rows of its experiment."""
    return run_job_in(tmp_path_factory.mktemp("experiment"), JOB, deep)


def total_losses(executor: Executor, cells: Sequence[Cell]) -> dict[InterventionKey, float]:
    """Measure cells of a text, and return the sum of the losses of its tokens under each intervention."""
    losses: defaultdict[InterventionKey, float] = defaultdict(float)
    for cell, result in executor.run_cells(Submissions.of([cells])):
        assert not isinstance(result, AvssError)
        losses[cell.intervention.key] += float(result.rows[0].samples.sum())
    return losses


# In place, and as a checkpoint


@pytest.mark.parametrize(
    ("family", "partition"),
    [
        ("llama", "streaming"),
        *nightly(
            ("llama", "single"),
            ("llama", "device_map"),
            ("gemma3_text", "streaming"),
            ("gpt2", "single"),
            ("opt", "device_map"),
        ),
    ],
)
def test_a_patch_in_place_is_the_repaired_checkpoint(
    family: str, partition: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    """To the bit: fitted by a cell, kept in the warehouse, evaluated by another; then the model is as it was."""
    model = lively(tiny_model("causal", family))
    folder = save_checkpoint(model, tmp_path / "whole")
    layers = open_module(model).layers[0].name.rpartition(".")[0]
    checkpoint = checkpoint_at(folder)
    settings = Settings(**READ, max_sequences=60, dtype="float32")
    placement = Placement(partition=partition)
    repair = Repair(by="map", corpora=(TEXT,), settings=settings)
    text = Settings(**READ, skip_sequences=72, max_sequences=8, dtype="float32")
    task = plan_text_task(PlacedModel(checkpoint=checkpoint, settings=text, placement=placement), TEXT)
    less_folder = tmp_path / "less"
    with closing(LocalExecutor(settings)) as executor:
        placed = PlacedModel(checkpoint=checkpoint, settings=settings, placement=placement)
        (fit,) = plan_fits(placed, layers, ["map"], (TEXT,)).values()
        patches = fit_repairs(EvaluationSession(Store(tmp_path / "w"), executor), [(fit, [(1,)])])
        patch = patches[fit, (1,)]
        without = NO_INTERVENTION.without(1)
        repaired = replace(without, patch=patch)
        losses = total_losses(executor, task.cells([without, repaired, NO_INTERVENTION]))
        plan = Plan(model=str(folder), num_layers=3, layers=layers, drop=(1,))
        prune(folder, plan, less_folder, repair=repair)
        less = checkpoint_at(less_folder)
        pruned_task = plan_text_task(PlacedModel(checkpoint=less, settings=text, placement=Placement()), TEXT)
        expected = total_losses(executor, pruned_task.cells())
        again = total_losses(executor, task.cells())
    assert losses[repaired.key] == expected[NO_INTERVENTION.key]
    assert expected[NO_INTERVENTION.key] != losses[without.key]
    assert again == {NO_INTERVENTION.key: losses[NO_INTERVENTION.key]}
    assert [read_repaired(patch).record] == read_repairs(less_folder)


def test_a_patch_is_the_same_bytes_and_leaves_no_trace() -> None:
    layers = open_module(llama()).layers
    path = "mlp.down_proj.weight"
    before = layers[1].module.get_parameter(path).detach().clone()
    patch = {(1, path): before + 1, (0, path): before * 2}
    data = encode_patch(patch, "about")
    assert data == encode_patch(dict(reversed(patch.items())), "about")
    back, about = decode_patch(data)
    assert about == "about"
    assert back.keys() == patch.keys()
    for key in patch:
        assert torch.equal(back[key], patch[key])
    with pytest.raises(KeyError), changing(patch_changes(layers, back)):
        assert torch.equal(layers[1].module.get_parameter(path), before + 1)
        raise KeyError
    assert torch.equal(layers[1].module.get_parameter(path), before)


# Shared by copies of the model


def fit_by_copies(model: Path, copies: int, partition: str = "single", rows: int = 60) -> PlannedTask:
    """Return the fit of a repair that so many copies of a model share."""
    settings = Settings(**READ, max_sequences=rows, dtype="float32")
    placed = PlacedModel(checkpoint=checkpoint_at(model), settings=settings, placement=Placement(partition=partition))
    return plan_fits(placed, "layers", ["refit_all"], (TEXT,), copies)["refit_all"]


def test_no_more_copies_share_a_fit_than_its_text_has_batches(deep: Path) -> None:
    fits = [fit_by_copies(deep, copies) for copies in (1, 2, 99)]
    assert [fit.placement.ranks for fit in fits] == [1, 2, MAX_COPIES]
    assert len({fit.run_id() for fit in fits}) == 3
    assert fit_by_copies(deep, 99, rows=12).placement.ranks == 3
    assert fit_by_copies(deep, 2, "streaming").placement.ranks == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_copies_share_the_text_of_a_fit(deep: Path, tmp_path: Path) -> None:
    """Two workers, each with a part of the text, find what one does."""
    fit_alone = fit_by_copies(deep, 1)
    fit_together = fit_by_copies(deep, 2)
    drop = (2, 3, 5)
    with closing(RayExecutor(Execution(executor="ray", replicas=2), fit_alone.settings)) as executor:
        session = EvaluationSession(Store(tmp_path / "w"), executor)
        patches = fit_repairs(session, [(fit_alone, [drop]), (fit_together, [drop])])
    alone = read_repaired(patches[fit_alone, drop])
    together = read_repaired(patches[fit_together, drop])
    assert alone.tensors.keys() == together.tensors.keys()
    assert len(alone.record.cuts) >= 2
    for ours, theirs in zip(together.record.cuts, alone.record.cuts, strict=True):
        assert ours.ridges == theirs.ridges
        assert ours.error_before == pytest.approx(theirs.error_before, rel=1e-6)
        assert ours.error_after == pytest.approx(theirs.error_after, rel=1e-6)
    for name, weights in alone.tensors.items():
        torch.testing.assert_close(together.tensors[name], weights, rtol=1e-4, atol=1e-6)


def test_each_batch_is_of_one_copy(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(**READ, dtype="float32")
    placement = with_copies(Placement(), 3)
    taken = []
    for rank in range(3):
        monkeypatch.setattr(group, "rank_and_size", lambda rank=rank: (rank, 3))
        with closing(open_replica(checkpoint_at(deep), settings, placement, head=True)) as replica:
            assert replica.language_model is not None
            assert replica.language_model.reports == (rank == 0)
            taken.append([*replica.language_model.local_indices(7)])
    assert [*chain(*taken)] == [*range(7)]
    for batches in taken:
        assert batches


def test_a_fit_says_how_far_it_is(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal in the bar, elsewhere in a line now and then; one cell may take many minutes."""
    fit = fit_by_copies(deep, 1)
    events = list[Event]()
    session = EvaluationSession(Store(tmp_path), LocalExecutor(fit.settings), on_event=events.append)
    fit_repairs(session, [(fit, [(2, 3, 5)])])
    shares: dict[str, list[float]] = {}
    for event in events:
        if isinstance(event, CellUnderway):
            assert event.cell.intervention.removed == (2, 3, 5)
            shares.setdefault(event.step, []).append(event.share)
    assert [*shares] == [f"Repairing cut {number} of 4" for number in (1, 2, 3, 4)]
    for shares_of_cut in shares.values():
        assert shares_of_cut[0] == 0
        for share in shares_of_cut:
            assert 0 <= share < 1
    monkeypatch.setattr(avss_progress, "LOG_SECONDS", -1.0)
    shown = []
    for terminal in (True, False):
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=100, color_system=None)
        monkeypatch.setattr(avss_progress, "console", lambda console=console, **_: console)
        with CellProgress() as bar:
            for event in events:
                bar(event)
            if terminal:
                bar(CellUnderway(fit.cells([NO_INTERVENTION.without(2, 3, 5)])[0], "Repairing cut 2 of 4", 0.4))
        shown.append(output.getvalue())
    assert "deep without 3 layers: Repairing cut 2 of 4, 40%" in shown[0]
    assert not shown[1]
    lines = capsys.readouterr().err
    assert "deep: Repairing cut 1 of 4, 0%" in lines
    assert "deep: 1 of 1 evaluated" in lines


# As an axis of an experiment


@pytest.mark.nightly
def test_every_choice_is_evaluated_with_every_repair(done: Done) -> None:
    job, rows = done
    by_choice = {(row["method"], row["repair"]): row for row in rows if row["metric"] == "loss"}
    chosen = {"avss", "block influence", "last", "random 0", "random 1"}
    expected = {("whole model", None)}
    for method in chosen:
        expected |= {(method, None), (method, "channel"), (method, "map")}
    assert by_choice.keys() == expected
    for (method, repair), row in by_choice.items():
        first = row["drop"] == [*range(len(row["drop"]))]
        assert (row["patch"] is not None) == (repair is not None and not first), method
        assert row["retention"] == pytest.approx(np.exp(by_choice["whole model", None]["value"] - row["value"]))
        if first and method != "whole model":
            assert row["value"] == by_choice[method, None]["value"]
    assert by_choice["last", None]["drop"] == [5, 6]
    better = [method for method in chosen if by_choice[method, "map"]["value"] < by_choice[method, None]["value"]]
    assert len(better) >= 3
    stored = table_rows(read_job(job).warehouse, "experiments")
    patch_of_row = itemgetter("method", "repair", "patch")
    assert {patch_of_row(row) for row in stored} == {patch_of_row(row) for row in rows}


def pruned(model: Path, plan: Path, output: Path, repair: str, *more: Any) -> Any:
    """`avss prune`, repaired as in `JOB`."""
    return avss(
        *("prune", model, plan, "-o", output, "--repair", repair, "--repair-corpora", TEXT, "--skip-sequences", 12),
        *("--max-sequences", 60, "--sequence-length", 32, "--batch-size", 4, "--sequences-per-shard", 4),
        *("--dtype", "float32", "--device", "cpu", *more),
    )


@pytest.mark.nightly
@pytest.mark.parametrize("repair", ["channel", "map"])
def test_a_row_is_what_the_pruned_checkpoint_gives(repair: str, done: Done, deep: Path, tmp_path: Path) -> None:
    """`avss prune --repair` gives the same loss to the bit, and the same bytes with the fit of the experiment."""
    job, rows = done
    warehouse = read_job(job).warehouse
    (row,) = [r for r in rows if (r["method"], r["repair"], r["metric"]) == ("last", repair, "loss")]
    plan = tmp_path / "plan.yaml"
    fitted_here = tmp_path / "here"
    from_warehouse = tmp_path / "kept"
    Plan(model=str(deep), num_layers=8, layers="layers", drop=tuple(row["drop"])).write(plan)
    assert pruned(deep, plan, fitted_here, repair).exit_code == 0
    read = {**READ, "skip_sequences": 72, "max_sequences": 8, "dtype": "float32"}
    (evaluation,) = evaluate([fitted_here], tasks=[TASK], warehouse=tmp_path / "w", **read)
    assert evaluation.result.value == row["value"]
    assert evaluation.result.stderr == row["stderr"]
    tensors, _ = decode_patch(Storage(warehouse).read_patch(row["patch"]))
    assert {layer for layer, _ in tensors} == {4}
    times = cell_times(warehouse)
    done_again = pruned(deep, plan, from_warehouse, repair, "-w", warehouse, "--replicas", 1)
    assert done_again.exit_code == 0, done_again.stderr
    assert cell_times(warehouse) == times
    assert "the repaired weights (largest difference 0)" in done_again.stdout
    assert (from_warehouse / "model.safetensors").read_bytes() == (fitted_here / "model.safetensors").read_bytes()


@pytest.mark.nightly
def test_a_repaired_checkpoint_is_not_asked_what_it_was_fitted_on(deep: Path, tmp_path: Path) -> None:
    """Questions, of a file of them; those behind are asked."""
    file = tmp_path / "questions.jsonl"
    plan = tmp_path / "plan.yaml"
    questions = []
    for number in range(20):
        question = QUESTIONS[number % 3]
        questions.append({**question, "question": f"{number}: {question['question']}"})
    write_json_lines(file, questions)
    Plan(model=str(deep), num_layers=8, layers="layers", drop=(2,)).write(plan)
    read = ("--sequence-length", 64, "--batch-size", 4, "--dtype", "float32", "--device", "cpu")
    text = ("--repair", "channel", "--repair-corpora", f"truthfulqa:{file}", "--max-sequences", 8)
    less = tmp_path / "less"
    succeed("prune", deep, plan, "-o", less, *text, *read)
    asked = ("evaluate", less, "--tasks", f"truthfulqa:{file}", "-w", tmp_path / "w", *read)
    refused = mistake(*asked)
    assert re.search(r"2 of the 20 questions of truthfulqa:\S+ are prompts that the repair of", refused)
    assert avss(*asked, "--skip-questions", 8).exit_code == 0


@pytest.mark.nightly
def test_nothing_is_fitted_twice_and_what_is_lost_is_fitted_again(done: Done) -> None:
    job, rows = done
    warehouse = Path(read_job(job).warehouse)
    patches = sorted((warehouse / "patches").iterdir())
    times = cell_times(warehouse)
    written = {patch: patch.stat().st_mtime_ns for patch in patches}
    assert {patch.stem for patch in patches} == {row["patch"] for row in rows if row["patch"]}
    patches[0].unlink()
    _, again = experiment_of(job)
    times_after = cell_times(warehouse)
    assert times_after.keys() == times.keys()
    measured_again = [file for file in times if times_after[file] != times[file]]
    assert len(measured_again) == 1  # the cell of its fit
    assert [patch for patch in patches if patch.stat().st_mtime_ns != written[patch]] == patches[:1]
    assert comparable(again) == comparable(rows)


def test_a_patch_that_is_damaged_is_no_patch(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    key = storage.write_patch(b"weights")
    assert storage.patch_keys() == {key}
    assert storage.read_patch(key) == b"weights"
    (tmp_path / "patches" / f"{key}.safetensors").write_bytes(b"other")
    with pytest.raises(DamagedFile, match="not what was written"):
        storage.read_patch(key)


# What is refused


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (("skip_sequences: 72", "skip_sequences: 6"), "the scores of", "`skip_sequences` 12"),
        (("\n  skip_sequences: 72", "\n  skip_sequences: 40"), "the repair is fitted on", "`skip_sequences` 72"),
        (("repair_skip_sequences: 12", "repair_skip_sequences: 5"), "the scores of", "`repair_skip_sequences` 12"),
    ],
)
def test_the_three_texts_are_apart(
    change: tuple[str, str], message: str, hint: str, done: Done, tmp_path: Path
) -> None:
    job, _ = done
    same = tmp_path / "same.yaml"
    same.write_text(job.read_text().replace(*change))
    with pytest.raises(ConfigError, match=message) as refused:
        experiment_of(same)
    assert hint in str(refused.value)


# What it says


@pytest.mark.nightly
def test_the_table_and_the_verdict_tell_of_repairs(done: Done) -> None:
    job, _ = done
    told = succeed("run", job)
    words = in_one_line(told.stdout)
    assert "block influence + map" in words
    assert "last + channel" in words
    assert "(25%), repaired by map" in words
    assert "(25%), repaired by channel" in words
    assert "Of 2 random choices of as many layers, repaired by map," in words
    report = job.parent / "report.html"
    succeed("report", "-w", read_job(job).warehouse, "-o", report)
    assert "last + map" in report.read_text()
    assert "repaired by map" in report.read_text()
