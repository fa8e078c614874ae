"""What makes the host wait for a device, or a device for the host."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "index.Tensor", "equal.default", "unique")
CREATING = ("empty", "zeros", "full", "clone", "stack", "cat", "add", "sub")


class NoWaiting(TorchDispatchMode):
    """Inside, an operation that waits for its result fails. Tensors on ``meta`` stand for those on a device.

    Attributes:
        copies: the operations between host and device, in order.
        allocations: the operations that made tensors of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.allocations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        for op in SYNCHRONIZING:
            assert f"aten.{op}" not in f"aten.{name}", f"{name} waits for its result"
        out = func(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        scalars = all(t.device.type != "cpu" or t.dim() == 0 for t in tensors) and "copy" not in name
        if len({t.device.type for t in tensors}) > 1 and not scalars:
            self.copies.append(name)
        if name.split(".")[0] in CREATING:
            self.allocations.append(name)
        return out
