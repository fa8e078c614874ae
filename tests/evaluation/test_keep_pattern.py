"""Plans, searches and experiments of a model whose layers other programs tell apart by their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.experiments import run_job_in
from support.families import lively, tiny_model

from avss_dist import ablate, evaluate, plan, score, shrink
from avss_dist.core.errors import ConfigError
from avss_dist.evaluation.events import Remark
from avss_dist.models.checkpoint.layer_kinds import describe_misread, rules_of
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.models.checkpoint.locate import locate
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan

pytestmark = pytest.mark.nightly
KINDS = ["sliding_attention", "full_attention"] * 3
OPTIONS: dict[str, Any] = {
    "corpus": "builtin:pydoc",
    "max_sequences": 8,
    "sequence_length": 24,
    "dtype": "float32",
    "device": "cpu",
}
JOB = """
warehouse: {warehouse}
models: [{model}]
corpora: ["builtin:pydoc"]
settings: {{max_sequences: 8, sequence_length: 24, batch_size: 4, device: cpu}}
experiment:
  tasks: ["perplexity:builtin:pydoc"]
  shares: [0.33]
  random: 2
  scores: [avss, greedy]
  search_max_sequences: 4
  max_sequences: 8
  skip_sequences: 8
  keep_pattern: true
"""


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    """A Gemma 2 of six layers, every second of which attends to all tokens."""
    model = tiny_model("causal", "gemma2", num_hidden_layers=6, layer_types=KINDS, sliding_window=8)
    return save_checkpoint(lively(model), tmp_path_factory.mktemp("models") / "gemma two")


@pytest.fixture(scope="module")
def measured(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A warehouse with the scores of the model and the loss without each layer."""
    warehouse = str(tmp_path_factory.mktemp("warehouse"))
    score(str(gemma), warehouse=warehouse, sites=("block",), **OPTIONS)
    ablate(str(gemma), warehouse=warehouse, **OPTIONS)
    return warehouse


def is_read_as_it_is(folder: Path, keep: Sequence[int]) -> bool:
    checkpoint = locate(str(folder))
    assert checkpoint is not None
    return describe_misread(rules_of(text_config(checkpoint)), keep) == []


@pytest.mark.parametrize("by", ["loss", "avss", "random", "last", "greedy"])
def test_plans_of_every_score_keep_the_pattern(by: str, gemma: Path, measured: str) -> None:
    options = OPTIONS if by == "greedy" else {}
    pattern_plan = plan(warehouse=measured, by=by, count=2, keep_pattern=True, **options)
    assert is_read_as_it_is(gemma, pattern_plan.keep)
    assert pattern_plan.why["keep_pattern"] is True


def test_a_plan_that_breaks_the_pattern_says_so(gemma: Path, measured: str) -> None:
    loss_plan = plan(warehouse=measured, by="loss", count=1)
    assert loss_plan.findings[0].startswith("llama.cpp would read")


def test_an_odd_number_from_the_middle_is_refused_with_the_nearest_ones(measured: str) -> None:
    """Kinds alternate and the ends are protected, so that only pairs of neighbours can go."""
    with pytest.raises(PlanError) as caught:
        plan(warehouse=measured, by="loss", count=3, first=1, last=1, keep_pattern=True)
    assert "Drop 2 or 4 " in str(caught.value.hint)


def test_experts_have_no_pattern_to_keep(measured: str) -> None:
    with pytest.raises(ConfigError, match="keep_pattern"):
        plan(warehouse=measured, by="tokens", experts=0.5, keep_pattern=True)


def test_evaluate_says_what_is_misread_before_it_measures(gemma: Path, tmp_path: Path) -> None:
    events: list[object] = []
    by_hand = Plan(model=str(gemma), num_layers=6, layers="layers", drop=(0,))
    evaluate(
        [by_hand],
        tasks=["perplexity:builtin:pydoc"],
        warehouse=str(tmp_path / "w"),
        on_event=events.append,
        **{name: value for name, value in OPTIONS.items() if name != "corpus"},
    )
    (remark,) = [event for event in events if isinstance(event, Remark)]
    assert "llama.cpp would read 5 of the 5 remaining layers" in remark.text


@pytest.mark.parametrize("by", ["damage", "greedy"])
@pytest.mark.parametrize("size", [{"share": 0.33}, {"keep": 0.01}], ids=str)
def test_shrink_keeps_the_pattern(by: str, size: dict[str, float], gemma: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_sequences": 32, "speed": False}
    less = tmp_path / "less"
    done = shrink(
        str(gemma),
        output=str(less),
        by=by,
        repair="none",
        keep_pattern=True,
        first=1,
        last=1,
        **size,
        **options,
    )
    assert is_read_as_it_is(gemma, done.best.plan.keep)
    assert "llama.cpp" not in (less / "README.md").read_text()


def test_shrink_refuses_a_size_that_breaks_the_pattern_before_it_measures(gemma: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Without 3 of 6 layers"):
        shrink(str(gemma), output=str(tmp_path / "less"), share=0.5, keep_pattern=True, first=1, last=1, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_experiments_keep_the_pattern(gemma: Path, tmp_path: Path) -> None:
    _, rows = run_job_in(tmp_path, JOB, gemma)
    methods = {row["method"] for row in rows}
    assert {"avss", "avss, reversed", "random 0", "greedy search", "leave one out"} <= methods
    for row in rows:
        keep = [layer for layer in range(6) if layer not in row["drop"]]
        assert is_read_as_it_is(gemma, keep), row["method"]
