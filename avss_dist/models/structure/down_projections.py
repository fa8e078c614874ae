"""Down projections of routed experts, and the units that they read.

The output of the fused experts of a layer is linear in their down projections: for a token, the sum over its experts of
the gate times the units of the expert times its down projection. Units are read without knowing the family, by calling
the experts with parts of the identity in place of the down projections, and with gates of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from avss_dist.models.forward import Arguments, Change, Keywords, ReplaceParameter, changing
from avss_dist.models.structure.layers import Routing, routing_of, tensors_of, with_replaced


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
        if self.transposed:
            return weight
        return weight.transpose(1, 2)

    def routing(self, args: Arguments, kwargs: Keywords) -> Routing:
        """Return the routing among the arguments of a call of the experts."""
        routing = routing_of(tensors_of(args, kwargs))
        assert routing is not None
        return routing

    def units(self, args: Arguments, kwargs: Keywords) -> Routing:
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
            # An expert with a part of the identity as its down projection returns some of its units.
            read = min(outputs, width - start)
            part = torch.zeros(width, outputs, dtype=weight.dtype, device=weight.device)
            part[start : start + read, :read].fill_diagonal_(1)
            with self._replaced(part):
                for slot in range(chosen):
                    index = routing.index[:, slot : slot + 1]
                    gates = routing.gates[:, slot : slot + 1]
                    only = {id(routing.index): index, id(routing.gates): torch.ones_like(gates)}
                    output = self._call(args, kwargs, only)
                    units[:, slot, start : start + read] = output[:, :read]
        return replace(routing, hidden=units)

    def is_linear(self, args: Arguments, kwargs: Keywords, output: torch.Tensor, tolerance: float) -> bool:
        """Whether the output of a call is that of the down projections and their biases applied to `units`.

        Args:
            args, kwargs, output: arguments and output of a call of the experts.
            tolerance: largest difference, relative to the norm of the output.
        """
        rows = self.as_rows(self.module.get_parameter(self.WEIGHT))
        chosen = self.units(args, kwargs)
        gated = chosen.hidden.float() * chosen.gates.unsqueeze(-1).float()
        from_units = gated.new_zeros(len(gated), rows.shape[-1])
        for token, experts in enumerate(chosen.index.tolist()):
            for units, expert in zip(gated[token], experts, strict=True):
                # One matrix at a time is in memory in float32.
                from_units[token] += units @ rows[expert].float()
        with self._replaced(torch.zeros_like(rows[0]), keep_bias=True):
            from_bias = self._call(args, kwargs, {}).float()
        difference = from_units + from_bias - output.reshape(from_units.shape).float()
        return bool(difference.norm() <= tolerance * output.float().norm())

    def _replaced(self, rows: torch.Tensor, *, keep_bias: bool = False) -> AbstractContextManager[None]:
        """Return a context in which every expert has the down projection ``rows``, [units, outputs], and no bias."""
        matrix = rows if self.transposed else rows.T
        weight = self.module.get_parameter(self.WEIGHT)
        changes: list[Change] = [
            ReplaceParameter(self.module, self.WEIGHT, matrix.expand(weight.shape).contiguous()),
        ]
        bias = self.module._parameters.get(self.BIAS)
        if bias is not None and not keep_bias:
            changes.append(ReplaceParameter(self.module, self.BIAS, torch.zeros_like(bias)))
        return changing(changes)

    def _call(self, args: Arguments, kwargs: Keywords, replaced: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return the output, [tokens, outputs], of the experts without hooks, with other arguments, by their id."""
        forward = getattr(self.module, "_old_forward", self.module.forward)  # Accelerate's would load weights anew.
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
