"""Repairs in experiments: fitted once and kept, evaluated in place as the checkpoint that `avss prune` would write."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.checkpoints import llama, one_thread
from support.command_line import avss
from support.commands import Command
from support.tiers import nightly
from support.experiments import experiment_of, run_job_in
from support.families import lively, tiny_model
from support.processes import wait_until
from tasks.test_truthfulqa import QUESTIONS

from avss_dist import evaluate
from avss_dist.analysis.verdict import verdicts
from avss_dist.core.errors import ConfigError, CorpusError, DamagedFile
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.settings import Execution, Settings
from avss_dist.evaluation.events import CellUnderway, Event
from avss_dist.evaluation.repairs import fit_repairs, plan_fits, read_repaired
from avss_dist.evaluation.session import EvaluationSession, PlacedModel, PlannedTask
from avss_dist.evaluation.tasks import text_task
from avss_dist.executors.local import LocalExecutor
from avss_dist.executors.ray.executor import RayExecutor
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import open_module
from avss_dist.models.patching import decode_patch, encode_patch, patched
from avss_dist.partition import copies as avss_copies
from avss_dist.partition.base import Placement
from avss_dist.partition.copies import MAX_COPIES, with_copies
from avss_dist.partition.open import open_replica
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.methods import Experiment, Method, methods
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.repair import Repair
from avss_dist.report.terminal import progress as avss_progress
from avss_dist.report.terminal.progress import CellProgress
from avss_dist.runs.job_file import JobError, read_job
from avss_dist.warehouse.patches import Patches
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.storage import Storage
from avss_dist.warehouse.store import Store

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
def deep(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Path:
    return save_checkpoint(lively(llama(num_hidden_layers=8)), tmp_path_factory.mktemp("models") / "deep")


@pytest.fixture(scope="module")
def done(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A job, and the rows of its experiment."""
    return run_job_in(tmp_path_factory.mktemp("experiment"), JOB, deep)


def losses_of(folder: Path) -> dict[str, float]:
    """What a checkpoint loses on the text that the experiment evaluates on."""
    with one_thread():
        (found,) = evaluate(
            [str(folder)],
            tasks=[TASK],
            warehouse=folder.parent / "evaluated",
            skip_sequences=72,
            max_sequences=8,
            dtype="float32",
            **READ,
        )
    return {"value": found.result.value, "stderr": found.result.stderr}


# In place, and as a checkpoint


@pytest.mark.parametrize(
    ("family", "partition"),
    [
        *(("llama", partition) for partition in ("single", "device_map", "streaming")),
        *nightly(("gemma3_text", "streaming"), ("gpt2", "single"), ("opt", "device_map"), ("olmo2", "single")),
    ],
)
def test_a_patch_in_place_is_the_repaired_checkpoint(
    family: str, partition: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    """To the bit: fitted by a cell, kept in the warehouse, evaluated by another; then the model is as it was."""
    model = lively(tiny_model("causal", family))
    folder = save_checkpoint(model, tmp_path / "whole")
    layers = open_module(model).structure.layers[0].name.rpartition(".")[0]
    checkpoint, settings = resolve(str(folder)), Settings(**READ, max_sequences=60, dtype="float32")
    store, placement = Store(tmp_path / "w"), Placement(partition=partition)
    repair = Repair(by="map", corpora=(TEXT,), settings=settings)
    text = Settings(**READ, max_sequences=8, dtype="float32")
    read = text_task(checkpoint, TEXT, text, skip_sequences=72)
    task = PlannedTask(checkpoint=checkpoint, settings=text, task=read, placement=placement)
    with one_thread(), closing(LocalExecutor(settings)) as executor:
        whole = PlacedModel(checkpoint=checkpoint, settings=settings, placement=placement)
        (fit,) = plan_fits(whole, layers, [repair]).values()
        found = fit_repairs(EvaluationSession(store, executor), [(fit, [(1,)])])
        patch = found[fit.run_id(), (1,)]
        without = NO_INTERVENTION.without(1)
        cells = task.cells([without, replace(without, patch=patch), NO_INTERVENTION])
        measured: dict[Any, float] = {}
        for cell, result in executor.run_cells(iter([cells])):
            key = cell.intervention.key
            measured[key] = measured.get(key, 0.0) + float(result.rows[0].samples.sum())
        plan = Plan(model=str(folder), num_layers=3, layers=layers, drop=(1,))
        prune(str(folder), plan, tmp_path / "less", repair=repair)
        less = resolve(str(tmp_path / "less"))
        read = text_task(less, TEXT, text, skip_sequences=72)
        again = PlannedTask(checkpoint=less, settings=text, task=read, placement=Placement())
        expected = sum(float(r.rows[0].samples.sum()) for _, r in executor.run_cells(iter([again.cells()])))
        (whole,) = {float(r.rows[0].samples.sum()) for c, r in executor.run_cells(iter([task.cells()])) if c.part == 0}
        after = [float(r.rows[0].samples.sum()) for c, r in executor.run_cells(iter([[cells[-2]]]))]
    assert measured[replace(without, patch=patch).key] == expected
    assert measured[without.key] != expected and after == [whole]
    assert read_repaired(patch).record == prune_record(tmp_path / "less")


def prune_record(folder: Path) -> Any:
    from avss_dist.pruning.repair.record import read_repairs

    (record,) = read_repairs(folder)
    return record


def test_a_patch_is_the_same_bytes_and_leaves_no_trace() -> None:
    layers = open_module(llama()).structure.layers
    path = "mlp.down_proj.weight"
    before = layers[1].module.get_parameter(path).detach().clone()
    patch = {(1, path): before + 1, (0, path): before * 2}
    data = encode_patch(patch, "about")
    assert data == encode_patch(dict(reversed(patch.items())), "about")
    back, about = decode_patch(data)
    assert about == "about" and back.keys() == patch.keys()
    assert all(torch.equal(back[key], patch[key]) for key in patch)
    with pytest.raises(KeyError), patched(layers, back):
        assert torch.equal(layers[1].module.get_parameter(path), before + 1)
        raise KeyError
    assert torch.equal(layers[1].module.get_parameter(path), before)


# Shared by copies of the model


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_copies_share_the_text_of_a_fit(deep: Path, tmp_path: Path) -> None:
    """Two workers, each with a part of the text, find what one does; no more than the text has batches are taken."""
    checkpoint, settings = resolve(str(deep)), Settings(**READ, max_sequences=60, dtype="float32")
    store, by = Store(tmp_path / "w"), "refit_all"
    repair = Repair(by=by, corpora=(TEXT,), settings=settings)
    one, two, many, streamed = (
        plan_fits(
            PlacedModel(checkpoint=checkpoint, settings=settings, placement=Placement(partition=partition)),
            "model.layers",
            [repair],
            copies,
        )[by]
        for partition, copies in (("single", 1), ("single", 2), ("single", 99), ("streaming", 2))
    )
    assert [fit.placement.ranks for fit in (one, two, many, streamed)] == [1, 2, MAX_COPIES, 1]
    assert len({one.run_id(), two.run_id(), many.run_id()}) == 3
    short = replace(repair, settings=replace(settings, max_sequences=12))
    model = PlacedModel(checkpoint=checkpoint, settings=settings, placement=Placement())
    assert plan_fits(model, "model.layers", [short], 99)[by].placement.ranks == 3
    drop = (2, 3, 5)
    with closing(RayExecutor(Execution(executor="ray", replicas=2), settings)) as executor:
        found = fit_repairs(EvaluationSession(store, executor), [(one, [drop]), (two, [drop])])
    alone, together = (read_repaired(found[fit.run_id(), drop]) for fit in (one, two))
    assert alone.tensors.keys() == together.tensors.keys() and len(alone.record.cuts) >= 2
    for ours, theirs in zip(together.record.cuts, alone.record.cuts, strict=True):
        assert ours.ridges == theirs.ridges
        assert ours.error_before == pytest.approx(theirs.error_before, rel=1e-6)
        assert ours.error_after == pytest.approx(theirs.error_after, rel=1e-6)
    for name, weights in alone.tensors.items():
        torch.testing.assert_close(together.tensors[name], weights, rtol=1e-4, atol=1e-6)


def test_each_batch_is_of_one_copy(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(**READ, dtype="float32")
    placement, taken = with_copies(Placement(), 3), []
    for rank in range(3):
        monkeypatch.setattr(avss_copies, "require_group", lambda _, rank=rank: (rank, 3))
        with closing(open_replica(resolve(str(deep)), settings, placement, head=True)) as replica:
            assert replica.language_model is not None
            assert replica.language_model.reports == (rank == 0)
            taken.append([*replica.language_model.local_indices(7)])
    assert [*chain(*taken)] == [*range(7)] and all(taken)


class Heard:
    """Shares of steps that events in the middle of cells tell of."""

    def __init__(self) -> None:
        self.of: dict[str, list[float]] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, CellUnderway):
            assert event.cell.intervention.removed == (2, 3, 5)
            self.of.setdefault(event.step, []).append(event.share)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_fit_says_how_far_it_is(
    terminal: bool, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal in the bar, elsewhere in a line now and then; one cell may take many minutes."""
    settings = Settings(**READ, max_sequences=60, dtype="float32")
    repair = Repair(by="refit_all", corpora=(TEXT,), settings=settings)
    model = PlacedModel(checkpoint=resolve(str(deep)), settings=settings, placement=Placement())
    planned = plan_fits(model, "model.layers", [repair])[repair.by]
    heard, shown = Heard(), io.StringIO()
    session = EvaluationSession(Store(tmp_path / "heard"), LocalExecutor(settings), on_event=heard)
    fit_repairs(session, [(planned, [(2, 3, 5)])])
    cuts = [f"Repairing cut {n} of 4" for n in (1, 2, 3, 4)]
    assert [*heard.of] == cuts
    for shares in heard.of.values():
        assert shares[0] == 0 and all(0 <= share < 1 for share in shares)
    monkeypatch.setattr(
        avss_progress, "console", lambda **_: Console(file=shown, force_terminal=terminal, width=100, color_system=None)
    )
    monkeypatch.setattr(avss_progress, "LOG_SECONDS", -1.0)
    with CellProgress() as bar:
        session = EvaluationSession(Store(tmp_path / "shown"), LocalExecutor(settings), on_event=bar)
        fit_repairs(session, [(planned, [(2, 3, 5)])])
        bar(CellUnderway(planned.cells([NO_INTERVENTION.without(2, 3, 5)])[0], "Repairing cut 2 of 4", 0.4))
    said = shown.getvalue(), capsys.readouterr().err
    if terminal:
        assert "deep without 3 layers: Repairing cut 2 of 4, 40%" in said[0]
    else:
        assert "deep: Repairing cut 1 of 4, 0%" in said[1] and "deep: 1 of 1 evaluated" in said[1] and not said[0]


# As an axis of an experiment


def test_every_choice_is_evaluated_with_every_repair(done: tuple[Path, list[dict[str, Any]]]) -> None:
    job, rows = done
    of = {(row["method"], row["repair"]): row for row in rows if row["metric"] == "loss"}
    chosen = {"avss", "block influence", "last", "random 0", "random 1"}
    assert of.keys() == {("whole model", None)} | {(m, r) for m in chosen for r in (None, "channel", "map")}
    for (method, repair), row in of.items():
        first = row["drop"] == [*range(len(row["drop"]))]
        assert (row["patch"] is not None) == (repair is not None and not first), method
        assert row["retention"] == pytest.approx(np.exp(of["whole model", None]["value"] - row["value"]))
        if first and method != "whole model":
            assert row["value"] == of[method, None]["value"]
    assert of["last", None]["drop"] == [5, 6]
    assert sum(of[m, "map"]["value"] < of[m, None]["value"] for m in chosen) >= 3
    stored = Warehouse(read_job(job).warehouse).table("experiments").to_pylist()
    assert {(row["method"], row["repair"], row["patch"]) for row in stored} == {
        (row["method"], row["repair"], row["patch"]) for row in rows
    }


def pruned(model: Path, plan: Path, output: Path, repair: str, *more: Any) -> Any:
    """`avss prune`, repaired as in `JOB`."""
    return avss(
        *("prune", model, plan, "-o", output, "--repair", repair, "--repair-corpus", TEXT, "--skip-sequences", 12),
        *("--max-sequences", 60, "--sequence-length", 32, "--batch-size", 4, "--sequences-per-shard", 4),
        *("--dtype", "float32", "--device", "cpu", *more),
    )


@pytest.mark.parametrize("repair", ["channel", "map"])
def test_a_row_is_what_the_pruned_checkpoint_gives(
    repair: str, done: tuple[Path, list[dict[str, Any]]], deep: Path, tmp_path: Path
) -> None:
    """Of `avss prune --repair` with the same text: the same loss to the bit, and the same weights."""
    job, rows = done
    (row,) = (r for r in rows if (r["method"], r["repair"], r["metric"]) == ("last", repair, "loss"))
    plan = tmp_path / "plan.yaml"
    Plan(model=str(deep), num_layers=8, layers="layers", drop=tuple(row["drop"])).write(plan)
    with one_thread():
        out = pruned(deep, plan, tmp_path / "less", repair)
    assert out.exit_code == 0, out.stderr
    assert losses_of(tmp_path / "less") == {"value": row["value"], "stderr": row["stderr"]}
    tensors, _ = decode_patch(Patches(Storage(read_job(job).warehouse)).read(row["patch"]))
    assert {layer for layer, _ in tensors} == {4}


def test_a_checkpoint_takes_the_fit_of_an_experiment(
    done: tuple[Path, list[dict[str, Any]]], deep: Path, tmp_path: Path
) -> None:
    """From its warehouse: no cell is measured, and the checkpoint is that of a fit in this process, to the byte."""
    job, rows = done
    warehouse = Path(read_job(job).warehouse)
    (drop,) = {tuple(row["drop"]) for row in rows if row["method"] == "last"}
    plan = tmp_path / "plan.yaml"
    Plan(model=str(deep), num_layers=8, layers="layers", drop=drop).write(plan)
    files = {file: file.stat().st_mtime_ns for file in warehouse.rglob("*.*")}
    kept = pruned(deep, plan, tmp_path / "kept", "map", "-w", warehouse, "--replicas", 1)
    assert kept.exit_code == 0, kept.stderr
    assert {file: file.stat().st_mtime_ns for file in warehouse.rglob("*.*") if "cells" in file.parts} == {
        file: time for file, time in files.items() if "cells" in file.parts
    }
    with one_thread():
        assert pruned(deep, plan, tmp_path / "here", "map").exit_code == 0
    weights = [tmp_path / name / "model.safetensors" for name in ("kept", "here")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "the repaired weights (largest difference 0)" in kept.stdout


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_workers_fit_the_repair_of_a_checkpoint_and_keep_it(deep: Path, tmp_path: Path) -> None:
    """Two of them; a mistake comes before the fit, and a second checkpoint costs none."""
    plan, warehouse = tmp_path / "plan.yaml", tmp_path / "w"
    Plan(model=str(deep), num_layers=8, layers="layers", drop=(2, 3, 5)).write(plan)
    workers = ("-w", warehouse, "--replicas", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused = pruned(deep, plan, tmp_path / "full", "refit", *workers)
    assert refused.exit_code == 2 and "is not empty" in refused.stderr and not warehouse.exists()
    for name in ("first", "second"):
        done = pruned(deep, plan, tmp_path / name, "refit", *workers)
        assert done.exit_code == 0, done.stderr
        assert len(list((warehouse / "patches").iterdir())) == len(list((warehouse / "cells").rglob("*.parquet"))) == 1
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    with one_thread():
        assert pruned(deep, plan, tmp_path / "here", "refit").exit_code == 0
    whole = resolve(str(deep)).folder / "model.safetensors"
    changed, here, old = (load_file(file) for file in (first, tmp_path / "here" / "model.safetensors", whole))
    assert any(not torch.equal(changed[name], old[name]) for name in changed if changed[name].shape == old[name].shape)
    for name, weights in here.items():
        torch.testing.assert_close(changed[name], weights, rtol=1e-4, atol=1e-6)


def test_a_repaired_checkpoint_is_not_asked_what_it_was_fitted_on(deep: Path, tmp_path: Path) -> None:
    """Questions, of a file of them; those behind are asked."""
    file, plan = tmp_path / "questions.jsonl", tmp_path / "plan.yaml"
    questions = [{**QUESTIONS[i % 3], "question": f"{i}: {QUESTIONS[i % 3]['question']}"} for i in range(20)]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in questions), encoding="utf-8")
    Plan(model=str(deep), num_layers=8, layers="layers", drop=(2,)).write(plan)
    read = ("--sequence-length", 64, "--batch-size", 4, "--dtype", "float32", "--device", "cpu")
    text = ("--repair", "channel", "--repair-corpus", f"truthfulqa:{file}", "--max-sequences", 8)
    made = avss("prune", deep, plan, "-o", tmp_path / "less", *text, *read)
    assert made.exit_code == 0, made.stderr
    asked = ("evaluate", tmp_path / "less", "--task", f"truthfulqa:{file}", "-w", tmp_path / "w", *read)
    refused = avss(*asked)
    assert refused.exit_code == 2
    assert re.search(r"2 of the 20 questions of truthfulqa:\S+ are prompts that the repair of", refused.stderr)
    assert avss(*asked, "--skip-questions", 8).exit_code == 0


@pytest.mark.parametrize("more", [("--replicas", 2), ("--threads", 2), ("--fresh",), ("--partition", "device_map")])
def test_workers_need_a_warehouse_for_a_fit(more: tuple[Any, ...], deep: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    Plan(model=str(deep), num_layers=8, layers="layers", drop=(2, 3)).write(plan)
    done = pruned(deep, plan, tmp_path / "less", "channel", *more)
    assert done.exit_code == 2 and "--warehouse" in done.stderr
    assert not (tmp_path / "less").exists()


def test_nothing_is_fitted_twice_and_what_is_lost_is_fitted_again(done: tuple[Path, list[dict[str, Any]]]) -> None:
    job, rows = done
    folder = Path(read_job(job).warehouse)
    files = sorted([*(folder / "cells").rglob("*.parquet"), *(folder / "patches").iterdir()])
    times = {file: file.stat().st_mtime_ns for file in files}
    kept = sorted((folder / "patches").iterdir())
    distinct = {row["patch"] for row in rows if row["patch"]}
    assert {file.stem for file in kept} == distinct
    lost = kept[0]
    lost.unlink()
    with one_thread():
        _, again = experiment_of(job)
    now = sorted([*(folder / "cells").rglob("*.parquet"), *(folder / "patches").iterdir()])
    assert now == files
    changed = {file for file in files if file.stat().st_mtime_ns != times[file]}
    assert lost in changed and len(changed) == 2  # the patch, and the cell of its fit
    assert shown(again) == shown(rows)


def shown(rows: list[dict[str, Any]]) -> str:
    return json.dumps([{k: v for k, v in row.items() if k != "created_at"} for row in rows])


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_a_killed_experiment_goes_on_and_workers_are_sent_the_patches(
    done: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """By SIGKILL while it fits; then two Ray workers do the rest: the same rows as one process gives."""
    whole, rows = done
    job = tmp_path / "job.yaml"
    job.write_text(whole.read_text().replace(read_job(whole).warehouse, str(tmp_path / "w")))
    killed = Command("run", job)
    patches = tmp_path / "w" / "patches"
    wait_until(lambda: (patches.is_dir() and any(patches.iterdir())) or not killed.running())
    killed.kill()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "w" / "cells").rglob("*.parquet")}
    with one_thread():
        _, resumed = experiment_of(job, executor="ray", replicas=2)
    assert shown(resumed) == shown(rows)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_patch_that_is_damaged_is_no_patch(tmp_path: Path) -> None:
    patches = Patches(Storage(tmp_path))
    key = patches.write(b"weights")
    assert patches.keys() == {key} and patches.read(key) == b"weights"
    (tmp_path / "patches" / f"{key}.safetensors").write_bytes(b"other")
    with pytest.raises(DamagedFile, match="not what was written"):
        patches.read(key)


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
    change: tuple[str, str], message: str, hint: str, done: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    job, _ = done
    same = tmp_path / "same.yaml"
    same.write_text(job.read_text().replace(*change))
    with pytest.raises(ConfigError, match=message) as refused:
        experiment_of(same)
    assert hint in str(refused.value)


def test_too_little_text_for_a_repair(done: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    job, _ = done
    little = tmp_path / "little.yaml"
    less = job.read_text().replace("repair_max_sequences: 60", "repair_max_sequences: 2")
    little.write_text(less.replace(read_job(job).warehouse, str(tmp_path / "w")))
    with pytest.raises(CorpusError, match="The repair map of this model needs"):
        experiment_of(little)
    assert not (tmp_path / "w" / "patches").exists()  # nothing was fitted before that is refused


@pytest.mark.parametrize("partition", ["tensor_parallel", "expert_parallel"])
def test_a_partition_whose_weights_cannot_be_changed_is_refused_first(partition: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(warehouse=tmp_path / "w", model="nowhere") + f"execution: {{partition: {partition}}}\n")
    with pytest.raises(ConfigError, match="weights where they cannot be changed") as refused:
        experiment_of(job)
    assert "single, device_map" in str(refused.value) and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{tasks: [x], repairs: [map]}", "repairs map needs text to be fitted on"),
        ("{tasks: [x], repairs: []}", "repairs must not be empty"),
        ("{tasks: [x], repairs: [mapp], repair_corpora: [x]}", "Did you mean 'map'"),
        ("{tasks: [x], repair_corpora: [x]}", "repair_corpora has no effect"),
    ],
)
def test_mistakes_in_a_section(tmp_path: Path, section: str, message: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"warehouse: w\nmodels: [m]\ncorpora: ['builtin:pydoc']\nexperiment: {section}\n")
    with pytest.raises(JobError, match=message):
        read_job(job)


# What it says


def test_the_table_and_the_verdict_tell_of_repairs(done: tuple[Path, list[dict[str, Any]]]) -> None:
    job, _ = done
    told = avss("run", job)
    assert told.exit_code == 0, told.stderr
    words = " ".join(told.stdout.split())
    assert "block influence + map" in words and "last + channel" in words
    assert "(25%), repaired by map" in words and "(25%), repaired by channel" in words
    assert "Of 2 random choices of as many layers, repaired by map," in words
    report = job.parent / "report.html"
    made = avss("report", "-w", read_job(job).warehouse, "-o", report)
    assert made.exit_code == 0, made.stderr
    assert "last + map" in report.read_text() and "repaired by map" in report.read_text()


def test_a_verdict_compares_what_is_repaired_alike() -> None:
    common = {"task": "t", "metric": "acc", "share": 0.25, "drop": [1], "value": 0.5, "control": None, "seed": None}

    def row(score: str | None, kept: float, repair: str | None = None, **more: Any) -> dict[str, Any]:
        interval = {"retention": kept, "retention_low": kept - 0.01, "retention_high": kept + 0.01}
        return {
            **common,
            "method": str(score),
            "score": score,
            "repair": repair,
            "patch": repair and "hash",
            **interval,
            **more,
        }

    rows = [row(None, 1.0, share=0.0, value=0.8)]
    rows += [row("avss", 0.5), row("random", 0.7), row("avss", 0.95, "map"), row("random", 0.93, "map")]
    plain, repaired = verdicts([*rows, row("last", 0.97, "map")])
    assert "the claim does not hold" in plain and "A random choice of as many layers keeps 70.0%." in plain
    assert "repaired by map, 95.0%" in repaired and "the claim holds" in repaired
    assert "A random choice of as many layers, repaired by map, keeps 93.0%." in repaired
    (unrepaired,) = verdicts([row(None, 1.0, share=0.0, value=0.8), row("avss", 0.1, "map", patch=None)])
    assert "repaired by map (nothing: no layer stands before them), 10.0%" in unrepaired
    assert "the last before the final one keeps 97.0%" in repaired and "97.0%" not in plain


def test_the_last_layers_go_before_the_final_one() -> None:
    scores = [{"layer": layer} for layer in range(8)]
    choice = Method(score="last").choice(0.25)
    assert choice.drop(choice.scores(scores, {})) == (5, 6)
    most = Method(score="last").choice(0.85)
    assert most.drop(most.scores(scores, {})) == (0, 1, 2, 3, 4, 5, 6)
    wanted = {"tasks": (TASK,), "scores": ("block_influence",), "random": 0, "leave_one_out": False}
    rows = [{"site": "block", "recipe": "pooled", "threshold": 1e-5, "threshold_kind": "absolute"}]
    for last in (True, False):
        assert (Method(score="last") in methods(Experiment(**wanted, last=last), rows)) == last
