"""Layers and the tensors to read in them: what they are, which module lists may hold them, how their axes lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from avss_dist.errors import ModelError, nearest
from avss_dist.models.experts import Experts

PROBE_SHAPE = (2, 12)  # rows and tokens differ, so that axes can be distinguished


@dataclass(frozen=True)
class Tap:
    """A tensor to read: what ``module`` takes in or gives out, and how its axes lie."""

    module: nn.Module
    reads: str  # "input" or "output"
    axes: str
    exchange: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Where ranks have parts of the units: from [rows, tokens, part] to this rank's rows of all units; collective."""


@dataclass(frozen=True)
class Projection:
    """A linear map of a layer whose input is a site.

    Attributes:
        path: of its module, below the layer.
        site: its input; several maps may read one.
        outputs, inputs: units that it gives and takes, of the whole map.
        axes: of its input, see `axes_of`.
        gates: it is the module that gates an MLP, and what it gives becomes zero: its units spare the rows of one map
            and the columns of another, ``outputs`` weights each (CATS, arXiv 2404.08763).
    """

    path: str
    module: nn.Module
    site: str
    outputs: int
    inputs: int
    axes: str
    gates: bool = False


@dataclass(frozen=True)
class Layer:
    """One transformer block: the ``call``-th use of ``module`` in a forward pass (models may share a block)."""

    index: int
    name: str
    module: nn.Module
    call: int
    axes: str
    taps: Mapping[str, Tap]
    projections: tuple[Projection, ...] = ()
    gate: Projection | None = None
    experts: Experts | None = None

    @property
    def maps(self) -> tuple[Projection, ...]:
        """All that can be made sparse: its linear maps, and what gates its MLP."""
        return (*self.projections, *([self.gate] if self.gate else []))


@dataclass(frozen=True)
class Structure:
    """The layers of a model in the order of their calls, and what a user should know about them."""

    layers: tuple[Layer, ...]
    notes: tuple[str, ...]


def describe_projections(layers: Sequence[Layer]) -> str:
    """The linear maps of layers, as the column ``projections`` of ``runs`` has them."""
    found = [[layer.index, p.path, p.site, p.outputs, p.inputs] for layer in layers for p in layer.projections]
    return json.dumps(found, separators=(",", ":"))


def layer_lists(model: nn.Module, num_layers: int | None, path: str | None = None) -> dict[str, nn.ModuleList]:
    """Module lists that may be the layers, by path: the one at ``path``, or the shallowest of the config's layer count.

    Raises:
        ModelError: there is none; the message names what was seen.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    if path is not None:
        if path not in lists:
            raise ModelError(f"{type(model).__name__} has no layer list '{path}'.", nearest(path, lists))
        return {path: lists[path]}
    blocks = {name: module for name, module in lists.items() if _holds_blocks(module)}
    wanted = {name: module for name, module in blocks.items() if len(module) == num_layers} or blocks
    if not wanted:
        raise not_found(model, num_layers, lists, "no module list holds whole blocks")
    return _shallowest(wanted)


def not_found(model: nn.Module, num_layers: int | None, lists: Mapping[str, nn.ModuleList], why: str) -> ModelError:
    seen = ", ".join(f"{name} ({len(module)} x {type(module[0]).__name__})" for name, module in lists.items())
    return ModelError(
        f"The {num_layers or ''} layers of {type(model).__name__} could not be found: {why}.".replace("  ", " "),
        f"Seen: {seen or 'no module list'}. Name one with `layers`.",
    )


def _holds_blocks(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(
        not isinstance(m, (nn.ModuleList, nn.Sequential)) and any(is_linear(c) for c in m.modules() if c is not m)
        for m in modules
    )


def _shallowest(lists: Mapping[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    depth = min((name.count(".") for name in lists), default=0)
    return {name: module for name, module in lists.items() if name.count(".") == depth}


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module as a whole; of those that DeepSpeed ZeRO-3 has partitioned, ``numel`` is 0."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def is_linear(module: nn.Module) -> bool:
    """A map with a two-dimensional weight: Linear, GPT-2's Conv1D, quantized linears."""
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or kind == "Conv1D" or ("Linear" in kind and hasattr(module, "weight"))


def linear_sizes(module: Any) -> tuple[int, int]:
    """Return how many units a linear map takes and gives; GPT-2's Conv1D has its weight as [inputs, outputs]."""
    rows, columns = module.weight.shape if module.weight.dim() == 2 else (0, 0)
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def first_tensor(value: Any) -> torch.Tensor | None:
    """The hidden states that a module returned or was given: a tensor, or the first in a tuple or ModelOutput."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() and value.dim() >= 2 else None
    if isinstance(value, Mapping):
        value = (value.get("hidden_states"), *value.values())
    parts = value if isinstance(value, (tuple, list)) else ()
    return next((part for part in parts if first_tensor(part) is not None and isinstance(part, torch.Tensor)), None)


def input_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The hidden states that a module was called with."""
    named = kwargs.get("hidden_states")
    return first_tensor(named) if named is not None else first_tensor((*args, *kwargs.values()))


def axes_of(shape: Sequence[int], rows: int, tokens: int) -> str:
    """How the axes of a tensor lie, by its shape; ``rows`` where it does not say."""
    if len(shape) == 2 and shape[0] == rows * tokens:
        return "flat"
    if len(shape) == 3 and tuple(shape[:2]) == (tokens, rows):
        return "tokens first"
    if len(shape) == 4 and tuple(shape[:2]) != (rows, tokens) and tuple(shape[1:3]) == (rows, tokens):
        return "streams first"
    return "rows"


def as_rows(x: torch.Tensor, axes: str, rows: int, tokens: int) -> torch.Tensor | None:
    """The tensor as contiguous [rows, tokens, units], parallel streams as units; None if it does not fit."""
    if axes == "tokens first":
        x = x.transpose(0, 1)
    elif axes == "streams first":
        x = x.movedim(0, 2)
    elif x.dim() == 2 and x.shape[0] == rows * tokens:
        x = x.reshape(rows, tokens, -1)
    if x.dim() < 3 or tuple(x.shape[:2]) != (rows, tokens):
        return None
    return x.reshape(rows, tokens, -1).contiguous()


@dataclass(frozen=True)
class LayerCall:
    """What a layer was called with."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states."""
        hidden = input_tensor(self.args, self.kwargs)
        assert hidden is not None
        return hidden

    def given(self, instead: torch.Tensor) -> LayerCall:
        """The same call with other hidden states."""
        hidden = self.hidden
        return LayerCall(
            [instead if value is hidden else value for value in self.args],
            {name: instead if value is hidden else value for name, value in self.kwargs.items()},
        )

    def rerun(self, layer: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the layer again: its input, a leaf, and its output."""
        leaf = self.hidden.detach().requires_grad_()
        call = self.given(leaf)
        output = first_tensor(layer(*call.args, **call.kwargs))
        assert output is not None
        return leaf, output
