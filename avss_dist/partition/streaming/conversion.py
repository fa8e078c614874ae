"""Conversion, by transformers, of several stored tensors to weights of a model, some of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from avss_dist.core.errors import ModelError
from avss_dist.models.loading import quiet
from avss_dist.models.naming import Naming
from avss_dist.models.safetensors import StoredTensor
from avss_dist.partition.streaming.buffers import ELSEWHERE


class Conversion:
    """Conversion by `from_pretrained` of stored tensors that are not weights as they are, such as single experts.

    Args:
        model: transformers model on the meta device.
        stored: tensors to convert, some of which may be unused.
    """

    def __init__(self, model: Any, stored: Sequence[StoredTensor]) -> None:
        self._model = model
        self._stored = stored
        self._targets: dict[str, int] | None = None
        self._mapping: list[Any] = []

    def sources(self, keys: set[int]) -> tuple[StoredTensor, ...]:
        """Return the stored tensors from which weights, by id, are converted.

        Raises:
            ModelError: no stored tensor belongs to these weights.
        """
        if self._targets is None:
            with self._refusing():
                self._targets = dict(self._match())
        sources = tuple(stored for stored in self._stored if self._targets.get(stored.name) in keys)
        if not sources:
            raise self._refusal("its files have other tensors than its layers")
        return sources

    def _match(self) -> Iterator[tuple[str, int]]:
        """Yield (name of a stored tensor, id of the first weight that is made of it)."""
        naming = Naming(self._model)
        self._mapping = naming.mapping
        for name in sorted(stored.name for stored in self._stored):
            target = naming.state.get(naming.renamed(name), naming.state.get(name))
            if target is not None:
                yield name, id(target)

    def convert(self, tensors: dict[str, torch.Tensor]) -> None:
        """Convert the tensors of `sources`, by name, and set the weights in the model, on the CPU.

        Raises:
            ModelError: transformers cannot convert them.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(dtype=self._model.dtype, weight_mapping=self._mapping)
        with self._refusing(), quiet():
            info, _ = convert_and_load_state_dict_in_model(self._model, tensors, options)
        wrong = [*info.conversion_errors, *(name for name, *_ in info.mismatched_keys)]
        if wrong:
            raise self._refusal(f"'{wrong[0]}' cannot be made of one layer's tensors")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Convert exceptions of transformers' private interfaces, which may change, to ModelError."""
        try:
            yield
        except (ImportError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise self._refusal(f"this version of transformers converts them in another way ({error})") from error

    def _refusal(self, why: str) -> ModelError:
        return ModelError(
            f"The weights of {type(self._model).__name__} cannot be read layer by layer: {why}.", ELSEWHERE
        )
