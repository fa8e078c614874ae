"""The kernels on a CPU: compiled loops, whole sequences to a thread, so that no result depends on the thread count."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from avss_dist.measure.kernels import regions
from avss_dist.measure.kernels.base import PATTERNS, Accumulator, float32_limits
from avss_dist.measure.kernels.threads import team

MOST_ELEMENTS = 1 << 32  # that one thread counts in 32 bits before its counts are flushed

_REGIONS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.bfloat16: (regions.measure_bfloat16, regions.finish_patterns),
    torch.float16: (regions.measure_float16, regions.finish_patterns),
    torch.float32: (regions.measure_wide, regions.finish_wide),
}


class CpuKernels:
    """See `kernels.Kernels`. Keeps its scratch memory from call to call; not for two callers at once."""

    def __init__(self) -> None:
        self._counts = np.zeros((torch.get_num_threads(), PATTERNS), np.uint32)
        self._scratch: dict[tuple[int, ...], _Scratch] = {}

    def add(
        self,
        into: Accumulator,
        x: torch.Tensor,
        mask: torch.Tensor,
        before: torch.Tensor | None = None,
        update: torch.Tensor | None = None,
    ) -> None:
        """See `kernels.Kernels`."""
        most = max(1, (MOST_ELEMENTS - 1) // (x.shape[1] * x.shape[2]))
        whole = {"x": x, "mask": mask} | (
            {} if before is None or update is None else {"before": before, "update": update}
        )
        for start in range(0, len(x), most):
            part = whole if len(x) <= most else {name: t[start : start + most] for name, t in whole.items()}
            self._add(into, **part)

    def _add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, **compared: torch.Tensor) -> None:
        into.reserve(x.numel())
        mask = mask.contiguous()
        rows, tokens, units = x.shape
        shape = (rows, units, len(into.thresholds))
        if shape not in self._scratch:
            self._scratch[shape] = _Scratch(*shape, self._counts)
        scratch = self._scratch[shape]
        limits = _limits(into.thresholds.tobytes())
        read = {name: _as_loops_read(tensor) for name, tensor in {"x": x, **compared}.items()}
        totals = into.tensors
        fields = scratch.addresses | {
            "rows": rows,
            "tokens": tokens,
            "units": units,
            "squared": units if "unit_sums" in totals else 0,
            "compared": bool(compared),
            "num_limits": len(limits),
            "count_bytes": totals["patterns"].element_size() if "patterns" in totals else 0,
            "raw": x.data_ptr(),
            "mask": mask.data_ptr(),
            "limits": _address(limits),
        }
        fields |= {name: tensor.data_ptr() for name, tensor in read.items()}
        fields |= {f"all_{name}": tensor.data_ptr() for name, tensor in totals.items()}
        call = np.array([fields.get(name, 0) for name in regions.FIELDS], np.int64)
        measure, finish = _REGIONS[x.dtype]
        team().run(measure.address, _address(call), min(rows, len(self._counts)))
        _c_function(finish.address)(_address(call))


class _Scratch:
    """Memory for what a region measures by sequence, and where it lies."""

    def __init__(self, rows: int, units: int, thresholds: int, counts: np.ndarray) -> None:
        self._arrays = {
            "counts": counts,
            "sums": np.empty((rows, units)),
            "squares": np.empty((rows, units)),
            "seen": np.empty((rows, 2), np.int64),
            "pooled": np.empty((rows, 1)),
            "angles": np.empty((rows, 2), np.int64),
            "geometry": np.empty((rows, 5)),
            "near_zeros": np.empty((rows, thresholds), np.int64),
            "elements": np.empty((rows, 3), np.int64),
            "moments": np.empty((rows, 4)),
        }
        self.addresses = {name: _address(array) for name, array in self._arrays.items()}


@lru_cache(maxsize=8)
def _limits(thresholds: bytes) -> np.ndarray:
    return float32_limits(np.frombuffer(thresholds, np.float64))


@lru_cache(maxsize=8)
def _c_function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _as_loops_read(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 and float32 as they are; float16 is widened, which is exact."""
    return x.float() if x.dtype == torch.float16 else x
