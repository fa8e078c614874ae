"""Tensors of a .gguf file, unpacked some at a time as transformers unpacks all of them.

transformers has two readers. Some architectures go through its conversions, as quantized safetensors do. All others are
unpacked by the gguf package, and rearranged by a class of their architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.naming import Naming
from avss_dist.models.safetensors import DTYPES, StoredTensor

_BYTES = "U8"


class GgufTensors:
    """Tensors of a .gguf file.

    It uses private interfaces of transformers, which may change; see `naming.Naming`.

    Attributes:
        stored: the tensors as they are in the file; blocks of quantized numbers are bytes.
        names: name in the model of each tensor that it uses, after `find_names`. Several tensors may make one weight.

    Raises:
        ModelError: the file is damaged.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from gguf import GGUFReader

        self._file = Path(checkpoint.path)
        try:
            reader = GGUFReader(self._file)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ModelError(
                f"{self._file} has no header of a .gguf file: {error}.", "Download or copy it again."
            ) from error
        self._types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        self.stored = [self._stored(tensor) for tensor in reader.tensors]
        self._architecture = str(reader.fields["general.architecture"].contents())
        self.names: dict[str, str] = {}
        self._processor: Any = None
        self._weights: dict[str, str] = {}

    def _stored(self, tensor: Any) -> StoredTensor:
        kind = tensor.tensor_type.name
        shape = tuple(int(size) for size in reversed(tensor.shape)) if kind in DTYPES else tensor.data.shape
        dtype = kind if kind in DTYPES else _BYTES
        return StoredTensor(tensor.name, dtype, int(tensor.n_bytes), shape, self._file, int(tensor.data_offset))

    def quantizer(self, model: Any) -> Any:
        """Return transformers' quantizer that unpacks the tensors of this architecture; None if it has none.

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

    def find_names(self, model: Any) -> None:
        """Find the name of each tensor in a model, which may be on the meta device."""
        if quantizer := self.quantizer(model):
            naming = Naming(model, quantizer)
            renamed = {stored.name: naming.renamed(stored.name) for stored in self.stored}
            self.names = {name: target for name, target in renamed.items() if target in naming.state}
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
        for name in (stored.name for stored in self.stored):
            target = self._weights.get(name) or self._weights.get(name.removesuffix(".weight"))  # fused experts
            if target:
                self.names[name] = target

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
