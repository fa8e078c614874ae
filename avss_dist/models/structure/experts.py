"""Routed experts of a layer: their removal from an open model, and their units.

Inside its ``forward`` a router holds the rows of the remaining experts alone, so that it computes exactly what the
router of a pruned checkpoint does. The indices that it returns are those of the whole model, and the logits of removed
experts are minus infinity.

Units of routed experts are the inputs of their down projections. The output of the fused experts of a layer is linear
in their down projections: for a token, the sum over its experts of the gate times the units of the expert times its
down projection. Units are read without knowing the family, by calling the experts with parts of the identity in place
of the down projections, and with gates of 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import Removal, experts_by_layer
from avss_dist.core.process import bound
from avss_dist.core.text import count_of
from avss_dist.models.forward import around, replace_tensor, replaced_attributes, replaced_parameters
from avss_dist.models.structure.layers import Layer, Routing, first_tensor, routing_of, with_replaced

COUNT = "num_experts"
"""Attribute of routers and of fused experts with the number of experts."""
ROUTER_TENSORS = ("weight", "bias", "e_score_correction_bias", "expert_bias")
"""Tensors of a router, or of the module around it, that have a row for each expert."""
_OTHER_COUNT = re.compile(r"^(n|num)_.*experts$|^out_features$")
_EXPERTS = re.compile(r"(^|\.)experts\b|(?<!Shared)Experts$")
_ELSEWHERE = "Remove whole layers of this model."
_Removed = Mapping[nn.Module, frozenset[int]]  # by router


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
        of_router = {f"{module}.{name}".lstrip(".") for module in (self.router, self.block) for name in ROUTER_TENSORS}
        return path.startswith(f"{self.experts}.") or path in of_router

    def shape_without(self, path: str, shape: tuple[int, ...], removed: int) -> tuple[int, ...]:
        """Return the shape of a tensor of the layer, by its path, once some experts are removed."""
        has_rows = shape[:1] == (self.number,) and self.has_row_for_each(path)
        return (self.number - removed, *shape[1:]) if has_rows else shape

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
        if self.groups == 1:
            return
        size = self.number // self.groups
        lost = Counter(expert // size for expert in set(removed))
        sizes = {size - lost[group] for group in range(self.groups)}
        if len(sizes) > 1:
            raise ModelError(
                f"The router of layer {layer} chooses among {self.groups} groups of {size} experts each, of which "
                f"{min(sizes)} to {max(sizes)} would remain. Groups must have equal sizes.",
                "Remove as many experts of each group; avss plan does so if it can read the checkpoint's config.json.",
            )
        if min(sizes) < 2 or min(sizes) * self.chosen_groups < self.top_k:
            raise ModelError(
                f"{count_of(min(sizes), 'expert')} would remain in each of the {self.groups} groups of layer {layer}. "
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
    if not fused:
        if unknown := [path for path, module in modules.items() if _EXPERTS.search(f"{path} {type(module).__name__}")]:
            raise _unsupported(f"'{unknown[0]}' is not one module with a matrix for each of its `{COUNT}` experts")
        return None
    if len(fused) > 1:
        raise _unsupported(f"it has {len(fused)} modules of experts: {', '.join(fused)}")
    (path,) = fused
    block, number = path.rpartition(".")[0], _stacked(modules[path])[0]
    beside = {name: module for name, module in modules[block].named_children() if module is not modules[path]}
    routers = [name for name, module in beside.items() if _is_router(module)]
    if len(routers) != 1:
        kinds = ", ".join(type(module).__name__ for module in beside.values())
        raise _unsupported(
            f"no module beside its experts has `{COUNT}`, `top_k` and one weight row for each expert"
            f"{kinds and f' (it has {kinds})'}"
        )
    router = beside[routers[0]]
    if reason := _obstacle(router, modules[block], number):
        raise _unsupported(reason)
    groups = _groups(router, "num_group", "n_group", "num_groups")
    return RoutedExperts(
        block=block,
        router=f"{block}.{routers[0]}".lstrip("."),
        experts=path,
        number=number,
        top_k=int(router.top_k),
        groups=groups,
        chosen_groups=_groups(router, "topk_group", "topk_groups") if groups > 1 else 1,
    )


def _unsupported(reason: str) -> ModelError:
    return ModelError(f"its routed experts cannot be removed: {reason}", _ELSEWHERE)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts of a layer, with one matrix for each.

    Where ranks have some of the experts each, its count is that of a rank.
    """
    numbers, count = _stacked(module), getattr(module, COUNT, None)
    split = any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
    return bool(numbers) and type(count) is int and set(numbers) == {numbers[0] if split else count}


def _stacked(module: nn.Module) -> list[int]:
    """Return the number of matrices of each parameter that is a stack of them."""
    shapes = [_shape(parameter) for parameter in module._parameters.values() if parameter is not None]
    return [shape[0] for shape in shapes if len(shape) >= 3]


def _is_router(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    shape = () if weight is None else _shape(weight)
    return len(shape) == 2 and type(getattr(module, "top_k", None)) is int and shape[0] == getattr(module, COUNT, None)


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, of which ZeRO-3 may hold a part here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _obstacle(router: nn.Module, block: nn.Module, number: int) -> str | None:
    """Return why a router cannot choose among fewer experts, or None."""
    kind = type(router).__name__
    if getattr(router, COUNT) != number:
        return f"{kind} chooses among {getattr(router, COUNT)} experts, of which {number} have weights"
    tensors = [*router.named_parameters(), *router.named_buffers()]
    if other := [name for name, _ in tensors if name not in ROUTER_TENSORS]:
        return f"{kind} has a tensor '{other[0]}', whose meaning for an expert is unknown"
    counts = [name for name in vars(router) if _OTHER_COUNT.match(name) and name != COUNT]
    if counts:
        return f"{kind} also counts experts in `{counts[0]}`"
    around = [name for name in (*block._parameters, *block._buffers) if name not in ROUTER_TENSORS]
    return f"{type(block).__name__} has a tensor '{around[0]}' of its own" if around else None


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


def require_experts(layers: Sequence[Layer], removed: Collection[Removal]) -> None:
    """Refuse experts that the model does not have, or that cannot be removed.

    Raises:
        ModelError: an expert cannot be removed; the message names the layer, and has the reason.
    """
    for index, experts in experts_by_layer(removed).items():
        layer = layers[index]
        routed, called = require_routed_experts(layer.module, index, experts), layer.experts
        if called is None or called.module is not layer.module.get_submodule(routed.experts):
            raise ModelError(
                f"Layer {index} calls its routed experts in a way that is not seen, so none can be removed.",
                _ELSEWHERE,
            )


_REMOVED: ContextVar[_Removed] = ContextVar("removed experts", default=MappingProxyType({}))


@contextmanager
def without_experts(layers: Sequence[Layer], removed: Collection[Removal]) -> Iterator[None]:
    """Have routers choose among the remaining experts inside the context.

    Interleaved passes are not affected.

    Args:
        layers: layers of the model, for which `require_experts` passes.
    """
    before = _REMOVED.get()
    routers = dict(before)
    choices = {}
    for index, experts in experts_by_layer(removed).items():
        routed = require_routed_experts(layers[index].module, index, experts)
        router = layers[index].module.get_submodule(routed.router)
        routers[router] = before.get(router, frozenset()) | {*experts}
        if router not in before:
            choices[router] = partial(_choose, router, routed.number)
    with around(choices, weights=True), bound(_REMOVED, routers):
        yield


def _choose(router: nn.Module, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a router of ``number`` experts, as an action of `around`, so that it chooses among the remaining ones.

    It holds their rows alone while it runs. Instance attributes hide its tensors.
    """
    weight: Any = router.weight
    keep = torch.tensor([e for e in range(number) if e not in _REMOVED.get()[router]], device=weight.device)

    def shorten(value: Any) -> Any:
        """Return an argument without the removed experts, if it is a vector with an element for each."""
        is_vector = isinstance(value, torch.Tensor) and value.shape == (number,)
        return value.index_select(0, keep) if is_vector else value

    tensors = {name: getattr(router, name, None) for name in ROUTER_TENSORS}
    rows = {name: t.index_select(0, keep) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    with replaced_attributes([(router, {**rows, COUNT: len(keep)})]):
        output = forward(*map(shorten, args), **{name: shorten(value) for name, value in kwargs.items()})
    logits = first_tensor(output)
    if logits is None or logits.shape[-1] != len(keep):
        raise ModelError(f"A {type(router).__name__} returns no logits of its experts.", _ELSEWHERE)
    whole = logits.new_full((*logits.shape[:-1], number), -torch.inf).index_copy(-1, keep, logits)
    index = next((t for t in output if isinstance(t, torch.Tensor) and not t.is_floating_point()), None)
    if index is None:
        raise ModelError(f"A {type(router).__name__} does not choose experts itself.", _ELSEWHERE)
    return replace_tensor(replace_tensor(output, logits, whole), index, keep[index].to(index.dtype))


@dataclass(frozen=True)
class DownProjections:
    """Down projections of the fused experts of a layer, stacked in one parameter.

    Attributes:
        module: the fused experts.
        transposed: whether the parameter is [experts, units, outputs], not [experts, outputs, units].
    """

    module: nn.Module
    transposed: bool

    WEIGHT: ClassVar[str] = "down_proj"
    BIAS: ClassVar[str] = "down_proj_bias"

    def as_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the stacked parameter, or its values, as [experts, units, outputs]."""
        return weight if self.transposed else weight.transpose(1, 2)

    def routing(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routing:
        """Return the routing among the arguments of a call of the experts."""
        routing = routing_of([value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)])
        assert routing is not None
        return routing

    def units(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routing:
        """Return a routing whose hidden units are the inputs of the down projections of a token's experts.

        Args:
            args, kwargs: arguments of a call of the experts.
        """
        routing = self.routing(args, kwargs)
        tokens, chosen = routing.index.shape
        weight = self.module.get_parameter(self.WEIGHT)
        _, width, outputs = self.as_rows(weight).shape
        units = routing.hidden.new_empty(tokens, chosen, width)
        for start in range(0, width, outputs):
            read = min(outputs, width - start)
            part = torch.zeros(width, outputs, dtype=weight.dtype, device=weight.device)
            part[start : start + read, :read].fill_diagonal_(1)
            with self._replaced(part):
                for slot in range(chosen):
                    index, gates = (tensor[:, slot : slot + 1] for tensor in (routing.index, routing.gates))
                    only = {id(routing.index): index, id(routing.gates): torch.ones_like(gates)}
                    units[:, slot, start : start + read] = self._call(args, kwargs, only)[:, :read]
        return replace(routing, hidden=units)

    def is_linear(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Tensor, tolerance: float) -> bool:
        """Whether the output of a call is that of the down projections and their biases applied to `units`.

        Args:
            args, kwargs, output: arguments and output of a call of the experts.
            tolerance: largest difference, relative to the norm of the output.
        """
        rows, chosen = self.as_rows(self.module.get_parameter(self.WEIGHT)), self.units(args, kwargs)
        gated = chosen.hidden.float() * chosen.gates.unsqueeze(-1).float()
        from_units = gated.new_zeros(len(gated), rows.shape[-1])
        for token, experts in enumerate(chosen.index.tolist()):  # one matrix at a time in float32
            for units, expert in zip(gated[token], experts, strict=True):
                from_units[token] += units @ rows[expert].float()
        with self._replaced(torch.zeros_like(rows[0]), keep_bias=True):
            from_bias = self._call(args, kwargs, {}).float()
        difference = from_units + from_bias - output.reshape(from_units.shape).float()
        return bool(difference.norm() <= tolerance * output.float().norm())

    def _replaced(self, rows: torch.Tensor, *, keep_bias: bool = False) -> AbstractContextManager[None]:
        """Return a context in which every expert has the down projection ``rows``, [units, outputs], and no bias."""
        matrix = rows if self.transposed else rows.T
        weight = self.module.get_parameter(self.WEIGHT)
        values = {weight: matrix.expand(weight.shape).contiguous()}
        bias = self.module._parameters.get(self.BIAS)
        if bias is not None and not keep_bias:
            values[bias] = torch.zeros_like(bias)
        return replaced_parameters(values)

    def _call(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], replaced: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Return the output, [tokens, outputs], of the experts without hooks, with other arguments, by their id."""
        forward = getattr(self.module, "_old_forward", self.module.forward)  # Accelerate's would load weights anew
        positional, keywords = with_replaced(args, kwargs, replaced)
        output = forward(*positional, **keywords)
        return output.reshape(-1, output.shape[-1])


def find_down_projections(module: nn.Module) -> DownProjections | None:
    """Return the down projections of fused experts, or None if they are not known.

    The module may be on the meta device. They are known where they are plain numbers in the parameter that all families
    of transformers name alike.
    """
    weight = module._parameters.get(DownProjections.WEIGHT)
    if weight is None or not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return None
    if len(getattr(weight, "ds_shape", weight.shape)) != 3:
        return None
    return DownProjections(module, transposed=bool(getattr(module, "is_transposed", False)))
