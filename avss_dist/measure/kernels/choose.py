"""Choice of the fastest kernels for a device."""

from __future__ import annotations

import warnings

import torch

from avss_dist.measure.kernels.base import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """Return the fastest backend for a device.

    CUDA without NVRTC falls back to torch operations with a warning. ROCm and other devices always use them.
    """
    if device.type == "cpu":
        from avss_dist.measure.kernels.cpu import CpuKernels

        return CpuKernels()
    from avss_dist.measure.kernels.generic import TorchKernels

    if device.type == "cuda" and torch.version.hip is None:
        from avss_dist.measure.kernels.cuda.backend import CudaKernels, NotCompiled
        from avss_dist.measure.kernels.cuda.device import launcher_of

        try:
            return CudaKernels(launcher_of(device))
        except NotCompiled as error:
            warnings.warn(f"torch counts on {device}, which is slower: {error}.", RuntimeWarning, stacklevel=2)
    return TorchKernels()
