"""Names of stored tensors in the model that transformers makes of them."""

from __future__ import annotations

from typing import Any


class Naming:
    """Mapping from the names of stored tensors to the names of a model's weights.

    It uses private interfaces of transformers, which may change: expect ImportError, TypeError, AttributeError,
    KeyError and ValueError.

    Args:
        model: a transformers model, which may be on the meta device.
        quantizer: transformers' quantizer that unpacks the stored tensors; None if they are not quantized.

    Attributes:
        mapping: transformers' entries that rename and convert tensors.
        state: the model's state dict, by name.
    """

    def __init__(self, model: Any, quantizer: Any = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.mapping: list[Any] = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self.state: dict[str, Any] = model.state_dict(keep_vars=True)
        self._renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix

    def renamed(self, stored: str) -> str:
        """Return the name of the weight that a stored tensor becomes, or of the first one that is made of it."""
        from transformers.core_model_loading import rename_source_key

        name, _ = rename_source_key(stored, self._renamings, self._converters, self._prefix, self.state)
        return str(name)
