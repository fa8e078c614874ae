"""A model in which one layer, and nothing else, tells whether an answer fits its question: it is named, by no chance.

Tokens carry three marks in dimensions of their own, which no weight but the constructed ones reads or writes: what a
question asks for, what an answer says, and a constant. The first layer's attention copies what was asked to the
answer's tokens. In the planted layer two neurons of the MLP fire where the two differ, and nothing reads them. So the
activations of all other layers are of the same distribution for both labels, whatever the answer.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import llama, one_thread
from support.command_line import avss

import avss_dist
from avss_dist.analysis.contrast import Strata, answer_rows, contrast, layer_table, read_answers
from avss_dist.core.errors import QueryError
from avss_dist.core.names import AFTER_ANOTHER
from avss_dist.report.contrasts import contrast_section
from avss_dist.report.page.page import report_page
from avss_dist.stats import contrast as contrast_stats
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

PAIRS, LAYERS, PLANTED = 60, 5, 2
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
    """A random Llama with the construction above."""
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
        attention, mlp = layer.self_attn, layer.mlp
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reads.weight *= 5
            reads.weight[:, marks] = 0
        for writes in (attention.o_proj, mlp.down_proj):
            writes.weight[marks] = 0
    first, planted = model.model.layers[0].self_attn, model.model.layers[PLANTED].mlp
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
    assert "Left after every control: none." in page
    (run,) = scored.runs().to_pylist()
    (chart,) = contrast_section("1. model", contrast(scored, run)).charts
    assert f'data-chart="{chart.name}"' in page
    assert {row["answers"] for row in chart.rows} >= {"after their own prompts", "after another prompt"}


def test_with_labels_exchanged_inside_pairs_none_is_named(scored: Warehouse) -> None:
    """20 seeds; in 200, 1% name a layer, and 5.5% find one that differs by label."""
    (run,) = scored.runs().to_pylist()
    rows, place = answer_rows(scored, run, "neuron"), list(run["thresholds"]).index(THRESHOLD)
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
        np.testing.assert_allclose(merged, [row["eavss_contrast"] for row in rows], rtol=1e-6)
    relative = contrast(scored, run, site="neuron", threshold=0.1, threshold_kind="rms")
    by_layer = relative.layers.to_pylist()
    assert [row["layer"] for row in by_layer if row["p_holm"] < 0.05] == [PLANTED]
    assert by_layer[PLANTED]["rank"] == 1
    assert {row["stands"] for row in by_layer} == {None} and len(relative.predictions) == 0
    assert any("Lengths are not controlled" in line for line in relative.findings)
    units = contrast(scored, run, site="update", recipe="unit", threshold=THRESHOLD).layers.to_pylist()
    means = [scored.read_stratum_stats(run["run_id"])[0, "update", label] for label in LABELS]
    assert units[0]["hsav_difference"] == pytest.approx(
        np.subtract(*((m.unit_sum / m.unit_count).var() for m in means))
    )
    shown = avss("contrast", "-w", scored.root, "--site", "update", "--recipe", "unit", "--threshold", "0.1rms")
    assert shown.exit_code == 0 and "exchange of labels inside shards" in " ".join(shown.stdout.split())
    with pytest.raises(QueryError, match="no statistics for the recipe 'unit'"):
        contrast(scored, run, site="neuron", recipe="unit", threshold=THRESHOLD)
