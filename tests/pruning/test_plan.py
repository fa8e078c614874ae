"""Plans: which layers a choice drops, at every bound too, what a plan file may say, and the score that is chosen by."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, strategies
from pydantic import TypeAdapter
from support.checkpoints import LAYERS as TINY_LAYERS
from support.checkpoints import checkpoint_at, weights_in
from support.command_line import avss, mistake, succeed
from support.warehouses import identity_of as row_identity
from support.warehouses import run_row, write_scores

from avss_dist.core.errors import ConfigError, QueryError
from avss_dist.core.intervention import Expert, Removals, sublayers_of
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.core.yaml_files import MAX_BYTES
from avss_dist.models.checkpoint.loading import load_model
from avss_dist.models.checkpoint.size import Footprint, footprint
from avss_dist.planning.criteria import criterion_values, default_score, read_layers
from avss_dist.planning.evaluated import evaluated_lines
from avss_dist.planning.layers import LayerRanking, plan_layers
from avss_dist.plans.choice import Choice, PlanError
from avss_dist.plans.criteria import (
    PUBLISHED,
    Criterion,
    LayerValues,
    Reading,
    count_layers,
    random_values,
    stored_values,
    values_from_the_end,
)
from avss_dist.plans.plan import Plan, read_plan
from avss_dist.plans.run_layers import RunLayers, plan_choice
from avss_dist.plans.size import count_for_memory, describe_savings, local_run_size
from avss_dist.pruning.checkpoint import prune
from avss_dist.stats.catalog import BLOCK_DISTANCE, GREEDY, LAST, RANDOM, SCORES
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

# Choosing


LAYERS = [5.0, 1.0, 4.0, 2.0, 3.0, 0.5, 6.0, 7.0]


@given(
    strategies.lists(strategies.integers(0, 9).map(float), min_size=2, max_size=40),
    strategies.floats(0.01, 0.99),
    strategies.integers(0, 3),
    strategies.integers(0, 3),
)
def test_the_lowest_that_are_not_protected(scores: list[float], share: float, first: int, last: int) -> None:
    choice = Choice(by="avss", share=share, first=first, last=last)
    number = max(1, round(share * len(scores)))
    unprotected = max(0, len(scores) - first - last)
    if number > unprotected or number >= len(scores):
        with pytest.raises(PlanError):
            choice.drop(scores)
        return
    dropped = choice.drop(scores)
    free = range(first, len(scores) - last)
    assert set(dropped) <= set(free)
    assert len(dropped) == number
    highest = max(scores[layer] for layer in dropped)
    for layer in set(free) - set(dropped):
        assert highest <= scores[layer]


PLACE = ("site", "recipe", "threshold", "threshold_kind")
READ = {"corpus": "t.txt", "corpus_fingerprint": "c", "tokens_fingerprint": "t", "num_sequences": 8, "settings": "{}"}
RUN = {"model": "m", "revision": "r", "run_id": "m-1", **READ}


def rows_of(reading: tuple[Any, ...], values: list[float | None], **more: Any) -> list[dict[str, Any]]:
    """Rows of `scores`, the last layer first."""
    columns = {"rank": 1, **named(reading), **more}
    rows = []
    for layer, value in enumerate(values):
        rows.append({"layer": layer, "layer_name": f"layers.{layer}", "avss_smoothed": value, **columns})
    rows.reverse()
    return rows


def named(reading: tuple[Any, ...]) -> dict[str, Any]:
    """A reading by the names of its columns."""
    return dict(zip(PLACE, reading, strict=True))


def score_rows(values: list[float]) -> list[dict[str, Any]]:
    rows = rows_of(PUBLISHED, [*values])
    for row in rows:
        row["block_influence"] = -row["avss_smoothed"]
    return rows


def plan_from(rows: list[dict[str, Any]], choice: Choice, values: LayerValues) -> Plan:
    return plan_choice(RunLayers(run=RUN, rows=rows), choice, values)


def test_random_plans_differ_by_seed() -> None:
    rows = score_rows([float(i) for i in range(30)])

    def random_plan(seed: int) -> Plan:
        return plan_from(rows, Choice(by="random", seed=seed), random_values(30, seed))

    plan = random_plan(0)
    other = random_plan(1)
    assert plan == random_plan(0)
    assert plan.drop != other.drop
    assert len(plan.drop) == 8
    assert other.why == {"by": "random", "seed": 1, "share": 0.25}


def test_a_plan_has_its_reading_as_a_reason() -> None:
    rows = score_rows(LAYERS[:4])
    choice = Choice(by="avss", count=1, seed=3, reading=PUBLISHED)
    plan = plan_from(rows, choice, stored_values(rows, "avss"))
    assert plan.why == {"by": "avss", "count": 1, **named(PUBLISHED)}


def test_layers_that_are_not_one_list() -> None:
    names = ("a.0", "shared", "a.1")
    rows = [{"layer": layer, "layer_name": name} for layer, name in enumerate(names)]
    values = LayerValues(values={0: 1.0, 1: 2.0, 2: 3.0})
    with pytest.raises(PlanError, match="not one list of modules"):
        plan_from(rows, Choice(by="avss"), values)


# Plan files


PLAIN = {"model": "m", "num_layers": 6, "layers": "layers", "drop": [1]}


def test_a_plan_through_its_file(tmp_path: Path) -> None:
    plan = Plan(
        model="m",
        revision="r",
        num_layers=7,
        layers="layers",
        drop=(1, 4),
        why={"by": "loss", "share": 0.25, "first": 1},
        run_id="r-1",
        findings=("it rises: with depth", "#2"),
        evaluated=("perplexity 3.2",),
    )
    plan_file = tmp_path / "plan.yaml"
    plan.write(plan_file)
    assert read_plan(plan_file) == plan
    assert "drop: [1, 4]\nkeep: [0, 2, 3, 5, 6]\n" in plan_file.read_text()
    assert plan.keep == (0, 2, 3, 5, 6)
    chosen = "Chosen by loss (rise of the loss without the layer, measured): share 0.25, first 1."
    assert chosen in plan.describe()
    assert "attention" not in plan_file.read_text()


SUBLAYERS = ["mlp.4", "attention.5", "attention.2", 1, "attention.3", "mlp.3"]


def test_a_plan_names_sublayers(tmp_path: Path) -> None:
    """Both sublayers of a layer are the layer."""
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(PLAIN | {"drop": SUBLAYERS}))
    plan = read_plan(file)
    attention_2, _ = sublayers_of([2])
    attention_5, _ = sublayers_of([5])
    _, mlp_4 = sublayers_of([4])
    assert plan.drop == (1, 3, attention_2, attention_5, mlp_4)
    assert plan.dropped_layers == (1, 3)
    assert plan.keep == (0, 2, 4, 5)
    left_out = plan.table()["left_out"]
    assert left_out.to_pylist() == [None, "layer", "attention", "layer", "mlp", "attention"]
    plan.write(file)
    assert "\ndrop: [1, 3, attention.2, attention.5, mlp.4]\nkeep: [0, 2, 4, 5]\n" in file.read_text()
    assert "\nattention" not in file.read_text()
    assert read_plan(file) == plan
    assert plan.describe()[0] == "Drops 2 layers, 3 sublayers of 6: 1, 3, attention.2, attention.5, mlp.4."
    only_layer = Plan(model="m", num_layers=1, layers="layers", drop=("mlp.0",))
    assert only_layer.keep == (0,)


def test_a_plan_names_experts() -> None:
    plan = Plan(model="m", num_layers=3, layers="layers", drop=("expert.1.0", "expert.1.2"))
    assert plan.drop == (Expert(1, 0), Expert(1, 2))
    assert plan.describe()[0] == "Drops 2 experts in 1 of 3 layers: expert.1.0, expert.1.2."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drop": ["attention.6"]}, "no layer 6: the model has 6, from 0"),
        ({"drop": ["mlp.2", "mlp.2"]}, "drop has mlp.2 twice"),
        ({"mlp": [2]}, "yaml:4: Unknown key 'mlp'"),
        ({"drop": ["mlp.1", 1, "attention.1"]}, "drop has attention.1 and the whole layer 1"),
        ({"drop": ["mlp.0x1"]}, "drop: 'mlp.0x1' is neither a layer nor a sublayer"),
        ({"drop": [0, 1, 2, 3, 4, "mlp.5", "attention.5"]}, "drops all 6 layers"),
        ({"drop": [10_001]}, "no layer 10001: the model has 6, from 0"),
        ({"num_layers": 10**12}, "num_layers must be at most 10000, not 1000000000000"),
        ({"drop": [-1]}, "drop: -1 is neither a layer nor a sublayer"),
        ({"drop": [1, 1]}, "drop has 1 twice"),
        ({"drop": []}, "drops no layer"),
        ({"drop": "1, 2"}, "drop must be a list"),
        ({"drop": [True]}, "drop: True is neither a layer nor a sublayer"),
        ({"keep": [0]}, "keep must list the layers that drop leaves"),
        ({"dropp": [1]}, "Did you mean 'drop'"),
        ({5: [1]}, "plan.yaml:6: Unknown key .5."),
        ({"revision": 5}, "revision must be a text, not 5"),
        ({"model": None}, "model must be a text, not nothing"),
        ({"why": "because"}, "why must be a mapping"),
        ({"why": {"by": [1]}}, "why: A reason must be a text or a number."),
        ({"run_id": "../../x"}, "not a run id"),
        ({"num_layers": "six"}, "num_layers must be a whole number"),
        ({"revision": 5, "model": "", "num_layers": 0}, "3 problems"),
        ("words", "expected a mapping with keys"),
        ("drop: [1]\n# x\nmodel: m\ndrop: [2]\n", r"yaml:4: the key 'drop' is repeated; the first is in line 1\."),
        ("model: m\n1: a\n0x1: b\n", r"yaml:3: the key '0x1' is repeated; the first is in line 2\."),
        ("num_layers: !!bool 7", "yaml:1: this is not YAML: '7' is not a !!bool"),
        ("? [a]\n: 1", "a key must be a text"),
        ("drop: [1]", "model is missing"),
        ("model: 2026-13-45", "is not YAML"),
    ],
)
def test_files_that_are_no_plans(given: dict[Any, Any] | str, message: str, tmp_path: Path) -> None:
    """A plain plan with changes, or another text."""
    if not isinstance(given, str):
        given = yaml.safe_dump(PLAIN | given)
    plan_file = tmp_path / "plan.yaml"
    plan_file.write_text(given)
    with pytest.raises(PlanError, match=message):
        read_plan(plan_file)


def test_paths_that_are_no_plans(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(PlanError, match="cannot be read"):
            read_plan(path)
    plan_file = tmp_path / "plan.yaml"
    plan_file.write_bytes(os.urandom(8) + b"\xff")
    with pytest.raises(PlanError, match="it is not UTF-8 text"):
        read_plan(plan_file)


def test_a_file_that_is_too_large_is_told_as_such(tmp_path: Path) -> None:
    """Wherever the part that is read ends: here in the middle of a character."""
    plan_file = tmp_path / "plan.yaml"
    plan_file.write_text("é" * MAX_BYTES, encoding="utf-8")
    with pytest.raises(PlanError, match="is too large"):
        read_plan(plan_file)


def test_a_plan_has_a_schema_for_editors(tmp_path: Path) -> None:
    schema = TypeAdapter(Plan).json_schema()
    for part in schema["properties"].values():
        assert part["description"]
    plan = Plan(**PLAIN | {"why": {"by": "loss"}})
    plan_file = tmp_path / "plan.yaml"
    plan.write(plan_file)
    written = yaml.safe_load(plan_file.read_text())
    written.pop("keep")
    jsonschema.validate(written, schema)
    jsonschema.validate(written | {"drop": [1, "attention.2"]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written | {"drop": ["one"]}, schema)


# The score that is chosen by


@pytest.fixture
def scored(tmp_path: Path) -> Warehouse:
    """Two runs; the later one's AVSS rises with depth."""
    write_scores(tmp_path, "a-1", LAYERS)
    write_scores(tmp_path, "b-1", sorted(LAYERS), corpus="my text.txt")
    return Warehouse(tmp_path)


def write_losses(store: Warehouse, run_id: str, losses: list[float], whole: float = 3.0) -> None:
    """What `avss ablate` leaves: the loss of the whole model and without each layer."""
    common = {"task": "ablation:text.txt", "metric": "loss", **COMMON}
    rows = [{**common, "drop": [], "value": whole}]
    for layer, loss in enumerate(losses):
        rows.append({**common, "drop": [layer], "value": loss})
    write_evaluations(store, run_id, "loss", rows)


def write_evaluations(store: Warehouse, run_id: str, kind: str, rows: list[dict[str, Any]]) -> None:
    """Write rows of the evaluation of a run, whose id ends in its kind."""
    Store(store.root).write_rows("evaluations", identity_of(run_id, f"-{kind}"), rows)


def identity_of(run_id: str, suffix: str = "") -> RunIdentity:
    row = run_row(run_id)
    return replace(row_identity(row), run_id=f"{run_id}{suffix}")


COMMON = {"created_at": datetime(2026, 2, 1, tzinfo=UTC), "drop_parts": []}
"""Columns of a row of an evaluation that are the same in each of these tests."""
LOSSES = [9.0, 8.0, 3.1, 7.0, 3.2, 6.0, 5.0, 4.0]


def test_no_score_is_a_default(scored: Warehouse, tmp_path: Path) -> None:
    """Without `--by` and without a measured loss: no plan, the scores with their meanings, the command to measure."""
    plan = tmp_path / "plan.yaml"
    result = avss("plan", "-w", scored.root, "--run", "b-1", "-o", plan)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not plan.exists()
    command = f"avss ablate org/b-1 --corpus 'my text.txt' --warehouse {scored.root}"
    assert f"passes: {command} --no-leave-one-out --damage\n" in result.stderr
    assert f"loss: {command}\n" in result.stderr
    for name, score in SCORES.items():
        assert f"  {name}: {score.meaning}" in result.stderr
    assert "with --by" in result.stderr
    first_run = scored.runs().to_pylist()[0]
    with pytest.raises(QueryError, match="neither the damage of the layers of org/a-1 nor"):
        default_score(scored, first_run)


def write_damage(store: Warehouse, run_id: str, propagated: list[float], predicted: list[float]) -> None:
    """What `avss ablate --damage` leaves, of what plans read."""
    number = len(propagated)
    rows: list[dict[str, Any]] = []

    def add(metric: str, layer: int, value: float, drop: Sequence[int] = ()) -> None:
        place = {"metric": metric, "layer": layer, "drop": [*drop]}
        rows.append({"task": "damage:text.txt", **place, "value": value, **COMMON})

    for layer in range(number):
        add("propagated_2", layer, propagated[layer])
        add("predicted_3", layer, predicted[layer])
    for start, stop in combinations(range(number + 1), 2):
        distance = 0.2
        if (start, stop) == (4, 6):
            distance = 0.1
        add("block_distance", start, distance, range(start, stop))
    write_evaluations(store, run_id, "damage", rows)


def row_of_run(store: Warehouse, run_id: str) -> dict[str, Any]:
    row = store.run(run_id)
    assert row is not None
    return row


def dropped(store: Warehouse, run_id: str, **options: Any) -> Removals:
    """What a choice drops of a run."""
    plan = plan_layers(store, row_of_run(store, run_id), Choice(**options))
    return plan.drop


def test_damage_is_the_mean_of_two_ranks_and_the_default_without_a_loss(scored: Warehouse, tmp_path: Path) -> None:
    propagated = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    predicted = [0.8, 0.2, 0.5, -0.1, 0.9, 0.6, 0.7, 0.65]
    write_damage(scored, "b-1", propagated, predicted)
    # ranks 8 7 6 5 4 3 2 1 and 7 2 3 1 8 4 6 5: sums 15 9 9 6 12 7 8 6
    assert dropped(scored, "b-1", by="damage", count=2) == (3, 7)
    assert dropped(scored, "b-1", by="predicted", count=1) == (3,)
    assert dropped(scored, "b-1", by="propagated", count=1) == (7,)
    plan_file = tmp_path / "plan.yaml"
    succeed("plan", "-w", scored.root, "--run", "b-1", "-o", plan_file)
    plan = read_plan(plan_file)
    assert plan.drop == (3, 7)
    assert plan.why["by"] == "damage"
    assert plan.why["evaluation"] == "b-1-damage"
    write_losses(scored, "b-1", LOSSES)
    assert default_score(scored, row_of_run(scored, "b-1")) == "loss"


def test_a_block_is_chosen_by_its_own_distance(scored: Warehouse, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    options = ("plan", "-w", scored.root, "--run", "b-1", "--by", "block_distance", "-o", plan_file)
    result = avss(*options, "--count", 2)
    assert result.exit_code == 2
    assert "--no-leave-one-out --damage" in result.stderr
    write_damage(scored, "b-1", [1.0] * 8, [1.0] * 8)
    result = succeed(*options, "--count", 2)
    assert read_plan(plan_file).drop == (4, 5)
    result = avss(*options, "--count", 2, "--first", 1, "--last", 3)
    assert read_plan(plan_file).drop == (1, 2)
    result = avss(*options, "--count", 7, "--first", 1, "--last", 1)
    assert result.exit_code == 2
    assert "6 of 8 are not protected" in result.stderr


def test_the_measured_loss_is_taken_where_there_is_one(scored: Warehouse, tmp_path: Path) -> None:
    write_losses(scored, "b-1", LOSSES)
    plan_file = tmp_path / "plan.yaml"
    result = succeed("plan", "-w", scored.root, "--run", "b-1", "-o", plan_file)
    plan = read_plan(plan_file)
    assert plan.drop == (2, 4)
    assert plan.why["by"] == "loss"
    assert plan.why["evaluation"] == "b-1-loss"
    assert "No --by was given: loss is measured" in result.stdout
    assert "Not evaluated yet" in result.stdout
    assert "Finding" not in result.stdout
    for line in ("Drops 2 of 8 layers: 2, 4.", "Model: org/b-1 at main. Run: b-1."):
        assert line in result.stdout
    run = row_of_run(scored, "b-1")
    assert plan_layers(scored, run, Choice(by="loss")) == plan


def test_measured_values_tell_the_evaluation_that_they_come_from(scored: Warehouse) -> None:
    write_losses(scored, "b-1", LOSSES)
    run = row_of_run(scored, "b-1")
    values = criterion_values(scored, read_layers(scored, run), Criterion("loss"))
    assert values.run_id == "b-1-loss"
    assert values.task == "ablation:text.txt"
    (seen,) = values.seen
    assert seen.use == "ablation"
    assert seen.by == "b-1-loss"
    assert seen.corpus == "text.txt"


def test_values_that_are_read_once_make_plans_of_any_size(scored: Warehouse) -> None:
    run = row_of_run(scored, "a-1")
    ranking = LayerRanking.of_run(scored, run, Criterion("avss", reading=PUBLISHED))
    choice = Choice(by="avss", reading=PUBLISHED, last=1)
    for drop in ((5,), (1, 5), (1, 3, 5)):
        assert ranking.plan(replace(choice, count=len(drop))).drop == drop


def test_a_plan_says_what_speaks_against_it(scored: Warehouse, tmp_path: Path) -> None:
    """Scores that track depth, what experiments said of them, and what the model without these layers is worth."""
    without_two = {"task": "t", "metric": "acc", "drop": [0, 1], "score": "avss", "value": 0.4, **COMMON}
    retention = {"retention": 0.5, "retention_low": 0.4, "retention_high": 0.6, "method": "avss", "share": 0.25}
    Store(scored.root).write_rows("experiments", identity_of("b-1"), [without_two | retention], "0" * 20)
    loss = {"task": "perplexity:x", "metric": "loss", **COMMON}
    whole = {**loss, "drop": [], "value": np.log(20.0)}
    pruned = {**loss, "drop": [0, 1], "value": np.log(49020.0)}
    write_evaluations(scored, "b-1", "text", [whole, pruned])
    plan_file = tmp_path / "plan.yaml"
    result = succeed("plan", "-w", scored.root, "--run", "b-1", "--by", "avss", "-o", plan_file)
    plan = read_plan(plan_file)
    findings = "\n".join(plan.findings)
    assert "rises with depth" in findings
    assert "the claim does not hold" in findings
    assert plan.evaluated == ("perplexity:x: perplexity 4.902e+04, 20 of the whole model.",)
    for line in (*plan.findings, *plan.evaluated):
        assert line in result.stdout
    assert "Not evaluated yet" not in result.stdout


def test_a_plan_says_on_which_rows_it_was_evaluated_and_what_is_kept(scored: Warehouse) -> None:
    """Where the warehouse has the cells, with an interval over the rows."""
    common = {"task": "perplexity:x", "metric": "loss", **COMMON}
    about = {**common, "settings": '{"skip_sequences": 24}', "num_samples": 16}
    of_cell = {**common, "part": 0, "weights": np.ones(16)}
    losses = np.linspace(2.0, 3.0, 16)
    rises = np.linspace(0.1, 0.2, 16)
    evaluations = []
    cells = []
    for drop, samples in (((), losses), ((0, 1), losses + rises)):
        evaluations.append({**about, "drop": drop, "value": samples.mean()})
        cells.append({**of_cell, "drop": drop, "samples": samples})
    write_evaluations(scored, "b-1", "rows", evaluations)
    Store(scored.root).write_rows("cells", identity_of("b-1", "-rows"), cells, "0" * 20)
    lines = evaluated_lines(scored, row_of_run(scored, "b-1"), (0, 1))
    (line,) = [line for line in lines if line.startswith("perplexity:x (")]
    assert re.fullmatch(
        r"perplexity:x \(16 rows after the first 24\): perplexity 14\.15, 12\.18 of the whole model: "
        r"86\.1% kept \(95% interval 8\d\.\d% to 8\d\.\d%\)\.",
        line,
    )


def test_a_reading_that_was_not_scored_is_refused_with_what_was(scored: Warehouse, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    result = mistake("plan", "-w", scored.root, "--by", "avss", "--site", "mlp", "-o", plan_file)
    assert "No scores of site mlp, recipe pooled, threshold 1e-05." in result
    assert "There are: site block, recipe pooled, threshold 1e-05." in result


def test_of_several_runs_the_newest_is_named(scored: Warehouse, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    result = avss("plan", "-w", scored.root, "--by", "random", "-o", plan_file)
    assert "This is the newest of 2 runs" in result.stdout
    result = mistake("plan", "-w", scored.root, "--by", "random", "--first", "some", "-o", plan_file)
    assert "--first must be a whole number" in result


# What a plan saves, and how many layers a budget takes


@pytest.fixture(scope="module")
def size(tiny_llama: Path) -> Footprint:
    return footprint(str(tiny_llama), Settings())


def test_what_is_said_to_be_saved_is_missing_in_the_files(size: Footprint, tiny_llama: Path, tmp_path: Path) -> None:
    plan = Plan(model=str(tiny_llama), num_layers=TINY_LAYERS, layers="layers", drop=(0, 2))
    less = tmp_path / "less"
    done = prune(str(tiny_llama), plan, less)
    before = weights_in(tiny_llama).values()
    after = weights_in(less).values()
    fewer = count_numbers(before) - count_numbers(after)
    saved = sum(tensor.nbytes for tensor in before) - done["bytes"]
    share = saved / size.weight_bytes
    said = describe_savings(plan, size)
    assert f"Saves 2 of 3 layers, {fewer:,} of" in said
    assert f" parameters ({share:.1%}), {describe_bytes(saved)} of" in said


def count_numbers(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def test_keys_and_values_take_what_a_cache_takes(size: Footprint, tiny_llama: Path) -> None:
    model = load_model(checkpoint_at(tiny_llama), Settings(device="cpu"), head=True)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(7)[None], use_cache=True).past_key_values
    for layer, token_bytes in zip(cache.layers, size.cache_bytes, strict=True):
        assert layer.keys.nbytes + layer.values.nbytes == 7 * token_bytes


@pytest.mark.parametrize(("memory", "count"), [(91, 1), (90, 2), (70, 2), (69, 3)])  # 90: the smallest is not enough
def test_any_layers_of_that_number_leave_so_much(memory: int, count: int, size: Footprint) -> None:
    uneven = replace(size, weight_bytes=101, num_parameters=50, layer_bytes=(30, 10, 21, 30), num_layers=4)
    assert count_for_memory(uneven, memory) == count


def test_memory_that_suffices_or_cannot(size: Footprint) -> None:
    with pytest.raises(PlanError, match="as it is, which meets `memory`"):
        count_for_memory(size, size.weight_bytes)
    first, second, _ = size.layer_bytes
    least = describe_bytes(size.weight_bytes - first - second)
    with pytest.raises(PlanError, match=f"cannot be met: with one layer left, {least} of"):
        count_for_memory(size, 1)


# What a choice may combine, the scores that it reads, and its bounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "avs"}, "Did you mean 'avss'"),
        ({"by": "avss", "share": 1.0}, "`share` must be less than 1"),
        ({"by": "avss", "share": 0.5, "count": 2}, "`share` and `count` are mutually exclusive"),
        ({"by": "avss", "count": 0}, "`count` must be at least 1"),
        ({"by": "avss", "first": -1}, "`first` must be at least 0"),
        ({"by": "avss", "seed": -1, "count": 0}, "2 problems"),
        *(({"by": by, "highest": True}, "chooses among sets") for by in (BLOCK_DISTANCE, GREEDY)),
    ],
)  # fmt: skip
def test_combinations_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Choice(**options)


def stored(rows: list[dict[str, Any]], by: str, reading: Reading | None = None) -> list[float]:
    return stored_values(rows, by, reading).by_layer(count_layers(rows)).tolist()


def test_scores_are_those_of_one_reading_in_the_order_of_layers() -> None:
    other = ("mlp", *PUBLISHED[1:])
    published_rows = rows_of(PUBLISHED, [3.0, None, 1.0, 2.0])
    other_rows = rows_of(other, [7.0, 8.0, 9.0, 6.0])
    first, *later = published_rows
    for rows in ([*published_rows, *other_rows], [first, *other_rows, *later]):
        np.testing.assert_array_equal(stored(rows, "avss"), [3, np.nan, 1, 2])
        assert stored(rows, "avss", other) == [7, 8, 9, 6]
    assert stored(other_rows, "avss") == [7, 8, 9, 6]


def test_a_layer_without_a_rank_has_no_avss_and_its_other_scores() -> None:
    rows = rows_of(PUBLISHED, [3.0, 2.0], block_influence=0.5)
    rows[0]["rank"] = None
    np.testing.assert_array_equal(stored(rows, "avss"), [3, np.nan])
    np.testing.assert_array_equal(stored(rows, "block_influence"), [0.5, 0.5])


@pytest.mark.parametrize("by", [RANDOM, LAST])
def test_controls_need_no_scores(by: str, tmp_path: Path) -> None:
    rows = [{"layer": layer, "layer_name": f"layers.{layer}"} for layer in range(5)]
    layers = RunLayers(run=RUN, rows=rows)
    choice = Choice(by=by, seed=4)
    values = criterion_values(Warehouse(tmp_path), layers, choice.criterion)
    expected = [5, 4, 3, 2, 6]
    if by == RANDOM:
        expected = np.random.default_rng(4).permutation(5).tolist()
    assert isinstance(values, LayerValues)
    assert values.by_layer(5).tolist() == expected


def test_the_last_layers_go_first_and_the_final_one_stays() -> None:
    choice = Choice(by=LAST, count=2)
    assert choice.choose(values_from_the_end(5), 5) == (2, 3)


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({"count": 2}, (3, 4)),
        ({"count": 2, "first": 4}, (4, 5)),
        ({"count": 2, "last": 3}, (1, 2)),
        ({"count": 2, "first": 1, "last": 3}, (1, 2)),
        ({"count": 1}, (5,)),
        ({"share": 0.5}, (3, 4, 5)),
    ],
)
def test_the_block_with_the_least_distance(options: dict[str, Any], dropped: tuple[int, ...]) -> None:
    """Ties go to the earlier block."""
    costs = np.array([9.0, 3.0, 3.0, 2.0, 1.0, 0.5])
    distances = {}
    for start, stop in combinations(range(7), 2):
        distances[tuple(range(start, stop))] = float(costs[start:stop].sum())
    distances[4, 5] += 3
    choice = Choice(by=BLOCK_DISTANCE, **options)
    assert choice.drop_block(distances, 6) == dropped
    flat = dict.fromkeys(distances, 1.0)
    assert choice.drop_block(flat, 6)[0] == choice.first


@pytest.mark.parametrize("gap", [{}, {(3, 4): np.nan}, {(3, 4): np.inf}])
def test_a_block_without_a_distance_is_named(gap: dict[tuple[int, ...], float]) -> None:
    distances = {(0, 1): 1.0, (1, 2): 1.0, (2, 3): 1.0, (4, 5): 1.0} | gap
    choice = Choice(by=BLOCK_DISTANCE, count=2)
    with pytest.raises(PlanError, match=f"Layers 3 to 4 have no measurement '{BLOCK_DISTANCE}'"):
        choice.drop_block(distances, 6)
    protected = replace(choice, last=2)
    assert protected.drop_block(distances, 6) == (0, 1)


@pytest.mark.parametrize(
    ("options", "layers", "number"),
    [
        ({}, 4, 1),
        ({}, 6, 2),
        ({}, 30, 8),
        ({"share": 0.9}, 10, 9),
        ({"count": 2, "first": 1, "last": 1}, 4, 2),
    ],
)
def test_how_many_are_dropped(options: dict[str, Any], layers: int, number: int) -> None:
    assert Choice(by="avss", **options).number(layers) == number


@pytest.mark.parametrize(
    ("options", "layers", "message"),
    [
        ({"count": 3, "first": 1, "last": 1}, 4, "3 layers would be dropped, but only 2 of 4"),
        ({"first": 10**20}, 8, "only 0 of 8 are not protected"),
    ],
)
def test_more_than_are_not_protected_are_refused(options: dict[str, Any], layers: int, message: str) -> None:
    choice = Choice(by="avss", **options)
    with pytest.raises(PlanError, match=message):
        choice.number(layers)


@pytest.mark.parametrize(("first", "last", "layers", "expected"), [(1, 2, 6, range(1, 4)), (3, 2, 4, range(0))])
def test_layers_at_both_ends_are_protected(first: int, last: int, layers: int, expected: range) -> None:
    choice = Choice(by="avss", first=first, last=last)
    assert choice.unprotected(layers) == expected


def test_size_of_a_run_of_the_hub_is_not_that_of_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/tiny").mkdir(parents=True)
    monkeypatch.setattr("avss_dist.plans.size.run_size", pytest.fail)  # It would ask the hub.
    assert local_run_size({"model": "org/tiny", "revision": "c" * 40}) is None
