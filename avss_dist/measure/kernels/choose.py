"""The fastest kernels for a device."""

from __future__ import annotations

import torch

from avss_dist.measure.kernels.base import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """The fastest backend for a device."""
    if device.type == "cpu":
        from avss_dist.measure.kernels.cpu import CpuKernels

        return CpuKernels()
    from avss_dist.measure.kernels.generic import TorchKernels

    return TorchKernels()
