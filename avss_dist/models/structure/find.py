"""Find the layers of any model, and the sites inside them, by watching one tiny forward pass.

Names differ between families, structure does not: the layers are the shallowest module list as long as the config
says, and their order is the order of calls. The pass shows which modules run, how often, in which order and with which
axes.

A sublayer's addition to the residual stream is its output, or that of its last linear map or of the norm after it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.core.sites import EVERY_SITE, INPUT_SITES
from avss_dist.models.forward import Arguments, CallAfter, CallBefore, Change, Keywords, Output, changing
from avss_dist.models.structure.additions import Trace, tap_addition
from avss_dist.models.structure.layers import (
    PROBE_SHAPE,
    Experts,
    Layer,
    Projection,
    Tap,
    axes_of,
    count_parameters,
    first_tensor,
    input_tensor,
    is_linear,
    layer_lists,
    layers_not_found,
    linear_sizes,
    probe_tokens,
    routing_of,
)

_ATTENTION = re.compile(
    r"attention|attn|mixer|mamba|ssm|deltanet|recurrent|retention|fourier|conv|mlstm|temporal_block|^mla$",
    re.IGNORECASE,
)
_MLP = re.compile(r"mlp|moe|ffn|feed_?forward|\bff\b|expert", re.IGNORECASE)
_NOT_A_SUBLAYER = re.compile(
    r"norm|dropout|\bln\b|ln_?\d|act_fn|activation|rotary|hyperconnection|scal|DecoderLayer$", re.IGNORECASE
)
_EXPERTS = re.compile(r"experts|moe", re.IGNORECASE)


@dataclass
class Call:
    """Recorded call of a module inside a layer."""

    path: str
    module: nn.Module
    inputs: list[torch.Tensor]
    output: torch.Tensor


def find_sites(
    calls: Sequence[Call], layer_class: str, trace: Trace
) -> tuple[dict[str, Tap], tuple[Projection, ...], Experts | None]:
    """Return the sites of one layer, the linear maps whose inputs are sites, and its routed experts.

    Args:
        calls: calls of its modules, in order.
        trace: what became of their outputs.
    """
    by_kind: dict[str | None, list[Call]] = defaultdict(list)
    for call in calls:
        by_kind[_kind(call.path, call.module, layer_class)].append(call)
    attention, mlp = _largest(by_kind["attention"]), _largest(by_kind["mlp"])
    in_attention = _inside(calls, attention)
    taps: dict[str, Tap | None] = {"attention": _output_tap(attention, in_attention) if attention else None}
    readers: list[tuple[str, Call]] = []
    if attention:
        width = attention.output.shape[-1]
        last = [call for call in _linears(in_attention) if call.output.shape[-1] == width][-1:]
        readers = _readers(in_attention, last, "query_input", "output_input")
        readers = readers if len(readers) > len(last) else []
    if mlp:
        in_mlp = _inside(calls, mlp)
        names = (f"{c.path.rpartition('.')[2]} {_short_class_name(c.module, layer_class)}" for c in (mlp, *in_mlp))
        if any(_EXPERTS.search(name) for name in names):  # routed experts
            taps["mlp"] = _tap(mlp, "output")
        else:
            down = _last_linear(in_mlp, mlp.output.shape[-1])
            taps |= {"mlp": _output_tap(mlp, in_mlp), "neuron": _tap(down, "input") if down else None}
    else:  # linear maps in the layer itself
        attending = {id(call) for call in (*by_kind["attention"], *in_attention)}
        in_mlp = [call for call in calls if id(call) not in attending]
        down = _last_linear(in_mlp, calls[-1].output.shape[-1]) if calls else None
        if down and down.inputs[0].shape[-1] != down.output.shape[-1]:
            taps |= {"mlp": _tap(down, "output"), "neuron": _tap(down, "input")}
    if neuron := taps.get("neuron"):
        last = [call for call in _linears(in_mlp) if call.module is neuron.module]
        readers += _readers(in_mlp, last, "up_input", "neuron")
    for site in ("attention", "mlp"):
        tap = taps.get(site)
        if tap is not None:
            taps[site] = tap_addition(trace, tap)
    projections = []
    for site, call in readers:
        taps.setdefault(site, _tap(call, "input"))
        outputs, shape = call.output.shape[-1], call.inputs[0].shape
        projections.append(Projection(call.path, call.module, site, outputs, shape[-1], axes_of(shape, *PROBE_SHAPE)))
    taps_in_order = {}
    for site in EVERY_SITE:
        tap = taps.get(site)
        if tap:
            taps_in_order[site] = tap
    return (
        taps_in_order,
        tuple(projections),
        find_experts(calls),
    )


def find_down_projection(layer: nn.Module, width: int) -> tuple[str, nn.Module] | None:
    """Return path and module of the linear map that ends a layer's MLP, from names and shapes, without a pass.

    It is the module of the site ``neuron`` wherever `find_sites` finds that site.

    Args:
        width: units of the residual stream.

    Returns:
        None if experts are routed, or no linear map outside of attention has ``width`` output units.
    """
    modules = dict(layer.named_modules())
    names = {
        path: f"{path.rpartition('.')[2]} {_short_class_name(module, type(layer).__name__)}"
        for path, module in modules.items()
    }
    if any(_EXPERTS.search(names[path]) for path in modules if path):
        return None
    candidates: dict[tuple[bool, bool], tuple[str, nn.Module]] = {}
    for path, module in modules.items():
        parents = [".".join(path.split(".")[:count]) for count in range(1, path.count(".") + 1)]
        kinds = {_kind(parent, modules[parent], type(layer).__name__) for parent in parents}
        if not is_linear(module) or "attention" in kinds or any(_NOT_A_SUBLAYER.search(names[p]) for p in parents):
            continue
        inputs, outputs = linear_sizes(module)
        if outputs == width:
            candidates["mlp" in kinds, inputs != outputs] = path, module
    return candidates[max(candidates)] if candidates else None


def _readers(calls: Sequence[Call], last: Sequence[Call], first_site: str, last_site: str) -> list[tuple[str, Call]]:
    """Return (site, call) of a sublayer's input projections, which share one input, and of its last projection."""
    first = [call for call in _linears(calls) if all(call is not end for end in last)]
    places = [(call.inputs[0].data_ptr(), call.inputs[0].numel()) for call in first]  # of one tensor, or of views of it
    alike = [call for call, place in zip(first, places, strict=True) if place == places[0]]
    return [*((first_site, call) for call in alike), *((last_site, call) for call in last)]


def _linears(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if is_linear(call.module) and call.inputs]


def _short_class_name(module: nn.Module, layer_class: str) -> str:
    """Return a class name without the prefix of its family: ``Attention`` for ``Qwen3MoeAttention``."""
    kind = type(module).__name__
    starts = [i for i, letter in enumerate(kind) if letter.isupper() and layer_class.startswith(kind[:i])]
    return kind[max(starts, default=0) :]


def _kind(path: str, module: nn.Module, layer_class: str) -> str | None:
    """Return ``mlp`` or ``attention`` by the class or the name of a sublayer, or None if it is neither."""
    if is_linear(module):
        return None
    for label in (_short_class_name(module, layer_class), path.rpartition(".")[2]):
        if _NOT_A_SUBLAYER.search(label):
            return None
        if _MLP.search(label):
            return "mlp"
        if _ATTENTION.search(label):
            return "attention"
    return None


def _largest(calls: Sequence[Call]) -> Call | None:
    """Return the call with the most parameters among the shallowest ones."""
    depth = min((c.path.count(".") for c in calls), default=0)
    shallow = [c for c in calls if c.path.count(".") == depth]
    return max(shallow, key=lambda c: count_parameters(c.module), default=None)


def _inside(calls: Sequence[Call], sublayer: Call | None) -> list[Call]:
    return [call for call in calls if sublayer and call.path.startswith(f"{sublayer.path}.")]


def _last_linear(calls: Sequence[Call], width: int) -> Call | None:
    """Return the last linear map with ``width`` output units, preferably one that changes the width (down)."""
    linears = [c for c in calls if is_linear(c.module) and c.output.shape[-1] == width and c.inputs]
    return next(reversed([c for c in linears if c.inputs[0].shape[-1] != width] or linears), None)


def _output_tap(sublayer: Call, inside: Sequence[Call]) -> Tap | None:
    """Return a tap on a sublayer's addition: its output, or that of its last linear map before a residual or norm."""
    linears = [c for c in inside if is_linear(c.module) and c.output.shape[-1] == sublayer.output.shape[-1]]
    last = linears[-1] if linears else None
    norms = [i for i, c in enumerate(inside) if "norm" in type(c.module).__name__.lower()]
    ends_in_norm = bool(norms) and norms[-1] > (inside.index(last) if last else -1)
    if ends_in_norm and torch.equal(inside[norms[-1]].output, sublayer.output):  # also of one shape
        return _tap(last, "output") if last else None
    if last and last.output.numel() == sublayer.output.numel():
        added = sublayer.output - last.output.reshape(sublayer.output.shape)
        residuals = [x for x in sublayer.inputs if x.shape == added.shape and x.is_floating_point()]
        if any(float((added - x).abs().max()) < 1e-2 * float(x.abs().max()) for x in residuals):
            return _tap(last, "output")
    return _tap(sublayer, "output")


def _tap(call: Call, reads: str) -> Tap:
    tensor = call.output if reads == "output" else call.inputs[0]
    return Tap(call.module, reads, axes_of(tensor.shape, *PROBE_SHAPE))


def find_experts(calls: Sequence[Call]) -> Experts | None:
    """Return the experts of a layer from the calls of its modules, in order, or None if no call has a routing."""
    for i, call in enumerate(calls):
        routing, count = routing_of(call.inputs), getattr(call.module, "num_experts", 0)
        stacked = next((len(p) for p in call.module.parameters() if p.dim() == 3), 0)
        number = max(count if isinstance(count, int) else 0, stacked)  # ranks with some experts each count their own
        if routing is None or not number or call.output.numel() != routing.hidden.numel():
            continue
        size = len(routing.index) * number
        routers = [
            earlier for earlier in calls[:i] if earlier.output.shape[-1] == number and earlier.output.numel() == size
        ]
        if not routers:
            return Experts(call.module, number, None, normalized=False)
        output = routers[-1].output
        total = output.double().sum(dim=-1)
        normalized = bool((output >= 0).all() and torch.allclose(total, torch.ones_like(total), atol=1e-2))
        return Experts(call.module, number, routers[-1].module, normalized)
    return None


def find_structure(
    model: nn.Module, forward: Callable[[torch.Tensor], Any], num_layers: int | None, path: str | None = None
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Find layers and sites by one forward pass over ``PROBE_SHAPE`` tokens, and remove all hooks.

    Args:
        model: the backbone, without its head.
        forward: runs the backbone on int64[rows, tokens] token ids.
        num_layers: the config's layer count.
        path: module path of the layer list, or None to find it.

    Returns:
        The layers in the order of their calls, and remarks on them for people.

    Raises:
        ModelError: the layers cannot be found, or do not run. Exceptions of the model itself pass through.
    """
    lists = layer_lists(model, num_layers, path)
    layer_calls = _watch([module for modules in lists.values() for module in modules], forward)
    calls = Counter(layer.module for layer in layer_calls)
    used = {name: modules for name, modules in lists.items() if any(module in calls for module in modules)}
    if len(used) != 1:
        raise layers_not_found(
            model, num_layers, used or lists, "several module lists run" if used else "none of them runs"
        )
    (list_path, modules) = next(iter(used.items()))
    if not all(module in calls for module in modules):
        raise layers_not_found(model, num_layers, used, f"not every module of '{list_path}' runs as a layer")
    names = {module: f"{list_path}.{i}" for i, module in reversed(list(enumerate(modules)))}
    order = list(reversed(names))
    if len(layer_calls) == len(order):  # unless modules are shared, in the order of the list
        layer_calls = sorted(layer_calls, key=lambda layer: order.index(layer.module))
    layers: list[Layer] = []
    uses: Counter[nn.Module] = Counter()
    for index, layer in enumerate(layer_calls):
        module, form = layer.module, layer.form if calls[layer.module] == 1 else None
        name = f"{names[module]}#{uses[module]}" if uses[module] else names[module]
        layers.append(replace(layer, index=index, name=name, call=uses[module], form=form))
        uses[module] += 1
    notes = [*absent_sites(layers, ("attention", "mlp", "neuron"))]
    if shared := sum(layer.call > 0 for layer in layers):
        notes.append(
            f"layers share modules: {len(layers)} calls of {len(layers) - shared} modules, each call is a layer"
        )
    return tuple(layers), tuple(notes)


def _watch(modules: Iterable[nn.Module], forward: Callable[[torch.Tensor], Any]) -> list[Layer]:
    """Return a layer without a name for each call of these modules in one forward pass, in order."""
    layer_calls: list[Layer] = []
    calls: list[Call] = []  # of one layer at a time
    trace = Trace()

    def enter(args: Arguments, kwargs: Keywords) -> None:
        calls.clear()
        trace.begin(input_tensor(args, kwargs))

    def begin(module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        trace.enter(module, [*args, *kwargs.values()])

    def record(path: str, module: nn.Module, args: Arguments, kwargs: Keywords, output: Output) -> None:
        trace.leave(module, first_tensor(output))
        tensor = first_tensor(output)
        if tensor is not None:
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            calls.append(Call(path, module, inputs, tensor.clone()))

    def leave(module: nn.Module, args: Arguments, kwargs: Keywords, output: Output) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            trace.end(tensor)
            hidden, sites = input_tensor(args, kwargs), find_sites(calls, type(module).__name__, trace)
            is_alone = isinstance(output, torch.Tensor) or (isinstance(output, tuple) and len(output) == 1)
            form = type(output) if is_alone and hidden is not None and hidden.shape == tensor.shape else None
            layer_calls.append(Layer(0, "", module, 0, axes_of(tensor.shape, *PROBE_SHAPE), *sites, form))
        calls.clear()
        trace.begin(None)

    layers = dict.fromkeys(modules)
    watched: list[Change] = [CallBefore(layer, enter) for layer in layers]
    for layer in layers:
        for path, child in layer.named_modules():
            if child is not layer:
                watched.append(CallBefore(child, partial(begin, child)))
                watched.append(CallAfter(child, partial(record, path, child)))
    watched += [CallAfter(layer, partial(leave, layer)) for layer in layers]
    with trace, changing(watched):
        forward(probe_tokens())
    return layer_calls


def absent_sites(layers: Sequence[Layer], sites: Sequence[str]) -> Iterator[str]:
    """Yield a line for the user about each site that layers lack."""
    for site in sites:
        without = [layer.index for layer in layers if site not in layer.taps]
        if len(without) == len(layers):
            has = "a linear map of its own that reads it" if site in INPUT_SITES else "it as a module of its own"
            yield f"site '{site}' is absent: no layer of this family has {has}"
        elif without:
            yield f"site '{site}' is absent in layers {', '.join(map(str, without))}"
