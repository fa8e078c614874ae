"""Tensors of a checkpoint's weight files, from their headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoints import Checkpoint, explain_hub_errors
from avss_dist.models.safetensors import DTYPES, TensorInfo, tensors_of, weight_files


def stored_tensors(checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    """Yield the tensors of the weight files that transformers loads.

    Raises:
        ModelError: a file has no valid header.
    """
    if checkpoint.gguf:
        yield from _gguf_tensors(Path(checkpoint.path))
        return
    for file in weight_files(checkpoint.folder):
        yield from tensors_of(file)


def hub_tensors(spec: str, checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    """Yield the tensors of a checkpoint on the hub, without downloading its weights.

    Args:
        spec: the hub id as the user wrote it, for messages.

    Raises:
        ModelError: the checkpoint has no weights with a header, or the hub cannot be reached.
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
    """Return the floating dtype, of 16 bits or more, that most bytes of tensors have; float32 if none has one."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        dtype = DTYPES.get(tensor.dtype)
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
            sizes[dtype] += tensor.size
    return max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)), default=torch.float32)
