"""Conversion, by transformers, of several stored tensors to weights of a model, one weight at a time.

transformers has two readers of .gguf files. Some architectures go through its conversions, as quantized safetensors do.
All others are unpacked by the gguf package, and rearranged by a class of their architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avss_dist.core.errors import ModelError, first_line
from avss_dist.models.checkpoint.loading import quiet, renaming
from avss_dist.models.checkpoint.locate import Checkpoint, read_gguf
from avss_dist.models.checkpoint.safetensors import DTYPES, StoredTensor

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer

ELSEWHERE = (
    "Use `partition` device_map, which has transformers load the whole model."  # hint where streaming is impossible
)

Group = tuple[StoredTensor, ...]
"""Stored tensors that are converted together: all that make a weight, or several."""


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
        model: PreTrainedModel,
        stored: Sequence[StoredTensor],
        quantizer: HfQuantizer | None = None,
        names: Mapping[str, str] | None = None,
        unpack: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        self._model = model
        self._stored = stored
        self._quantizer = quantizer
        self._names = names or {}
        self.unpack = unpack
        self._subject = f"The weights of {type(model).__name__}"
        self._groups: dict[int, list[StoredTensor]] | None = None  # by the id of the first weight that is made of them
        self._mapping: list[Any] = []

    def groups(self, keys: set[int]) -> tuple[Group, ...]:
        """Return the stored tensors from which weights, by id, are converted, grouped by weight.

        Raises:
            ModelError: no stored tensor belongs to these weights.
        """
        if self._groups is None:
            with refusing(self._subject):
                rename, self._mapping, state = renaming(self._model, self._quantizer)
                self._groups = {}
                for stored in sorted(self._stored, key=attrgetter("name")):
                    read = self._names.get(stored.name, stored.name)
                    weight = state.get(rename(read), state.get(read))
                    if weight is not None:
                        self._groups.setdefault(id(weight), []).append(stored)
        groups = tuple(tuple(stored) for weight, stored in self._groups.items() if weight in keys)
        if not groups:
            raise ModelError(
                f"{self._subject} cannot be read layer by layer: its files have other tensors than its layers.",
                ELSEWHERE,
            )
        return groups

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
        with refusing(self._subject), quiet(), torch.no_grad():
            if self.unpack:
                tensors = self.unpack(tensors)
            elif self._quantizer:
                tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), options)
        mismatched = [name for name, *_ in info.mismatched_keys]
        wrong = [*info.conversion_errors, *mismatched]
        if wrong:
            raise ModelError(
                f"{self._subject} cannot be read layer by layer: '{wrong[0]}' cannot be made of one layer's tensors.",
                ELSEWHERE,
            )


@contextmanager
def refusing(subject: str) -> Iterator[None]:
    """Convert exceptions of transformers' private interfaces, which may change, to ModelError."""
    try:
        yield
    except (ImportError, TypeError, AttributeError, KeyError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{subject} cannot be read layer by layer: this version of transformers converts them in another way "
            f"({first_line(error)}).",
            ELSEWHERE,
        ) from error


class GgufTensors:
    """Tensors of a .gguf file.

    It uses private interfaces of transformers, which may change; see `loading.renaming`.

    Attributes:
        stored: the tensors as they are in the file; blocks of quantized numbers are bytes.
        names: name in the model of each tensor that it uses, after `find_names`. Several tensors may make one weight.

    Raises:
        ModelError: the file is damaged.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._file = Path(checkpoint.path)
        reader = read_gguf(checkpoint)
        self._types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        self.stored = [self._stored(tensor) for tensor in reader.tensors]
        self._architecture = str(reader.fields["general.architecture"].contents())
        self.names: dict[str, str] = {}
        self._processor: Any = None
        self._weights: dict[str, str] = {}

    def _stored(self, tensor: ReaderTensor) -> StoredTensor:
        dtype = tensor.tensor_type.name
        if dtype in DTYPES:
            shape = tuple(int(size) for size in reversed(tensor.shape))
        else:  # blocks of quantized numbers
            dtype = "U8"
            shape = tensor.data.shape
        return StoredTensor(tensor.name, dtype, int(tensor.n_bytes), shape, self._file, int(tensor.data_offset))

    def quantizer(self, model: PreTrainedModel) -> HfQuantizer | None:
        """Return transformers' quantizer that unpacks the tensors of this architecture, or None if it has none.

        Args:
            model: the model, which may be on the meta device.
        """
        try:
            from transformers import GgufConfig
            from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, get_gguf_plan
            from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
        except ImportError:  # before transformers 5.20
            return None
        quantizer = GgufHfQuantizer(GgufConfig(dequantize=True))
        quantizer.read_header(str(self._file))
        if not quantizer.supported:
            return None
        quantizer.mapping = get_gguf_conversion_mapping(quantizer.header.architecture, model.config)
        quantizer.quantized, _, _ = get_gguf_plan(quantizer.header, quantizer.mapping)
        quantizer.dtype = model.dtype
        return quantizer

    def find_names(self, model: PreTrainedModel) -> None:
        """Find the name of each tensor in a model, which may be on the meta device."""
        if quantizer := self.quantizer(model):
            rename, _, state = renaming(model, quantizer)
            for stored in self.stored:
                target = rename(stored.name)
                if target in state:
                    self.names[stored.name] = target
            return
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            load_gguf_checkpoint,
        )

        config = load_gguf_checkpoint(str(self._file))["config"]
        self._processor = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=config)
        self._weights = get_gguf_hf_weights_map(model, self._processor)
        for name in self._types:
            name_of_experts = name.removesuffix(".weight")
            weight = self._weights.get(name) or self._weights.get(name_of_experts)
            if weight:
                self.names[name] = weight

    def unpack(self, raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors as transformers' older reader has them, float32 by their names in the model.

        Args:
            raw: the tensors of some weights as they are in the file, by name, after `find_names`.
        """
        from gguf import dequantize

        tensors: dict[str, torch.Tensor] = {}
        for name, data in raw.items():
            blocks = data.contiguous().view(torch.uint8).numpy()
            result = self._processor.process(
                weights=dequantize(blocks, self._types[name]),
                name=name,
                tensor_key_mapping=self._weights,
                parsed_parameters={"tensors": tensors},
            )
            if result.name in self._weights:
                tensors[self._weights[result.name]] = torch.from_numpy(np.copy(result.weights))
        return tensors
