"""Parts of a model whose ranks split matrices: heads, the units that a rank sees at a site, and their exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from avss_dist.models.layers import Layer, Tap, first_tensor, probe_tokens
from avss_dist.models.loading import Forward
from avss_dist.partition.group import all_gather, exchange_units_for_rows

Probe = dict[tuple[int, str], torch.Tensor]
"""Tensors of a pass, by layer and site."""
_HEADS = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")


def head_count(config: Any) -> tuple[str, int] | None:
    """Return the attribute of a configuration with the number of heads that have keys of their own, and its value."""
    for name in _HEADS:
        try:
            heads = getattr(config, name, None)
        except RuntimeError:  # it differs from layer to layer
            continue
        if isinstance(heads, int):
            return name, heads
    return None


def whole_norms(matrix: torch.Tensor, order: int) -> torch.Tensor:
    """Return the vector norms of a matrix, or of each of a stack of matrices, float64. Ranks may have parts of it."""
    if not hasattr(matrix, "to_local"):
        return _norms(matrix, order)
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    assert isinstance(matrix, DTensor)
    dims = [getattr(placement, "dim", None) for placement in matrix.placements]
    placements = [
        Replicate() if dim is None else Shard(0) if dim % matrix.dim() < matrix.dim() - 2 else Partial() for dim in dims
    ]
    powers = _norms(matrix.to_local(), order) ** order
    return DTensor.from_local(powers, matrix.device_mesh, placements, run_check=False).full_tensor() ** (1 / order)


def _norms(matrix: torch.Tensor, order: int) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix, order, dim=(-2, -1), dtype=torch.float64)


def probe(run: Forward, layers: Sequence[Layer], device: torch.device) -> Probe:
    """Return the tensor of each site in a pass over ``PROBE_SHAPE`` tokens; the last call of a shared module."""
    tensors: Probe = {}

    def keep(key: tuple[int, str], value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is not None:
            tensors[key] = tensor.detach().clone()

    handles: list[Any] = []
    try:
        for layer in layers:
            for site, tap in {"block": Tap(layer.module, "output", layer.axes), **layer.taps}.items():
                key = layer.index, site
                if tap.reads == "input":
                    hook = lambda _m, args, kwargs, key=key: keep(key, (*args, *kwargs.values()))  # noqa: E731
                    handles.append(tap.module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(tap.module.register_forward_hook(lambda _m, _a, out, key=key: keep(key, out)))
        with torch.no_grad():
            run(probe_tokens(device), None)
    finally:
        for handle in handles:
            handle.remove()
    return tensors


def exchange_for(part: torch.Tensor, width: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the function that exchanges parts of ``width`` units; None where every rank has all of them."""
    widths = [int(n) for n in all_gather(part.shape[-1], part.device)]
    if sum(widths) != width or len(widths) == 1:
        return None
    return partial(exchange_units_for_rows, widths=widths)
