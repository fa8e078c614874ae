"""Sampling of text from a model itself, token by token from its predictions, as a corpus of all that it has learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.corpus.tokens import special_tokens_around
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_model, load_tokenizer, pin, text_config
from avss_dist.system.devices import pick_device
from avss_dist.system.streams import report, tracked

_APART = 1_000_003  # seeds of batches, from one seed to the next


def sample(
    checkpoint: Checkpoint, settings: Settings, *, count: int, seed: int = 0, first: int = 0
) -> Iterator[list[str]]:
    """Yield batches of sampled texts of at most ``sequence_length`` tokens, at temperature 1 without truncation.

    A text ends where the model ends it. Equal seeds, batch sizes, dtypes and devices give equal texts.

    Args:
        count: number of texts to sample; empty ones are left out of the result.
        first: index of the first batch to sample.

    Raises:
        ModelError: the model cannot be loaded or predicts no next token, or the tokenizer has no start token.
    """
    device = pick_device(settings.device)
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    settings = pin(settings, checkpoint, config, device.type)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id)  # EOS stands between texts of models without BOS
    start = special_tokens_around(tokenizer).prefix.tolist() or [i for i in candidates if i is not None][:1]
    if not start:
        raise ModelError(f"The tokenizer of '{checkpoint.name}' has no token to begin with.", "Name other text.")
    model = load_model(checkpoint, replace(settings, layers=None), head=True).to(device)
    if not model.can_generate():
        raise ModelError(f"'{checkpoint.name}' predicts no next token.", "Name a causal language model.")
    end = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, start[0]) if i is not None)
    sizes = [min(settings.batch_size, count - done) for done in range(0, count, settings.batch_size)]
    for number in tracked(range(first, len(sizes)), "Sampling"):
        prompts = torch.tensor([start] * sizes[number], device=device)
        reporting = partial(_report, first=len(start), batch=number, batches=len(sizes), settings=settings)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed((_APART * seed + number) % 2**32)  # all that the generator of CPUs takes
            generated = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=settings.sequence_length,
                pad_token_id=end,
                stopping_criteria=[reporting],
                **_AS_PREDICTED,
            )
        texts = tokenizer.batch_decode(generated[:, len(start) :], skip_special_tokens=True)
        yield [text for text in texts if text.strip()]


def _report(
    ids: torch.Tensor, _scores: Any, *, first: int, batch: int, batches: int, settings: Settings, **_: Any
) -> torch.Tensor:
    """Report the progress of a batch after each token, as a stopping criterion that stops no text."""
    report("Sampling", (batch + (ids.shape[1] - first) / settings.sequence_length) / batches)
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


_AS_PREDICTED: dict[str, Any] = {  # whatever the checkpoint's own generation_config.json says
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "use_cache": True,
}
