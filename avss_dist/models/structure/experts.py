"""Routed experts of a layer: their modules and numbers, and why some cannot be removed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from avss_dist.core.errors import ModelError
from avss_dist.core.text import count_of

COUNT = "num_experts"
"""Attribute of routers and of fused experts with the number of experts."""
ROUTER_TENSORS = ("weight", "bias", "e_score_correction_bias", "expert_bias")
"""Tensors of a router, or of the module around it, that have a row for each expert."""
_OTHER_COUNT = re.compile(r"^(n|num)_.*experts$|^out_features$")
_EXPERTS = re.compile(r"(^|\.)experts\b|(?<!Shared)Experts$")
COMPARED = 2
"""Number of experts of each group that a router with groups compares."""
ELSEWHERE = "Remove whole layers of this model."


@dataclass(frozen=True)
class RoutedExperts:
    """Modules of the routed experts of a layer, found by their attributes and shapes.

    Attributes:
        block: path, below the layer, of the module around router and experts.
        router, experts: paths of the router and of the fused experts.
        number: number of experts.
        top_k: number of experts that a token is sent to.
        groups: number of groups that the router divides the experts into, in their order; 1 without groups.
        chosen_groups: number of groups that the experts of a token are chosen from.
    """

    block: str
    router: str
    experts: str
    number: int
    top_k: int
    groups: int = 1
    chosen_groups: int = 1

    def has_row_for_each(self, path: str) -> bool:
        """Whether a tensor of the layer, by its path, has a row for each expert."""
        if path.startswith(f"{self.experts}."):
            return True
        module, _, name = path.rpartition(".")
        return name in ROUTER_TENSORS and module in (self.router, self.block)

    def shape_without(self, path: str, shape: tuple[int, ...], removed: int) -> tuple[int, ...]:
        """Return the shape of a tensor of the layer, by its path, once some experts are removed."""
        if shape[:1] == (self.number,) and self.has_row_for_each(path):
            return (self.number - removed, *shape[1:])
        return shape

    def require_remaining(self, layer: int, removed: Collection[int]) -> None:
        """Refuse a removal after which the router could not choose.

        Args:
            layer: index of the layer, for the message.
            removed: indices of the removed experts.

        Raises:
            ModelError: there is no such expert, fewer than ``top_k`` remain, or groups would differ in size.
        """
        if wrong := [expert for expert in removed if expert >= self.number]:
            raise ModelError(f"There is no expert {wrong[0]} in layer {layer}: it has {self.number}, from 0.")
        remaining = self.number - len(set(removed))
        if remaining < self.top_k:
            raise ModelError(
                f"{remaining} of {self.number} experts would remain in layer {layer}, and its router sends each token "
                f"to {self.top_k}.",
                "Remove fewer.",
            )
        if self.groups > 1:
            self._require_remaining_groups(layer, set(removed))

    def _require_remaining_groups(self, layer: int, removed: set[int]) -> None:
        """Refuse a removal after which groups would differ in size, or be too small for the router.

        Args: see `require_remaining`.

        Raises:
            ModelError: the router could not choose.
        """
        size = self.number // self.groups
        lost = Counter(expert // size for expert in removed)
        sizes = [size - lost[group] for group in range(self.groups)]
        smallest = min(sizes)
        largest = max(sizes)
        if smallest != largest:
            raise ModelError(
                f"The router of layer {layer} chooses among {self.groups} groups of {size} experts each, of which "
                f"{smallest} to {largest} would remain. Groups must have equal sizes.",
                "Remove as many experts of each group; avss plan does so if it can read the checkpoint's config.json.",
            )
        if smallest < COMPARED or smallest * self.chosen_groups < self.top_k:
            raise ModelError(
                f"{count_of(smallest, 'expert')} would remain in each of the {self.groups} groups of layer {layer}. "
                f"Its router compares two of each, and chooses {self.top_k} from {self.chosen_groups} groups.",
                "Remove fewer.",
            )


def find_routed_experts(layer: nn.Module) -> RoutedExperts | None:
    """Return the routed experts of a layer, or None if it has none.

    The layer may be on the meta device.

    Raises:
        ModelError: its experts cannot be removed; the message has the reason.
    """
    modules = dict(layer.named_modules())
    fused = [path for path, module in modules.items() if _is_fused(module)]
    if len(fused) > 1:
        raise _unsupported(f"it has {len(fused)} modules of experts: {', '.join(fused)}")
    if not fused:
        for path, module in modules.items():
            if _EXPERTS.search(f"{path} {type(module).__name__}"):
                raise _unsupported(f"'{path}' is not one module with a matrix for each of its `{COUNT}` experts")
        return None
    path = fused[0]
    block = path.rpartition(".")[0]
    number = _stacked(modules[path])[0]
    name, router = _find_router(modules[block], modules[path])
    if reason := _obstacle(router, modules[block], number):
        raise _unsupported(reason)
    groups = _groups(router, "num_group", "n_group", "num_groups")
    chosen_groups = 1
    if groups > 1:
        chosen_groups = _groups(router, "topk_group", "topk_groups")
    return RoutedExperts(
        block=block,
        router=f"{block}.{name}".lstrip("."),
        experts=path,
        number=number,
        top_k=int(router.top_k),
        groups=groups,
        chosen_groups=chosen_groups,
    )


def _find_router(block: nn.Module, experts: nn.Module) -> tuple[str, Any]:
    """Return the name and the module of the router beside the experts of a block.

    Raises:
        ModelError: there is no router, or more than one.
    """
    beside = {name: module for name, module in block.named_children() if module is not experts}
    routers = [name for name, module in beside.items() if _is_router(module)]
    if len(routers) == 1:
        return routers[0], beside[routers[0]]
    reason = f"no module beside its experts has `{COUNT}`, `top_k` and one weight row for each expert"
    kinds = [type(module).__name__ for module in beside.values()]
    if kinds:
        reason += f" (it has {', '.join(kinds)})"
    raise _unsupported(reason)


def _unsupported(reason: str) -> ModelError:
    return ModelError(f"its routed experts cannot be removed: {reason}", ELSEWHERE)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts of a layer, with one matrix for each.

    Where ranks have some of the experts each, its count is that of a rank.
    """
    numbers = _stacked(module)
    count = getattr(module, COUNT, None)
    if not numbers or type(count) is not int:
        return False
    is_split = any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
    if is_split:
        count = numbers[0]
    return all(number == count for number in numbers)


def _stacked(module: nn.Module) -> list[int]:
    """Return the number of matrices of each parameter that is a stack of them."""
    shapes = [_shape(parameter) for parameter in module._parameters.values() if parameter is not None]
    return [shape[0] for shape in shapes if len(shape) >= 3]


def _is_router(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or type(getattr(module, "top_k", None)) is not int:
        return False
    shape = _shape(weight)
    return len(shape) == 2 and shape[0] == getattr(module, COUNT, None)


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, of which ZeRO-3 may hold a part here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _obstacle(router: nn.Module, block: nn.Module, number: int) -> str | None:
    """Return why a router cannot choose among fewer experts, or None."""
    kind = type(router).__name__
    if getattr(router, COUNT) != number:
        return f"{kind} chooses among {getattr(router, COUNT)} experts, of which {number} have weights"
    for name, _ in [*router.named_parameters(), *router.named_buffers()]:
        if name not in ROUTER_TENSORS:
            return f"{kind} has a tensor '{name}', whose meaning for an expert is unknown"
    for name in vars(router):
        if _OTHER_COUNT.match(name) and name != COUNT:
            return f"{kind} also counts experts in `{name}`"
    for name in (*block._parameters, *block._buffers):
        if name not in ROUTER_TENSORS:
            return f"{type(block).__name__} has a tensor '{name}' of its own"
    return None


def _groups(router: nn.Module, *names: str) -> int:
    for name in names:
        value = getattr(router, name, None)
        if isinstance(value, int):
            return value
    return 1


def require_routed_experts(layer: nn.Module, index: int, removed: Collection[int]) -> RoutedExperts:
    """Return the routed experts of a layer that loses some.

    Args:
        layer: the module, which may be on the meta device.
        index: its index, for messages.
        removed: indices of the removed experts.

    Raises:
        ModelError: an expert cannot be removed; the message has the reason.
    """
    try:
        routed = find_routed_experts(layer)
    except ModelError as error:
        raise ModelError(f"Layer {index} ({type(layer).__name__}): {error.message}.", error.hint) from error
    if routed is None:
        raise ModelError(
            f"Layer {index} ({type(layer).__name__}) has no routed experts.", "Is it a plan for another model?"
        )
    routed.require_remaining(index, removed)
    return routed
