"""Losses of rows of text, and greedy continuations of prompts.

Losses are those of all predicted tokens, without layers, and of answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from avss_dist.core.errors import ModelError, first_line
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    Intervention,
    Removals,
    can_be_added,
    encode_removals,
    sublayers_of,
)
from avss_dist.core.memory import is_out_of_memory
from avss_dist.core.registry import BEST, CHANCE, ENTROPY, INCORRECT, LOSS
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.loading import quiet
from avss_dist.stats.metrics import AS_READ, OTHER_START
from avss_dist.tasks.task import Measure, Row, losses_under, predicted_tokens

TOKEN = "token"  # metric of a continuation: ids of its tokens


@dataclass(frozen=True, eq=False)
class TextLoss(Measure):
    """Loss on a shard of text, a sample for each sequence, and for paired text the entropy of the predictions."""

    shard: Shard

    def identity(self) -> dict[str, Any]:
        """Return the values that the key is made of."""
        return {
            "measure": "loss and entropy" if self.shard.pairing else "loss",
            "shard": self.shard.content_hash,
        }

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """Return the losses of the rows of the shard, and for paired text their entropies."""
        if not self.shard.pairing:
            return losses_under(model, self.shard, [intervention])
        batches, weights = list(self.shard.batches(model.settings.batch_size)), predicted_tokens(self.shard, model)
        with model.applying(intervention):
            sums = np.concatenate(model.each(partial(model.sums, entropies=True), batches), axis=1)
        return [Row(metric=name, samples=x, weights=weights) for name, x in zip((LOSS, ENTROPY), sums, strict=True)]


@dataclass(frozen=True, eq=False)
class RowStartLoss(Measure):
    """Loss on rows as they were read, and on the same text with other start tokens: a sample for each row.

    It tells whether the model expects other special tokens at the start of a text than the rows of a corpus have.
    """

    shards: tuple[Shard, Shard]
    measure = "row start"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """Return the losses of the rows as they were read, and of the same text with other start tokens."""
        pairs = zip((AS_READ, OTHER_START), self.shards, strict=True)
        return [row for metric, shard in pairs for row in losses_under(model, shard, [intervention], metric)]


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

    def identity(self) -> dict[str, Any]:
        """Return the values that the key is made of, without those at their defaults."""
        return {
            "measure": "leave one out",
            "shard": self.shard.content_hash,
            **({} if self.layers is None else {"layers": encode_removals(self.layers)}),
            **({"sublayers": True} if self.sublayers else {}),
        }

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """Return the losses of rows under the intervention, and without each layer in addition.

        Layers of the intervention are absent from every pass.
        """
        layers = range(len(model.layers))
        removals = (sublayers_of(layers) if self.sublayers else layers) if self.layers is None else self.layers
        interventions = [
            intervention.without(removal) for removal in removals if can_be_added(removal, intervention.removed)
        ]
        return losses_under(model, self.shard, [intervention, *interventions])


@dataclass(frozen=True, eq=False)
class TruthfulChoices(Measure):
    """MC1 and MC2 of TruthfulQA, a sample for each question.

    MC1: whether the best answer is more likely than every incorrect one. MC2: the share of the correct answers in the
    probability of all answers. Log-likelihoods are summed over an answer's tokens. `CHANCE` is MC2 of equal answers.
    """

    shard: Shard
    measure = "truthfulqa with chance"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """Return MC1, MC2 and chance for each question."""
        pairing = self.shard.pairing
        assert pairing is not None
        (losses,) = model.losses_under(list(self.shard.batches(model.settings.batch_size)), [intervention])
        labels = np.array(pairing.strata)
        questions = []
        for question in np.unique(pairing.pairs):
            answers = pairing.pairs == question
            likely, label = -losses[answers], labels[answers]
            wrong = label == INCORRECT
            is_best = likely[label == BEST].max() > likely[wrong].max()
            shares = np.exp(likely - likely.max())
            questions.append((is_best, shares[~wrong].sum() / shares.sum(), (~wrong).mean()))
        metrics = zip(("mc1", "mc2", CHANCE), np.array(questions, np.float64).T.copy(), strict=True)
        return [Row(metric=name, samples=x, weights=np.ones(len(x))) for name, x in metrics]


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

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """Return a row with the new tokens as its samples.

        Raises:
            ModelError: the model does not generate text.
        """
        ids = torch.tensor([self.prompt], device=model.device)
        try:
            with quiet(), model.applying(intervention):
                tokens = model.generate(
                    inputs=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.tokens,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                )
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(f"'{model.checkpoint.name}' generates no text: {first_line(error)}") from error
        samples = tokens[0, len(self.prompt) :].cpu().numpy().astype(np.float64)
        return [Row(metric=TOKEN, samples=samples, weights=np.ones(len(samples)))]
