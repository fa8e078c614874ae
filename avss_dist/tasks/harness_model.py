"""A language model as lm-evaluation-harness wants it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.loading import load_tokenizer


def harness_model(model: LanguageModel, *, generate: bool) -> Any:
    """A model as the harness wants it; ``generate`` as in `_Uncached`."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """The harness's own, which asks for all of a task's batches together."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            groups = _batches(requests, self.batch_size)
            ask = super()._loglikelihood_tokens
            found = model.together([partial(ask, [requests[i] for i in group], disable_tqdm=True) for group in groups])
            answers = dict(zip(chain(*groups), chain(*found), strict=True))
            return [answers[i] for i in range(len(requests))]

    settings = model.settings
    return Model(
        pretrained=_Uncached(model, generate=generate),
        tokenizer=load_tokenizer(model.checkpoint, trust_remote_code=settings.trust_remote_code),
        backend="causal",
        batch_size=settings.batch_size,
        softmax_dtype="float32",
    )


def _batches(requests: Sequence[Any], rows: int) -> list[list[int]]:
    """Indices of requests, those together that the harness puts into one batch.

    It sorts them by their length, then by their tokens; those of the same tokens but for the last share a row.
    """
    tokens = [(*context, *continuation) for _, context, continuation in requests]
    shared: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(requests)), key=lambda i: (-len(tokens[i]), tokens[i])):
        shared.setdefault(tokens[i][:-1], []).append(i)
    groups = [*shared.values()]
    return [sorted(i for group in groups[at : at + rows] for i in group) for at in range(0, len(groups), rows)]


class _Uncached:
    """A module as the harness sees it: no keys and values are kept, for layers that are left out have none.

    Args:
        generate: keep none when it generates, too; the harness asks for them.
    """

    def __init__(self, model: LanguageModel, *, generate: bool) -> None:
        self._model, self._generate = model, generate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.call(*args, **{**kwargs, "use_cache": False})

    def generate(self, **kwargs: Any) -> Any:
        return self._model.generate(**({**kwargs, "use_cache": False} if self._generate else kwargs))
