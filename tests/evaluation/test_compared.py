"""Models against each other: differences that `evaluate` returns and prints, and those of stored evaluations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from support.checkpoints import llama
from support.command_line import as_words, avss, json_rows, succeed
from support.texts import sentences

from avss_dist import evaluate
from avss_dist.analysis.compared import compared_models, compared_sections
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune
from avss_dist.reports.page.page import report_page
from avss_dist.stats.intervals import jackknife_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.studies.evaluate import Evaluations
from avss_dist.warehouse.reader import Warehouse

TASK = "perplexity:builtin:pydoc"
SIZES: dict[str, Any] = {
    "max_sequences": 12,
    "sequence_length": 32,
    "sequences_per_shard": 6,
    "batch_size": 4,
    "device": "cpu",
    "executor": "local",
}
DROPPED = {"first plan": 0, "second plan": 1, "third plan": 2}


@pytest.fixture(scope="module")
def plans(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of plans without one layer each, by name. Their names have a space."""
    folder = tmp_path_factory.mktemp("plans")
    files = {}
    for name, layer in DROPPED.items():
        plan = folder / f"{name}.yaml"
        keys = {"model": str(tiny_llama), "num_layers": 3, "layers": "layers", "drop": [layer]}
        plan.write_text(yaml.safe_dump(keys))
        files[name] = str(plan)
    return files


Stored = tuple[Path, Evaluations]


@pytest.fixture(scope="module")
def evaluated(tiny_llama: Path, plans: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A warehouse, and the evaluations of the whole model and of three plans in it."""
    warehouse = tmp_path_factory.mktemp("compared") / "w"
    return warehouse, evaluate([str(tiny_llama), *plans.values()], tasks=[TASK], warehouse=warehouse, **SIZES)


class Losses(NamedTuple):
    """Summed losses of the rows under a plan and of the whole model, and the numbers of tokens, float64[rows]."""

    whole: Float64
    first: Float64
    second: Float64
    tokens: Float64

    def difference(self, rows: Sequence[int]) -> float:
        """What the second plan keeps of the perplexity on these rows less what the first does, in plain NumPy."""
        rows = list(rows)
        whole, first, second, tokens = (values[rows].sum() for values in self)
        return float(np.exp((whole - second) / tokens) - np.exp((whole - first) / tokens))


def stored_losses(warehouse: Path) -> Losses:
    """Losses of the first two plans, read from the files of the warehouse."""
    cells = Warehouse(warehouse).table("cells").to_pylist()
    (run_id,) = {cell["run_id"] for cell in cells if cell["drop"] == [2]}
    by_drop: dict[str, list[Any]] = {}
    for cell in sorted(cells, key=itemgetter("part")):
        if cell["run_id"] == run_id:
            by_drop.setdefault(str(cell["drop"]), []).append(cell)
    samples = [np.concatenate([cell["samples"] for cell in by_drop[drop]]) for drop in ("[]", "[0]", "[1]")]
    return Losses(*samples, np.concatenate([cell["weights"] for cell in by_drop["[]"]]))


def test_all_but_the_whole_model_are_compared_with_the_first(evaluated: Stored, plans: dict[str, str]) -> None:
    _, evaluations = evaluated
    first, second, third = plans.values()
    pairs = [(comparison.label, comparison.reference) for comparison in evaluations.comparisons]
    assert pairs == [(second, first), (third, first)]


def test_the_differences_are_those_of_the_stored_samples(evaluated: Stored) -> None:
    warehouse, evaluations = evaluated
    whole, first, second, tokens = (values.sum() for values in stored_losses(warehouse))
    comparison = evaluations.comparisons[0]
    losses = [first / tokens, second / tokens]
    assert comparison.differences["loss"].value == pytest.approx(losses[1] - losses[0], rel=1e-12)
    assert comparison.differences["perplexity"].value == pytest.approx(np.exp(losses[1]) - np.exp(losses[0]), rel=1e-9)
    assert comparison.retained is not None
    kept = np.exp(whole / tokens - losses[1]) - np.exp(whole / tokens - losses[0])
    assert comparison.retained.value == pytest.approx(kept, rel=1e-9)
    assert comparison.retained.num_samples == 12


def test_the_interval_is_that_of_the_rows_without_one_each(evaluated: Stored) -> None:
    warehouse, evaluations = evaluated
    losses = stored_losses(warehouse)
    left_out = []
    for row in range(12):
        left_out.append(losses.difference([other for other in range(12) if other != row]))
    low, high = jackknife_interval(np.array(losses.difference(range(12))), np.array(left_out))
    retained = evaluations.comparisons[0].retained
    assert retained is not None
    assert (retained.low, retained.high) == pytest.approx((low, high), rel=1e-6)


def test_the_command_prints_a_sentence_and_the_same_columns_from_what_is_stored(
    evaluated: Stored, plans: dict[str, str]
) -> None:
    """The second run measures nothing, and the swapped models have the negated difference."""
    warehouse, evaluations = evaluated
    first, second, _ = plans.values()
    cells = Warehouse(warehouse).table("cells").num_rows
    words = [second, first, "--tasks", TASK, "-w", warehouse, *as_words(SIZES)]
    rows = json_rows(succeed("evaluate", *words, "--format", "json").stdout)
    shown = avss("evaluate", *words).stdout.replace("\n", " ")
    assert Warehouse(warehouse).table("cells").num_rows == cells
    swapped = [row for row in rows if row["subject"] == first]
    assert [row["compared_with"] for row in rows] == [None, None, second, second]
    forth = evaluations.comparisons[0]
    assert [row["difference"] for row in swapped] == [-difference.value for difference in forth.differences.values()]
    assert forth.retained is not None
    ends = [(row["retention_difference_low"], row["retention_difference_high"]) for row in swapped]
    assert ends == [(-forth.retained.high, -forth.retained.low)] * 2
    assert [row["num_samples"] for row in rows] == [12] * 4
    assert "first plan.yaml keeps" in shown
    assert "samples)." in shown


def test_a_model_named_twice_differs_from_itself_by_nothing(evaluated: Stored, plans: dict[str, str]) -> None:
    warehouse, _ = evaluated
    first, *_ = plans.values()
    (comparison,) = evaluate([first, first], tasks=[TASK], warehouse=warehouse, **SIZES).comparisons
    assert [difference.value for difference in comparison.differences.values()] == [0, 0]
    assert comparison.retained is not None
    assert comparison.retained.value == 0


@pytest.fixture(scope="module")
def checkpoints(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of the model without layer 0, and without layer 1."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for layer in (0, 1):
        plan = Plan(model=str(tiny_llama), num_layers=3, layers="layers", drop=(layer,), why={})
        prune(str(tiny_llama), plan, folder / f"without {layer}")
    return [str(folder / "without 0"), str(folder / "without 1")]


@pytest.mark.nightly
def test_pruned_checkpoints_are_compared_by_what_they_keep_of_their_base(
    checkpoints: list[str], evaluated: Stored, tiny_llama: Path
) -> None:
    """As their plans are, also with another size of batches."""
    warehouse, evaluations = evaluated
    sizes = {**SIZES, "batch_size": 3}
    written = evaluate(checkpoints, tasks=[TASK], base=str(tiny_llama), warehouse=warehouse, **sizes)
    (comparison,) = written.comparisons
    planned = evaluations.comparisons[0]
    assert comparison.retained is not None
    assert planned.retained is not None
    assert comparison.retained.value == pytest.approx(planned.retained.value, rel=1e-3)
    assert comparison.retained.low == pytest.approx(planned.retained.low, rel=1e-3)


def test_models_of_no_common_base_are_compared_by_the_metric_alone(
    tiny_llama: Path, save_checkpoint: Callable[[Any, Path], Path], tmp_path: Path
) -> None:
    other = save_checkpoint(llama(seed=9), tmp_path / "other")
    subjects = [str(tiny_llama), str(other)]
    (comparison,) = evaluate(subjects, tasks=[TASK], warehouse=tmp_path / "w", **SIZES).comparisons
    assert comparison.retained is None
    assert comparison.differences["perplexity"].has_interval


def test_models_with_other_tokens_are_not_compared(checkpoints: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other tokens"
    shutil.copytree(tiny_llama, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    evaluations = evaluate([str(tiny_llama), str(other)], tasks=[TASK], warehouse=tmp_path / "w", **SIZES)
    (comparison,) = evaluations.comparisons
    assert comparison.differences == {}
    assert comparison.problem is not None
    assert "tokenizers" in comparison.problem
    assert comparison.describe() in evaluations.findings


# Stored evaluations


def test_stored_evaluations_are_compared_as_the_command_compares_them(
    evaluated: Stored, plans: dict[str, str], tiny_llama: Path, tmp_path: Path
) -> None:
    """Each was evaluated by a command of its own, with its own size of batches."""
    _, evaluations = evaluated
    sizes = {"first plan": 4, "second plan": 3}
    for name, batch_size in sizes.items():
        evaluate([plans[name]], tasks=[TASK], warehouse=tmp_path / "w", **{**SIZES, "batch_size": batch_size})
    (group,), problems = compared_models(Warehouse(tmp_path / "w"))
    assert sorted(model.change.removed for model in group.models) == [(0,), (1,)]
    assert problems == []
    (section,) = compared_sections(Warehouse(tmp_path / "w"))
    expected = evaluations.comparisons[0].describe()
    for name in sizes:
        expected = expected.replace(plans[name], f"{tiny_llama} without {DROPPED[name]}")
    assert section.sentences == [expected]


@pytest.mark.nightly
def test_other_rows_and_other_texts_are_other_samples(plans: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(400, seed=1)))
    first, second, _ = plans.values()
    warehouse = tmp_path / "w"
    evaluate([first], tasks=[TASK], warehouse=warehouse, **SIZES)
    evaluate([second], tasks=[TASK], skip_sequences=6, warehouse=warehouse, **SIZES)
    evaluate([second], tasks=[f"perplexity:{text}"], warehouse=warehouse, **SIZES)
    assert compared_models(Warehouse(warehouse)) == ([], [])


def stored_copy(evaluated: Stored, tmp_path: Path, *lost: list[int]) -> Warehouse:
    """A copy of the warehouse without the cells of these sets of removed layers."""
    warehouse = tmp_path / "w"
    shutil.copytree(evaluated[0], warehouse)
    opened = Warehouse(warehouse)
    for file in sorted((warehouse / "cells").rglob("*.parquet")):
        run_id = file.parent.name.removeprefix("run_id=")
        rows = opened.read_file("cells", run_id, file.stem)
        assert rows is not None
        if rows["drop"][0].as_py() in lost:
            file.unlink()
    return Warehouse(warehouse)


def test_models_whose_samples_are_gone_are_named(evaluated: Stored, tmp_path: Path) -> None:
    store = stored_copy(evaluated, tmp_path, [1])
    sentences_of_sections = [text for section in compared_sections(store) for text in section.sentences]
    assert any("without 1 is not compared: its values by sample" in text for text in sentences_of_sections)


def test_evaluations_whose_samples_are_not_known_are_named(evaluated: Stored, tmp_path: Path) -> None:
    sections = compared_sections(stored_copy(evaluated, tmp_path, []))
    assert sections[-1].label == "Not compared"
    assert all("Evaluate it again" in text for text in sections[-1].sentences)


def test_the_page_has_the_differences_with_escaped_names(evaluated: Stored, tiny_llama: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(tiny_llama, hostile)
    plans = []
    for layer in (0, 1):
        plans.append(Plan(model=str(hostile), num_layers=3, layers="layers", drop=(layer,), why={}))
    evaluate(plans, tasks=[TASK], warehouse=tmp_path / "w", **SIZES)
    page = report_page(Warehouse(tmp_path / "w"))
    assert "Models against each other" in page
    assert "&lt;img src=x onerror=alert(1)&gt; without 0" in page
    assert "<img src=x" not in page
