"""Text that a model writes itself: a batch of texts, sampled from its predictions with a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from avss_dist.core.devices import SPARE_SHARE, computing_threads, free_cores, free_memory
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.streams import portion, report
from avss_dist.core.values import NewObject
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.partition.choose import size_of
from avss_dist.tasks.task import Measure, MetricRow
from avss_dist.tasks.text_loss import TOKEN, generate_text

LOGITS_BYTES = 48
"""Bytes of each logit of a step: copies of it in float32, its probability, and sums of probabilities in float64."""
TEXTS_APART = 1_000_003
"""Difference of the seeds of a text between one seed of the writing and the next."""


@dataclass(frozen=True)
class WriteTexts(Measure):
    """Measure that samples consecutive texts at temperature 1, without truncation: as the model predicts them.

    Its row `TOKEN` has the tokens of all texts as samples, and the number of the text of each token as weights. A text
    ends where the model ends it, or after as many tokens as a row has.

    Each text is drawn with random numbers of its own, so that the number of texts at once changes a text only by the
    rounding of logits. As many are written at once as memory allows.

    Attributes:
        start: token ids before each text.
        padding: token id behind texts that have ended.
        first, count: number of the first text, and number of texts.
        seed: seed of all texts.
        all_cores: compute on all idle cores of a CPU instead of with the threads of the settings.
    """

    start: tuple[int, ...]
    padding: int
    first: int
    count: int
    seed: int = 0
    all_cores: bool = False

    def identity(self) -> NewObject:
        """Return the values that the key is made of."""
        return {
            "measure": "own text",
            "start": self.start,
            "padding": self.padding,
            "first": self.first,
            "count": self.count,
            "seed": self.seed,
        }

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return the row of the tokens of all texts.

        Raises:
            ModelError: the model does not generate text.
        """
        rows = rows_at_once(model)
        threads = model.settings.threads
        if self.all_cores and model.device.type == "cpu":
            threads = max(threads, free_cores())
        texts: list[list[int]] = []
        with computing_threads(threads):
            for start in range(0, self.count, rows):
                number = min(rows, self.count - start)
                with portion(start / self.count, number / self.count):
                    texts += self._write(model, intervention, range(self.first + start, self.first + start + number))
        samples: list[int] = []
        numbers: list[int] = []
        for number, text in enumerate(texts, self.first):
            samples += text
            numbers += [number] * len(text)
        return [MetricRow(metric=TOKEN, samples=np.array(samples, np.float64), weights=np.array(numbers, np.float64))]

    def _write(self, model: LanguageModel, intervention: Intervention, numbers: range) -> list[list[int]]:
        """Return the tokens of texts that are written at once."""
        length = model.settings.sequence_length
        draws = _Draws(random_numbers(self.seed, numbers, length).to(model.device), len(self.start))
        generated = generate_text(
            model,
            torch.tensor([self.start] * len(numbers), device=model.device),
            intervention,
            max_new_tokens=length,
            pad_token_id=self.padding,
            use_cache=True,
            logits_processor=[draws],
        )
        texts = []
        for ids in generated[:, len(self.start) :].tolist():
            while ids and ids[-1] == self.padding:
                ids.pop()
            texts.append(ids)
        return texts


class _Draws:
    """Processor of logits that draws the next token of each text and leaves no other possible.

    Args:
        uniforms: float64[texts, tokens], random numbers from 0 to 1.
        start: number of tokens before each text.
    """

    def __init__(self, uniforms: torch.Tensor, start: int) -> None:
        self._uniforms = uniforms
        self._start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logits of which only that of the drawn token is finite."""
        step = input_ids.shape[1] - self._start
        report("Writing text", step / self._uniforms.shape[1])
        cumulative = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        drawn = self._uniforms[:, step, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, drawn, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def random_numbers(seed: int, numbers: range, length: int) -> torch.Tensor:
    """Return the random numbers of texts, float64[texts, tokens] from 0 to 1: the same for a text in any batch.

    They are made on the CPU, so that they are the same for every device.
    """
    uniforms = torch.empty(len(numbers), length, dtype=torch.float64)
    for row, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(TEXTS_APART * seed + number)
        uniforms[row] = torch.rand(length, dtype=torch.float64, generator=generator)
    return uniforms


def rows_at_once(model: LanguageModel) -> int:
    """Return the number of texts to write at once: those of a batch, halved until cache and logits have memory."""
    rows = model.settings.batch_size
    size = size_of(model.checkpoint, model.settings)
    if size is None:
        return rows
    free = SPARE_SHARE * free_memory(model.device)
    row_bytes = model.settings.sequence_length * sum(size.cache_bytes) + LOGITS_BYTES * size.vocabulary
    while rows > 1 and rows * row_bytes > free:
        rows = (rows + 1) // 2
    return rows
