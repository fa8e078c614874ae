"""Log-probabilities of transformers for tokens that a server has predicted, in float32 and in the server's dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from avss_dist.core.devices import devices_here, pick_device
from avss_dist.core.settings import Settings
from avss_dist.core.streams import progress_to
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import compute_dtype
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.partition.catalog import LAYERWISE, PARTITIONS
from avss_dist.partition.choose import place
from avss_dist.partition.execution import Execution
from avss_dist.partition.replica import open_replica
from avss_dist.serving.server import Int64, Predictions
from avss_dist.stats.layer_stats import Float64

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Report = Callable[[str, float], None]
"""Receives an activity, and the share of it that is done."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Expected:
    """Log-probabilities of transformers at the positions of some predictions.

    Attributes:
        best: int64[n], most likely tokens.
        best_logs: float64[n], log-probabilities of these.
        chosen_logs: float64[n], log-probabilities of the server's tokens.
        label_logs: float64[n], log-probabilities of the tokens of the row.
    """

    best: Int64
    best_logs: Float64
    chosen_logs: Float64
    label_logs: Float64


@dataclass(frozen=True, eq=False, kw_only=True)
class Reference:
    """Predictions of transformers for the tokens that a server predicted.

    Attributes:
        expected: log-probabilities in float32, by prediction.
        deviations: float64[all positions], how far those of the dtype are from them: of the token that float32 takes
            for the most likely one, or of the token of the row, whichever is more.
    """

    expected: tuple[Expected, ...]
    deviations: Float64


def server_dtype(checkpoint: Checkpoint, config: PreTrainedConfig, settings: Settings) -> str:
    """Return the dtype in which servers compute a checkpoint: that of the settings, else its own one of 16 bits.

    A checkpoint of 32 bits is computed in float16, as vLLM and converters to GGUF do.
    """
    dtype = compute_dtype(checkpoint, config, settings)
    if dtype not in (torch.float16, torch.bfloat16):
        dtype = torch.float16
    return str(dtype).removeprefix("torch.")


def compute_reference(
    checkpoint: Checkpoint,
    predictions: Sequence[Predictions],
    settings: Settings,
    execution: Execution,
    report: Report,
) -> Reference:
    """Return what transformers computes for predictions of a server.

    Args:
        settings: their dtype is that of `server_dtype`.
        report: receives the progress.
    """
    with progress_to(lambda _, share: report("computing in float32", share)):
        exact = _compute(checkpoint, predictions, replace(settings, dtype="float32"), execution, None)
    best = [expected.best for expected in exact]
    with progress_to(lambda _, share: report(f"computing in {settings.dtype}", share)):
        rounded = _compute(checkpoint, predictions, settings, execution, best)
    deviations = [np.zeros(0)]
    for expected, other in zip(exact, rounded, strict=True):
        by_best = np.abs(other.best_logs - expected.best_logs)
        by_label = np.abs(other.label_logs - expected.label_logs)
        deviations.append(np.maximum(by_best, by_label))
    return Reference(expected=tuple(exact), deviations=np.concatenate(deviations))


def _compute(
    checkpoint: Checkpoint,
    predictions: Sequence[Predictions],
    settings: Settings,
    execution: Execution,
    best: Sequence[Int64] | None,
) -> list[Expected]:
    """Return the log-probabilities of a model that is opened for it.

    Args:
        best: tokens whose log-probabilities are `Expected.best_logs`; the model's own by default.
    """
    kind = pick_device(settings.device).type
    settings = replace(settings, device=kind)
    placement = place(checkpoint, settings, execution, devices_here(kind), head=True)
    if PARTITIONS[placement.partition].gang:
        # This is one process.
        placement = place(checkpoint, settings, replace(execution, partition=LAYERWISE), devices_here(kind), head=True)
    with closing(open_replica(checkpoint, settings, placement, head=True)) as replica:
        model = replica.language_model
        assert model is not None
        batches = []
        for written in predictions:
            ids = written.ids[None]
            real = np.ones(ids.shape, np.bool_)
            batches.append(Batch(input_ids=ids, attention_mask=real, observed=real))
        asked = {id(batch): number for number, batch in enumerate(batches)}

        def expected(batch: Batch) -> Expected:
            number = asked[id(batch)]
            return _log_probabilities(model, batch, predictions[number], best[number] if best else None)

        return model.each(expected, batches)


@torch.no_grad()
def _log_probabilities(model: LanguageModel, batch: Batch, written: Predictions, best: Int64 | None) -> Expected:
    """Return the log-probabilities of a model at the positions of a prediction."""
    before = torch.from_numpy(written.positions - 1)
    labels = written.ids[written.positions].astype(np.int64)
    hidden = model.hidden_states(batch)[0]
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for piece, logits in model.logits(hidden[before.to(hidden.device)]):
        logs = logits.log_softmax(dim=-1)
        first = logits.argmax(dim=-1)
        if best is not None:
            first = torch.from_numpy(best[piece]).to(logits.device)
        tokens = torch.stack(
            [
                first,
                torch.from_numpy(written.best[piece]).to(logits.device),
                torch.from_numpy(labels[piece]).to(logits.device),
            ],
            dim=1,
        )
        parts.append((first.cpu().numpy(), logs.gather(1, tokens).double().cpu().numpy()))
    firsts = np.concatenate([tokens for tokens, _ in parts])
    logs_of_tokens = np.concatenate([values for _, values in parts])
    return Expected(
        best=firsts,
        best_logs=logs_of_tokens[:, 0],
        chosen_logs=logs_of_tokens[:, 1],
        label_logs=logs_of_tokens[:, 2],
    )
