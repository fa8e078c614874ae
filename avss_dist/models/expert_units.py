"""Units of routed experts: the inputs of their down projections.

The output of the fused experts of a layer is linear in their down projections: for a token, the sum over its experts of
the gate times the units of the expert times its down projection. Gated units are read without knowing the family, by
calling the experts with parts of the identity in place of the down projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from avss_dist.models.experts import routing_of
from avss_dist.models.patching import replaced_parameters


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

    def gated_units(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the units of the experts times their gates, [tokens, experts, units]; 0 for experts not chosen.

        Args:
            args, kwargs: arguments of a call of the experts.
        """
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        routing = routing_of(given)
        assert routing is not None
        weight = self.module.get_parameter(self.WEIGHT)
        number, units, outputs = self.as_rows(weight).shape
        gated = routing.hidden.new_zeros(len(routing.hidden), number, units)
        tokens = torch.arange(len(gated), device=gated.device)
        for start in range(0, units, outputs):
            width = min(outputs, units - start)
            part = torch.zeros(units, outputs, dtype=weight.dtype, device=weight.device)
            part[start : start + width, :width].fill_diagonal_(1)
            with self._replaced(part):
                for slot in range(routing.index.shape[1]):
                    index, gates = (tensor[:, slot : slot + 1] for tensor in (routing.index, routing.gates))
                    output = self._call(args, kwargs, {id(routing.index): index, id(routing.gates): gates})
                    gated[tokens, index[:, 0], start : start + width] += output[:, :width]
        return gated

    def is_linear(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Tensor, tolerance: float) -> bool:
        """Whether the output of a call is that of the down projections and their biases applied to `gated_units`.

        Args:
            args, kwargs, output: arguments and output of a call of the experts.
            tolerance: largest difference, relative to the norm of the output.
        """
        rows = self.as_rows(self.module.get_parameter(self.WEIGHT))
        from_units = self.gated_units(args, kwargs).flatten(1).float() @ rows.flatten(0, 1).float()
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
        forward = getattr(self.module, "_old_forward", self.module.forward)  # accelerate's wrapper loads weights anew
        positional = [replaced.get(id(value), value) for value in args]
        output = forward(*positional, **{name: replaced.get(id(value), value) for name, value in kwargs.items()})
        return output.reshape(-1, output.shape[-1])


def find_down_projections(module: nn.Module) -> DownProjections | None:
    """Return the down projections of fused experts, which may be on the meta device; None if they are not known.

    They are known where they are plain numbers in the parameter that all families of transformers name alike.
    """
    weight = module._parameters.get(DownProjections.WEIGHT)
    if weight is None or not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return None
    if len(getattr(weight, "ds_shape", weight.shape)) != 3:
        return None
    return DownProjections(module, transposed=bool(getattr(module, "is_transposed", False)))
