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
    tensors_of,
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


RESIDUAL_TOLERANCE = 1e-2
"""Largest difference between a sublayer's input and what it adds to its last linear map, relative to the input.

Sums in bfloat16 are rounded by up to 0.004 of their size."""


@dataclass
class Call:
    """Recorded call of a module inside a layer."""

    path: str
    module: nn.Module
    inputs: list[torch.Tensor]
    output: torch.Tensor


@dataclass(frozen=True)
class Sites:
    """Sites of a layer.

    Attributes:
        taps: taps on the tensors of the sites, by site.
        projections: linear maps whose inputs are sites.
        experts: its routed experts, or None.
    """

    taps: dict[str, Tap]
    projections: tuple[Projection, ...]
    experts: Experts | None


@dataclass(frozen=True)
class _Reader:
    """Call of a linear map whose input is a site."""

    site: str
    call: Call


def find_sites(calls: Sequence[Call], layer_class: str, trace: Trace) -> Sites:
    """Return the sites of one layer.

    Args:
        calls: calls of its modules, in order.
        trace: what became of their outputs.
    """
    by_kind: defaultdict[str | None, list[Call]] = defaultdict(list)
    for call in calls:
        by_kind[_kind(call.path, call.module, layer_class)].append(call)
    attention = _largest(by_kind["attention"])
    mlp = _largest(by_kind["mlp"])
    in_attention = _inside(calls, attention)
    taps: dict[str, Tap] = {}
    readers: list[_Reader] = []

    if attention is not None:
        _add_tap(taps, "attention", _output_tap(attention, in_attention))
        readers += _attention_readers(attention, in_attention)

    if mlp is not None:
        in_mlp = _inside(calls, mlp)
        if _has_experts(mlp, in_mlp, layer_class):
            taps["mlp"] = _tap(mlp, "output")
        else:
            _add_tap(taps, "mlp", _output_tap(mlp, in_mlp))
            down = _last_linear(in_mlp, mlp.output.shape[-1])
            if down is not None:
                taps["neuron"] = _tap(down, "input")
    else:
        # The linear maps of the MLP are in the layer itself.
        attending = {id(call) for call in (*by_kind["attention"], *in_attention)}
        in_mlp = [call for call in calls if id(call) not in attending]
        down = _last_linear(in_mlp, calls[-1].output.shape[-1]) if calls else None
        if down is not None and _width(down.inputs[0]) != _width(down.output):
            taps["mlp"] = _tap(down, "output")
            taps["neuron"] = _tap(down, "input")

    if "neuron" in taps:
        last = [call for call in _linears(in_mlp) if call.module is taps["neuron"].module]
        readers += _readers(in_mlp, last, "up_input", "neuron")
    for site in ("attention", "mlp"):
        if site in taps:
            taps[site] = tap_addition(trace, taps[site])
    for reader in readers:
        taps.setdefault(reader.site, _tap(reader.call, "input"))
    taps_in_order = {site: taps[site] for site in EVERY_SITE if site in taps}
    projections = tuple(_projection(reader) for reader in readers)
    return Sites(taps_in_order, projections, find_experts(calls))


def _add_tap(taps: dict[str, Tap], site: str, tap: Tap | None) -> None:
    if tap is not None:
        taps[site] = tap


def _attention_readers(attention: Call, inside: Sequence[Call]) -> list[_Reader]:
    """Return the input projections of an attention and its output projection; none if it has no input projections.

    Args:
        inside: calls of the modules of the attention.
    """
    width = _width(attention.output)
    output_projections = [call for call in _linears(inside) if _width(call.output) == width]
    last = output_projections[-1:]
    readers = _readers(inside, last, "query_input", "output_input")
    if len(readers) == len(last):
        return []
    return readers


def _has_experts(mlp: Call, inside: Sequence[Call], layer_class: str) -> bool:
    """Whether an MLP, or a module in it, is called experts."""
    for call in (mlp, *inside):
        name = call.path.rpartition(".")[2]
        if _EXPERTS.search(f"{name} {_short_class_name(call.module, layer_class)}"):
            return True
    return False


def _projection(reader: _Reader) -> Projection:
    call = reader.call
    inputs = call.inputs[0]
    axes = axes_of(inputs.shape, *PROBE_SHAPE)
    return Projection(call.path, call.module, reader.site, _width(call.output), _width(inputs), axes)


def _width(tensor: torch.Tensor) -> int:
    """Return the number of units of a tensor."""
    return tensor.shape[-1]


def find_down_projection(layer: nn.Module, width: int) -> tuple[str, nn.Module] | None:
    """Return path and module of the linear map that ends a layer's MLP, from names and shapes, without a pass.

    It is the module of the site ``neuron`` wherever `find_sites` finds that site.

    Args:
        width: units of the residual stream.

    Returns:
        None if experts are routed, or no linear map outside of attention has ``width`` output units.
    """
    modules = dict(layer.named_modules())
    layer_class = type(layer).__name__
    names: dict[str, str] = {}
    for path, module in modules.items():
        names[path] = f"{path.rpartition('.')[2]} {_short_class_name(module, layer_class)}"
        if path and _EXPERTS.search(names[path]):
            return None
    # The best candidate is in an MLP and changes the width. Of equal ones, the last is taken.
    candidates: dict[tuple[bool, bool], tuple[str, nn.Module]] = {}
    for path, module in modules.items():
        parents = _parents(path)
        kinds = {_kind(parent, modules[parent], layer_class) for parent in parents}
        is_aside = any(_NOT_A_SUBLAYER.search(names[parent]) for parent in parents)
        if not is_linear(module) or "attention" in kinds or is_aside:
            continue
        inputs, outputs = linear_sizes(module)
        if outputs == width:
            candidates["mlp" in kinds, inputs != outputs] = path, module
    if not candidates:
        return None
    return candidates[max(candidates)]


def _parents(path: str) -> list[str]:
    """Return the paths of the modules around a module, below the layer, the outermost first."""
    parts = path.split(".")
    return [".".join(parts[:number]) for number in range(1, len(parts))]


def _readers(calls: Sequence[Call], last: Sequence[Call], first_site: str, last_site: str) -> list[_Reader]:
    """Return a sublayer's input projections, which share one input, and its last projection.

    Args:
        last: calls of the last projection.
        first_site: site of the input of the input projections.
        last_site: site of the input of the last projection.
    """
    ends = {id(call) for call in last}
    first = [call for call in _linears(calls) if id(call) not in ends]
    readers = []
    for call in first:
        if _memory(call) == _memory(first[0]):
            readers.append(_Reader(first_site, call))
    for call in last:
        readers.append(_Reader(last_site, call))
    return readers


def _memory(call: Call) -> tuple[int, int]:
    """Return what the inputs of calls have in common that read one tensor, or views of it."""
    return call.inputs[0].data_ptr(), call.inputs[0].numel()


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
    depth = min((call.path.count(".") for call in calls), default=0)
    shallow = [call for call in calls if call.path.count(".") == depth]
    return max(shallow, key=lambda call: count_parameters(call.module), default=None)


def _inside(calls: Sequence[Call], sublayer: Call | None) -> list[Call]:
    if sublayer is None:
        return []
    return [call for call in calls if call.path.startswith(f"{sublayer.path}.")]


def _last_linear(calls: Sequence[Call], width: int) -> Call | None:
    """Return the last linear map with ``width`` output units, preferably one that changes the width (down)."""
    linears = [call for call in _linears(calls) if _width(call.output) == width]
    changing_width = [call for call in linears if _width(call.inputs[0]) != width]
    if changing_width:
        return changing_width[-1]
    if linears:
        return linears[-1]
    return None


def _output_tap(sublayer: Call, inside: Sequence[Call]) -> Tap | None:
    """Return a tap on a sublayer's addition: its output, or that of its last linear map before a residual or norm."""
    last: Call | None = None
    last_place = -1
    last_norm: Call | None = None
    last_norm_place = -1
    for place, call in enumerate(inside):
        if is_linear(call.module) and _width(call.output) == _width(sublayer.output):
            last = call
            last_place = place
        if "norm" in type(call.module).__name__.lower():
            last_norm = call
            last_norm_place = place
    if last_norm is not None and last_norm_place > last_place and torch.equal(last_norm.output, sublayer.output):
        return None if last is None else _tap(last, "output")
    if last is not None and _adds_residual(sublayer, last.output):
        return _tap(last, "output")
    return _tap(sublayer, "output")


def _adds_residual(sublayer: Call, output: torch.Tensor) -> bool:
    """Whether a sublayer returns one of its inputs plus the output of its last linear map."""
    if output.numel() != sublayer.output.numel():
        return False
    added = sublayer.output - output.reshape(sublayer.output.shape)
    for x in sublayer.inputs:
        if x.shape != added.shape or not x.is_floating_point():
            continue
        difference = float((added - x).abs().max())
        if difference < RESIDUAL_TOLERANCE * float(x.abs().max()):
            return True
    return False


def _tap(call: Call, reads: str) -> Tap:
    tensor = call.inputs[0] if reads == "input" else call.output
    return Tap(call.module, reads, axes_of(tensor.shape, *PROBE_SHAPE))


def find_experts(calls: Sequence[Call]) -> Experts | None:
    """Return the experts of a layer from the calls of its modules, in order, or None if no call has a routing."""
    for place, call in enumerate(calls):
        routing = routing_of(call.inputs)
        number = _count_experts(call.module)
        if routing is None or number == 0 or call.output.numel() != routing.hidden.numel():
            continue
        router = _router_before(calls[:place], len(routing.index), number)
        if router is None:
            return Experts(call.module, number, None, normalized=False)
        total = router.output.double().sum(dim=-1)
        are_shares = bool((router.output >= 0).all())
        sum_to_one = torch.allclose(total, torch.ones_like(total), atol=1e-2)
        return Experts(call.module, number, router.module, normalized=are_shares and sum_to_one)
    return None


def _count_experts(module: nn.Module) -> int:
    """Return the number of experts of a module, 0 if it has none.

    Ranks that have some of the experts each count their own, and have stacks of them all.
    """
    count = getattr(module, "num_experts", 0)
    if not isinstance(count, int):
        count = 0
    for parameter in module.parameters():
        if parameter.dim() == 3:
            return max(count, len(parameter))
    return count


def _router_before(calls: Sequence[Call], tokens: int, number: int) -> Call | None:
    """Return the last call whose output is a number for each token and expert, or None."""
    for call in reversed(calls):
        if _width(call.output) == number and call.output.numel() == tokens * number:
            return call
    return None


def find_structure(
    model: nn.Module, forward: Callable[[torch.Tensor], object], num_layers: int | None, path: str | None = None
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
    candidates: list[nn.Module] = []
    for modules in lists.values():
        candidates += modules
    layer_calls = _watch(candidates, forward)
    calls = Counter(layer.module for layer in layer_calls)
    used: dict[str, nn.ModuleList] = {}
    for name, modules in lists.items():
        if any(module in calls for module in modules):
            used[name] = modules
    if not used:
        raise layers_not_found(model, num_layers, lists, "none of them runs")
    if len(used) > 1:
        raise layers_not_found(model, num_layers, used, "several module lists run")
    list_path, modules = next(iter(used.items()))
    if not all(module in calls for module in modules):
        raise layers_not_found(model, num_layers, used, f"not every module of '{list_path}' runs as a layer")
    # A module that is in the list more than once has its first place.
    places: dict[nn.Module, int] = {}
    for place, module in enumerate(modules):
        places.setdefault(module, place)
    if len(layer_calls) == len(places):  # Unless modules are shared, layers have the order of the list.
        layer_calls.sort(key=lambda layer: places[layer.module])
    layers: list[Layer] = []
    uses: Counter[nn.Module] = Counter()
    for index, layer in enumerate(layer_calls):
        module = layer.module
        name = f"{list_path}.{places[module]}"
        if uses[module]:
            name += f"#{uses[module]}"
        form = layer.form
        if calls[module] > 1:
            form = None
        layers.append(replace(layer, index=index, name=name, call=uses[module], form=form))
        uses[module] += 1
    notes = list(absent_sites(layers, ("attention", "mlp", "neuron")))
    if len(uses) < len(layers):
        notes.append(f"layers share modules: {len(layers)} calls of {len(uses)} modules, each call is a layer")
    return tuple(layers), tuple(notes)


def _watch(modules: Iterable[nn.Module], forward: Callable[[torch.Tensor], object]) -> list[Layer]:
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
        tensor = first_tensor(output)
        trace.leave(module, tensor)
        if tensor is not None:
            calls.append(Call(path, module, tensors_of(args, kwargs), tensor.clone()))

    def leave(module: nn.Module, args: Arguments, kwargs: Keywords, output: Output) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            trace.end(tensor)
            sites = find_sites(calls, type(module).__name__, trace)
            layer = Layer(
                index=0,
                name="",
                module=module,
                call=0,
                axes=axes_of(tensor.shape, *PROBE_SHAPE),
                taps=sites.taps,
                projections=sites.projections,
                experts=sites.experts,
                form=_form(input_tensor(args, kwargs), output, tensor),
            )
            layer_calls.append(layer)
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


def _form(hidden: torch.Tensor | None, output: Output, tensor: torch.Tensor) -> type | None:
    """Return the `Layer.form` of a layer from a call.

    Args:
        hidden: hidden states that the layer took.
        output: output of the layer.
        tensor: hidden states in the output.
    """
    is_alone = isinstance(output, torch.Tensor) or (isinstance(output, tuple) and len(output) == 1)
    if not is_alone or hidden is None or hidden.shape != tensor.shape:
        return None
    return type(output)


def absent_sites(layers: Sequence[Layer], sites: Sequence[str]) -> Iterator[str]:
    """Yield a line for the user about each site that layers lack."""
    for site in sites:
        without = [layer.index for layer in layers if site not in layer.taps]
        if len(without) == len(layers):
            has = "it as a module of its own"
            if site in INPUT_SITES:
                has = "a linear map of its own that reads it"
            yield f"site '{site}' is absent: no layer of this family has {has}"
        elif without:
            indices = ", ".join(str(index) for index in without)
            yield f"site '{site}' is absent in layers {indices}"
