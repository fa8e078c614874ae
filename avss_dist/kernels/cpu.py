"""The kernels on a CPU: compiled loops, whole sequences to a thread, so that no result depends on the thread count."""

from __future__ import annotations

import numpy as np
import torch

from avss_dist.kernels import PATTERNS, Accumulator, float32_limits, loops, regions
from avss_dist.kernels.threads import team
from avss_dist.stats import HISTOGRAM_BINS, Float64, merge_moments

MOST_ELEMENTS = 1 << 32  # that one thread counts in 32 bits before its counts are flushed

Arrays = dict[str, np.ndarray]


class CpuKernels:
    """See `kernels.Kernels`. Keeps the threads' pattern counts from call to call; not for two callers at once."""

    def __init__(self) -> None:
        self._counts = np.zeros((torch.get_num_threads(), PATTERNS), np.uint32)

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
        for start in range(0, len(x), most):
            part = slice(start, start + most)
            compared = {} if before is None or update is None else {"before": before[part], "update": update[part]}
            self._add(into, x[part], mask[part], compared)

    def _add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, compared: dict[str, torch.Tensor]) -> None:
        into.reserve(x.numel())
        rows, tokens, units = x.shape
        mask = mask.contiguous()
        squared = units if "unit_sums" in into.tensors else 0
        wide = x.dtype == torch.float32
        read = {name: _as_loops_read(t) for name, t in {"values": x, **compared}.items()}
        arrays = _sums(rows, units, squared)
        arrays |= _float32_arrays(rows, into.thresholds) if wide else {"counts": self._counts}
        addresses = {name: _address(array) for name, array in arrays.items()}
        addresses |= {name: tensor.data_ptr() for name, tensor in read.items()}
        fields = addresses | {
            "raw": x.data_ptr(),
            "mask": mask.data_ptr(),
            "rows": rows,
            "tokens": tokens,
            "units": units,
            "squared": squared,
            "compared": bool(compared),
            "num_limits": len(into.thresholds),
        }
        call = np.array([fields.get(name, 0) for name in regions.FIELDS], np.int64)
        team().run(_REGIONS[x.dtype].address, _address(call), min(rows, len(self._counts)))
        if wide:
            _add_float32(into, arrays)
        else:
            total = into.tensors["patterns"].numpy()
            for counts in self._counts[: call[regions.ENTERED]]:
                loops.flush_patterns(counts, total)
        _add_units(into, arrays)
        if compared:
            _add_geometry(into, arrays)


_REGIONS = {
    torch.bfloat16: regions.measure_bfloat16,
    torch.float16: regions.measure_float16,
    torch.float32: regions.measure_wide,
}


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _as_loops_read(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 and float32 as they are; float16 is widened, which is exact."""
    return x.float() if x.dtype == torch.float16 else x


def _sums(rows: int, units: int, squared: int) -> Arrays:
    return {
        "sums": np.zeros((rows, units)),
        "squares": np.zeros((rows, squared)),
        "seen": np.zeros((rows, 2), np.int64),
        "pooled": np.zeros((rows, 1)),
        "angles": np.zeros((rows, 2), np.int64),
        "geometry": np.zeros((rows, 5)),
    }


def _float32_arrays(rows: int, thresholds: Float64) -> Arrays:
    return {
        "limits": float32_limits(thresholds),
        "histogram": np.zeros((rows, HISTOGRAM_BINS), np.int64),
        "near_zero": np.zeros((rows, len(thresholds)), np.int64),
        "elements": np.zeros((rows, 3), np.int64),
        "moments": np.zeros((rows, 4)),
    }


def _add_float32(into: Accumulator, arrays: Arrays) -> None:
    host = {name: tensor.numpy() for name, tensor in into.tensors.items()}
    host["histogram"] += arrays["histogram"].sum(0)
    host["near_zero"] += arrays["near_zero"].sum(0)
    moments = arrays["moments"]
    low, high = host["extremes"]
    host["extremes"][:] = min(low, moments[:, 2].min()), max(high, moments[:, 3].max())
    for counted, (mean, m2) in zip(arrays["elements"], moments[:, :2].tolist(), strict=True):
        _merge_into(host["moments"], int(host["elements"][0]), int(counted[0]), mean, m2)
        host["elements"] += counted


def _add_units(into: Accumulator, arrays: Arrays) -> None:
    pooled = arrays["pooled"][:, 0]
    whole = pooled[~np.isnan(pooled)]
    into.tensors["sequences"].numpy()[0] += len(whole)
    into.tensors["pooled"].numpy()[0] += whole.sum()
    if "unit_sums" in into.tensors:
        into.tensors["unit_count"].numpy()[0] += arrays["seen"][:, 0].sum()
        kept = into.tensors["unit_sums"].numpy()
        kept[0] += arrays["sums"].sum(0)
        kept[1] += arrays["squares"].sum(0)


def _add_geometry(into: Accumulator, arrays: Arrays) -> None:
    seen, geometry = into.tensors["tokens"].numpy(), arrays["geometry"]
    into.tensors["geometry"].numpy()[:] += geometry[:, :3].sum(0)
    for counted, (mean, m2) in zip(arrays["angles"], geometry[:, 3:].tolist(), strict=True):
        _merge_into(into.tensors["input_moments"].numpy(), int(seen[1]), int(counted[1]), mean, m2)
        seen += counted


def _merge_into(moments: Float64, seen: int, count: int, mean: float, m2: float) -> None:
    """Chan's update of ``moments`` [mean, m2] over ``seen`` elements by ``count`` more."""
    moments[:] = merge_moments((seen, *moments.tolist()), (count, mean, m2))[1:]
