"""Perplexities of packed rows against plain transformers with the tokenizer's defaults, and other starts of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import llama
from support.command_line import as_words, succeed

from avss_dist import evaluate
from avss_dist.analysis.findings import findings
from avss_dist.core.names import ROW_START
from avss_dist.runs.api import score
from avss_dist.warehouse.reader import Warehouse

SMALL = {"max_sequences": 12, "sequence_length": 16, "device": "cpu"}
WORDS = 100


def save(folder: Path, model: Any, added: str) -> Path:
    """Save a model with a tokenizer of whole words, which puts special tokens around a text as ``added`` says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    names = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=added, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """One document of random words."""
    path = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(f"w{i}" for i in rng.integers(0, WORDS, 400)), encoding="utf-8")
    return path


@pytest.mark.parametrize("added", ["$A", "<bos> $A", "<bos> $A <eos>"])
def test_the_perplexity_of_a_text_is_that_of_transformers(added: str, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save(tmp_path / "model", llama(), added)
    (evaluation,) = evaluate([str(folder)], tasks=[f"perplexity:{text}"], warehouse=tmp_path / "w", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words, losses, weights = text.read_text().split(), [], []
    length = SMALL["sequence_length"] - added.startswith("<bos>")
    for row in range(SMALL["max_sequences"]):
        ids = torch.tensor([tokenizer(" ".join(words[row * length : (row + 1) * length]))["input_ids"]])
        ids = ids[:, : SMALL["sequence_length"]]  # an EOS ends a text, and a row does not
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
        weights.append(ids.shape[1] - 1)
    assert evaluation.result.weights.tolist() == weights
    assert evaluation.result.samples / weights == pytest.approx(losses, rel=1e-5)


def expecting_bos() -> Any:
    """Return a Llama that gives every word the same probability after BOS, and nearly none without it.

    Unit 0 of the stream is -1 at every token, and decides between words and all other tokens. Attention is uniform, and
    adds to it what BOS alone has in unit 1.
    """
    model = llama(tie_word_embeddings=False)
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.zero_()
        model.model.embed_tokens.weight[:, 0] = -1
        model.model.embed_tokens.weight[1, 1] = 1
        layer.v_proj.weight[0, 1] = 1
        layer.o_proj.weight[0, 0] = 100
        model.lm_head.weight[:, 0] = -1
        model.lm_head.weight[3 : 3 + WORDS, 0] = 1
    return model


def test_a_model_that_expects_another_start_is_found_out(text: Path, tmp_path: Path) -> None:
    folder, warehouse = save(tmp_path / "model", expecting_bos(), "<bos> $A"), tmp_path / "w"
    wrong = SMALL | {"row_start": "none"}
    score(str(folder), corpus=str(text), warehouse=warehouse, **SMALL)
    score(str(folder), corpus=str(text), warehouse=warehouse, **wrong)
    right = evaluate([str(folder)], tasks=[f"perplexity:{text}"], warehouse=warehouse, **SMALL)
    assert right[0].result.value == pytest.approx(np.log(WORDS), rel=1e-3) and not right.findings
    assert not [row for row in findings(Warehouse(warehouse)).to_pylist() if row["kind"] == "row_start"]
    found = evaluate([str(folder)], tasks=[f"perplexity:{text}"], warehouse=warehouse, **wrong)
    (sentence,), wrong_losses = found.findings, found[0].result.samples / found[0].result.weights
    assert f"model has a perplexity of {np.exp(wrong_losses[:4].mean()):,.1f} on the first rows of {text}" in sentence
    assert sentence.endswith(
        "Set `row_start` to auto if it is none; else see whether its tokenizer lacks `add_bos_token`."
    )
    (row,) = [row for row in findings(Warehouse(warehouse)).to_pylist() if row["kind"] == "row_start"]
    assert row["severity"] == "warning" and "model has a perplexity of" in row["message"] and row["value"] > 1000


def test_a_tokenizer_that_does_not_add_the_bos_that_its_model_expects_is_found_out(text: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", expecting_bos(), "$A")
    task = f"perplexity:{text}"
    (sentence,) = evaluate([str(folder)], tasks=[task], warehouse=tmp_path / "w", **SMALL).findings
    assert "with another start of each row, which it seems to expect" in sentence
    rows = Warehouse(tmp_path / "w").table("evaluations").to_pylist()
    losses = {row["metric"]: row["value"] for row in rows if row["task"] == f"{ROW_START}{text}"}
    assert losses["loss_other_start"] == pytest.approx(np.log(WORDS), rel=1e-3)
    again = succeed("evaluate", folder, "--tasks", task, "-w", tmp_path / "w", *as_words(SMALL))
    assert "which it seems to expect" in again.output
