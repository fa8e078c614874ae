"""TruthfulQA's multiple choice against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import one_thread
from transformers import AutoModelForCausalLM, AutoTokenizer

from avss_dist import evaluate
from avss_dist.studies.evaluate import Evaluations
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


def rows_of(evaluations: Evaluations, task: str) -> dict[str, Result]:
    """Return the results of one task by their metric."""
    return {row.result.metric: row.result for row in evaluations if row.task == task}


def test_choices_and_entropies_are_those_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    """Whatever rows are padded to, and in whichever order they are: there, each row is alone."""
    file = tmp_path / "t.jsonl"
    backwards = tmp_path / "backwards.jsonl"
    for path, lines in ((file, QUESTIONS), (backwards, QUESTIONS[::-1])):
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    tasks = [f"truthfulqa:{file}", f"perplexity:truthfulqa:{file}", f"truthfulqa:{backwards}"]
    options = {"sequence_length": 48, "batch_size": 4, "sequences_per_shard": 4, "executor": "local"}
    with one_thread():
        evaluations = evaluate([str(tiny_llama)], tasks=tasks, warehouse=tmp_path / "w", **options)
        limited = evaluate(
            [str(tiny_llama)], tasks=[f"truthfulqa:{file}"], warehouse=tmp_path / "w", limit=1, **options
        )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def predicted(question: str, answer: str) -> tuple[torch.Tensor, list[int]]:
        """Log-probabilities, [tokens, vocabulary], of the answer's tokens; and which they are."""
        prompt = tokenizer(f"Q: {question}\nA:").input_ids
        text = tokenizer(f" {answer}").input_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text])).logits[0].double().log_softmax(-1)
        return logits[len(prompt) - 1 : -1], text

    def likelihood(question: str, answer: str) -> float:
        logs, text = predicted(question, answer)
        return float(logs[torch.arange(len(text)), text].sum())

    mc1 = []
    mc2 = []
    for question, (best_answer, correct, incorrect) in ANSWERS.items():
        right = [likelihood(question, text) for text in correct]
        wrong = [likelihood(question, text) for text in incorrect]
        best = likelihood(question, best_answer)
        if best_answer not in correct:
            right.append(best)
        mc1.append(float(best > max(wrong)))
        mc2.append(np.exp(right).sum() / (np.exp(right).sum() + np.exp(wrong).sum()))
    results = rows_of(evaluations, tasks[0])
    rows = rows_of(evaluations, tasks[1])
    reverse = rows_of(evaluations, tasks[2])
    assert results["mc1"].samples.tolist() == mc1
    np.testing.assert_allclose(results["chance"].samples, [2 / 3, 1 / 3, 2 / 4])
    for metric in ("mc1", "mc2", "chance"):
        np.testing.assert_allclose(reverse[metric].samples[::-1], results[metric].samples, rtol=1e-5)
    for i, (question, (best_answer, _, _)) in enumerate(ANSWERS.items()):  # four rows each: two answers, two prompts
        logs, text = predicted(question, best_answer)
        assert rows["entropy"].samples[4 * i] == pytest.approx(float(-(logs.exp() * logs).sum()), rel=1e-4)
        assert rows["loss"].samples[4 * i] == pytest.approx(-likelihood(question, best_answer), rel=1e-4)
        assert rows["entropy"].weights[4 * i] == len(text)
    assert {len(evaluation.result.samples) for evaluation in limited} == {1}
    np.testing.assert_allclose(results["mc2"].samples, mc2, rtol=1e-4)
