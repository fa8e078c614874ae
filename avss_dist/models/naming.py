"""What transformers calls the tensors of a checkpoint's files in the model that it makes of them."""

from __future__ import annotations

from typing import Any


class Naming:
    """The names of a model's weights by those of stored tensors.

    None of what it asks is transformers' public interface, which may change: expect ImportError, TypeError,
    AttributeError, KeyError and ValueError.

    Args:
        model: may be on the meta device.

    Attributes:
        mapping: transformers' own, by which it renames and converts tensors.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.mapping: list[Any] = get_model_conversion_mapping(model)
        self.state: dict[str, Any] = model.state_dict(keep_vars=True)
        self._renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix

    def renamed(self, stored: str) -> str:
        """What a stored tensor is called in the model, or the first weight that is made of it."""
        from transformers.core_model_loading import rename_source_key

        name, _ = rename_source_key(stored, self._renamings, self._converters, self._prefix, self.state)
        return str(name)
