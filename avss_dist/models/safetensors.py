"""Copying tensors from one safetensors file to another: the system moves the bytes, and no memory is taken."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from avss_dist.errors import ModelError
from avss_dist.models.size import read_header

CHUNK_BYTES = 64 << 20
_ALIGNMENT = 8  # of the data in a file: the header is filled up with spaces


def copy_tensors(source: Path, target: Path, names: Mapping[str, str], copied: Callable[[int], None]) -> int:
    """Write a safetensors file of some tensors of another, under new names, in their order; returns their bytes.

    Args:
        names: the new name by the old one.
        copied: told the bytes of every piece.

    Raises:
        ModelError: the source ends before its header says.
        OSError: the target cannot be written.
    """
    header, data = read_header(source)
    kept = sorted(names, key=lambda name: header[name]["data_offsets"][0])
    told: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in kept:
        first, last = header[name]["data_offsets"]
        told[names[name]] = header[name] | {"data_offsets": [end, end + last - first]}
        end += last - first
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with source.open("rb", buffering=0) as file, target.open("xb", buffering=0) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for first, last in _joined([tuple(header[name]["data_offsets"]) for name in kept]):
            for start in range(first, last, CHUNK_BYTES):
                size = min(CHUNK_BYTES, last - start)
                if not _copy(file.fileno(), out.fileno(), data + start, size):
                    raise ModelError(f"{source} ends before its tensors do.", "Copy it again.")
                copied(size)
        os.fsync(out.fileno())
    return end


def _joined(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges of bytes, those that touch as one."""
    start, end = 0, 0
    for first, last in ranges:
        if first != end:
            if end > start:
                yield start, end
            start = first
        end = last
    if end > start:
        yield start, end


def _copy(source: int, target: int, start: int, size: int) -> bool:
    """Append bytes of a file to another; False if there are not as many."""
    with suppress(OSError):  # another file system, or one that cannot: as bytes, then
        while size and (count := os.copy_file_range(source, target, size, start)):
            start, size = start + count, size - count
    while size:
        block = os.pread(source, min(size, 1 << 20), start)
        if not block:
            return False
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(target, rest) :]
        start, size = start + len(block), size - len(block)
    return True
