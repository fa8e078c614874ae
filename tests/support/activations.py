"""Memory of the activations that a backward pass reads."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()


def peak_of_saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the largest number of bytes that graphs keep at a time, without parameters and buffers of a model."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    users: Counter[int] = Counter()
    peak = 0

    def release(storage: int) -> None:
        users[storage] -= 1
        if not users[storage]:
            del sizes[storage]

    def pack(tensor: torch.Tensor) -> Saved:
        nonlocal peak
        saved = Saved(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            users[storage.data_ptr()] += 1
            sizes[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(saved, release, storage.data_ptr())
            peak = max(peak, sum(sizes.values()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        run()
    return peak
