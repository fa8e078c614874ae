"""What a checkpoint's files hold, from their headers; no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from avss_dist.errors import ModelError
from avss_dist.models.checkpoints import Checkpoint, explain_hub_errors
from avss_dist.models.safetensors import DTYPES, TensorInfo, tensors_of, weight_files


def stored_tensors(checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    """The tensors of the weight files that are loaded.

    Raises:
        ModelError: a file has no header that can be read.
    """
    if checkpoint.gguf:
        yield from _gguf_tensors(Path(checkpoint.path))
        return
    for file in weight_files(checkpoint.folder):
        yield from tensors_of(file)


def hub_tensors(spec: str, checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    """The tensors of a hub checkpoint of which only the configuration is here; ``spec`` is what the user named.

    Raises:
        ModelError: it has no weights with a header, or the hub cannot be reached.
    """
    from huggingface_hub import errors, get_safetensors_metadata

    with explain_hub_errors(spec):
        try:
            metadata = get_safetensors_metadata(checkpoint.name, revision=checkpoint.revision)
        except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
            raise ModelError(f"'{spec}' has no weights (*.safetensors) with a header: {error}") from error
    for file in metadata.files_metadata.values():
        for name, tensor in file.tensors.items():
            yield TensorInfo(name, tensor.dtype, tensor.data_offsets[1] - tensor.data_offsets[0])


def _gguf_tensors(file: Path) -> Iterator[TensorInfo]:
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{file} has no header of a .gguf file: {error}.", "Download or copy it again.") from error
    for tensor in tensors:
        yield TensorInfo(tensor.name, tensor.tensor_type.name, int(tensor.n_bytes))


def floating_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """The floating dtype of most bytes of tensors that can be computed with as they are; float32 where none can."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        dtype = DTYPES.get(tensor.dtype)
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
            sizes[dtype] += tensor.size
    return max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)), default=torch.float32)
