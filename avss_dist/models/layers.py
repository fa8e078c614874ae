"""Find the layers of any model, and the sites inside them, by watching one tiny forward pass.

Names differ between families, structure does not: the layers are the shallowest module list as long as the config
says, their order is the order of calls, and what a sublayer adds to the residual stream is the output of its last
linear map. The pass shows which modules run, how often, in which order and with which tensor layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from avss_dist.errors import ModelError, nearest
from avss_dist.settings import SITES

PROBE_SHAPE = (2, 12)  # rows and tokens differ, so that layouts can be told apart

_ATTENTION = re.compile(
    r"attention|attn|mixer|mamba|ssm|deltanet|recurrent|retention|fourier|conv|mlstm|temporal_block|^mla$",
    re.IGNORECASE,
)
_MLP = re.compile(r"mlp|moe|ffn|feed_?forward|\bff\b|expert", re.IGNORECASE)
_NOT_A_SUBLAYER = re.compile(
    r"norm|dropout|\bln\b|ln_?\d|act_fn|activation|rotary|hyperconnection|scal|DecoderLayer$", re.IGNORECASE
)
_EXPERTS = re.compile(r"experts|moe", re.IGNORECASE)


@dataclass(frozen=True)
class Point:
    """A tensor to read: what ``module`` takes in or gives out, and how its axes lie."""

    module: nn.Module
    reads: str  # "input" or "output"
    layout: str
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None  # makes a rank's part of the units whole; collective


@dataclass(frozen=True)
class Layer:
    """One transformer block: the ``call``-th use of ``module`` in a forward pass (models may share a block)."""

    index: int
    name: str
    module: nn.Module
    call: int
    layout: str
    points: Mapping[str, Point]


@dataclass(frozen=True)
class Structure:
    """The layers of a model in the order of their calls, and what a user should know about them."""

    layers: tuple[Layer, ...]
    notes: tuple[str, ...]


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
        raise _not_found(model, num_layers, lists, "no module list holds whole blocks")
    return _shallowest(wanted)


def _not_found(model: nn.Module, num_layers: int | None, lists: Mapping[str, nn.ModuleList], why: str) -> ModelError:
    seen = ", ".join(f"{name} ({len(module)} x {type(module[0]).__name__})" for name, module in lists.items())
    return ModelError(
        f"The {num_layers or ''} layers of {type(model).__name__} could not be found: {why}.".replace("  ", " "),
        f"Seen: {seen or 'no module list'}. Name one with `layers`.",
    )


def _holds_blocks(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(
        not isinstance(m, (nn.ModuleList, nn.Sequential)) and any(_is_linear(c) for c in m.modules() if c is not m)
        for m in modules
    )


def _shallowest(lists: Mapping[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    depth = min((name.count(".") for name in lists), default=0)
    return {name: module for name, module in lists.items() if name.count(".") == depth}


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module as a whole; of those that DeepSpeed ZeRO-3 has partitioned, ``numel`` is 0."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def _is_linear(module: nn.Module) -> bool:
    """A map with a two-dimensional weight: Linear, GPT-2's Conv1D, quantized linears."""
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or kind == "Conv1D" or ("Linear" in kind and hasattr(module, "weight"))


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


def layout_of(shape: Sequence[int], rows: int, tokens: int) -> str:
    """How the axes of a tensor lie, told by its shape; ``rows`` where it cannot be told."""
    if len(shape) == 2 and shape[0] == rows * tokens:
        return "flat"
    if len(shape) == 3 and tuple(shape[:2]) == (tokens, rows):
        return "tokens first"
    if len(shape) == 4 and tuple(shape[:2]) != (rows, tokens) and tuple(shape[1:3]) == (rows, tokens):
        return "streams first"
    return "rows"


def as_rows(x: torch.Tensor, layout: str, rows: int, tokens: int) -> torch.Tensor | None:
    """The tensor as contiguous [rows, tokens, units], parallel streams as units; None if it does not fit."""
    if layout == "tokens first":
        x = x.transpose(0, 1)
    elif layout == "streams first":
        x = x.movedim(0, 2)
    elif x.dim() == 2 and x.shape[0] == rows * tokens:
        x = x.reshape(rows, tokens, -1)
    if x.dim() < 3 or tuple(x.shape[:2]) != (rows, tokens):
        return None
    return x.reshape(rows, tokens, -1).contiguous()


@dataclass
class _Call:
    """One module's call inside a layer."""

    path: str
    module: nn.Module
    inputs: list[torch.Tensor]
    output: torch.Tensor


_Found = tuple[nn.Module, str, Mapping[str, Point]]


@dataclass
class _Trace:
    """Watches a forward pass; holds the tensors of one layer at a time."""

    found: list[_Found] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)

    def enter(self, _module: nn.Module, _args: Any) -> None:
        self.calls = []

    def record(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
                self.calls.append(_Call(path, module, inputs, tensor.clone()))

        return hook

    def leave(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            self.found.append(
                (module, layout_of(tensor.shape, *PROBE_SHAPE), _find_points(self.calls, type(module).__name__))
            )
        self.calls = []


def find_structure(
    model: nn.Module, forward: Callable[[torch.Tensor], Any], num_layers: int | None, path: str | None = None
) -> Structure:
    """Find layers and sites by one forward pass over ``PROBE_SHAPE`` tokens; no hook is left behind.

    Args:
        model: the backbone, without its head.
        forward: runs the backbone on int64[rows, tokens] token ids.
        num_layers: the config's layer count.
        path: module path of the layer list, or None to find it.

    Raises:
        ModelError: the layers cannot be found, or do not run. What the model itself raises passes through.
    """
    lists = layer_lists(model, num_layers, path)
    names = {
        module: f"{name}.{i}" for name, modules in lists.items() for i, module in reversed(list(enumerate(modules)))
    }
    trace = _Trace()
    handles: list[Any] = []
    try:
        for module in names:
            for child_path, child in module.named_modules():
                if child is not module:
                    handles.append(child.register_forward_hook(trace.record(child_path), with_kwargs=True))
            handles.append(module.register_forward_pre_hook(trace.enter))
            handles.append(module.register_forward_hook(trace.leave, with_kwargs=True))
        forward(torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1]).reshape(PROBE_SHAPE))
    finally:
        for handle in handles:
            handle.remove()
    ran = {module for module, _, _ in trace.found}
    used = {name: modules for name, modules in lists.items() if any(module in ran for module in modules)}
    if len(used) != 1:
        raise _not_found(model, num_layers, used or lists, "several module lists run" if used else "none of them runs")
    (list_path, modules) = next(iter(used.items()))
    if not all(module in ran for module in modules):
        raise _not_found(model, num_layers, used, f"not every module of '{list_path}' runs as a layer")
    order = {module: f"{list_path}.{i}" for i, module in reversed(list(enumerate(modules)))}
    return _structure(trace.found, dict(reversed(order.items())))


def _structure(found: list[_Found], names: Mapping[nn.Module, str]) -> Structure:
    """Layers in list order, or in the order of calls where modules are shared."""
    if len(found) == len(names):
        order = list(names)
        found = sorted(found, key=lambda item: order.index(item[0]))
    layers: list[Layer] = []
    uses: dict[nn.Module, int] = {}
    for index, (module, layout, points) in enumerate(found):
        call = uses.get(module, 0)
        uses[module] = call + 1
        name = names[module] if call == 0 else f"{names[module]}#{call}"
        layers.append(Layer(index, name, module, call, layout, points))
    return Structure(tuple(layers), tuple(_notes(layers)))


def _notes(layers: Sequence[Layer]) -> Iterator[str]:
    for site in ("attention", "mlp", "neuron"):
        without = [layer.index for layer in layers if site not in layer.points]
        if len(without) == len(layers):
            yield f"site '{site}' is absent: no layer of this family has it as a module of its own"
        elif without:
            yield f"site '{site}' is absent in layers {', '.join(map(str, without))}"
    shared = [layer for layer in layers if layer.call]
    if shared:
        yield f"layers share modules: {len(layers)} calls of {len(layers) - len(shared)} modules, each call is a layer"


def _find_points(calls: Sequence[_Call], layer_class: str) -> dict[str, Point]:
    """The sublayer sites of one layer, from its modules' calls."""
    kinds = {id(c): _kind(c, layer_class) for c in calls}
    attention = _largest([c for c in calls if kinds[id(c)] == "attention"])
    mlp = _largest([c for c in calls if kinds[id(c)] == "mlp"])
    points: dict[str, Point | None] = {}
    if attention:
        points["attention"] = _output_point(attention, _inside(calls, attention))
    if mlp:
        inside = _inside(calls, mlp)
        routed = any(
            _EXPERTS.search(f"{c.path.rpartition('.')[2]} {_own_name(c.module, layer_class)}") for c in (mlp, *inside)
        )
        points["mlp"] = _point(mlp, "output") if routed else _output_point(mlp, inside)
        last = None if routed else _last_linear(inside, mlp.output.shape[-1])
    else:
        outside = [c for c in calls if not (attention and _within(c, attention)) and kinds[id(c)] != "attention"]
        last = _last_linear(outside, calls[-1].output.shape[-1] if calls else 0)
        last = None if last and last.inputs[0].shape[-1] == last.output.shape[-1] else last
        points["mlp"] = _point(last, "output") if last else None
    points["neuron"] = _point(last, "input") if last else None
    return {site: point for site in SITES if (point := points.get(site))}


def _own_name(module: nn.Module, layer_class: str) -> str:
    """A class name without the family's prefix: ``Attention`` of ``Qwen3MoeAttention`` in ``Qwen3MoeDecoderLayer``."""
    kind = type(module).__name__
    prefix = "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(kind, layer_class, strict=False)))
    own = kind[len(prefix) :]
    while prefix and not own[:1].isupper():
        own, prefix = prefix[-1] + own, prefix[:-1]
    return own


def _kind(call: _Call, layer_class: str) -> str | None:
    """``mlp`` or ``attention`` by what a sublayer's class, else its name, says it is."""
    if _is_linear(call.module):
        return None
    for label in (_own_name(call.module, layer_class), call.path.rpartition(".")[2]):
        if _NOT_A_SUBLAYER.search(label):
            return None
        if _MLP.search(label):
            return "mlp"
        if _ATTENTION.search(label):
            return "attention"
    return None


def _largest(calls: Sequence[_Call]) -> _Call | None:
    """The call with the most parameters among the shallowest."""
    depth = min((c.path.count(".") for c in calls), default=0)
    shallow = [c for c in calls if c.path.count(".") == depth]
    return max(shallow, key=lambda c: count_parameters(c.module), default=None)


def _within(call: _Call, sublayer: _Call) -> bool:
    return call.path.startswith(sublayer.path + ".")


def _inside(calls: Sequence[_Call], sublayer: _Call) -> list[_Call]:
    return [c for c in calls if _within(c, sublayer)]


def _last_linear(calls: Sequence[_Call], width: int) -> _Call | None:
    """The last linear map that ends at ``width`` units, one from another width first (a down projection)."""
    linears = [c for c in calls if _is_linear(c.module) and c.output.shape[-1] == width and c.inputs]
    down = [c for c in linears if c.inputs[0].shape[-1] != width]
    return next(reversed(down or linears), None)


def _output_point(sublayer: _Call, inside: Sequence[_Call]) -> Point | None:
    """What the sublayer adds: its output, or its last linear map's where it adds the residual or a norm itself."""
    linears = [c for c in inside if _is_linear(c.module) and c.output.shape[-1] == sublayer.output.shape[-1]]
    last = linears[-1] if linears else None
    norms = [i for i, c in enumerate(inside) if "norm" in type(c.module).__name__.lower()]
    ends_in_norm = bool(norms) and norms[-1] > (inside.index(last) if last else -1)
    ends_in_norm = ends_in_norm and inside[norms[-1]].output.shape == sublayer.output.shape
    if ends_in_norm and torch.equal(inside[norms[-1]].output, sublayer.output):
        return _point(last, "output") if last else None
    if last and _adds_an_input(sublayer, last):
        return _point(last, "output")
    return _point(sublayer, "output")


def _adds_an_input(sublayer: _Call, last: _Call) -> bool:
    if last.output.numel() != sublayer.output.numel():
        return False
    added = sublayer.output - last.output.reshape(sublayer.output.shape)
    return any(
        t.shape == added.shape
        and t.is_floating_point()
        and float((added - t).abs().max()) < 1e-2 * float(t.abs().max())
        for t in sublayer.inputs
    )


def _point(call: _Call, reads: str) -> Point:
    tensor = call.output if reads == "output" else call.inputs[0]
    return Point(call.module, reads, layout_of(tensor.shape, *PROBE_SHAPE))
