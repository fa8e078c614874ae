"""Text that was read on the way to a plan or a checkpoint is not held out from it, whatever has read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import checkpoint_at, llama
from support.json_files import write_json
from support.texts import sentences

import avss_dist
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.corpus.seen import SeenText
from avss_dist.evaluation import planned_tasks
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.planned_tasks import plan_task, refuse_seen
from avss_dist.partition.placement import Placement
from avss_dist.plans.plan import ModelPlan, Plan, read_checked_plan, read_plan
from avss_dist.plans.seen import read_seen
from avss_dist.warehouse.reader import Warehouse

READ: dict[str, Any] = {"sequence_length": 32, "max_sequences": 6, "device": "cpu", "dtype": "float32"}
LOCAL = {"executor": "local", "partition": "single"}
TEXTS = ("scored", "measured", "other", "unseen")
PLANS: Mapping[str, set[str]] = {
    "avss": {"scored"},
    "loss": {"scored", "measured"},
    "damage": {"scored", "measured"},
    "greedy": {"scored", "other"},
    "sparsity": {"scored", "other"},
    "uniform": {"scored"},
    "precision": {"measured"},
}
"""Texts that each plan was made from."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    """A model, texts, and a warehouse with its scores on one text and its measurements on another."""
    folder = tmp_path_factory.mktemp("seen")
    for seed, name in enumerate(TEXTS):
        (folder / f"{name}.txt").write_text("\n".join(sentences(60, seed=seed)))
    save_checkpoint(llama(), folder / "model")
    common: dict[str, Any] = {"warehouse": folder / "w", **READ, **LOCAL}
    avss_dist.score(folder / "model", corpus=folder / "scored.txt", sites=("block", "inputs"), **common)
    measured: dict[str, Any] = {"damage": True, "quantize": ["int8"], "rounded_layers": False}
    avss_dist.ablate(folder / "model", corpus=folder / "measured.txt", **measured, **common)
    return folder


@pytest.fixture(scope="module")
def plans(folder: Path) -> dict[str, Any]:
    """A plan of each kind; `PLANS` has the texts of each."""
    there: dict[str, Any] = {"warehouse": folder / "w"}
    other: dict[str, Any] = {"corpus": folder / "other.txt", **there, **READ, **LOCAL}
    return {
        "avss": avss_dist.plan(by="avss", count=1, **there),
        "loss": avss_dist.plan(by="loss", count=1, **there),
        "damage": avss_dist.plan(by="damage", count=1, **there),
        "greedy": avss_dist.plan(by="greedy", count=1, **other),
        "sparsity": avss_dist.sparsify(0.5, method="loss", **other),
        "uniform": avss_dist.sparsify(0.5, **there),
        "precision": avss_dist.quantize(bits=9, **there),
    }


def refuse(folder: Path, text: str, *plans: ModelPlan, **changes: Any) -> None:
    """Refuse to evaluate plans on a text, if it was read on the way to them."""
    checkpoint = checkpoint_at(folder / "model")
    placed = PlacedModel(checkpoint=checkpoint, settings=Settings(**READ | changes), placement=Placement())
    task = plan_task(placed, f"perplexity:{folder / text}.txt").task
    refuse_seen([task], checkpoint, plans, Warehouse(folder / "w"), [])


def without_seen(plan: ModelPlan) -> ModelPlan:
    """Return a plan as earlier versions wrote it."""
    return replace(plan, seen=())


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_has_the_texts_that_it_was_made_from(kind: str, plans: dict[str, Any]) -> None:
    assert {Path(text.corpus).stem for text in plans[kind].seen} == PLANS[kind]


@pytest.mark.parametrize("kind", PLANS)
def test_the_rows_and_the_hashes_of_each_text_are_kept(kind: str, plans: dict[str, Any]) -> None:
    for text in plans[kind].seen:
        assert text.skip_sequences == 0
        assert text.max_sequences == 6
        assert text.sequence_length == 32
        assert len(text.corpus_fingerprint) == len(text.tokens_fingerprint) == 64


@pytest.mark.parametrize("kind", PLANS)
def test_the_file_of_a_plan_keeps_them(kind: str, plans: dict[str, Any], tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    plans[kind].write(plan_file)
    cls = type(plans[kind])
    written = read_plan(plan_file) if cls is Plan else read_checked_plan(cls, plan_file)
    assert written.seen == plans[kind].seen


@pytest.mark.parametrize(("kind", "text"), [*product(PLANS, TEXTS)])
def test_a_plan_is_evaluated_on_no_text_that_it_was_made_from(
    kind: str, text: str, folder: Path, plans: dict[str, Any]
) -> None:
    if text in PLANS[kind]:
        with pytest.raises(ConfigError, match=rf"100% of perplexity:\S*{text}.txt is text that "):
            refuse(folder, text, plans[kind])
    else:
        refuse(folder, text, plans[kind])


@pytest.mark.parametrize("kind", PLANS)
def test_other_rows_of_the_same_text_are_allowed(kind: str, folder: Path, plans: dict[str, Any]) -> None:
    for text in PLANS[kind]:
        refuse(folder, text, plans[kind], skip_sequences=6)


@pytest.mark.parametrize("kind", [kind for kind in PLANS if kind != "sparsity"])
def test_a_file_of_an_earlier_version_tells_the_same_texts(kind: str, folder: Path, plans: dict[str, Any]) -> None:
    """As far as the warehouse has its run and its evaluation."""
    for text in PLANS[kind]:
        with pytest.raises(ConfigError, match="is text that"):
            refuse(folder, text, without_seen(plans[kind]))


def test_the_texts_of_two_plans_that_are_evaluated_together_count(folder: Path, plans: dict[str, Any]) -> None:
    """Those of a sparsity plan beside the ones of a plan of layers, through the function of the command."""
    for text in ("measured", "other"):
        with pytest.raises(ConfigError, match=rf"{text}.txt is text that"):
            avss_dist.evaluate(
                [plans["loss"]],
                sparse=plans["sparsity"],
                tasks=[f"perplexity:{folder / text}.txt"],
                warehouse=folder / "w",
                **READ,
                **LOCAL,
            )


def test_keys_of_the_task_read_the_text_again(folder: Path, plans: dict[str, Any], monkeypatch: Any) -> None:
    """Records have no keys. A task on the same text may."""
    opened = []

    def read(_seen: SeenText, _tokenizer: Any, corpus: str) -> Any:
        opened.append(corpus)
        return SimpleNamespace(shards=())

    monkeypatch.setattr(planned_tasks, "read_again", read)
    uri = "s3://KEY:SECRET@bucket/a.txt"
    seen = SeenText(use="scores", by="a-1", corpus=uri)
    checkpoint = checkpoint_at(folder / "model")
    (text,) = planned_tasks.earlier_texts([seen], checkpoint, [uri])
    text.read()
    assert opened == [uri]


def test_a_pruned_checkpoint_keeps_them(folder: Path, plans: dict[str, Any], tmp_path: Path) -> None:
    """One that was pruned again, too."""
    pruned = tmp_path / "pruned"
    avss_dist.prune(folder / "model", plans["loss"], pruned)
    hand = Plan(model=str(pruned), num_layers=2, layers="layers", drop=(0,))
    again = tmp_path / "again"
    avss_dist.prune(pruned, hand, again)
    assert read_seen(pruned) == read_seen(again) == plans["loss"].seen


def test_the_revision_of_a_checkpoint_does_not_depend_on_them(
    folder: Path, plans: dict[str, Any], tmp_path: Path
) -> None:
    pruned = tmp_path / "pruned"
    model = folder / "model"
    avss_dist.prune(model, plans["loss"], pruned)
    other = tmp_path / "other"
    avss_dist.prune(model, without_seen(plans["loss"]), other / "pruned")
    assert checkpoint_at(pruned).revision == checkpoint_at(other / "pruned").revision


def test_a_pruned_checkpoint_is_evaluated_on_no_text_of_its_plan(
    folder: Path, plans: dict[str, Any], tmp_path: Path
) -> None:
    pruned = tmp_path / "pruned"
    avss_dist.prune(folder / "model", plans["loss"], pruned)
    there: dict[str, Any] = {"warehouse": tmp_path / "w", **READ, **LOCAL}
    with pytest.raises(ConfigError, match=r"measured.txt is text that the ablation model-\w+ was measured on"):
        avss_dist.evaluate([str(pruned)], tasks=[f"perplexity:{folder}/measured.txt"], **there)


def test_an_experiment_is_on_no_text_of_its_measurements(folder: Path, tmp_path: Path) -> None:
    settings = {name: READ[name] for name in ("sequence_length", "max_sequences", "dtype", "device")}
    job = {
        "warehouse": str(folder / "w"),
        "models": [str(folder / "model")],
        "corpora": [str(folder / "scored.txt")],
        "settings": {**settings, "sites": ["block", "inputs"]},
        "experiment": {"tasks": [f"perplexity:{folder}/measured.txt"], "scores": ["loss"], "leave_one_out": False},
    }
    job_file = tmp_path / "job.yaml"
    write_json(job_file, job)
    with pytest.raises(ConfigError, match=r"measured.txt is text that the ablation model-\w+ was measured on"):
        avss_dist.run(job_file, executor="local")
