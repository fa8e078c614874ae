"""safetensors files of a checkpoint: their headers, and reading, overwriting and copying of their tensors."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from avss_dist.core.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtypes by their names in headers."""
COPIED_AT_ONCE = 64 << 20  # bytes
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ALIGNMENT = 8  # of the data in a file: the header is padded with spaces


@dataclass(frozen=True)
class TensorInfo:
    """Tensor as described by a header: name, dtype as written there, and size in bytes."""

    name: str
    dtype: str
    size: int


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """Tensor of a safetensors file, ``size`` bytes from offset ``start``."""

    shape: tuple[int, ...]
    file: Path
    start: int


def tensors_of(file: Path) -> list[StoredTensor]:
    """Return the tensors of a file in the order of its header: eight bytes of length, then JSON.

    Raises:
        ModelError: the file has no valid header.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return [_tensor(name, file, 8 + length, entry) for name, entry in header.items()]
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.", "Is the download complete?") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ModelError(
            f"{file} has no header of a safetensors file: {reason}.", "Download or copy it again."
        ) from error


def _tensor(name: str, file: Path, data: int, entry: Any) -> StoredTensor:
    """Return the tensor of a header's entry, where ``data`` is the offset of the first tensor in the file."""
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not isinstance(entry["dtype"], str) or not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
        raise ValueError(f"'{name}' has no dtype, shape and offsets")
    if last < first:
        raise ValueError(f"'{name}' ends before it begins")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is not None:
        size = math.prod(shape) * dtype.itemsize
        if last - first != size:
            raise ValueError(f"'{name}' has {last - first:,} bytes, and its shape wants {size:,}")
    return StoredTensor(name, entry["dtype"], last - first, shape, file, data + first)


def floating_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """Return the floating dtype, of 16 bits or more, that most bytes of tensors have, or float32 if none has one."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        dtype = DTYPES.get(tensor.dtype)
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
            sizes[dtype] += tensor.size
    return max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)), default=torch.float32)


@contextmanager
def explaining_reads(stored: StoredTensor) -> Iterator[None]:
    """Raise ModelError for an error in reading or mapping a tensor inside the context."""
    try:
        yield
    except (EOFError, ValueError) as error:  # mapping a file that is too short is a ValueError
        raise ModelError(f"{stored.file} ends before its tensor '{stored.name}' does.", "Copy it again.") from error
    except OSError as error:
        raise ModelError(f"{stored.file} cannot be read: {error.strerror}.", "Does it still exist?") from error


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Read a tensor of a file into memory of its own.

    Raises:
        ModelError: torch has no such dtype, or the file cannot be read to the tensor's end.
    """
    if stored.dtype not in DTYPES:
        raise ModelError(f"'{stored.name}' of {stored.file} is of dtype {stored.dtype}, which torch does not have.")
    with explaining_reads(stored), stored.file.open("rb") as file:
        file.seek(stored.start)
        data = bytearray(file.read(stored.size))
        if len(data) < stored.size:
            raise EOFError
    return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).reshape(stored.shape)


def copy_tensors(
    source: Path,
    target: Path,
    names: Mapping[str, str],
    rows: Mapping[str, Sequence[int]],
    values: Mapping[str, torch.Tensor],
) -> int:
    """Copy some tensors of a safetensors file to a new one under new names, and return their number of bytes.

    The operating system moves the bytes, without going through the memory of this process.

    Args:
        names: new names by old ones.
        rows: ascending indices of the rows to copy, by old name; all rows by default.
        values: values to write instead, by new name, of the stored dtype and the copied shape, on the CPU.

    Raises:
        ModelError: the source ends before its header says.
        OSError: the target cannot be written.
    """
    tensors = sorted((tensor for tensor in tensors_of(source) if tensor.name in names), key=lambda tensor: tensor.start)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    written: list[tuple[int, int] | torch.Tensor] = []
    for tensor in tensors:
        shape, pieces = tensor.shape, [(tensor.start, tensor.start + tensor.size)]
        copied_rows = rows.get(tensor.name)
        if copied_rows is not None:
            width = tensor.size // shape[0]
            shape = (len(copied_rows), *shape[1:])
            pieces = [(tensor.start + row * width, tensor.start + (row + 1) * width) for row in copied_rows]
        size = sum(last - first for first, last in pieces)
        header[names[tensor.name]] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [end, end + size]}
        value = values.get(names[tensor.name])
        assert value is None or (value.nbytes, value.dtype) == (size, DTYPES[tensor.dtype])
        written += pieces if value is None else [value]
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with source.open("rb", buffering=0) as file, target.open("xb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for piece in written:
            if isinstance(piece, torch.Tensor):
                out.write(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                continue
            out.flush()
            first, last = piece
            while first < last:
                size = os.sendfile(out.fileno(), file.fileno(), first, min(COPIED_AT_ONCE, last - first))
                if not size:
                    raise ModelError(f"{source} ends before its tensors do.", "Copy it again.")
                first += size
        out.flush()
        os.fsync(out.fileno())
    return end
