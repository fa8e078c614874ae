"""Small inputs of linear maps that become zero.

Hooks before the maps change their inputs alone: other modules that read the same tensor see it unchanged. Zeros are
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn

from avss_dist.core.intervention import THRESHOLD, MapSparsity, Sparsity
from avss_dist.core.process import bound
from avss_dist.models.forward import Arguments, BindVariable, CallBefore, Change, Keywords
from avss_dist.models.structure.layers import Layer, Projection, tensors_of, with_replaced
from avss_dist.models.structure.linear_maps import find_projection, weight_of

_DENSE: ContextVar[bool] = ContextVar("dense", default=False)


@contextmanager
def dense() -> Iterator[None]:
    """Leave the inputs of linear maps unchanged, and count none, in passes inside the context."""
    with bound(_DENSE, True):
        yield


@dataclass
class SparsityCounts:
    """Counts of zeros in the inputs of the linear maps of a `Sparsity`, on the devices of the maps."""

    sparsity: Sparsity
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, number: int, counts: torch.Tensor) -> None:
        """Add the numbers of [zeros, elements] of an input of a map, int64[2]."""
        if number in self._sums:
            counts = self._sums[number] + counts
        self._sums[number] = counts

    def by_map(self) -> list[list[int]]:
        """Return the numbers of [zeros, elements] so far in the inputs of each map."""
        counts = []
        for number in range(len(self.sparsity.maps)):
            if number in self._sums:
                counts.append(self._sums[number].tolist())
            else:
                counts.append([0, 0])
        return counts


def sparsity_changes(model: nn.Module, layers: Sequence[Layer], counts: SparsityCounts) -> list[Change]:
    """Return the changes by which a model computes with sparse activations, and adds to counts of zeros.

    Args:
        model: the module that is called with token ids and, if rows are padded, ``attention_mask``.
        layers: its layers, from `find.find_structure`.

    Raises:
        ModelError: the model lacks one of the maps, or the map has another shape.
    """
    sparsity = counts.sparsity
    norms: dict[nn.Module, torch.Tensor] = {}
    changes: list[Change] = [
        BindVariable(_PASS, _SparsePass(tokens=None)),
        CallBefore(model, _PassStart(sparsity.rule)),
    ]
    for number, cut in enumerate(sparsity.maps):
        projection = find_projection(layers, cut)
        hook = _SparseInput(number, cut, projection, norms, counts)
        changes.append(CallBefore(projection.module, hook))
    return changes


@dataclass(frozen=True)
class _SparsifiedInput:
    """Input of a linear map, and what became of it.

    Attributes:
        original: the input.
        by, value: the rule, see `MapSparsity`.
        sparse: the input after some elements became zero.
        counts: int64[2], numbers of zeros and of elements.
    """

    original: torch.Tensor
    by: str
    value: float
    sparse: torch.Tensor
    counts: torch.Tensor


@dataclass
class _SparsePass:
    """A forward pass with sparse activations.

    Attributes:
        tokens: sparse tokens, bool[rows, tokens], or None for all.
        last: the last sparsified input. Maps that read one tensor often have one rule.
    """

    tokens: torch.Tensor | None
    last: _SparsifiedInput | None = None


_PASS: ContextVar[_SparsePass] = ContextVar("sparse pass")
"""The pass of this context. It stays after its end for layers that run again for their gradients."""


@dataclass(frozen=True)
class _PassStart:
    """Hook before a model, which sets the sparse tokens of the forward pass that begins."""

    rule: str

    def __call__(self, args: Arguments, kwargs: Keywords) -> None:
        inputs = _model_input(args, kwargs)
        rows, tokens = inputs.shape[:2]
        attention_mask = kwargs.get("attention_mask")
        assert attention_mask is None or isinstance(attention_mask, torch.Tensor)
        sparse = sparse_tokens(self.rule, rows, tokens, attention_mask, inputs.device)
        _PASS.set(_SparsePass(sparse))


def _model_input(args: Arguments, kwargs: Keywords) -> torch.Tensor:
    """Return the token ids or embeddings among the arguments of a call of a model."""
    for name in ("input_ids", "inputs_embeds"):
        tensor = kwargs.get(name)
        if isinstance(tensor, torch.Tensor):
            return tensor
    tensor = next(value for value in args if value is not None)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def sparse_tokens(
    rule: str, rows: int, tokens: int, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Return the tokens that a rule makes sparse, bool[rows, tokens] without padding, or None for all tokens.

    Several tokens at once are a prompt, whose positions are counted without padding. A single token is being decoded,
    and is always sparse.
    """
    real = None
    if attention_mask is not None:
        real = attention_mask[:, -tokens:].to(device).bool()
    if rule == "all" or tokens == 1:
        return real
    if real is None:
        real = torch.ones((rows, tokens), dtype=torch.bool, device=device)
    place = real.cumsum(dim=1)  # The first token has place 1.
    length = real.sum(dim=1, keepdim=True)
    return real & (place > length // 2)


@dataclass(frozen=True)
class _SparseInput:
    """Hook before a linear map, which returns its arguments with a sparse input, and counts its zeros.

    Attributes:
        number: number of the map in the `Sparsity`.
        norms: norms of columns by module, computed when they are needed.
    """

    number: int
    cut: MapSparsity
    projection: Projection
    norms: dict[nn.Module, torch.Tensor]
    counts: SparsityCounts

    def __call__(self, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords] | None:
        if _DENSE.get():
            return None
        x = tensors_of(args, kwargs)[0]
        current = _PASS.get()
        sparsified = current.last
        if sparsified is None or not self._applies(sparsified, x):
            sparsified = self._sparsify(x, current.tokens)
            current.last = None if self.cut.weighted else sparsified
        self.counts.add(self.number, sparsified.counts)
        return with_replaced(args, kwargs, {id(x): sparsified.sparse})

    def _applies(self, last: _SparsifiedInput, x: torch.Tensor) -> bool:
        """Whether what became of another map's input is what becomes of this one."""
        if self.cut.weighted:  # The norms of another map's columns differ.
            return False
        return last.original is x and last.by == self.cut.by and last.value == self.cut.value

    def _sparsify(self, x: torch.Tensor, tokens: torch.Tensor | None) -> _SparsifiedInput:
        """Make small elements of an input zero.

        Args:
            tokens: sparse tokens, bool[rows, tokens], or None for all.
        """
        norms = None
        if self.cut.weighted:
            norms = column_norms(self.projection.module, self.norms)
        removed = ~keep_mask(self.cut, x.detach(), norms)
        size = torch.tensor(x.numel(), device=x.device)
        if tokens is not None:
            by_token = tokens.T if self.projection.axes == "tokens first" else tokens
            where = by_token.to(x.device).reshape(x.shape[:-1]).unsqueeze(-1)
            removed = removed & where
            size = where.sum() * x.shape[-1]
        sparse = torch.where(removed, x.new_zeros(()), x)
        counts = torch.stack([removed.sum(), size])
        return _SparsifiedInput(x, self.cut.by, self.cut.value, sparse, counts)


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
    units = sizes.shape[-1]
    number = units - int(cut.value * units)
    largest = sizes.topk(number, dim=-1, sorted=False).indices
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, largest, True)


def column_norms(module: nn.Module, cache: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
    """Return the norms of the columns of a linear map's weight, float32[inputs], cached in ``cache``."""
    if module not in cache:
        cache[module] = torch.linalg.vector_norm(weight_of(module).float(), dim=0)
    return cache[module]
