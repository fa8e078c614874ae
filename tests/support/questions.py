"""Everything that is asked of a language model, by one small text: what each replica must answer alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avss_dist.core.intervention import Expert, Intervention, Removals, sublayers_of
from avss_dist.corpus.pairs import Pairing
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.tasks.backward import Gradients
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.map_damage import RoundedLosses, RoundingDamage
from avss_dist.tasks.shapley import Shapley
from avss_dist.tasks.task import MetricRow
from avss_dist.tasks.text_loss import LeaveOneOut, TextLoss
from support.causal_lm import random_shard

HARNESS = """\
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
"""
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " a kind of fish"], "answer": 0},
    {"question": "Two and two are", "choices": [" four", " five", " a"], "answer": 0},
    {"question": "A list that is sorted has", "choices": [" no end", " an order"], "answer": 1},
    {"question": "Water", "choices": [" is wet", " is", " is dry and warm"], "answer": 0},
    {"question": "Yes", "choices": ["!", "?"], "answer": 1},
]


COMPOSED = (
    "leave one out of",
    "sublayers, each of",
    "gradients without",
    "gradients of what propagates in",
    "shapley",
    "rounded maps of",
)  # of what the other questions need of a model, in the order of `LanguageModel`: no family has its own way with them
WHOLLY_ASKED = "llama"  # the family of which every partition is asked everything


def composed(family: str, partition: str = "") -> tuple[str, ...]:
    """Return the questions that a family need not be asked, for another one is; spread experts are those of Qwen3."""
    return () if family == ("qwen3_moe" if partition == "expert_parallel" else WHOLLY_ASKED) else COMPOSED


def write_questions(folder: Path) -> str:
    """A task of multiple choice for the harness: the path of its file."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    questions_file = folder / "questions.yaml"
    questions_file.write_text(HARNESS.format(data=data))
    return str(questions_file)


def questions() -> dict[str, Any]:
    """A measure for each kind of question, and the layers that are left out of it: two rows a batch, five rows."""
    shard = random_shard()
    return {
        "loss": (TextLoss(shard), ()),
        "loss without a layer": (TextLoss(shard), (1,)),
        "loss and entropy of answers without a layer": (TextLoss(_paired(shard)), (1,)),
        "leave one out": (LeaveOneOut(shard), ()),
        "leave one out of the rest": (LeaveOneOut(shard), (2,)),
        "sublayers, each": (LeaveOneOut(shard, sublayers=True), ()),
        "sublayers, each of the rest": (LeaveOneOut(shard, sublayers=True), (0, *sublayers_of([1])[:1])),
        "gradients without an attention": (Gradients(shard), tuple(sublayers_of([1])[:1])),
        "shapley": (Shapley(shards=(shard,), seeds=(0,), truncation=False), ()),
        "gradients": (Gradients(shard), ()),
        "gradients without the last layer": (Gradients(shard), (2,)),
        "gradients of what propagates": (Damage(shard=shard, lookahead=1), ()),
        "gradients of what propagates in the rest": (Damage(shard=shard), (1,)),
        "rounded layers": (RoundedLosses(shard, "int4"), ()),
        "rounded layers of the rest": (RoundedLosses(shard, "fp8"), (1,)),
        "gradients of rounded weights": (RoundingDamage(shard=shard, formats=("int4", "fp8")), ()),
    }


def _paired(shard: Shard) -> Shard:
    """The same as answers that begin with the fourth token."""
    rows = np.arange(shard.num_sequences)
    starts = np.full(len(rows), 3, np.int32)
    return replace(shard, pairing=Pairing(rows=rows, pairs=rows, strata=("any",) * len(rows), starts=starts))


def answers(model: LanguageModel, skip: tuple[str, ...] = ()) -> dict[str, list[MetricRow]]:
    """What a model answers to each; nothing about sublayers where they cannot be left out alone."""
    skip = (*skip, *(("sublayers", "gradients without an attention") if model.obstacles else ()))
    asked = {**questions(), **questions_without(one_of_each(model))}
    asked = {name: question for name, question in asked.items() if not any(map(name.startswith, skip))}
    return {name: measure(model, Intervention(removed=drop)) for name, (measure, drop) in asked.items()}


def one_of_each(model: LanguageModel) -> Removals:
    """An expert of each layer that has any."""
    return tuple(Expert(layer.index, 1) for layer in model.layers if layer.experts)


def questions_without(experts: Removals) -> dict[str, Any]:
    """The questions to a model without some of its experts, none to a model that has none."""
    shard = random_shard()
    asked = {
        "loss without experts": (TextLoss(shard), experts),
        "leave one out without experts": (LeaveOneOut(shard), experts),
        "gradients without experts": (Gradients(shard), experts),
    }
    return asked if experts else {}


def generated(model: LanguageModel) -> torch.Tensor:
    """[1, tokens]: a greedy continuation without a layer, with a cache and without one."""
    ids = torch.arange(10, 16, device=model.device)[None]
    with model.without((1,)):
        continuation: torch.Tensor = model.generate(inputs=ids, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(inputs=ids, max_new_tokens=4, do_sample=False), continuation)
    return continuation.cpu()


def assert_same(actual: dict[str, list[MetricRow]], expected: dict[str, list[MetricRow]], rtol: float = 0.0) -> None:
    """The same rows, their samples to the bit, or so near relative to the largest."""
    assert actual.keys() == expected.keys()
    for name, rows in expected.items():
        key = [(row.metric, row.removed, row.rounding, row.layer) for row in rows]
        assert [(row.metric, row.removed, row.rounding, row.layer) for row in actual[name]] == key, name
        for row, wanted in zip(actual[name], rows, strict=True):
            assert np.array_equal(row.weights, wanted.weights), name
            size = float(np.abs(wanted.samples).max(initial=0.0))
            near = 100 * rtol if row.metric == "entropy" else rtol  # its sums are of float32
            assert np.abs(row.samples - wanted.samples).max() <= near * size, (name, row.metric, row.removed, row.layer)
