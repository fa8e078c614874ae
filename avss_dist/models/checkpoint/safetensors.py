"""safetensors files of a checkpoint: their headers, and reading, overwriting and copying of their tensors."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter, FileIO
from pathlib import Path

import torch

from avss_dist.core.errors import ModelError
from avss_dist.core.values import JsonObject

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
COPIED_AT_ONCE = 64 << 20
"""Number of bytes that the operating system copies in one call."""
_LENGTH_BYTES = 8
"""Number of bytes at the start of a file that hold the length of its header."""
_MAX_HEADER_BYTES = 100_000_000
"""Length of the longest header that the safetensors library reads."""
_ALIGNMENT = 8
"""Alignment of the data in a file, in bytes. The header is padded with spaces."""


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


def tensors_of(file: Path, start: int = 0) -> list[StoredTensor]:
    """Return the tensors of a file in the order of its header: eight bytes of length, then JSON.

    Args:
        start: offset of the header in a file that has more before it.

    Raises:
        ModelError: the file has no valid header.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            (length,) = struct.unpack("<Q", stream.read(_LENGTH_BYTES))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        data = start + _LENGTH_BYTES + length
        return [_tensor(name, file, data, entry) for name, entry in header.items()]
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.", "Is the download complete?") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"no {error}"
        raise ModelError(
            f"{file} has no header of a safetensors file: {reason}.", "Download or copy it again."
        ) from error


def _tensor(name: str, file: Path, data: int, entry: JsonObject) -> StoredTensor:
    """Return the tensor of a header's entry, where ``data`` is the offset of the first tensor in the file."""
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    is_complete = isinstance(entry["dtype"], str)
    for number in (first, last, *shape):
        if type(number) is not int or number < 0:
            is_complete = False
    if not is_complete:
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
    except (EOFError, ValueError) as error:  # Mapping a file that is too short is a ValueError.
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
    tensors = [tensor for tensor in tensors_of(source) if tensor.name in names]
    tensors.sort(key=lambda tensor: tensor.start)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    written: list[_Piece | torch.Tensor] = []
    for tensor in tensors:
        shape = tensor.shape
        pieces = [_Piece(tensor.start, tensor.size)]
        copied_rows = rows.get(tensor.name)
        if copied_rows is not None:
            width = tensor.size // shape[0]
            shape = (len(copied_rows), *shape[1:])
            pieces = [_Piece(tensor.start + row * width, width) for row in copied_rows]
        size = sum(piece.size for piece in pieces)
        name = names[tensor.name]
        header[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [end, end + size]}
        if name in values:
            value = values[name]
            assert value.nbytes == size
            assert value.dtype == DTYPES[tensor.dtype]
            written.append(value)
        else:
            written += pieces
        end += size
    with source.open("rb", buffering=0) as file, target.open("xb") as out:
        out.write(_encode_header(header))
        for data in written:
            if isinstance(data, torch.Tensor):
                out.write(_tensor_bytes(data))
            else:
                _copy_piece(file, data, out)
        out.flush()
        os.fsync(out.fileno())
    return end


@dataclass(frozen=True)
class NewTensor:
    """Tensor that a new file gets: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(target: Path, tensors: Sequence[NewTensor], read: Callable[[str], torch.Tensor]) -> None:
    """Write a new safetensors file, of which one tensor is in memory at a time.

    Args:
        read: function that returns the tensor of a name, on the CPU.

    Raises:
        OSError: the target cannot be written.
    """
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    # As the library does, wide elements come first, so that all are aligned.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        offsets = [end, end + tensor.size]
        header[tensor.name] = {"dtype": dtype_names[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        end += tensor.size
    with target.open("xb") as out:
        out.write(_encode_header(header))
        for tensor in ordered:
            value = read(tensor.name)
            assert value.dtype == tensor.dtype
            assert value.shape == tensor.shape
            out.write(_tensor_bytes(value))
        out.flush()
        os.fsync(out.fileno())


def _encode_header(header: Mapping[str, object]) -> bytes:
    """Return the start of a file: the length of the header, and the header, padded."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file from an offset."""

    start: int
    size: int


def _copy_piece(source: FileIO, piece: _Piece, out: BufferedWriter) -> None:
    """Append bytes of a file to another one.

    Raises:
        ModelError: the source ends before the piece does.
    """
    out.flush()
    first = piece.start
    last = first + piece.size
    while first < last:
        copied = os.sendfile(out.fileno(), source.fileno(), first, min(COPIED_AT_ONCE, last - first))
        if copied == 0:
            raise ModelError(f"{source.name} ends before its tensors do.", "Copy it again.")
        first += copied
