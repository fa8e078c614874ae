"""Greedy continuation of a prompt, as a measurement whose samples are token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from avss_dist.core.errors import ModelError, first_line
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import fingerprint
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.loading import quiet
from avss_dist.system.memory import is_out_of_memory
from avss_dist.tasks.base import Row

TOKEN = "token"  # metric of a continuation: ids of its tokens


@dataclass(frozen=True)
class ContinuePrompt:
    """Measure of the greedy continuation of one prompt: a row `TOKEN`, whose samples are the new tokens.

    Attributes:
        prompt: token ids, special tokens included.
        max_tokens: maximum number of new tokens; the model may end the text before.
    """

    prompt: tuple[int, ...]
    max_tokens: int

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="continuation", prompt=list(self.prompt), tokens=self.max_tokens)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`.

        Raises:
            ModelError: the model does not generate text.
        """
        ids = torch.tensor([self.prompt], device=model.device)
        try:
            with quiet(), model.applying(intervention):
                tokens = model.generate(
                    inputs=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.max_tokens,
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
