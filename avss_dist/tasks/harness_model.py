"""Adapter of a language model to lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from avss_dist.corpus.documents import without_today
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.loading import load_tokenizer

Question = tuple[tuple[int, ...], tuple[int, ...]]
"""Input of the model (context and continuation without the last token), and the continuation that is asked for."""


def harness_model(model: LanguageModel, *, failures: list[Exception], chat: bool = False) -> Any:
    """Return a language model as a model of the harness.

    Args:
        failures: list to which exceptions of the model itself are appended; they are raised all the same.
        chat: apply the model's chat template.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """The harness's model with another way to batch log-likelihoods: all batches of a task run together."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            questions = [
                (tuple((*before, *after)[-(self.max_length + 1) :][:-1]), tuple(after)) for _, before, after in requests
            ]
            groups = _batches(questions, self.batch_size)
            with _noting(failures):
                likelihoods = model.together(
                    [partial(_likelihoods, model, [questions[i] for i in group]) for group in groups]
                )
            answers = dict(zip(chain(*groups), chain(*likelihoods), strict=True))
            return [answers[i] for i in range(len(requests))]

    settings = model.settings
    tokenizer = load_tokenizer(model.checkpoint, trust_remote_code=settings.trust_remote_code)
    if chat:
        tokenizer.chat_template = without_today(tokenizer.get_chat_template())
    return Model(
        pretrained=_Module(model, failures),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=settings.batch_size,
        softmax_dtype="float32",
    )


def _batches(questions: Sequence[Question], rows: int) -> list[list[int]]:
    """Return the indices of questions in batches of ``rows`` distinct rows, the longest rows first."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(questions)), key=lambda i: (-len(questions[i][0]), questions[i][0])):
        shared.setdefault(questions[i][0], []).append(i)
    groups = [*shared.values()]
    return [sorted(i for group in groups[at : at + rows] for i in group) for at in range(0, len(groups), rows)]


@torch.no_grad()
def _likelihoods(model: LanguageModel, questions: Sequence[Question]) -> list[tuple[float, bool]]:
    """Return (log-likelihood in nats, whether greedy decoding gives the continuation) of each question of a batch.

    The head runs at tokens of continuations alone. Padding comes after them, where causal models do not look.
    """
    rows = {row: number for number, row in enumerate(dict.fromkeys(row for row, _ in questions))}
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, number in rows.items():
        ids[number, : len(row)] = row
    real = np.ones(ids.shape, np.bool_)
    hidden = model.hidden_states(Batch(input_ids=ids, attention_mask=real, observed=real))
    positions = [(rows[row], at) for row, after in questions for at in range(len(row) - len(after), len(row))]
    at, after = torch.tensor(positions, device=model.device).T
    labels = torch.tensor([token for _, continuation in questions for token in continuation], device=model.device)
    losses, best = torch.empty(len(labels), dtype=torch.float64), torch.empty(len(labels), dtype=torch.bool)
    for piece, logits in model.logits(hidden[at, after]):
        losses[piece] = cross_entropy(logits, labels[piece], reduction="none").double().cpu()
        best[piece] = (logits.argmax(dim=-1) == labels[piece]).cpu()
    lengths = [len(continuation) for _, continuation in questions]
    parts = zip(losses.split(lengths), best.split(lengths), strict=True)
    return [(-float(loss.sum()), bool(greedy.all())) for loss, greedy in parts]


class _Module:
    """Stand-in for a model's module, which calls the model as its intervention requires.

    Args:
        failures: see `harness_model`.
    """

    def __init__(self, model: LanguageModel, failures: list[Exception]) -> None:
        self._model, self._failures = model, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _noting(self._failures):
            return self._model.call(*args, **{**kwargs, "use_cache": False})

    def generate(self, **kwargs: Any) -> Any:
        with _noting(self._failures):
            return self._model.generate(**kwargs)


@contextmanager
def _noting(failures: list[Exception]) -> Iterator[None]:
    """Append an exception that is raised inside the context to a list, and raise it."""
    try:
        yield
    except Exception as error:
        failures.append(error)
        raise
