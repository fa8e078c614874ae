"""Interventions in the linear maps of an open model: small inputs become zero, and weights are rounded.

Hooks before the maps change their inputs alone: other modules that read the same tensor see it unchanged. Zeros are
counted. Rounded weights are the nearest numbers of a number format. Whole weights in memory are rounded once, and
replaced in place. Weights that are in memory only while their layer runs (offloaded ones, and those of ranks that
gather a layer) are rounded whenever their map runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError, nearest
from avss_dist.core.intervention import THRESHOLD, MapSparsity, Rounding, Sparsity
from avss_dist.core.process import bound
from avss_dist.models.change.number_formats import NumberFormat, fitting, number_format
from avss_dist.models.forward import around, hooked, replaced_parameters, with_parameters
from avss_dist.models.structure.layers import Layer, Projection, require_single_use, with_replaced

GROUP, MOST_DISTINCT = 32, 16  # neighbours that are looked at together, and values of 4 bits
SAMPLED = 8  # rows of a weight that are looked at


_Sparsified = tuple[torch.Tensor, torch.Tensor]
"""Input of a map after some elements became zero, and int64[2]: numbers of zeros and of elements."""
_SPARSE: ContextVar[torch.Tensor | None] = ContextVar("sparse", default=None)
"""Sparse tokens of the forward pass in this context, bool[rows, tokens], or None for all."""
_LAST: ContextVar[tuple[torch.Tensor, Any, _Sparsified] | None] = ContextVar("last", default=None)
"""Last sparsified input of the forward pass in this context, and how it was sparsified."""
_DENSE: ContextVar[bool] = ContextVar("dense", default=False)


@contextmanager
def dense() -> Iterator[None]:
    """Leave the inputs of linear maps unchanged, and count none, in passes inside the context."""
    with bound(_DENSE, True):
        yield


SparsityCounts = Callable[[], list[list[int]]]
"""Function that returns the numbers of [zeros, elements] so far in the inputs of each map of a `Sparsity`."""


@contextmanager
def sparsified(model: nn.Module, layers: Sequence[Layer], sparsity: Sparsity) -> Iterator[SparsityCounts]:
    """Have a model compute with sparse activations inside the context, and yield the counts of zeros.

    Args:
        model: the module that is called with token ids and, if rows are padded, ``attention_mask``.
        layers: its layers, from `find.find_structure`.

    Raises:
        ModelError: the model lacks one of the maps, or the map has another shape.
    """
    projections = [find_projection(layers, cut) for cut in sparsity.maps]
    sums: dict[int, torch.Tensor] = {}  # by map: int64[2], on its device
    norms: dict[nn.Module, torch.Tensor] = {}

    def add(number: int, counts: torch.Tensor) -> None:
        sums[number] = sums[number] + counts if number in sums else counts

    def counts() -> list[list[int]]:
        return [sums[number].tolist() if number in sums else [0, 0] for number in range(len(projections))]

    hooks = [
        (projection.module, partial(_sparsify, cut, projection, norms, partial(add, number)))
        for number, (cut, projection) in enumerate(zip(sparsity.maps, projections, strict=True))
    ]
    with bound(_SPARSE, None), bound(_LAST, None), hooked(before=[(model, partial(_begin, sparsity.rule)), *hooks]):
        yield counts


def find_projection(layers: Sequence[Layer], cut: MapSparsity) -> Projection:
    """Return the linear map that a `MapSparsity` names.

    Raises:
        ModelError: the model has no such map, it has another shape, or its layer is used more than once.
    """
    hint = "The plan was made for another model."
    layer = _layer_at(layers, cut.layer, "made sparse", hint)
    maps = {projection.path: projection for projection in layer.projections}
    if cut.path not in maps:
        raise ModelError(
            f"Layer {layer.index} has no linear map '{cut.path}' whose input is seen.",
            f"{hint} It has {', '.join(maps) or 'none: they are fused'}.",
        )
    projection = maps[cut.path]
    if (projection.outputs, projection.inputs) != (cut.outputs, cut.inputs):
        raise ModelError(
            f"'{cut.path}' of layer {layer.index} is {projection.outputs} x {projection.inputs}, "
            f"not {cut.outputs} x {cut.inputs}.",
            hint,
        )
    return projection


def _layer_at(layers: Sequence[Layer], index: int, change: str, hint: str | None = None) -> Layer:
    """Return a layer whose linear maps can be changed alone.

    Args:
        change: past participle, for the message.

    Raises:
        ModelError: the model has no such layer, or it is used more than once in a pass.
    """
    if index >= len(layers):
        raise ModelError(f"There is no layer {index}: the model has {len(layers)}, from 0.", hint)
    require_single_use(layers, layers[index], change)
    return layers[index]


def _begin(rule: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Set the sparse tokens of the forward pass that begins."""
    inputs = next(t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if t is not None)
    rows, tokens = inputs.shape[:2]
    _SPARSE.set(sparse_tokens(rule, rows, tokens, kwargs.get("attention_mask"), inputs.device))
    _LAST.set(None)


def sparse_tokens(
    rule: str, rows: int, tokens: int, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Return the tokens that a rule makes sparse, bool[rows, tokens] without padding, or None for all tokens.

    Several tokens at once are a prompt, whose positions are counted without padding. A single token is being decoded,
    and is always sparse.
    """
    real = None if attention_mask is None else attention_mask[:, -tokens:].to(device).bool()
    if rule == "all" or tokens == 1:
        return real
    real = torch.ones((rows, tokens), dtype=torch.bool, device=device) if real is None else real
    place, length = real.cumsum(dim=1), real.sum(dim=1, keepdim=True)  # from 1
    return real & (place > length // 2)


def _sparsify(
    cut: MapSparsity,
    projection: Projection,
    norms: dict[nn.Module, torch.Tensor],
    count: Callable[[torch.Tensor], None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return the arguments of a linear map with its sparsified input, and count its zeros."""
    if _DENSE.get():
        return None
    x = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
    how, last, tokens = (cut.by, cut.value), _LAST.get(), _SPARSE.get()
    if last is not None and last[0] is x and last[1] == how and not cut.weighted:
        sparse, counts = last[2]  # maps that read one tensor often have one cut
    else:
        removed = ~keep_mask(cut, x.detach(), column_norms(projection.module, norms) if cut.weighted else None)
        size = torch.tensor(x.numel(), device=x.device)
        if tokens is not None:
            by_token = (tokens.T if projection.axes == "tokens first" else tokens).to(x.device)
            where = by_token.reshape(x.shape[:-1]).unsqueeze(-1)
            removed, size = removed & where, where.sum() * x.shape[-1]
        sparse, counts = torch.where(removed, x.new_zeros(()), x), torch.stack([removed.sum(), size])
        _LAST.set((x, how, (sparse, counts)))
    count(counts)
    return with_replaced(args, kwargs, {id(x): sparse})


def keep_mask(cut: MapSparsity, x: torch.Tensor, norms: torch.Tensor | None = None) -> torch.Tensor:
    """Return a mask of the elements that stay as they are, bool[..., units].

    NaN stays.

    Args:
        x: input of the map, [..., units].
        norms: norms of the columns of its weight, [units], if sizes are weighted by them.
    """
    sizes = x.abs()
    if norms is not None:
        sizes = sizes * norms.to(x.dtype)
    if cut.by == THRESHOLD:
        return ~(sizes <= cut.value)
    number = sizes.shape[-1] - int(cut.value * sizes.shape[-1])
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    return chosen.scatter_(-1, sizes.topk(number, dim=-1, sorted=False).indices, True)


def column_norms(module: nn.Module, cache: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
    """Return the norms of the columns of a linear map's weight, float32[inputs], cached in ``cache``."""
    if module not in cache:
        cache[module] = torch.linalg.vector_norm(weight_of(module).float(), dim=0)
    return cache[module]


def weight_of(module: Any) -> torch.Tensor:
    """Return the weight of a linear map, [outputs, inputs], in its current dtype.

    Raises:
        ModelError: the weight is quantized.
    """
    weight: torch.Tensor = module.weight
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelError(f"The weight of a {type(module).__name__} is quantized: it cannot be read as numbers.")
    return weight.detach().T if type(module).__name__ == "Conv1D" else weight.detach()


def rounded_weight(module: nn.Module, target: NumberFormat) -> torch.Tensor:
    """Return the weight of a linear map after rounding, [outputs, inputs], in the weight's dtype.

    Raises:
        ModelError: the weight is quantized, or has a shape that the format cannot take.
    """
    weight = weight_of(module)
    if obstacle := target.obstacle(*weight.shape):
        raise ModelError(f"{target.name} cannot round a {type(module).__name__}: its {obstacle}.")
    return target.round(weight).to(weight.dtype)


def rounded_maps(layers: Sequence[Layer], rounding: Rounding) -> dict[Projection, NumberFormat]:
    """Return the linear maps that a rounding names, each with its format.

    Args:
        layers: all layers of the model.

    Raises:
        ModelError: the model lacks a layer or a map, a layer is used more than once, or a format cannot take a map.
    """
    formats: dict[Projection, NumberFormat] = {}
    for index in sorted(rounding.layers):
        layer = _layer_at(layers, index, "rounded alone")
        maps = {projection.path: projection for projection in layer.projections}
        for place in rounding.places:
            if place.layer == index and place.path is not None and place.path not in maps:
                raise ModelError(f"Layer {index} has no linear map '{place.path}'.", nearest(place.path, maps))
        for path, name in rounding.formats(index, maps).items():
            formats[maps[path]] = number_format(name)
            require_fit(layers, layer, maps[path], formats[maps[path]])
    return formats


def require_fit(layers: Sequence[Layer], layer: Layer, projection: Projection, target: NumberFormat) -> None:
    """Refuse a format that cannot take a linear map.

    Args:
        layers: all layers of the model.

    Raises:
        ModelError: the map has another shape. The hint names formats that can take all maps of the model.
    """
    if obstacle := target.obstacle(projection.outputs, projection.inputs):
        able = fitting((p.outputs, p.inputs) for other in layers for p in other.projections)
        raise ModelError(
            f"The number format {target.name} cannot take '{projection.path}' of layer {layer.index}: its {obstacle}.",
            f"Formats that can take every linear map of this model: {', '.join(able)}.",
        )


def rounded_before(layers: Sequence[Layer]) -> str | None:
    """Return a note that weights of linear maps were rounded before, or None if nothing suggests it.

    Weights of training differ among neighbours, even in bfloat16. Those that were unpacked from a format of 4 bits have
    at most 16 different values in a group. Some rows of every weight that is in memory are looked at.
    """
    maps = [projection for layer in layers for projection in layer.projections]
    coarse = sum(_distinct(projection) <= MOST_DISTINCT for projection in maps)
    if not coarse:
        return None
    return (
        f"{coarse} of {len(maps)} linear maps have at most {MOST_DISTINCT} different values among {GROUP} neighbouring "
        "weights: they were rounded before, and rounding them again says little of the original"
    )


def _distinct(projection: Projection) -> int:
    """Return the largest number of different values in a group of neighbours, or `GROUP` if the weight is not here."""
    weight = projection.module.get_parameter("weight")
    if weight.is_meta or hasattr(weight, "to_local") or weight.numel() != projection.outputs * projection.inputs:
        return GROUP
    sampled = weight_of(projection.module)[:SAMPLED].reshape(-1)
    groups = sampled[: len(sampled) // GROUP * GROUP].reshape(-1, GROUP).sort(dim=1).values
    return 1 + int((groups.diff(dim=1) != 0).sum(dim=1).max()) if len(groups) else GROUP


@contextmanager
def rounded(layers: Sequence[Layer], rounding: Rounding, *, when_called: bool = False) -> Iterator[None]:
    """Have layers compute with rounded weights inside the context, and restore the weights exactly.

    Args:
        when_called: weights are in memory, or whole, only while their layer runs.

    Raises:
        ModelError: see `rounded_maps`.
    """
    maps = {projection.module: target for projection, target in rounded_maps(layers, rounding).items()}

    def current(module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
        weight = rounded_weight(module, maps[module])
        stored = weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight
        return {module.get_parameter("weight"): stored}

    absent = [module for module in maps if when_called or module.get_parameter("weight").is_meta]
    present = [current(module) for module in maps if module not in absent]
    with (
        replaced_parameters({weight: value for values in present for weight, value in values.items()}),
        around({module: partial(with_parameters, partial(current, module)) for module in absent}, weights=True),
    ):
        yield
