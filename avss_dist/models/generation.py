"""Greedy generation of a number of tokens, and the check that a model whose layers are skipped has a cache for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from avss_dist.core.errors import first_line
from avss_dist.models.change.remaining import remaining_modules
from avss_dist.models.change.sparsity import dense
from avss_dist.models.checkpoint.loading import quiet
from avss_dist.models.forward import changing
from avss_dist.models.structure.layers import Layer, probe_tokens

CHECKED_TOKENS = 3
"""Number of tokens that are generated to check the key-value cache."""


def generate_greedily(model: Any, ids: torch.Tensor, num_tokens: int, **options: Any) -> Any:
    """Generate exactly so many of the most likely tokens with the key-value cache.

    Args:
        model: the model of transformers with its head.
        ids: token ids of prompts of one length, int64[rows, tokens].
        options: further options of ``generate``.

    Returns:
        The output of ``generate`` as an object, with ``sequences``.
    """
    return model.generate(
        inputs=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        **options,
    )


def find_cache_obstacle(
    model: Any, layers: Sequence[Layer], skipped: frozenset[int], device: torch.device
) -> str | None:
    """Return why the remaining layers cannot generate with a key-value cache, found on a few tokens, or None.

    Args:
        model: the model of transformers with its head.
        layers: all layers of the model.
        skipped: indices of the layers that are skipped in this context.
        device: device of the token ids.
    """
    ids = probe_tokens(device)
    run = partial(model, use_cache=False)
    try:
        with torch.no_grad(), quiet(), dense():
            expected = run(input_ids=ids).logits
            with changing(remaining_modules(model, layers, skipped)):
                if not torch.equal(run(input_ids=ids).logits, expected):
                    return "layers of this family depend on their place"
                generated = generate_greedily(model, ids, CHECKED_TOKENS, output_logits=True)
                cached = torch.stack(generated.logits, dim=1).float()
                plain = run(input_ids=generated.sequences).logits[:, -CHECKED_TOKENS - 1 : -1].float()
    except Exception as error:  # A model's own code can raise anything where layers are missing.
        return f"its remaining layers do not run alone ({type(error).__name__}: {first_line(error)})"
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    size = (plain - plain.mean(-1, keepdim=True)).norm()
    # A difference of NaN is not the same either.
    is_same = (cached - plain).norm() <= tolerance * size
    if not is_same:
        return "its predictions with the cache differ from those without"
    return None
