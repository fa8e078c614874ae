"""Losses of rows of text, and greedy continuations of prompts.

Losses are those of all predicted tokens, without layers, and of answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from avss_dist.core.errors import ModelError, first_line
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    Intervention,
    Removal,
    Removals,
    can_be_added,
    removal_numbers,
    sublayers_of,
)
from avss_dist.core.memory import is_out_of_memory
from avss_dist.core.values import NewObject
from avss_dist.corpus.labels import BEST, INCORRECT
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import quiet
from avss_dist.stats.metrics import AS_READ, CHANCE, ENTROPY, LOSS, OTHER_START
from avss_dist.tasks.task import Measure, MetricRow, losses_under, predicted_tokens

TOKEN = "token"  # metric of a continuation: ids of its tokens


@dataclass(frozen=True, eq=False)
class TextLoss(Measure):
    """Loss on a shard of text, a sample for each sequence, and for paired text the entropy of the predictions."""

    shard: Shard

    def identity(self) -> NewObject:
        """Return the values that the key is made of."""
        return {
            "measure": "loss and entropy" if self.shard.pairing else "loss",
            "shard": self.shard.content_hash,
        }

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return the losses of the rows of the shard, and for paired text their entropies."""
        if not self.shard.pairing:
            return losses_under(model, self.shard, [intervention])
        batches = list(self.shard.batches(model.settings.batch_size))
        with model.applying(intervention):
            by_batch = model.each(partial(model.sums, entropies=True), batches)
        losses, entropies = np.concatenate(by_batch, axis=1)
        weights = predicted_tokens(self.shard, model)
        return [
            MetricRow(metric=LOSS, samples=losses, weights=weights),
            MetricRow(metric=ENTROPY, samples=entropies, weights=weights),
        ]


@dataclass(frozen=True, eq=False)
class RowStartLoss(Measure):
    """Loss on rows as they were read, and on the same text with other start tokens: a sample for each row.

    It tells whether the model expects other special tokens at the start of a text than the rows of a corpus have.
    """

    shards: tuple[Shard, Shard]
    measure = "row start"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return the losses of the rows as they were read, and of the same text with other start tokens."""
        as_read, other_start = self.shards
        return [
            *losses_under(model, as_read, [intervention], metric=AS_READ),
            *losses_under(model, other_start, [intervention], metric=OTHER_START),
        ]


@dataclass(frozen=True, eq=False)
class LeaveOneOut(Measure):
    """Loss on a shard of text of the whole model, and without each layer, with rows as those of `TextLoss`.

    A pass without a layer resumes from the hidden states of the whole model's pass, which saves about half of the
    layers' computation. Families in which that would change numbers run from the first layer.

    Attributes:
        layers: layers and sublayers to remove, one at a time; all layers by default.
        sublayers: with default ``layers``, remove all sublayers instead.
    """

    shard: Shard
    layers: Removals | None = None
    sublayers: bool = False

    def identity(self) -> NewObject:
        """Return the values that the key is made of, without those at their defaults."""
        identity: NewObject = {"measure": "leave one out", "shard": self.shard.content_hash}
        if self.layers is not None:
            identity["layers"] = removal_numbers(self.layers)
        if self.sublayers:
            identity["sublayers"] = True
        return identity

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return the losses of rows under the intervention, and without each layer in addition.

        Layers of the intervention are absent from every pass.
        """
        interventions = [intervention]
        for removal in self._removals(model):
            if can_be_added(removal, intervention.removed):
                interventions.append(intervention.without(removal))
        activity = "Leaving out sublayers" if self.sublayers else "Leaving out layers"
        return losses_under(model, self.shard, interventions, activity)

    def _removals(self, model: LanguageModel) -> Iterable[Removal]:
        every_layer = range(len(model.layers))
        if self.layers is not None:
            return self.layers
        if self.sublayers:
            return sublayers_of(every_layer)
        return every_layer


@dataclass(frozen=True, eq=False)
class TruthfulChoices(Measure):
    """MC1 and MC2 of TruthfulQA, a sample for each question.

    MC1: whether the best answer is more likely than every incorrect one. MC2: the share of the correct answers in the
    probability of all answers. Log-likelihoods are summed over an answer's tokens. `CHANCE` is MC2 of equal answers.
    """

    shard: Shard
    measure = "truthfulqa with chance"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return MC1, MC2 and chance for each question."""
        pairing = self.shard.pairing
        assert pairing is not None
        (losses,) = model.losses_under(list(self.shard.batches(model.settings.batch_size)), [intervention])
        labels = np.array(pairing.strata)
        samples: dict[str, list[float]] = {"mc1": [], "mc2": [], CHANCE: []}
        for question in np.unique(pairing.pairs):
            answers = pairing.pairs == question
            likelihoods = -losses[answers]
            is_wrong = labels[answers] == INCORRECT
            is_best = labels[answers] == BEST
            probabilities = np.exp(likelihoods - likelihoods.max())
            samples["mc1"].append(likelihoods[is_best].max() > likelihoods[is_wrong].max())
            samples["mc2"].append(probabilities[~is_wrong].sum() / probabilities.sum())
            samples[CHANCE].append((~is_wrong).mean())
        rows = []
        for metric, values in samples.items():
            rows.append(MetricRow(metric=metric, samples=np.array(values, np.float64), weights=np.ones(len(values))))
        return rows


@dataclass(frozen=True)
class ContinuePrompt(Measure):
    """Measure of the greedy continuation of one prompt: a row `TOKEN`, whose samples are the new tokens.

    Attributes:
        prompt: token ids, special tokens included.
        tokens: maximum number of new tokens; the model may end the text before.
    """

    prompt: tuple[int, ...]
    tokens: int
    measure = "continuation"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return a row with the new tokens as its samples.

        Raises:
            ModelError: the model does not generate text.
        """
        ids = torch.tensor([self.prompt], device=model.device)
        tokens = generate_text(model, ids, intervention, max_new_tokens=self.tokens)
        samples = tokens[0, len(self.prompt) :].cpu().numpy().astype(np.float64)
        return [MetricRow(metric=TOKEN, samples=samples, weights=np.ones(len(samples)))]


def generate_text(
    model: LanguageModel, ids: torch.Tensor, intervention: Intervention, **options: object
) -> torch.Tensor:
    """Return prompts and the tokens that follow, the most likely ones unless a processor of logits chooses.

    Args:
        ids: token ids of prompts of one length, int64[rows, tokens].
        intervention: change of the model.
        options: further options of ``generate``.

    Raises:
        ModelError: the model does not generate text.
    """
    try:
        with quiet(), model.applying(intervention):
            tokens: torch.Tensor = model.generate(
                inputs=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                **options,
            )
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"'{model.checkpoint.name}' generates no text: {first_line(error)}") from error
    return tokens
