"""Searching sets of layers of a model: against sets measured one by one, continued, on workers, as a command."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support.causal_lm import SMALL, opened
from support.checkpoints import llama
from support.command_line import as_words, avss, json_rows, mistake, succeed
from support.experiments import cell_times
from support.tables import evaluation_rows, run_rows

from avss_dist import ablate
from avss_dist.core.intervention import (
    Intervention,
    Removals,
    stored_removals,
    sublayers_of,
)
from avss_dist.core.settings import Settings
from avss_dist.evaluation import session
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.planning.search import SearchStep
from avss_dist.plans.choice import Choice, PlanError
from avss_dist.plans.plan import Plan
from avss_dist.requests import PlanRequest
from avss_dist.runs.scoring import score
from avss_dist.studies import search as search_module
from avss_dist.studies.search import search
from avss_dist.tasks.text_loss import TextLoss
from avss_dist.warehouse.reader import Warehouse

Scored = tuple[Path, Mapping[str, Any]]
Save = Callable[[Any, Path], Path]
TEXT = "builtin:pydoc"
LAYERS = 6
OPTIONS = as_words(SMALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Path:
    """Weights so large that layers matter."""
    folder = tmp_path_factory.mktemp("search") / "six-layers"
    return save_checkpoint(llama(num_hidden_layers=LAYERS, initializer_range=0.3), folder)


@pytest.fixture(scope="module")
def warehouse(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of the model; not to be changed."""
    folder = tmp_path_factory.mktemp("scored") / "w"
    score(model, corpus=TEXT, warehouse=folder, **SMALL)
    return folder


@pytest.fixture
def scored(warehouse: Path, tmp_path: Path) -> Scored:
    """A copy of the warehouse, to change, and the row of its run."""
    folder = Path(shutil.copytree(warehouse, tmp_path / "w"))
    (row,) = run_rows(folder)
    return folder, row


def found_in(scored: Scored, **options: Any) -> tuple[Plan, list[SearchStep]]:
    warehouse, run = scored
    request = PlanRequest(warehouse=warehouse, by="greedy", corpus=TEXT, skip_sequences=6, **SMALL | options)
    return search(request, run, Choice(by="greedy", count=3, last=1))


class Truth:
    """The loss of a model without sets of layers, each measured alone."""

    def __init__(self, model: LanguageModel) -> None:
        text = plan_text(model.checkpoint, TEXT, Settings(**SMALL, skip_sequences=6))
        self._model = model
        self._parts = [TextLoss(shard) for shard in text.shards]

    def __call__(self, drop: Removals) -> float:
        rows = [part(self._model, Intervention(removed=drop))[0] for part in self._parts]
        return float(sum(row.samples.sum() for row in rows) / sum(row.weights.sum() for row in rows))


def test_greedy_drops_what_costs_least_at_each_step(scored: Scored, model: Path) -> None:
    truth = Truth(opened(model, batch_size=4))
    plan, (whole, *steps) = found_in(scored)
    drop: Removals = ()
    assert len(steps) == 3
    for number, step in enumerate(steps):
        drop = min(
            (tuple(sorted({*drop, layer})) for layer in range(LAYERS - 1) if layer not in drop),
            key=truth,
        )
        assert step.best.removed == drop
        assert step.best.value == truth(drop)
        assert step.sets == [5, 9, 12][number]
    assert plan.drop == drop
    assert steps[-1].best.value == truth(drop)
    assert whole.best.value == truth(())
    assert plan.why["by"] == "greedy"
    assert plan.why["sets"] == 12


@pytest.mark.nightly
def test_a_search_measures_what_it_does_not_know(scored: Scored) -> None:
    """Again, nothing; from the start, everything."""
    plan, _ = found_in(scored)
    before = cell_times(scored[0])
    assert found_in(scored)[0] == plan
    assert cell_times(scored[0]) == before
    assert found_in(scored, fresh=True)[0].drop == plan.drop
    assert not cell_times(scored[0]).items() >= before.items()


@pytest.mark.nightly
@pytest.mark.parametrize("year", [2050, 2020])
def test_a_fresh_search_goes_by_its_own_measurements_whatever_the_clock_says(
    year: int, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock was set before or after all other measurements, and each cell is written earlier than the last one."""
    times = count(start=0, step=-60)

    class SetBack(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(year, 1, 1, tzinfo=tz) + timedelta(seconds=next(times))

    plan, _ = found_in(scored)
    before = cell_times(scored[0])
    for module in (session, search_module):
        monkeypatch.setattr(module, "datetime", SetBack, raising=False)
    assert found_in(scored, fresh=True)[0].drop == plan.drop
    assert not cell_times(scored[0]).items() & before.items()


@pytest.mark.nightly
def test_the_text_of_a_search_is_no_text_to_evaluate_on(scored: Scored, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    found_in(scored)[0].write(plan)
    command = ["evaluate", plan, "--tasks", f"perplexity:{TEXT}", "--warehouse", scored[0], *OPTIONS]
    for skip in (0, 6):  # that of the scores, and that of the search
        told = mistake(*command, "--skip-sequences", skip)
        assert "100% of perplexity" in told
    assert "Use other text: another corpus, or --skip-sequences 12." in told
    assert avss(*command, "--skip-sequences", 12).exit_code == 0
    assert avss(*command, "--skip-sequences", 6, "--allow-overlap").exit_code == 0


def test_another_checkpoint_is_refused(model: Path, scored: Scored, save_checkpoint: Save) -> None:
    changed = {**scored[1], "revision": "0" * 64}
    with pytest.raises(PlanError, match="now"):
        found_in((scored[0], changed))


# The command line


@pytest.mark.nightly
def test_a_search_shows_its_steps_and_its_plan_prunes(scored: Scored, model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    done = succeed("plan", "-w", scored[0], "--by", "greedy", "--count", 2, "--corpus", TEXT, "-o", plan, *OPTIONS)
    for words in ("dropped", "perplexity", "sets", "Chosen by greedy (a search: removes the layer"):
        assert words in done.stdout
    assert "Finding: The set was chosen for its loss on this very text" in done.stdout
    pruned = tmp_path / "pruned"
    assert avss("prune", model, plan, "-o", pruned).exit_code == 0
    assert len(opened(pruned).layers) == LAYERS - 2


@pytest.mark.nightly
def test_sublayers_are_measured_evaluated_and_not_pruned(scored: Scored, model: Path, tmp_path: Path) -> None:
    """A checkpoint cannot be without them, an evaluation can."""
    warehouse = scored[0]
    plan = tmp_path / "plan.yaml"
    truth = Truth(opened(model, batch_size=4))
    text = ("--corpus", TEXT, "--skip-sequences", 6, *OPTIONS)
    shown = succeed("ablate", model, *text, "--warehouse", warehouse, "--no-leave-one-out", "--sublayers")
    assert "attention alone" in shown.stdout, shown.stderr
    read = ablate(model, corpus=TEXT, warehouse=warehouse, sublayers=True, skip_sequences=6, **SMALL)
    for layer, results in read.layers.items():
        for removed in sublayers_of([layer]):
            assert results[removed.part].value == pytest.approx(truth((removed,)) - truth(()), abs=1e-9)
    written = Plan(model=str(model), num_layers=LAYERS, layers="layers", drop=("attention.2", "mlp.0"))
    written.write(plan)
    task = ("--tasks", f"perplexity:{TEXT}", "--skip-sequences", 12, "--warehouse", warehouse, *OPTIONS)
    succeed("evaluate", plan, *task, "--format", "json")
    assert {stored_removals(row) for row in evaluation_rows(warehouse, f"perplexity:{TEXT}")} == {(), written.drop}
    assert "2 sublayers" in avss("evaluate", plan, *task).stdout
    listed = avss("ls", "plans", "--warehouse", warehouse, "--format", "json")
    assert ["attention.2", "mlp.0"] in [row["drop"] for row in json_rows(listed.stdout)]
    named = Warehouse(warehouse).sql("SELECT DISTINCT drop, drop_parts, removals(drop, drop_parts) AS names FROM cells")
    for row in named.to_pylist():
        assert row["names"] == [*map(str, row["drop"]), *row["drop_parts"]]
    less = tmp_path / "less"
    assert "drops attention.2, mlp.0 alone" in mistake("prune", model, plan, "-o", less)
    assert not less.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "greedy"], "--by greedy needs text to measure losses on"),
        (["--by", "gredy", "--corpus", TEXT], "greedy"),
        (["--by", "block_influence", "--corpus", TEXT], "--corpus has no effect without a search"),
        (["--by", "block_influence", "--replicas", 2], "--replicas has no effect without a search"),
        (["--by", "block_influence", "--max-sequences", 2], "--max-sequences has no effect without a search"),
    ],
)
def test_a_mistake_is_named(words: list[str], said: str, scored: Scored, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    assert said in mistake("plan", "-w", scored[0], "-o", plan_file, *words)
    assert not plan_file.exists()
    assert not (scored[0] / "cells").exists()
