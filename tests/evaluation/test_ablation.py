"""Ablation: resumed passes against whole ones, Shapley values against every subset, plans, tables, and rounding."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.causal_lm import SMALL, opened, random_shard
from support.checkpoints import VOCABULARY, llama
from support.command_line import as_words, avss, in_one_line, json_rows, mistake, succeed
from support.corpora import rows_of
from support.experiments import cell_times
from support.families import tiny_model
from support.quantized import block_fp8
from support.rows import column, only_row, values_in, where
from support.tables import evaluation_rows, table_rows
from support.tiers import all_of
from transformers import Qwen3Config, Qwen3ForCausalLM

from avss_dist import ablate, evaluate, score
from avss_dist.analysis.scorecard import best_readings, score_cards
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import CorpusPlan, Shard
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.skipping import resumption
from avss_dist.models.forward import changing
from avss_dist.models.structure.layers import representatives
from avss_dist.models.watching import recording
from avss_dist.reports.page.page import _scorecards
from avss_dist.reports.terminal.evaluation import ablation_table
from avss_dist.studies.ablate import Ablation
from avss_dist.tasks import shapley as ablation
from avss_dist.tasks.shapley import SHAPLEY, SHARED, Shapley
from avss_dist.tasks.task import MetricRow
from avss_dist.tasks.text_loss import LeaveOneOut, TextLoss
from avss_dist.warehouse.reader import Warehouse

Save = Callable[[Any, Path], Path]
RESUMED = ("llama", "gemma3_text", "qwen3", "qwen2_moe", "gpt2", "opt", "mamba", "olmo2")
NOT_RESUMED = ("falcon", "gemma3n_text", "bamba")
EACH_LAYER = ((), (0,), (1,), (2,))
TEXT = "builtin:pydoc"


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Path:
    """Weights so large that layers matter."""
    folder = tmp_path_factory.mktemp("ablation") / "four-layers"
    return save_checkpoint(llama(num_hidden_layers=4, initializer_range=0.3), folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Path:
    """Four layers that have learned the text by heart: without any of them, the model is worse than a guess."""
    folder = tmp_path_factory.mktemp("ablation") / "trained"
    model = llama(num_hidden_layers=4, initializer_range=0.3)
    save_checkpoint(model, folder)
    text = text_of(opened(folder))
    rows = torch.from_numpy(rows_of(text)).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return save_checkpoint(model, folder)


def text_of(model: LanguageModel) -> CorpusPlan:
    """The text that is ablated on, in the tokens of a model and in one shard."""
    settings = Settings(**SMALL | {"sequences_per_shard": 6})
    return plan_text(model.checkpoint, TEXT, settings)


def losses_without(
    model: LanguageModel, shard: Shard, drops: Sequence[tuple[int, ...]] = EACH_LAYER
) -> list[MetricRow]:
    """Return the losses without each set of layers, each by a pass of its own."""
    measure = TextLoss(shard)
    losses = []
    for drop in drops:
        losses += measure(model, NO_INTERVENTION.without(*drop))
    return losses


def assert_same_rows(
    rows: list[MetricRow], expected: list[MetricRow], drops: Sequence[tuple[int, ...]] = EACH_LAYER
) -> None:
    assert [row.removed for row in rows] == [*drops]
    for row, other in zip(rows, expected, strict=True):
        assert row.metric == other.metric
        assert row.layer == other.layer
        assert np.array_equal(row.samples, other.samples)
        assert np.array_equal(row.weights, other.weights)


@pytest.mark.parametrize("name", all_of(RESUMED + NOT_RESUMED, default=["gemma3_text", "mamba", "falcon"]))
def test_each_loss_is_that_of_the_plan(name: str, save_checkpoint: Save, tmp_path: Path) -> None:
    model = opened(save_checkpoint(tiny_model("causal", name), tmp_path / name))
    shard = random_shard()
    try:
        expected = losses_without(model, shard)
    except Exception as error:  # a family that cannot be run without a layer
        with pytest.raises(type(error)):
            LeaveOneOut(shard)(model)
        assert name in NOT_RESUMED
        return
    assert_same_rows(LeaveOneOut(shard)(model), expected)
    assert model.resumes == (name in RESUMED)
    whole, without_first, *_ = expected
    assert not math.isclose(whole.samples[0], without_first.samples[0], rel_tol=1e-9)


def test_half_precision_resumes_too(tiny_llama: Path) -> None:
    model = opened(tiny_llama, dtype="bfloat16")
    shard = random_shard()
    assert_same_rows(LeaveOneOut(shard)(model), losses_without(model, shard))
    assert model.resumes


def test_one_more_layer_left_out(four_layers: Path) -> None:
    model = opened(four_layers)
    shard = random_shard()
    drops = [(1,), (0, 1), (1, 2), (1, 3)]
    rows = LeaveOneOut(shard)(model, NO_INTERVENTION.without(1))
    assert_same_rows(rows, losses_without(model, shard, drops), drops)


def count_layer_passes(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that grows by a layer's module with every pass through a layer."""
    passes: list[Any] = []
    kind = type(model.layers[0].module)
    forward = kind.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return passes


def test_half_of_the_layers_run(four_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(four_layers)
    shard = random_shard(rows=2)
    assert model.resumes  # which tries every layer
    passes = count_layer_passes(model, monkeypatch)
    LeaveOneOut(shard)(model)
    assert len(passes) == 4 + 3 + 2 + 1  # the whole model, and what follows each layer


@pytest.mark.parametrize("resumes", [True, False], ids=["changes its input", "reads what an earlier one left"])
def test_a_layer_may_change_its_input_but_not_hand_more_than_hidden_states_on(
    resumes: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed pass would not have what an earlier layer left elsewhere, or something stale."""
    model = opened(tiny_llama)
    shard = random_shard()
    kind = type(model.layers[0].module)
    forward = kind.forward
    left = {}

    def changed(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if resumes:
            return hidden_states.add_(forward(self, hidden_states, *args, **kwargs))
        (layer,) = [layer.index for layer in model.layers if layer.module is self]
        left[layer] = hidden_states.mean()
        output = forward(self, hidden_states, *args, **kwargs)
        return output + left.pop(0, 0.5) if layer == 2 else output

    monkeypatch.setattr(kind, "forward", changed)
    assert_same_rows(LeaveOneOut(shard)(model), losses_without(model, shard))
    assert model.resumes == resumes


@pytest.mark.nightly
def test_of_many_layers_some_of_each_kind_are_tried(tmp_path: Path, save_checkpoint: Save) -> None:
    few = opened(save_checkpoint(llama(num_hidden_layers=8), tmp_path / "few"))
    assert representatives(few.layers) == list(few.layers)
    kinds = ["sliding_attention"] * 40
    kinds[11] = kinds[12] = kinds[30] = "full_attention"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 40, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCABULARY}
    config = Qwen3Config(**sizes, layer_types=kinds, use_sliding_window=True, sliding_window=8)
    many = opened(save_checkpoint(Qwen3ForCausalLM(config), tmp_path / "many"))
    tried = [layer.index for layer in representatives(many.layers)]
    assert tried == [0, 6, 11, 17, 22, 28, 30, 33, 39]


def test_resuming_leaves_no_trace(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    shard = random_shard()
    (batch, *_) = shard.batches(2)
    before = model.losses(batch)
    with recording(model.layers) as inputs:
        model.losses(batch)
    resumed = resumption(model.layers, 1, inputs[1])
    with pytest.raises(KeyboardInterrupt), changing(resumed):
        raise KeyboardInterrupt
    for layer in model.layers:
        assert "forward" not in vars(layer.module)
        assert not layer.module._forward_hooks
        assert not layer.module._forward_pre_hooks
    assert np.array_equal(model.losses(batch), before)


# Shapley values


def enumerated(model: LanguageModel, shard: Shard) -> tuple[dict[frozenset[int], float], list[float]]:
    """The loss without every set of layers, and the Shapley value of each layer, by its definition."""
    players = range(len(model.layers))
    losses = {}
    for size in range(len(players) + 1):
        for removed in combinations(players, size):
            (row,) = TextLoss(shard)(model, NO_INTERVENTION.without(*removed))
            losses[frozenset(removed)] = row.samples.sum() / row.weights.sum()
    values = []
    for layer in players:
        total = 0.0
        for removed in losses:
            if layer not in removed:
                change = losses[removed | {layer}] - losses[removed]
                total += share_of_orders(len(removed), len(players)) * change
        values.append(total)
    return losses, values


def share_of_orders(before: int, players: int) -> float:
    """The share of all orders in which a given player comes right after a given set of so many."""
    after = players - before - 1
    return math.factorial(before) * math.factorial(after) / math.factorial(players)


@pytest.mark.nightly
def test_a_permutation_stops_where_the_model_only_guesses(trained: Path) -> None:
    """The layers that are left share the rest of the loss, so that contributions add up as they do without."""
    model = opened(trained)
    (shard,) = text_of(model).shards
    seeds = (0, 1, 2)
    whole_passes = Shapley(shards=(shard,), seeds=seeds, truncation=False)
    full = whole_passes(model)
    truncating = replace(whole_passes, truncation=True)
    rows = truncating(model)
    cut = rows[:4]
    shared = rows[4:]
    for layer, row in enumerate(shared):
        assert row.metric == SHARED
        assert row.layer == layer
    losses, _ = enumerated(model, shard)
    bound = math.log(model.module.config.vocab_size)
    empty = losses[frozenset(range(4))]
    whole = losses[frozenset()]
    assert whole < bound
    truncated = 0
    for index, seed in enumerate(seeds):
        order = np.random.default_rng(seed).permutation(4).tolist()
        removed = [losses[frozenset(order[:number])] for number in range(5)]
        worse_than_guesses = [place for place in range(4) if removed[place] >= bound]
        stop = min(worse_than_guesses, default=4)
        truncated += stop < 3
        for place, layer in enumerate(order):
            measured = removed[place + 1] - removed[place]
            assert full[layer].samples[index] == measured
            expected = measured
            if place >= stop:
                expected = (empty - removed[stop]) / (4 - stop)
            assert cut[layer].samples[index] == pytest.approx(expected, abs=1e-12)
            assert shared[layer].samples[index] == (place >= stop and stop < 3)
    assert truncated > 0
    sums = sum(row.samples for row in cut)
    assert sums == pytest.approx(np.full(3, empty - whole), abs=1e-12)


def test_values_of_a_model_that_only_guesses_are_those_of_all_permutations(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no better than a guess with all of its layers: nothing is truncated, and nothing is 0."""
    model = opened(tiny_llama)
    shard = random_shard()
    losses, values = enumerated(model, shard)
    whole = losses[frozenset()]
    empty = losses[frozenset(range(3))]
    assert whole > math.log(model.module.config.vocab_size)
    orders = [*permutations(range(3))]

    class Ordered:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def permutation(self, players: Any) -> Any:
            return np.array(orders[self.seed])

    measure = Shapley(shards=(shard,), seeds=tuple(range(6)))
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", Ordered)
        rows = measure(model)
    measured = [row.samples.mean() for row in rows if row.metric == SHAPLEY]
    assert measured == pytest.approx(values, abs=1e-12)
    assert min(map(abs, values)) > 1e-6
    assert sum(measured) == pytest.approx(empty - whole, abs=1e-12)
    for row in rows:
        if row.metric == SHARED:
            assert not row.samples.any()


def shown(ablation: Ablation) -> str:
    printed = StringIO()
    console = Console(width=300, file=printed)
    console.print(ablation_table(ablation))
    return in_one_line(printed.getvalue())


@pytest.mark.nightly
def test_truncated_permutations_are_counted(trained: Path, tmp_path: Path) -> None:
    warehouse = tmp_path / "w"
    text = {"corpus": TEXT, "warehouse": warehouse, "leave_one_out": False, **SMALL}
    truncating = ablate(trained, shapley=6, **text)
    truncated, number = truncating.permutations
    shared = truncating.table()["shapley_shared"].to_numpy()
    assert number == 6
    assert 0 < truncated <= 6
    assert shared.max() <= truncated / 6 + 1e-12
    told = shown(truncating)
    assert f"{truncated} of 6 permutations were truncated where the model only guessed" in told
    rows = where(table_rows(warehouse, "evaluations"), metric=SHARED)
    assert column(rows, "value") == pytest.approx(shared.tolist())
    whole = ablate(trained, shapley=6, truncation=False, **text)
    assert whole.permutations == (0, 6)
    (first, *_) = whole.table().to_pylist()
    assert first["shapley_shared"] is None
    assert "truncated" not in shown(whole)
    assert total_shapley(truncating) == pytest.approx(total_shapley(whole), abs=1e-9)


def total_shapley(ablation: Ablation) -> float:
    return sum(ablation.table()["shapley"].to_pylist())


@pytest.mark.nightly
def test_resumed_or_not_the_contributions_are_the_same(four_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(four_layers)
    assert model.resumes
    passes = count_layer_passes(model, monkeypatch)
    shards = (random_shard(), random_shard(rows=3))
    measure = Shapley(shards=shards, seeds=(0, 1, 2), truncation=False)
    resumed = measure(model)
    number = len(passes)
    passes.clear()
    monkeypatch.setattr(ablation, "MAX_RECORDED_BYTES", 0)
    for row, other in zip(resumed, measure(model), strict=True):
        assert row.layer == other.layer
        assert np.array_equal(row.samples, other.samples)
    assert number < 0.7 * len(passes)
    (without, *_) = measure(model, NO_INTERVENTION.without(0))
    assert without.layer == 1


# Plans


@pytest.mark.nightly
def test_plans_need_the_ablation_and_evaluate_to_its_losses(tiny_llama: Path, tmp_path: Path) -> None:
    warehouse = tmp_path / "w"
    plan = tmp_path / "plan.yaml"
    run = score(tiny_llama, corpus=TEXT, warehouse=warehouse, **SMALL)
    refused = mistake("plan", "-w", warehouse, "--by", "shapley", "-o", plan)
    assert f"avss ablate {tiny_llama} --corpus {TEXT} --warehouse {warehouse}" in refused
    text = {"corpus": TEXT, "warehouse": warehouse, "skip_sequences": 6, **SMALL}
    ablated = ablate(tiny_llama, gradients=True, shapley=2, **text)
    assert ablated.whole is not None
    # The text is that of the ablation, whose losses are those of the evaluation.
    same_text = {"tasks": [f"perplexity:{TEXT}"], "warehouse": warehouse, "skip_sequences": 6, "allow_overlap": True}
    for by, task in (("loss", "ablation"), ("shapley", "shapley"), ("taylor", "gradients")):
        done = succeed("plan", "-w", warehouse, "--run", run.run_id, "--by", by, "--count", 1, "-o", plan)
        assert f"task: {task}:{TEXT}" in plan.read_text(), done.stderr
        (evaluated,) = evaluate([plan], **same_text, **SMALL)
        (dropped,) = evaluated.subject.intervention.removed
        name = "increase" if by == "loss" else by
        values = {layer: results[name].value for layer, results in ablated.layers.items()}
        assert dropped == min(values, key=lambda layer: values[layer])
        assert np.array_equal(evaluated.result.samples, ablated.layers[dropped]["loss"].samples)
    whole = ablated.whole
    loss = ablated.layers[1]["loss"]
    increase = ablated.layers[1]["increase"]
    assert increase.value == pytest.approx(loss.value - whole.value)
    difference = loss.samples / loss.weights - whole.samples / whole.weights
    stderr = difference.std(ddof=1) / math.sqrt(len(difference))
    assert increase.stderr == pytest.approx(stderr)
    rows = evaluation_rows(warehouse, f"gradients:{TEXT}")
    assert values_in(rows, "metric") == {"taylor", "gradient_l1", "gradient_l2", "weight_frobenius"}
    for row in where(rows, metric="taylor"):
        assert row["num_samples"] == 6


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_workers_give_what_one_process_gives(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = ("--max-sequences", 6, "--sequence-length", 32, "--sequences-per-shard", 2)
    measured = ("--shapley", 8, "--gradients", "--quantize", "int4", "--quantize", "int8")
    command = ("ablate", tiny_llama, "--corpus", TEXT, *sizes, *measured, "--format", "csv")
    one = succeed(*command, "--warehouse", tmp_path / "one", "--executor", "local")
    two = succeed(*command, "--warehouse", tmp_path / "two", "--replicas", "2")
    assert one.stdout == two.stdout


# The command line


def test_ablate_shows_a_table(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = {"max_sequences": 4, "sequence_length": 32}
    text = {"corpus": TEXT, "warehouse": tmp_path / "w", "shapley": 8, **sizes}
    done = succeed("ablate", tiny_llama, *as_words(text))
    assert "order the layers as this one does to" in in_one_line(done.stdout)
    for words in ("loss without", "increase", "Shapley", "95% interval", "Loss of the whole model"):
        assert words in in_one_line(done.stdout)
    assert "Taylor" not in done.stdout
    rows = ablate(tiny_llama, **text).table().to_pylist()
    assert column(rows, "layer") == [0, 1, 2]
    for row in rows:
        assert row["shapley_low"] <= row["shapley"] <= row["shapley_high"]
        assert f"{row['loss']:.4f}" in done.stdout
        assert f"{row['shapley']:.4f}" in done.stdout
    assert rows[0]["taylor"] is None


def test_damage_is_kept_and_shown(tiny_llama: Path, tmp_path: Path) -> None:
    """Through the command line and the warehouse: every metric, and blocks."""
    warehouse = tmp_path / "w"
    sizes = ("--max-sequences", 4, "--sequence-length", 32, "--sequences-per-shard", 2)
    options = (tiny_llama, "--corpus", TEXT, "--warehouse", warehouse, *sizes, "--no-leave-one-out", "--damage")
    done = succeed("ablate", *options)
    for words in ("damage", "predicted", "propagated", "the layer with the lowest damage"):
        assert words in in_one_line(done.stdout)
    rows = evaluation_rows(warehouse, f"damage:{TEXT}")
    of_layers = where(rows, drop=[])
    metrics = values_in(of_layers, "metric")
    for name in ("propagated", "propagated_cosine", "taylor", "fisher"):
        for lookahead in range(4):
            assert f"{name}_{lookahead}" in metrics
    blocks = column(where(rows, metric="block_distance"), "drop")
    assert sorted(blocks) == [[0], [0, 1], [0, 1, 2], [1], [1, 2], [2]]
    predicted = where(of_layers, metric="predicted_3")
    second = only_row(predicted, layer=1)
    assert second["stderr"] > 0
    printed = succeed("ablate", *options, "--format", "json")
    table = json_rows(printed.stdout)
    for row in table:
        in_warehouse = only_row(predicted, layer=row["layer"])
        assert row["predicted_3"] == in_warehouse["value"]
    assert column(table, "layer") == [0, 1, 2]
    assert sum(column(table, "damage")) == 6


def test_numbers_that_cannot_be_had_are_shown(tiny_llama: Path, tmp_path: Path) -> None:
    """One sequence has no standard error, one permutation no interval."""
    one_row = {**SMALL, "max_sequences": 1}
    ablated = ablate(tiny_llama, corpus=TEXT, warehouse=tmp_path / "w", shapley=1, **one_row)
    assert "nan" not in shown(ablated)
    (first, *_) = ablated.table().to_pylist()
    assert first["shapley_low"] is None


def test_mistakes(tiny_llama: Path, tmp_path: Path) -> None:
    text = {"corpus": TEXT, "warehouse": tmp_path / "w", **SMALL}
    with pytest.raises(ConfigError, match="Nothing would be measured"):
        ablate(tiny_llama, leave_one_out=False, **text)
    with pytest.raises(ConfigError, match="`shapley` must be at least 0, not -1"):
        ablate(tiny_llama, shapley=-1, **text)


def test_very_many_passes_are_made_only_where_they_are_wanted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"corpus": TEXT, "warehouse": tmp_path / "w", **SMALL}
    told = r"Up to [\d,]+ forward passes .*layers: 3, times that each is left out: 1,000,001"
    with pytest.raises(ConfigError, match=told) as caught:
        ablate(tiny_llama, shapley=10**6, **text)
    assert caught.value.hint == "Lower `shapley` or `max_sequences`. More than 100,000 need `allow_many`."
    monkeypatch.setattr("avss_dist.studies.ablate.MOST_PASSES", 0)
    assert len(ablate(tiny_llama, allow_many=True, **text).layers) == 3


def test_more_permutations_than_can_be_listed_are_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10^9, the seeds alone would fill the memory."""
    monkeypatch.setattr(np.random, "SeedSequence", lambda *_: pytest.fail("seeds were made"))
    warehouse = tmp_path / "w"
    options = ["--corpus", TEXT, "--warehouse", warehouse, "--shapley", 10**9]
    for more in ([], ["--allow-many"]):
        done = avss("ablate", tiny_llama, *options, *more)
        said = "Error: 1,000,000,000 permutations are more than one command takes: 1,000,000.\nLower --shapley.\n"
        assert done.exit_code == 2
        assert done.stderr == said
    with pytest.raises(ConfigError, match="1,000,000,000 permutations"):
        ablate(tiny_llama, corpus=TEXT, warehouse=warehouse, shapley=10**9, allow_many=True)
    assert not warehouse.exists()


# Sensitivity to rounding: what is printed, kept, measured once, compared with scores, and refused


SIZES = ("--max-sequences", 6, "--sequence-length", 32, "--sequences-per-shard", 3, "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Path:
    """Weights so large that rounding matters, and maps of 32 and 64 inputs."""
    folder = tmp_path_factory.mktemp("sensitivity") / "model"
    return save_checkpoint(llama(num_hidden_layers=4, intermediate_size=64, initializer_range=0.3), folder)


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with a run, and the measured and predicted effect of two formats, predicted on other rows too."""
    warehouse = tmp_path_factory.mktemp("sensitivity") / "w"
    score(model, corpus=TEXT, warehouse=warehouse, **SMALL)
    options = {"corpus": TEXT, "warehouse": warehouse, "quantize": ["int4", "Q4_0"], **SMALL, "dtype": "float32"}
    ablate(model, **options)
    ablate(model, **options, skip_sequences=6, rounded_layers=False, leave_one_out=False)
    return warehouse


def options_of(model: Path, warehouse: Path, *formats: str) -> tuple[Any, ...]:
    words = []
    for name in formats:
        words += ["--quantize", name]
    return ("ablate", model, "--corpus", TEXT, "-w", warehouse, *SIZES, "--no-leave-one-out", *words)


def test_ablate_shows_what_is_measured_and_predicted(model: Path, tmp_path: Path) -> None:
    options = options_of(model, tmp_path, "int4", "q4_0")
    done = succeed(*options)
    told = in_one_line(done.stdout)
    for words in ("int4, 4.", "q4_0, 4.5 bits: increase", "predicted", "mlp.down_proj", "order the layers as this"):
        assert words in told, told
    times = cell_times(tmp_path)
    table = avss(*options, "--format", "csv")
    assert len(times) == 2 * 3
    assert cell_times(tmp_path) == times  # by shard: predicted, and measured by format
    rows = [*csv.DictReader(io.StringIO(table.stdout))]
    assert len(rows) == 2 * 4 * (1 + 7)
    for name in ("int4", "q4_0"):
        of_layer = where(rows, format=name, layer="2")
        layer = only_row(of_layer, map="")
        maps = [row for row in of_layer if row["map"]]
        for name in ("first_order", "second_order", "predicted", "output_error", "num_weights"):
            parts = [float(row[name]) for row in maps]
            assert float(layer[name]) == pytest.approx(sum(parts))
        assert f"{float(layer['increase']):.5f}" in told
        assert f"{float(layer['predicted']):.5f}" in told
        assert float(layer["increase_stderr"]) > 0
        assert float(layer["loss"])
        attention = {f"self_attn.{part}_proj" for part in "qkvo"}
        mlp = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
        assert values_in(maps, "map") == attention | mlp


def test_rows_of_the_warehouse_name_what_is_rounded(measured: Path) -> None:
    rows = table_rows(measured, "evaluations")
    places = values_in(where(rows, task=f"rounding:{TEXT}"), "rounding")
    assert {"int4@0", "q4_0@3", "int4@2.mlp.up_proj"} <= places
    assert None not in places
    losses = where(rows, metric="loss", task=f"rounded:int4:{TEXT}")
    assert values_in(losses, "rounding") == {None, "int4@0", "int4@1", "int4@2", "int4@3"}
    unrounded = only_row(losses, rounding=None)
    whole = where(rows, metric="loss", task=f"ablation:{TEXT}", drop=[])
    assert values_in(whole, "value") == {unrounded["value"]}
    joined = Warehouse(measured).sql(
        """SELECT p.layer, m.value - w.value AS measured, p.value AS predicted
        FROM evaluations p JOIN evaluations m USING (rounding) JOIN evaluations w ON m.run_id = w.run_id
        WHERE p.metric = 'predicted' AND m.metric = 'loss' AND w.metric = 'loss' AND w.rounding IS NULL
        AND p.rounding LIKE 'int4@%'"""
    )
    assert joined.num_rows == 2 * 4  # two texts


@pytest.mark.nightly
def test_the_scorecard_compares_with_rounded_layers(measured: Path) -> None:
    store = Warehouse(measured)
    cards = score_cards(store, store.runs().to_pylist())
    rows = where(best_readings(cards).to_pylist(), format="int4")
    scores = {row["score"]: row for row in rows}
    expected = {"avss", "block_influence", "left_out:loss", "last", "predicted", "output_error"}
    assert expected <= {*scores}
    assert scores["rounded:q4_0"]["same_text"] is True
    assert scores["predicted"]["same_text"] is False
    assert scores["block_influence"]["same_text"] is None
    for row in rows:
        if row["spearman_loss"] is not None:
            assert -1 <= row["spearman_loss"] <= 1
    expected = spearman(rounded_losses(measured, "int4"), rounded_losses(measured, "q4_0"))
    assert scores["rounded:q4_0"]["spearman_loss"] == pytest.approx(expected)
    done = succeed("findings", "--truth", "-w", measured)
    told = in_one_line(done.stdout)
    for words in (
        "weights rounded to int4",
        "weights rounded to q4_0",
        "loss, rounded to q4_0",
        "first + second order",
        "of other text",
    ):
        assert words in told, told
    removals = where(cards.to_pylist(), format=None)
    assert "loss" in column(removals, "score")
    assert "output_error" not in column(removals, "score")


def rounded_losses(warehouse: Path, name: str) -> np.ndarray:
    """The losses with each of the four layers rounded to a number format."""
    rows = where(evaluation_rows(warehouse, f"rounded:{name}:{TEXT}"), metric="loss")
    losses = [only_row(rows, rounding=f"{name}@{layer}")["value"] for layer in range(4)]
    return np.array(losses)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of the ranks of values of which no two are alike."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_the_page_shows_removed_layers_alone(measured: Path) -> None:
    store = Warehouse(measured)
    runs = store.runs().to_pylist()
    (section,) = _scorecards(store, runs, dict.fromkeys(column(runs, "run_id"), "model"))
    table = section.tables[0]
    (names, *_) = table.value_columns
    shown = [row.values[names.key] for row in table.rows]
    assert "block influence" in shown
    assert "error of outputs" not in shown
    assert len(shown) == len({*shown})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quantize", "int4-g129"), ("Unknown number format 'int4-g129'", "Did you mean 'int4-g128'?")),
        (("--quantize", "tq1_0"), ("tq1_0 cannot take", "not a multiple of 256", "can take every linear map", "int4")),
        (
            ("--quantize", "int4", "--partition", "tensor_parallel", "--ranks", 2),
            ("--partition tensor_parallel has a part of each weight", "fsdp, zero3"),
        ),
    ],
)
def test_mistakes_are_explained(options: tuple[Any, ...], words: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    told = mistake(*options_of(model, tmp_path / "w"), *options)
    for part in words:
        assert part in told, told
    assert "Traceback" not in told


def test_a_quantized_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    folder = block_fp8(model, tmp_path / "fp8")
    command = options_of(folder, tmp_path / "w", "int4")
    for more in ((), ("--dequantize",)):
        done = mistake(*command, *more)
        assert "is quantized already (fp8" in done
        assert "Name the checkpoint that it was made of" in done
