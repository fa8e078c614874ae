"""Contrasts of labels: a planted layer is named, and each control takes away what it should.

Besides rows that are written with a difference, there is a model in which one layer, and nothing else, tells whether an
answer fits its question. Tokens carry three marks in dimensions of their own, which no weight but the constructed ones
reads or writes: what a question asks for, what an answer says, and a constant. The first layer's attention copies what
was asked to the answer's tokens. In the planted layer two neurons of the MLP fire where the two differ, and nothing
reads them. So the activations of all other layers are of the same distribution for both labels, whatever the answer.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.checkpoints import llama, one_thread
from support.command_line import json_rows, succeed
from support.json_files import write_json_lines
from support.rows import column, where
from support.warehouses import identity_of, run_row, write_scores, write_shard

import avss_dist
from avss_dist.analysis.contrast import (
    Strata,
    answer_rows,
    contrast,
    contrast_section,
    layer_table,
    paired_run,
    read_answers,
)
from avss_dist.core.errors import QueryError
from avss_dist.corpus.labels import AFTER_ANOTHER
from avss_dist.reports.page.page import report_page
from avss_dist.stats import contrast as contrast_stats
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

PAIRS = 60
ANSWERS = 4 * PAIRS
LAYERS = 5
UNITS = 8
PLANTED = 2
THRESHOLDS = [1e-5, 1e-2]
STRATA = ("truthful", "incorrect", f"truthful{AFTER_ANOTHER}", f"incorrect{AFTER_ANOTHER}")


def write(root: Path, *, planted: float, elsewhere: float = 1.0, longer: int = 0, seed: int = 2) -> dict[str, Any]:
    """A run whose incorrect answers have ``planted`` times the variance in one layer, and are ``longer``.

    After another prompt it is ``elsewhere`` times. The variance of an answer goes with its length.
    """
    rng = np.random.default_rng(seed)
    tokens = np.repeat(rng.integers(10, 20, PAIRS), 4)
    tokens += np.tile([0, longer, 0, longer], PAIRS)
    factors = np.ones((LAYERS, ANSWERS))
    factors[PLANTED] = np.tile([1.0, planted, 1.0, elsewhere], PAIRS)
    factors[1] = tokens / 10
    rows: dict[str, list[np.ndarray]] = {}
    for layer in range(LAYERS):
        noise = np.exp(0.2 * rng.normal(size=ANSWERS))
        near_zero = rng.binomial(tokens * UNITS, 0.2)
        for name, values in answers_of(layer, tokens, factors[layer] * noise * (layer + 1), near_zero).items():
            rows.setdefault(name, []).append(values)
    return write_answers(root, {name: np.concatenate(values) for name, values in rows.items()})


def answers_of(layer: int, tokens: np.ndarray, variance: np.ndarray, near_zero: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a layer's answers, of which none counts elements at the first threshold."""
    columns = {
        "layer": np.full(ANSWERS, layer),
        "site": np.full(ANSWERS, "block"),
        "row": np.arange(ANSWERS),
        "pair": np.repeat(np.arange(PAIRS), 4),
        "stratum": np.tile(STRATA, PAIRS),
        "prompt_tokens": np.full(ANSWERS, 9),
        "answer_tokens": tokens,
    }
    count = tokens * UNITS
    return columns | {
        "count": count,
        "near_zero": np.stack([np.zeros_like(near_zero), near_zero], axis=1),
        "mean": np.zeros(ANSWERS),
        "m2": variance * count,
        "pooled_variance": variance,
        "norm": np.sqrt(variance * UNITS),
        "relative_magnitude": np.ones(ANSWERS),
    }


def write_answers(root: Path, rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write a run of one shard with statistics by answer; its row."""
    row = run_row("paired", num_layers=LAYERS, num_sequences=ANSWERS, num_shards=1)
    row |= {"thresholds": THRESHOLDS, "sites": ["block"]}
    result = ShardResult(shard_id=0, content_hash="", layers=("a",) * LAYERS, strata={}, rows=rows)
    store = Store(root)
    write_shard(store, identity_of(row), result)
    store.write_run(row)
    return row


def standing(layers: pa.Table) -> list[int]:
    """Return the layers that stand after every control."""
    return column(where(layers.to_pylist(), stands=True), "layer")


def test_a_planted_layer_is_named(tmp_path: Path) -> None:
    row = write(tmp_path, planted=1.5)
    contrasted = contrast(Warehouse(tmp_path), row, threshold=1e-2)
    assert standing(contrasted.layers) == [PLANTED]
    planted = contrasted.layers.to_pylist()[PLANTED]
    assert planted["rank"] == 1
    assert planted["prone_probability"] > 0.99
    assert planted["eavss_contrast_low"] < planted["eavss_contrast"] < planted["eavss_contrast_high"]
    assert planted["deviation"] == pytest.approx(np.log(1.5), abs=0.1)
    assert contrasted.reading["hallucinated"] == "incorrect"
    assert f"Stand after every control: {PLANTED}." in contrasted.findings


def test_a_planted_layer_predicts_answers_best(tmp_path: Path) -> None:
    row = write(tmp_path, planted=1.5)
    predictions = contrast(Warehouse(tmp_path), row, threshold=1e-2).predictions.to_pylist()
    best = max(predictions, key=lambda prediction: prediction["auroc"])
    assert best["layer"] == PLANTED
    assert best["beats_baselines"]
    assert best["auroc"] > 0.8
    assert best["after_another"] < 0.6


def test_a_planted_layer_is_named_with_labels_exchanged(tmp_path: Path) -> None:
    row = write(tmp_path, planted=1.5)
    labels = {"hallucinated": "truthful", "truthful": "incorrect"}
    contrasted = contrast(Warehouse(tmp_path), row, threshold=1e-2, **labels)
    assert standing(contrasted.layers) == [PLANTED]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"planted": 1.5, "elsewhere": 1.5}, "Otherwise than for the same answers after another prompt: none."),
        ({"planted": 1.0, "longer": 8}, "With lengths matched (0 pairs): too few pairs to tell."),
        (
            {"planted": 1.0, "seed": 1},
            "No layer differs between hallucinated and truthful answers more than with labels exchanged inside pairs.",
        ),
    ],
)
def test_controls_take_away_what_they_should(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    row = write(tmp_path, **changes)
    findings = contrast(Warehouse(tmp_path), row, threshold=1e-2).findings
    assert words in findings
    assert "Stand after every control: none." in findings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.5}, "did not count elements below 0.5"),
        ({"site": "mlp"}, "mlp"),
        ({"truthful": "right"}, "right"),
        ({"hallucinated": "truthful", "truthful": "truthful"}, "Labels: incorrect, truthful."),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    row = write(tmp_path, planted=1.0)
    with pytest.raises(QueryError, match=message):
        contrast(Warehouse(tmp_path), row, **options)


def test_the_command_shows_layers_predictions_and_findings(tmp_path: Path) -> None:
    write(tmp_path, planted=1.5)
    shown = succeed("contrast", "-w", tmp_path, "--threshold", "1e-2").stdout
    assert "Stand after every control: 2." in shown
    assert "AUROC" in shown
    printed = succeed("contrast", "-w", tmp_path, "--threshold", "1e-2", "--format", "json").stdout
    rows = json_rows(printed)
    assert column(rows, "stands") == [False, False, True, False, False]


def test_a_newer_run_without_answers_is_passed_over(tmp_path: Path) -> None:
    paired = write(tmp_path, planted=1.5)
    write_scores(tmp_path, "newer", [1.0, 2.0], created_at=datetime.max.replace(tzinfo=UTC))
    assert paired_run(Warehouse(tmp_path), None).row["run_id"] == paired["run_id"]


ASKED, SAID, COPIED, CONSTANT = range(4)
LABELS = ("incorrect", "<b>right</b>")
WORDS = 60
THRESHOLD = 1e-2


def save_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer of whole words; their ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "yes", "no"]
    words += [f"plus{i}" for i in range(WORDS)]
    words += [f"minus{i}" for i in range(WORDS)]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>")
    fast.save_pretrained(folder)
    return ids


@torch.no_grad()
def planted_llama(ids: dict[str, int]) -> Any:
    """A random Llama with that construction."""
    model = llama(num_hidden_layers=LAYERS, vocab_size=len(ids))
    marks = [ASKED, SAID, COPIED, CONSTANT]
    embedded = model.model.embed_tokens.weight
    embedded.normal_(generator=torch.Generator().manual_seed(1))
    embedded[:, marks] = 0
    embedded[:, CONSTANT] = 1
    embedded[ids["yes"], ASKED] = 1.0
    embedded[ids["no"], ASKED] = -1.0
    for word, row in ids.items():
        if word.startswith("plus"):
            embedded[row, SAID] = 1.0
        if word.startswith("minus"):
            embedded[row, SAID] = -1.0
    for layer in model.model.layers:
        attention = layer.self_attn
        mlp = layer.mlp
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reads.weight *= 5
            reads.weight[:, marks] = 0
        for writes in (attention.o_proj, mlp.down_proj):
            writes.weight[marks] = 0
    first = model.model.layers[0].self_attn
    planted = model.model.layers[PLANTED].mlp
    size = first.head_dim
    first.k_proj.weight[:size] = 0  # the first two heads look at all tokens alike
    first.v_proj.weight[0] = torch.eye(32)[ASKED]
    first.o_proj.weight[:, [0, size]] = 0
    first.o_proj.weight[COPIED, 0] = 2
    difference = torch.eye(32)[SAID] - torch.eye(32)[COPIED]
    planted.gate_proj.weight[:2] = torch.stack([difference, -difference])
    planted.up_proj.weight[:2] = 0.5 * torch.eye(32)[CONSTANT]
    planted.down_proj.weight[:, :2] = 0
    return model


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    folder = tmp_path_factory.mktemp("planted")
    planted_llama(save_tokenizer(folder / "model")).save_pretrained(folder / "model")
    file = folder / "pairs.jsonl"
    write_json_lines(file, questions_and_answers())
    options: dict[str, Any] = {"sequence_length": 16, "batch_size": 32, "dtype": "float32", "executor": "local"}
    options |= {"corpus": f"{file}:q+a:kind", "warehouse": folder / "w", "thresholds": (THRESHOLD,)}
    with one_thread():
        avss_dist.score(str(folder / "model"), **options)
    return Warehouse(folder / "w")


def questions_and_answers() -> list[dict[str, str]]:
    """Return each question with an answer that does not fit it, and with one that does."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(PAIRS):
        asks_yes = rng.integers(2) == 0
        question = f"{'yes' if asks_yes else 'no'} plus{i % WORDS} " * 3
        for label, fits in zip(LABELS, (False, True), strict=True):
            sign = "plus" if asks_yes == fits else "minus"
            answer = " ".join(f"{sign}{word}" for word in rng.integers(0, WORDS, 4))
            lines.append({"q": question, "a": answer, "kind": label})
    return lines


@pytest.fixture
def run(scored: Warehouse) -> dict[str, Any]:
    (run,) = scored.runs().to_pylist()
    return run


@pytest.mark.parametrize(("site", "named"), [("neuron", [PLANTED]), ("block", []), ("update", [])])
def test_the_planted_layer_is_named_and_no_other_site_of_any(
    scored: Warehouse, run: dict[str, Any], site: str, named: list[int]
) -> None:
    contrasted = contrast(scored, run, site=site, threshold=THRESHOLD)
    assert standing(contrasted.layers) == named


@pytest.mark.nightly
def test_the_page_shows_it_and_escapes_labels(scored: Warehouse, run: dict[str, Any]) -> None:
    page = report_page(scored)
    assert "<b>right" not in page
    assert f"incorrect against &lt;b&gt;right&lt;/b&gt; answers, {PAIRS} pairs" in page
    assert "Stand after every control: none." in page
    (chart,) = contrast_section("1. model", contrast(scored, run)).charts
    assert f'data-chart="{chart.name}"' in page
    assert set(column(chart.rows, "answers")) >= {"after their own prompts", "after another prompt"}


@pytest.mark.nightly
def test_with_labels_exchanged_inside_pairs_none_is_named(scored: Warehouse, run: dict[str, Any]) -> None:
    """20 seeds; in 200, 1% name a layer, and 5.5% find one that differs by label."""
    rows = answer_rows(scored, run, "neuron")
    place = list(run["thresholds"]).index(THRESHOLD)
    own = read_answers(rows, LABELS, "", place)
    other = read_answers(rows, LABELS, AFTER_ANOTHER, place)
    alarms = 0
    for labels in contrast_stats.permuted_labels(own, 20, seed=7).astype(bool):
        assert (np.bincount(own.pair, labels) == 1).all()
        exchanged = layer_table(replace(own, hallucinated=labels), replace(other, hallucinated=labels), "pooled")
        alarms += len(standing(exchanged)) > 0
    assert alarms <= 1


@pytest.mark.parametrize("recipe", ["pooled", "element"])
def test_merged_strata_say_what_single_answers_say(scored: Warehouse, run: dict[str, Any], recipe: str) -> None:
    strata = Strata.of_run(scored, run, "neuron")
    threshold = Threshold(value=THRESHOLD, kind="absolute")
    (merged,) = contrast_stats.contrast(*strata.both_sides(recipe, threshold))
    layers = contrast(scored, run, site="neuron", recipe=recipe, threshold=THRESHOLD).layers
    np.testing.assert_allclose(merged, layers["eavss_contrast"], rtol=1e-6)


def test_merged_strata_have_relative_thresholds_without_controls(scored: Warehouse, run: dict[str, Any]) -> None:
    contrasted = contrast(scored, run, site="neuron", threshold=0.1, threshold_kind="rms")
    layers = contrasted.layers.to_pylist()
    differing = [row["layer"] for row in layers if row["p_holm"] < 0.05]
    assert differing == [PLANTED]
    assert layers[PLANTED]["rank"] == 1
    assert set(column(layers, "stands")) == {None}
    assert len(contrasted.predictions) == 0
    assert "Lengths are not controlled" in " ".join(contrasted.findings)


def test_merged_strata_have_means_of_units(scored: Warehouse, run: dict[str, Any]) -> None:
    layers = contrast(scored, run, site="update", recipe="unit", threshold=THRESHOLD).layers.to_pylist()
    stats = scored.read_stratum_stats(run["run_id"])
    variances = []
    for label in LABELS:
        of_label = stats[0, "update", label]
        means = of_label.unit_sum / of_label.unit_count
        variances.append(means.var())
    assert layers[0]["hsav_difference"] == pytest.approx(variances[0] - variances[1])


def test_the_command_shows_means_of_units(scored: Warehouse) -> None:
    options = ("--site", "update", "--recipe", "unit", "--threshold", "0.1rms")
    shown = succeed("contrast", "-w", scored.root, *options).stdout
    assert "exchange of labels inside shards" in " ".join(shown.split())


def test_a_site_without_means_of_units_is_refused(scored: Warehouse, run: dict[str, Any]) -> None:
    with pytest.raises(QueryError, match="no statistics for the recipe 'unit'"):
        contrast(scored, run, site="neuron", recipe="unit", threshold=THRESHOLD)
