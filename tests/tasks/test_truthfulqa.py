"""TruthfulQA's multiple choice against plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import one_thread
from support.json_files import write_json_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from avss_dist import evaluate
from avss_dist.tasks.results import Result

ANSWERS = {
    "What is 2?": ("a number", ["a number", "two"], ["no"]),
    "Who am I?": ("you", ["you"], ["me", "nobody at all"]),
    "Where is it?": ("not here", ["away"], ["here", "it"]),
}
QUESTIONS = [
    {"question": question, "best_answer": best, "correct_answers": correct, "incorrect_answers": incorrect}
    for question, (best, correct, incorrect) in ANSWERS.items()
]
OPTIONS: dict[str, Any] = {"sequence_length": 48, "batch_size": 4, "sequences_per_shard": 4, "executor": "local"}


def write_questions(file: Path, *, backwards: bool = False) -> Path:
    """Write the questions and their answers into a file, and return its path."""
    rows = QUESTIONS[::-1] if backwards else QUESTIONS
    write_json_lines(file, rows)
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "t.jsonl")


def results_of(model: Path, task: str, folder: Path, **options: Any) -> dict[str, Result]:
    """Return the results of a task by their metric."""
    with one_thread():
        evaluations = evaluate([str(model)], tasks=[task], warehouse=folder / "w", **OPTIONS, **options)
    return {evaluation.result.metric: evaluation.result for evaluation in evaluations}


class Reference:
    """A model of plain transformers, which is asked a question with one answer at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def predicted(self, question: str, answer: str) -> tuple[torch.Tensor, list[int]]:
        """Return log-probabilities, [tokens, vocabulary], of the answer's tokens, and the tokens."""
        prompt = self.tokenizer(f"Q: {question}\nA:").input_ids
        tokens = self.tokenizer(f" {answer}").input_ids
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + tokens])).logits[0]
        return logits.double().log_softmax(-1)[len(prompt) - 1 : -1], tokens

    def likelihood(self, question: str, answer: str) -> float:
        """Return the log-likelihood of an answer."""
        logs, tokens = self.predicted(question, answer)
        return float(logs[torch.arange(len(tokens)), tokens].sum())

    def probability(self, question: str, answers: list[str]) -> float:
        """Return the probability of one of several answers."""
        likelihoods = [self.likelihood(question, answer) for answer in answers]
        return np.exp(likelihoods).sum()


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


def test_choices_are_those_of_transformers(tiny_llama: Path, reference: Reference, file: Path, tmp_path: Path) -> None:
    """Whatever rows are padded to: there, each row is alone."""
    results = results_of(tiny_llama, f"truthfulqa:{file}", tmp_path)
    for i, (question, (best_answer, correct, incorrect)) in enumerate(ANSWERS.items()):
        best = reference.likelihood(question, best_answer)
        largest_of_wrong = max(reference.likelihood(question, answer) for answer in incorrect)
        assert results["mc1"].samples[i] == float(best > largest_of_wrong)
        right = reference.probability(question, list({*correct, best_answer}))
        wrong = reference.probability(question, incorrect)
        assert results["mc2"].samples[i] == pytest.approx(right / (right + wrong), rel=1e-4)
    np.testing.assert_allclose(results["chance"].samples, [2 / 3, 1 / 3, 2 / 4])


@pytest.mark.parametrize("metric", ["mc1", "mc2", "chance"])
def test_choices_do_not_depend_on_the_order_of_the_questions(
    metric: str, tiny_llama: Path, file: Path, tmp_path: Path
) -> None:
    backwards = write_questions(tmp_path / "backwards.jsonl", backwards=True)
    results = results_of(tiny_llama, f"truthfulqa:{file}", tmp_path)
    reverse = results_of(tiny_llama, f"truthfulqa:{backwards}", tmp_path)
    np.testing.assert_allclose(reverse[metric].samples[::-1], results[metric].samples, rtol=1e-5)


def test_entropies_and_losses_are_those_of_transformers(
    tiny_llama: Path, reference: Reference, file: Path, tmp_path: Path
) -> None:
    results = results_of(tiny_llama, f"perplexity:truthfulqa:{file}", tmp_path)
    for i, (question, (best_answer, _, _)) in enumerate(ANSWERS.items()):
        row = 4 * i  # four rows each: two answers, two prompts
        logs, tokens = reference.predicted(question, best_answer)
        entropies = -(logs.exp() * logs).sum(dim=-1)
        assert results["entropy"].samples[row] == pytest.approx(entropies.sum().item(), rel=1e-4)
        assert results["loss"].samples[row] == pytest.approx(-reference.likelihood(question, best_answer), rel=1e-4)
        assert results["entropy"].weights[row] == len(tokens)


def test_a_limit_asks_the_first_questions(tiny_llama: Path, file: Path, tmp_path: Path) -> None:
    results = results_of(tiny_llama, f"truthfulqa:{file}", tmp_path, limit=1)
    for result in results.values():
        assert len(result.samples) == 1
