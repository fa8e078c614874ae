"""Contrasts of labels: a planted layer is named, and each control takes away what it should.

Besides rows that are written with a difference, there is a model in which one layer, and nothing else, tells whether an
answer fits its question. Tokens carry three marks in dimensions of their own, which no weight but the constructed ones
reads or writes: what a question asks for, what an answer says, and a constant. The first layer's attention copies what
was asked to the answer's tokens. In the planted layer two neurons of the MLP fire where the two differ, and nothing
reads them. So the activations of all other layers are of the same distribution for both labels, whatever the answer.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import llama, one_thread
from support.command_line import avss
from support.rows import column
from support.warehouses import run_row, write_scores, write_shard

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
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

PAIRS = 60
LAYERS = 5
PLANTED = 2
THRESHOLDS = [1e-5, 1e-2]
STRATA = ("truthful", "incorrect", f"truthful{AFTER_ANOTHER}", f"incorrect{AFTER_ANOTHER}")


def write(root: Path, *, planted: float, elsewhere: float = 1.0, longer: int = 0, seed: int = 2) -> dict[str, Any]:
    """A run whose incorrect answers have ``planted`` times the variance in one layer, and are ``longer``.

    After another prompt it is ``elsewhere`` times. The variance of an answer goes with its length.
    """
    rng = np.random.default_rng(seed)
    n = 4 * PAIRS
    strata = STRATA * PAIRS
    tokens = np.repeat(rng.integers(10, 20, PAIRS), 4)
    tokens = tokens + longer * np.array([s.startswith("incorrect") for s in strata])
    layers = []
    for layer in range(LAYERS):
        factor = {"incorrect": planted, STRATA[3]: elsewhere} if layer == PLANTED else {}
        own = np.array([factor.get(s, 1.0) for s in strata])
        variance = own * np.exp(0.2 * rng.normal(size=n)) * (layer + 1) * (tokens / 10 if layer == 1 else 1)
        count = tokens * 8
        near_zero = np.stack([np.zeros(n, np.int64), rng.binomial(count, 0.2)], axis=1)
        layers.append(
            {
                "layer": np.full(n, layer),
                "site": np.full(n, "block"),
                "row": np.arange(n),
                "pair": np.repeat(np.arange(PAIRS), 4),
                "stratum": np.array(strata),
                "prompt_tokens": np.full(n, 9),
                "answer_tokens": tokens,
                "count": count,
                "near_zero": near_zero,
                "mean": np.zeros(n),
                "m2": variance * count,
                "pooled_variance": variance,
                "norm": np.sqrt(variance * 8),
                "relative_magnitude": np.ones(n),
            }
        )
    rows = {name: np.concatenate([columns[name] for columns in layers]) for name in layers[0]}
    row = run_row("paired", num_layers=LAYERS, num_sequences=n, num_shards=1, thresholds=THRESHOLDS, sites=["block"])
    identity = RunIdentity(**{name: row[name] for name in ("run_id", "model", "revision", "family")})
    store = Store(root)
    write_shard(store, identity, ShardResult(shard_id=0, content_hash="", layers=("a",) * LAYERS, strata={}, rows=rows))
    store.write_run(row)
    return row


def left(root: Path, row: dict[str, Any], **options: Any) -> list[int]:
    found = contrast(Warehouse(root), row, threshold=1e-2, **options)
    return [one["layer"] for one in found.layers.to_pylist() if one["stands"]]


def test_a_planted_layer_is_named(tmp_path: Path) -> None:
    row = write(tmp_path, planted=1.5)
    found = contrast(Warehouse(tmp_path), row, threshold=1e-2)
    layers = found.layers.to_pylist()
    assert [one["layer"] for one in layers if one["stands"]] == [PLANTED]
    planted = layers[PLANTED]
    assert planted["rank"] == 1
    assert planted["prone_probability"] > 0.99
    assert planted["eavss_contrast_low"] < planted["eavss_contrast"] < planted["eavss_contrast_high"]
    assert planted["deviation"] == pytest.approx(np.log(1.5), abs=0.1)
    assert found.reading["hallucinated"] == "incorrect"
    assert f"Stand after every control: {PLANTED}." in found.findings
    best = max(found.predictions.to_pylist(), key=lambda one: one["auroc"])
    assert best["layer"] == PLANTED
    assert best["beats_baselines"]
    assert best["auroc"] > 0.8 > 0.6 > best["after_another"]
    assert left(tmp_path, row, hallucinated="truthful", truthful="incorrect") == [PLANTED]


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
    found = contrast(Warehouse(tmp_path), row, threshold=1e-2)
    assert words in found.findings
    assert "Stand after every control: none." in found.findings


def test_mistakes(tmp_path: Path) -> None:
    row = write(tmp_path, planted=1.0)
    for options, message in (
        ({"threshold": 0.5}, "did not count elements below 0.5"),
        ({"site": "mlp"}, "mlp"),
        ({"truthful": "right"}, "right"),
        ({"hallucinated": "truthful", "truthful": "truthful"}, "Labels: incorrect, truthful."),
    ):
        with pytest.raises(QueryError, match=message):
            contrast(Warehouse(tmp_path), row, **options)


def test_the_command_shows_layers_predictions_and_findings(tmp_path: Path) -> None:
    write(tmp_path, planted=1.5)
    shown = avss("contrast", "-w", tmp_path, "--threshold", "1e-2")
    assert shown.exit_code == 0
    assert "Stand after every control: 2." in shown.stdout
    assert "AUROC" in shown.stdout
    lines = avss("contrast", "-w", tmp_path, "--threshold", "1e-2", "--format", "json").stdout.splitlines()
    assert [json.loads(line)["stands"] for line in lines] == [layer == PLANTED for layer in range(LAYERS)]


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

    words = ["<pad>", "yes", "no", *(f"{sign}{i}" for sign in ("plus", "minus") for i in range(WORDS))]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>").save_pretrained(folder)
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
    for word, row in ids.items():
        embedded[row, ASKED] = {"yes": 1.0, "no": -1.0}.get(word, 0.0)
        embedded[row, SAID] = 1.0 if word.startswith("plus") else -1.0 if word.startswith("minus") else 0.0
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
    rng = np.random.default_rng(0)
    lines = []
    for i in range(PAIRS):
        asked = int(rng.integers(2))
        question = f"{('yes', 'no')[asked]} {i % WORDS} " * 3
        for label, fits in zip(LABELS, (False, True), strict=True):
            sign = ("plus", "minus")[asked if fits else 1 - asked]
            answer = " ".join(f"{sign}{word}" for word in rng.integers(0, WORDS, 4))
            lines.append({"q": question.replace(str(i % WORDS), f"plus{i % WORDS}"), "a": answer, "kind": label})
    file = folder / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    options: dict[str, Any] = {"sequence_length": 16, "batch_size": 32, "dtype": "float32", "executor": "local"}
    with one_thread():
        avss_dist.score(
            str(folder / "model"), corpus=f"{file}:q+a:kind", warehouse=folder / "w", thresholds=(THRESHOLD,), **options
        )
    return Warehouse(folder / "w")


def test_the_planted_layer_is_named_and_no_other_site_of_any(scored: Warehouse) -> None:
    (run,) = scored.runs().to_pylist()
    for site, named in (("neuron", [PLANTED]), ("block", []), ("update", [])):
        layers = contrast(scored, run, site=site, threshold=THRESHOLD).layers
        assert layers.filter(layers["stands"])["layer"].to_pylist() == named, site


def test_the_page_shows_it_and_escapes_labels(scored: Warehouse) -> None:
    page = report_page(scored)
    assert "<b>right" not in page
    assert f"incorrect against &lt;b&gt;right&lt;/b&gt; answers, {PAIRS} pairs" in page
    assert "Stand after every control: none." in page
    (run,) = scored.runs().to_pylist()
    (chart,) = contrast_section("1. model", contrast(scored, run)).charts
    assert f'data-chart="{chart.name}"' in page
    assert set(column(chart.rows, "answers")) >= {"after their own prompts", "after another prompt"}


def test_with_labels_exchanged_inside_pairs_none_is_named(scored: Warehouse) -> None:
    """20 seeds; in 200, 1% name a layer, and 5.5% find one that differs by label."""
    (run,) = scored.runs().to_pylist()
    rows = answer_rows(scored, run, "neuron")
    place = list(run["thresholds"]).index(THRESHOLD)
    own, other = (read_answers(rows, LABELS, after, place) for after in ("", AFTER_ANOTHER))
    alarms = 0
    for labels in contrast_stats.permuted_labels(own, 20, seed=7).astype(bool):
        assert (np.bincount(own.pair, labels) == 1).all()
        found = layer_table(replace(own, hallucinated=labels), replace(other, hallucinated=labels), "pooled")
        alarms += any(found["stands"].to_pylist())
    assert alarms <= 1


def test_merged_strata_say_what_single_answers_say_and_more(scored: Warehouse) -> None:
    (run,) = scored.runs().to_pylist()
    strata = Strata.of_run(scored, run, "neuron")
    for recipe in ("pooled", "element"):
        threshold = Threshold(value=THRESHOLD, kind="absolute")
        (merged,) = contrast_stats.contrast(*strata.both_sides(recipe, threshold))
        rows = contrast(scored, run, site="neuron", recipe=recipe, threshold=THRESHOLD).layers.to_pylist()
        np.testing.assert_allclose(merged, column(rows, "eavss_contrast"), rtol=1e-6)
    relative = contrast(scored, run, site="neuron", threshold=0.1, threshold_kind="rms")
    by_layer = relative.layers.to_pylist()
    assert [row["layer"] for row in by_layer if row["p_holm"] < 0.05] == [PLANTED]
    assert by_layer[PLANTED]["rank"] == 1
    assert set(column(by_layer, "stands")) == {None}
    assert len(relative.predictions) == 0
    assert any("Lengths are not controlled" in line for line in relative.findings)
    units = contrast(scored, run, site="update", recipe="unit", threshold=THRESHOLD).layers.to_pylist()
    means = [scored.read_stratum_stats(run["run_id"])[0, "update", label] for label in LABELS]
    assert units[0]["hsav_difference"] == pytest.approx(
        np.subtract(*((m.unit_sum / m.unit_count).var() for m in means))
    )
    shown = avss("contrast", "-w", scored.root, "--site", "update", "--recipe", "unit", "--threshold", "0.1rms")
    assert shown.exit_code == 0
    assert "exchange of labels inside shards" in " ".join(shown.stdout.split())
    with pytest.raises(QueryError, match="no statistics for the recipe 'unit'"):
        contrast(scored, run, site="neuron", recipe="unit", threshold=THRESHOLD)
