"""Arguments of a launch (sizes and addresses, 8 bytes each), and the layout of the memory that kernels share."""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise

import torch

UNITS_A_WARP, STRIP, RUN = 128, 32, 8  # as in common.cu
MAX_CALLS = 8
ENOUGH_ITEMS = 4096  # for every warp of a large card
MIN_CHUNK = 16  # tokens; chunks are multiples of it
ALIGNMENT = 256

NUMBERS = {torch.bfloat16: 0, torch.float16: 16, torch.float32: 32}  # DTYPE in common.cu
OCTAVE = {torch.bfloat16: 128, torch.float16: 1024, torch.float32: 128}  # counters of an octave of one sign


@lru_cache(maxsize=1)
def source() -> str:
    """Return the CUDA C++ of all kernels."""
    here = files(__package__)
    return "\n".join((here / f"{name}.cu").read_text("utf-8") for name in ("common", "count", "compare", "finish"))


@lru_cache(maxsize=1)
def fields() -> tuple[str, ...]:
    """Return the names of the arguments of a launch, in the order of ``struct Call``."""
    body = re.search(r"struct Call \{\n(.*?)\n\};", source(), re.DOTALL)
    assert body is not None
    return tuple(re.findall(r"(\w+);", re.sub(r"//.*", "", body[1])))


def window(dtype: torch.dtype, shared: int) -> tuple[int, int]:
    """Return LOW and SPAN: the first pattern with a counter in a block's shared memory, and their number.

    They cover the 64 octaves up to 2**17 for bfloat16 and float32, in which activations lie, and the 30 octaves of
    float16. With less memory, they cover fewer octaves: for float16, those around 1/4.

    Args:
        shared: bytes of shared memory of a block.
    """
    octave = OCTAVE[dtype]
    maximum = (shared // 8 - STRIP) // octave
    if dtype != torch.float16:
        octaves = min(64, maximum)
        return (144 - octaves) * octave, octaves * octave
    octaves = min(30, maximum)
    return max(1, (31 - octaves) // 2 - 2) * octave, octaves * octave


def shared_bytes(dtype: torch.dtype, span: int, limits: int) -> int:
    """Return the bytes of shared memory of a counting block."""
    return 4 * (span + STRIP + 2 * limits + 3) if dtype == torch.float32 else 8 * (span + STRIP)


def chunk_of(rows: int, tokens: int, units: int) -> int:
    """Return the tokens per work item, small enough that every warp of a large card gets items.

    The order of float sums depends on it, so it is a function of shapes only.
    """
    chunks = -(-ENOUGH_ITEMS // (rows * -(-units // UNITS_A_WARP)))
    return -(-tokens // (chunks * MIN_CHUNK)) * MIN_CHUNK


@lru_cache(maxsize=64)
def layout(
    shape: tuple[int, int, int], chunk: int, dtype: torch.dtype, squared: bool, compared: bool
) -> tuple[dict[str, int], int, int]:
    """Return the layout of a call's memory: offsets by field, size of the leading zeroed part, total size."""
    rows, tokens, units = shape
    parts = rows * -(-tokens // chunk)
    items = parts * -(-units // UNITS_A_WARP) if dtype == torch.float32 else 0
    zeros = {"ticket": 4, "arrived": 4 * parts, "bad": rows * tokens}
    scratch = {
        "sums": 8 * parts * units,
        "squares": 8 * parts * units * squared,
        "seen": 16 * parts,
        "moments": 40 * items,
        "compared": 56 * rows * -(-tokens // RUN) * compared,
        "spread": 16 * rows * -(-units // STRIP),
        "pooled": 8 * rows,
        "row_seen": 16 * rows,
    }
    sizes = {name: size for name, size in (zeros | scratch).items() if size}
    ends = [0]
    for size in sizes.values():
        ends.append(ends[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    offsets = dict(zip(sizes, (start for start, _ in pairwise(ends)), strict=True))
    return offsets, offsets["sums"], ends[-1]


def record(values: dict[str, int]) -> bytes:
    """Return the bytes of a ``struct Call``. Fields without a value are 0."""
    return struct.pack(f"{len(fields())}q", *(values.get(name, 0) for name in fields()))


def records(calls: list[bytes]) -> bytes:
    """Return the bytes of a ``struct Calls``."""
    return struct.pack("q", len(calls)) + b"".join(calls).ljust(MAX_CALLS * 8 * len(fields()), b"\0")
