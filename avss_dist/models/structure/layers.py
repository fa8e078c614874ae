"""Layers of a model, the tensors that are read in them, and the order of the axes of these tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError, nearest
from avss_dist.models.forward import Arguments, Forward, Keywords, Output

MAX_REPRESENTATIVES = 8
"""Number of layers at equal distances in a sample, beside the first and the last of each kind."""
PROBE_SHAPE = (2, 12)
"""Rows and tokens of the pass that probes a model. They differ, so that axes can be distinguished."""


def probe_tokens(device: torch.device | None = None) -> torch.Tensor:
    """Return the tokens by which a model is probed: int64[rows, tokens] of ``PROBE_SHAPE``, all different."""
    return torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=device).reshape(PROBE_SHAPE)


@dataclass(frozen=True)
class Scale:
    """A number by which a layer multiplies or divides the output of a sublayer."""

    number: float
    divides: bool = False

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product or the quotient, rounded as the layer rounds it."""
        if self.divides:
            return x / self.number
        return x * self.number


@dataclass(frozen=True)
class Tap:
    """A tensor to read: the input or the output of ``module``, scaled.

    Attributes:
        reads: ``input`` or ``output``.
        axes: order of the tensor's axes; see `axes_of`.
        scales: what the layer does to the output before it adds it to the residual stream, in order.
    """

    module: nn.Module
    reads: str
    axes: str
    scales: tuple[Scale, ...] = ()
    exchange: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Collective from this rank's units of all rows, [rows, tokens, part], to its rows of all units; or None."""

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input or output ``x`` of the module as it is added to the residual stream."""
        for scale in self.scales:
            x = scale.apply(x)
        return x


@dataclass(frozen=True)
class Projection:
    """A linear map of a layer whose input is a site.

    Attributes:
        path: path of its module, below the layer.
        site: name of its input; several maps may share one.
        outputs, inputs: units of the output and of the input of the whole map.
        axes: order of the axes of its input; see `axes_of`.
    """

    path: str
    module: nn.Module
    site: str
    outputs: int
    inputs: int
    axes: str


@dataclass(frozen=True)
class Experts:
    """Routed experts of a layer.

    Attributes:
        module: the fused experts, called with the tensors of a `Routing`.
        number: number of experts.
        router: the module whose output is [tokens, number]; None if no module has such an output.
        normalized: whether the router's output is probabilities, not logits.
    """

    module: nn.Module
    number: int
    router: nn.Module | None
    normalized: bool


@dataclass(frozen=True)
class Routing:
    """Tensors of a call of the experts.

    Attributes:
        hidden: hidden states, [tokens, units]; or the hidden units of each of a token's experts, [tokens, k, units].
        index: integer [tokens, k], the indices of each token's experts.
        gates: floating [tokens, k], the weights of the experts' outputs.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """One transformer block: the ``call``-th use of ``module`` in a forward pass (models may share a block).

    Attributes:
        form: type of the output where it is hidden states alone, of the input's shape: ``torch.Tensor``, or the type of
            a tuple of one. Such a layer need not run to be skipped. None for other layers and for shared modules.
    """

    index: int
    name: str
    module: nn.Module
    call: int
    axes: str
    taps: Mapping[str, Tap]
    projections: tuple[Projection, ...] = ()
    experts: Experts | None = None
    form: type | None = None

    def __str__(self) -> str:
        return f"Layer {self.index} ({self.name})"


def layer_lists(model: nn.Module, num_layers: int | None, path: str | None = None) -> dict[str, nn.ModuleList]:
    """Return the module lists that may be the layers, by path.

    Args:
        num_layers: the configuration's layer count; lists of this length are preferred.
        path: path of the layer list; None takes the shallowest lists of blocks.

    Raises:
        ModelError: the model has no such list; the message names its module lists.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            lists[name] = module
    if path is not None:
        if path not in lists:
            raise ModelError(f"{type(model).__name__} has no layer list '{path}'.", nearest(path, lists))
        return {path: lists[path]}
    blocks = {name: modules for name, modules in lists.items() if _holds_blocks(modules)}
    as_long_as_told = {name: modules for name, modules in blocks.items() if len(modules) == num_layers}
    candidates = as_long_as_told or blocks
    if not candidates:
        raise layers_not_found(model, num_layers, lists, "no module list holds whole blocks")
    depth = min(name.count(".") for name in candidates)
    return {name: modules for name, modules in candidates.items() if name.count(".") == depth}


def _holds_blocks(modules: nn.ModuleList) -> bool:
    """Whether every module of a list has a linear map below it, and none is a list or a sequence itself."""
    for module in modules:
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            return False
        has_linear = any(is_linear(part) for part in module.modules() if part is not module)
        if not has_linear:
            return False
    return True


def layers_not_found(
    model: nn.Module, num_layers: int | None, lists: Mapping[str, nn.ModuleList], why: str
) -> ModelError:
    """Return the error that the layers of a model were not found, naming the module lists that it has."""
    described = [f"{name} ({len(modules)} x {type(modules[0]).__name__})" for name, modules in lists.items()]
    layers = f"{num_layers} layers" if num_layers else "layers"
    return ModelError(
        f"The {layers} of {type(model).__name__} could not be found: {why}.",
        f"Seen: {', '.join(described) or 'no module list'}. Name one with `layers`.",
    )


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module, before DeepSpeed ZeRO-3 partitions them (``numel`` is 0 then)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: Linear, GPT-2's Conv1D, or a quantized linear."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return True
    return "Linear" in type(module).__name__ and hasattr(module, "weight")


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear map stores its weight as [inputs, outputs], as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def linear_sizes(module: Any) -> tuple[int, int]:
    """Return the units of the input and of the output of a linear map, (0, 0) if its weight is packed."""
    if module.weight.dim() != 2:
        return 0, 0
    rows, columns = module.weight.shape
    if is_transposed(module):
        return rows, columns
    return columns, rows


def first_tensor(value: Output) -> torch.Tensor | None:
    """Return the hidden states in a module's arguments or output: the first tensor of a tuple or ModelOutput."""
    if isinstance(value, torch.Tensor):
        return value if _may_be_hidden(value) else None
    if isinstance(value, Mapping):
        value = (value.get("hidden_states"), *value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            if isinstance(part, torch.Tensor) and _may_be_hidden(part):
                return part
    return None


def _may_be_hidden(tensor: torch.Tensor) -> bool:
    """Whether a tensor has the dtype and the axes of hidden states."""
    return tensor.is_floating_point() and tensor.dim() >= 2


def tensors_of(args: Arguments, kwargs: Keywords) -> list[torch.Tensor]:
    """Return the tensors among the arguments of a call."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def input_tensor(args: Arguments, kwargs: Keywords) -> torch.Tensor | None:
    """Return the hidden states in the arguments of a call, or None."""
    hidden = kwargs.get("hidden_states")
    if hidden is not None:
        return first_tensor(hidden)
    return first_tensor((*args, *kwargs.values()))


def output_tensor(layer: Layer, output: Output, hidden: torch.Tensor) -> torch.Tensor:
    """Return the hidden states in the output of a layer with the input ``hidden``.

    Raises:
        ModelError: their shapes differ.
    """
    after = first_tensor(output)
    if after is None or after.shape != hidden.shape:
        raise ModelError(f"{layer} does not keep the shape of its input.")
    return after


def axes_of(shape: Sequence[int], rows: int, tokens: int) -> str:
    """Return the order of a tensor's axes by its shape: ``flat``, ``tokens first``, ``streams first`` or ``rows``."""
    if len(shape) == 2 and shape[0] == rows * tokens:
        return "flat"
    if len(shape) == 3 and tuple(shape[:2]) == (tokens, rows):
        return "tokens first"
    if len(shape) == 4 and tuple(shape[:2]) != (rows, tokens) and tuple(shape[1:3]) == (rows, tokens):
        return "streams first"
    return "rows"


def as_rows(x: torch.Tensor, axes: str, rows: int, tokens: int, *, place: object = "A module") -> torch.Tensor:
    """Return a tensor as contiguous [rows, tokens, units]. Parallel streams become units.

    Args:
        place: the module that has the tensor, for the message.

    Raises:
        ModelError: the tensor has another shape.
    """
    shape = list(x.shape)
    if axes == "tokens first":
        x = x.transpose(0, 1)
    elif axes == "streams first":
        x = x.movedim(0, 2)
    elif x.dim() == 2 and x.shape[0] == rows * tokens:
        x = x.reshape(rows, tokens, -1)
    if x.dim() < 3 or tuple(x.shape[:2]) != (rows, tokens):
        raise ModelError(
            f"{place} sees {shape} in a batch of {rows} x {tokens} tokens: the model pads, pools or extends its rows.",
            "If it pads rows to a multiple, make `sequence_length` one.",
        )
    return x.reshape(rows, tokens, -1).contiguous()


def routing_of(inputs: Sequence[torch.Tensor]) -> Routing | None:
    """Return the input tensors of a call as a routing, or None if they do not have its shapes and dtypes."""
    index = _first_matrix_of_integers(inputs)
    if index is None:
        return None
    hidden = inputs[0]
    if not hidden.is_floating_point() or hidden.dim() != 2 or len(hidden) != len(index):
        return None
    for gates in inputs[1:]:
        if gates.is_floating_point() and gates.shape == index.shape:
            return Routing(hidden, index, gates)
    return None


def _first_matrix_of_integers(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    for tensor in tensors:
        if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            return tensor
    return None


def with_replaced(args: Arguments, kwargs: Keywords, instead: Mapping[int, torch.Tensor]) -> tuple[Arguments, Keywords]:
    """Return the arguments of a call with others in the place of some, by their id."""
    positional = tuple(instead.get(id(value), value) for value in args)
    keywords = {name: instead.get(id(value), value) for name, value in kwargs.items()}
    return positional, keywords


@dataclass(frozen=True)
class LayerCall:
    """Arguments of a call of a layer."""

    args: Arguments
    kwargs: Keywords

    @property
    def hidden(self) -> torch.Tensor:
        """Hidden states among the arguments."""
        hidden = input_tensor(self.args, self.kwargs)
        if hidden is None:
            raise ModelError("A layer is called without hidden states.")
        return hidden

    def with_hidden(self, replacement: torch.Tensor) -> LayerCall:
        """Return the same call with other hidden states."""
        return LayerCall(*with_replaced(self.args, self.kwargs, {id(self.hidden): replacement}))

    def rerun(self, layer: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """Call a layer again, and return its input as a leaf tensor and its output.

        The leaf requires a gradient if the hidden states of this call do.
        """
        leaf = self.hidden.detach().requires_grad_(self.hidden.requires_grad)
        call = self.with_hidden(leaf)
        output = first_tensor(layer(*call.args, **call.kwargs))
        assert output is not None
        return leaf, output


def require_single_use(layers: Sequence[Layer], layer: Layer, change: str) -> None:
    """Refuse to change a layer alone whose module is also that of other layers.

    Args:
        layers: all layers of the model.
        change: past participle, for the message.

    Raises:
        ModelError: the layer is used more than once in a pass.
    """
    uses = [other for other in layers if other.module is layer.module]
    if len(uses) > 1:
        raise ModelError(f"{layer} is used more than once; it cannot be {change}.")


def representatives(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers on which to try something that takes passes for each: all of them, or a sample of many.

    The sample is the first and the last layer of each kind, and others at equal distances. Layers are of one kind if
    their modules have equal classes, flags and names, which tell apart sliding attention or shared keys and values.
    """
    if len(layers) <= MAX_REPRESENTATIVES:
        return list(layers)
    kinds: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, layer in enumerate(layers):
        kinds[_kind_of(layer)].append(place)
    chosen: set[int] = set()
    for places in kinds.values():
        chosen.add(places[0])
        chosen.add(places[-1])
    step = (len(layers) - 1) / (MAX_REPRESENTATIVES - 1)
    for number in range(MAX_REPRESENTATIVES):
        chosen.add(round(step * number))
    return [layers[place] for place in sorted(chosen)]


def _kind_of(layer: Layer) -> Hashable:
    """Return the classes, flags and names of the modules of a layer."""
    parts = []
    for path, part in layer.module.named_modules():
        flags = tuple((name, value) for name, value in vars(part).items() if type(value) in (bool, str))
        parts.append((path, type(part), flags))
    return tuple(parts)
