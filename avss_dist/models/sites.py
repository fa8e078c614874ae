"""Find the sites inside a layer from the calls of its modules in one forward pass.

A sublayer's addition to the residual stream is the output of its last linear map.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from avss_dist.core.settings import EVERY_SITE
from avss_dist.models.experts import Experts, find_experts
from avss_dist.models.layers import PROBE_SHAPE, Projection, Tap, axes_of, count_parameters, is_linear, linear_sizes

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


@dataclass(frozen=True)
class LayerSites:
    """Sites of a layer, the linear maps whose inputs are sites, and its routed experts."""

    taps: dict[str, Tap]
    projections: tuple[Projection, ...]
    experts: Experts | None


def find_sites(calls: Sequence[Call], layer_class: str) -> LayerSites:
    """Return the sites of one layer, and its linear maps, from the calls of its modules."""
    by_kind: dict[str | None, list[Call]] = defaultdict(list)
    for call in calls:
        by_kind[_kind(call.path, call.module, layer_class)].append(call)
    attention, mlp = _largest(by_kind["attention"]), _largest(by_kind["mlp"])
    in_attention = _inside(calls, attention) if attention else []
    taps = {"attention": _output_tap(attention, in_attention) if attention else None}
    if mlp:
        in_mlp = _inside(calls, mlp)
        taps |= _taps_of_mlp(mlp, in_mlp, layer_class)
    else:
        known = {id(call) for call in (*by_kind["attention"], *in_attention)}
        in_mlp = [call for call in calls if id(call) not in known]
        taps |= _taps_without_mlp(in_mlp, calls)
    readers = _readers_in_attention(attention, in_attention) if attention else []
    if neuron := taps.get("neuron"):
        readers += _readers_in_mlp(in_mlp, neuron.module)
    for site, call in readers:
        taps.setdefault(site, _tap(call, "input"))
    projections = tuple(_projection(site, call) for site, call in readers)
    found = {site: tap for site in EVERY_SITE if (tap := taps.get(site))}
    return LayerSites(found, projections, find_experts(calls))


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


def _readers_in_attention(attention: Call, inside: Sequence[Call]) -> list[tuple[str, Call]]:
    """Return (site, call) of attention's input projections, which share one input, and of its output projection."""
    linears, width = _linears(inside), attention.output.shape[-1]
    last = next((call for call in reversed(linears) if call.output.shape[-1] == width), None)
    first = [call for call in linears if call is not last]
    alike = [call for call in first if _share_input(call, first[0])]
    return [*(("query_input", call) for call in alike), *([("output_input", last)] if last and alike else [])]


def _readers_in_mlp(calls: Sequence[Call], down: nn.Module) -> list[tuple[str, Call]]:
    """Return (site, call) of the MLP's input projections, which share one input, and of its projection ``down``."""
    linears = _linears(calls)
    last = [call for call in linears if call.module is down]
    first = [call for call in linears if call.module is not down]
    alike = [call for call in first if _share_input(call, first[0])]
    return [*(("up_input", call) for call in alike), *(("neuron", call) for call in last)]


def _linears(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if is_linear(call.module) and call.inputs]


def _share_input(first: Call, second: Call) -> bool:
    """Whether two modules read one tensor, or views of all of it."""
    a, b = first.inputs[0], second.inputs[0]
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _projection(site: str, call: Call) -> Projection:
    given = call.inputs[0]
    outputs, inputs = call.output.shape[-1], given.shape[-1]
    return Projection(call.path, call.module, site, outputs, inputs, axes_of(given.shape, *PROBE_SHAPE))


def _taps_of_mlp(mlp: Call, inside: Sequence[Call], layer_class: str) -> dict[str, Tap | None]:
    """Return the sites of an MLP that is a module; with routed experts, its output alone."""
    names = (f"{call.path.rpartition('.')[2]} {_short_class_name(call.module, layer_class)}" for call in (mlp, *inside))
    if any(_EXPERTS.search(name) for name in names):
        return {"mlp": _tap(mlp, "output")}
    last = _last_linear(inside, mlp.output.shape[-1])
    return {"mlp": _output_tap(mlp, inside), "neuron": _tap(last, "input") if last else None}


def _taps_without_mlp(outside: Sequence[Call], calls: Sequence[Call]) -> dict[str, Tap | None]:
    """Return the sites of an MLP whose linear maps are in the layer itself, the calls ``outside`` of attention."""
    last = _last_linear(outside, calls[-1].output.shape[-1]) if calls else None
    if last is None or last.inputs[0].shape[-1] == last.output.shape[-1]:
        return {}
    return {"mlp": _tap(last, "output"), "neuron": _tap(last, "input")}


def _short_class_name(module: nn.Module, layer_class: str) -> str:
    """Return a class name without the prefix of its family: ``Attention`` for ``Qwen3MoeAttention``."""
    kind = type(module).__name__
    prefix = "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(kind, layer_class, strict=False)))
    short = kind[len(prefix) :]
    while prefix and not short[:1].isupper():
        short, prefix = prefix[-1] + short, prefix[:-1]
    return short


def _kind(path: str, module: nn.Module, layer_class: str) -> str | None:
    """Return ``mlp`` or ``attention`` by the class or the name of a sublayer; None if it is neither."""
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


def _within(call: Call, sublayer: Call) -> bool:
    return call.path.startswith(sublayer.path + ".")


def _inside(calls: Sequence[Call], sublayer: Call) -> list[Call]:
    return [c for c in calls if _within(c, sublayer)]


def _last_linear(calls: Sequence[Call], width: int) -> Call | None:
    """Return the last linear map with ``width`` output units; one that changes the width (down) is preferred."""
    linears = [c for c in calls if is_linear(c.module) and c.output.shape[-1] == width and c.inputs]
    down = [c for c in linears if c.inputs[0].shape[-1] != width]
    return next(reversed(down or linears), None)


def _output_tap(sublayer: Call, inside: Sequence[Call]) -> Tap | None:
    """Return a tap on a sublayer's addition: its output, or that of its last linear map before a residual or norm."""
    linears = [c for c in inside if is_linear(c.module) and c.output.shape[-1] == sublayer.output.shape[-1]]
    last = linears[-1] if linears else None
    norms = [i for i, c in enumerate(inside) if "norm" in type(c.module).__name__.lower()]
    ends_in_norm = bool(norms) and norms[-1] > (inside.index(last) if last else -1)
    ends_in_norm = ends_in_norm and inside[norms[-1]].output.shape == sublayer.output.shape
    if ends_in_norm and torch.equal(inside[norms[-1]].output, sublayer.output):
        return _tap(last, "output") if last else None
    if last and _adds_an_input(sublayer, last):
        return _tap(last, "output")
    return _tap(sublayer, "output")


def _adds_an_input(sublayer: Call, last: Call) -> bool:
    if last.output.numel() != sublayer.output.numel():
        return False
    added = sublayer.output - last.output.reshape(sublayer.output.shape)
    return any(
        t.shape == added.shape
        and t.is_floating_point()
        and float((added - t).abs().max()) < 1e-2 * float(t.abs().max())
        for t in sublayer.inputs
    )


def _tap(call: Call, reads: str) -> Tap:
    tensor = call.output if reads == "output" else call.inputs[0]
    return Tap(call.module, reads, axes_of(tensor.shape, *PROBE_SHAPE))
