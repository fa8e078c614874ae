"""Small inputs of linear maps that become zero.

Hooks before the maps change their inputs alone: other modules that read the same tensor see it unchanged. Zeros are
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.core.intervention import (
    THRESHOLD,
    MapSparsity,
    Sparsity,
)
from avss_dist.core.process import bound
from avss_dist.models.forward import (
    hooked,
)
from avss_dist.models.structure.layers import (
    Layer,
    Projection,
    with_replaced,
)
from avss_dist.models.structure.linear_maps import find_projection, weight_of

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
