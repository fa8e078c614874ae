"""Conversion, by transformers, of several stored tensors to weights of a model, some of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from avss_dist.core.errors import ModelError
from avss_dist.models.loading import quiet
from avss_dist.models.naming import Naming
from avss_dist.models.safetensors import StoredTensor
from avss_dist.partition.streaming.buffers import ELSEWHERE

GROUP_BYTES = 64 << 20  # of tensors that are converted together, unless those of a single weight are larger

Unpack = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
Group = tuple[StoredTensor, ...]
"""Stored tensors that are converted together: all that make some weights."""


class Conversion:
    """Conversion by `from_pretrained` of stored tensors that are not weights as they are.

    Examples are single experts, and quantized weights with their scales.

    Args:
        model: transformers model on the meta device.
        stored: tensors to convert, some of which may be unused.
        quantizer: transformers' quantizer that unpacks them; None if they are not quantized.
        names: names under which transformers reads tensors, by stored name, where they differ.
        unpack: function that unpacks tensors on the CPU before transformers reads them; None if the quantizer does.
    """

    def __init__(
        self,
        model: Any,
        stored: Sequence[StoredTensor],
        quantizer: Any = None,
        names: Mapping[str, str] | None = None,
        unpack: Unpack | None = None,
    ) -> None:
        self._model, self._stored, self._quantizer = model, stored, quantizer
        self._names, self._unpack = names or {}, unpack
        self._targets: dict[str, int] | None = None
        self._mapping: list[Any] = []

    @property
    def unpacks_on_cpu(self) -> bool:
        """Whether quantized tensors are unpacked on the CPU."""
        return self._unpack is not None

    def groups(self, keys: set[int]) -> tuple[Group, ...]:
        """Return the stored tensors from which weights, by id, are converted.

        Raises:
            ModelError: no stored tensor belongs to these weights.
        """
        if self._targets is None:
            with self._refusing():
                self._targets = dict(self._match())
        by_target: dict[int, list[StoredTensor]] = {}
        for stored in self._stored:
            if (target := self._targets.get(stored.name)) in keys:
                by_target.setdefault(target, []).append(stored)
        if not by_target:
            raise self._refusal("its files have other tensors than its layers")
        return tuple(_grouped(by_target.values()))

    def _match(self) -> Iterator[tuple[str, int]]:
        """Yield (name of a stored tensor, id of the first weight that is made of it)."""
        naming = Naming(self._model, self._quantizer)
        self._mapping = naming.mapping
        for name in sorted(stored.name for stored in self._stored):
            read = self._names.get(name, name)
            target = naming.state.get(naming.renamed(read), naming.state.get(read))
            if target is not None:
                yield name, id(target)

    def convert(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Convert the tensors of a group, by name, and set the weights in the model.

        Args:
            device: device that unpacks quantized tensors. Others are converted on the CPU.

        Raises:
            ModelError: transformers cannot convert them.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(
            dtype=self._model.dtype,
            weight_mapping=self._mapping,
            hf_quantizer=self._quantizer,
            device_map={"": device if self._quantizer else "cpu"},
        )
        with self._refusing(), quiet(), torch.no_grad():
            if self._unpack:
                tensors = self._unpack(tensors)
            elif self._quantizer:
                tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), options)
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


def _grouped(sources: Iterable[list[StoredTensor]]) -> Iterator[Group]:
    """Join the tensors of consecutive weights to groups of at most `GROUP_BYTES`."""
    group: list[StoredTensor] = []
    for tensors in sources:
        if group and sum(stored.size for stored in (*group, *tensors)) > GROUP_BYTES:
            yield tuple(group)
            group = []
        group += tensors
    yield tuple(group)
