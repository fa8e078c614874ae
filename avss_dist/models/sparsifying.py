"""Running a model with small inputs of its linear maps set to zero, in place, and counting how many are.

Hooks before the linear maps change what these read, and nothing else: other modules that read the same tensor see all
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.errors import ModelError
from avss_dist.intervention import MapSparsity, Sparsity
from avss_dist.models.layers import Layer, Projection
from avss_dist.settings import THRESHOLD, TOP_K, TOP_P
from avss_dist.system.context import bound


@dataclass
class _Tokens:
    """A forward pass: which of its tokens are made sparse, bool[rows, tokens], or None for all; and the last result."""

    sparse: torch.Tensor | None
    last: tuple[torch.Tensor, Any, _Thinned] | None = None


@dataclass(frozen=True)
class _Thinned:
    """What a map reads instead, how many elements became zero, and of how many: int64[]."""

    x: torch.Tensor
    zeros: torch.Tensor
    count: torch.Tensor


_TOKENS: ContextVar[_Tokens | None] = ContextVar("tokens", default=None)
_UNCOUNTED: ContextVar[bool] = ContextVar("uncounted", default=False)


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, passes are made sparse, and count for nothing."""
    with bound(_UNCOUNTED, True):
        yield


def is_counted() -> bool:
    """Whether passes count, which they do outside of `uncounted`."""
    return not _UNCOUNTED.get()


@dataclass
class SparsityCounts:
    """Zeros and elements of the inputs of each map of a `Sparsity`, in its order: int64[2] on the device of the map."""

    by_map: list[torch.Tensor | None]

    def add(self, number: int, thinned: _Thinned) -> None:
        """Add what a map read."""
        if is_counted():
            both = torch.stack([thinned.zeros, thinned.count])
            before = self.by_map[number]
            self.by_map[number] = both if before is None else before + both

    def values(self) -> list[list[int]]:
        """Return zeros and elements of every map."""
        return [[0, 0] if both is None else both.tolist() for both in self.by_map]


@contextmanager
def sparsified(model: nn.Module, layers: Sequence[Layer], sparsity: Sparsity) -> Iterator[SparsityCounts]:
    """Inside, the model computes with sparse activations; no hook is left behind.

    Args:
        model: what is called with token ids and, where rows are padded, ``attention_mask``.
        layers: its layers, of `structure.find_structure`.

    Raises:
        ModelError: it has not the maps that are named.
    """
    found = [find_projection(layers, cut) for cut in sparsity.maps]
    counts = SparsityCounts([None] * len(found))
    norms: dict[nn.Module, torch.Tensor] = {}
    with bound(_TOKENS, None), ExitStack() as stack:
        begin = partial(_begin, sparsity.rule)
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for number, (cut, projection) in enumerate(zip(sparsity.maps, found, strict=True)):
            thin = partial(_thin, cut, projection.axes, norms, partial(counts.add, number))
            stack.callback(changing(projection, thin).remove)
        yield counts


def find_projection(layers: Sequence[Layer], cut: MapSparsity) -> Projection:
    """The linear map that a cut names.

    Raises:
        ModelError: there is none, it has another shape, or its layer is used more than once.
    """
    made = "The plan was made for another model."
    if cut.layer >= len(layers):
        raise ModelError(f"There is no layer {cut.layer}: the model has {len(layers)}, from 0.", made)
    layer = layers[cut.layer]
    known = {one.path: one for one in layer.maps}
    if cut.path not in known:
        raise ModelError(
            f"Layer {layer.index} has no linear map '{cut.path}' whose input is seen.",
            f"{made} It has {', '.join(known) or 'none: they are fused'}.",
        )
    one = known[cut.path]
    if (one.outputs, one.inputs) != (cut.outputs, cut.inputs):
        raise ModelError(
            f"'{cut.path}' of layer {layer.index} is {one.outputs} x {one.inputs}, not {cut.outputs} x {cut.inputs}.",
            made,
        )
    if [other.module for other in layers].count(layer.module) > 1:
        raise ModelError(f"Layer {layer.index} ({layer.name}) is used more than once; it cannot be made sparse.")
    return one


def _begin(rule: str, _module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A forward pass begins: find out which of its tokens are made sparse."""
    given = next(t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if t is not None)
    rows, tokens = given.shape[:2]
    _TOKENS.set(_Tokens(sparse_tokens(rule, rows, tokens, kwargs.get("attention_mask"), given.device)))


def sparse_tokens(
    rule: str, rows: int, tokens: int, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """bool[rows, tokens] of the tokens that a rule makes sparse, padding left out; None for all.

    Several tokens at once are a prompt, whose places are counted without its padding. One token is decoded, and sparse.
    """
    real = None if attention_mask is None else attention_mask[:, -tokens:].to(device).bool()
    if rule == "all" or tokens == 1:
        return real
    real = torch.ones((rows, tokens), dtype=torch.bool, device=device) if real is None else real
    place, length = real.cumsum(dim=1), real.sum(dim=1, keepdim=True)  # from 1
    if rule == "dense-prefill":
        return torch.zeros_like(real)
    return real & (place > (length // 2 if rule == "last-half" else 1))


Change = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""From a module and what it reads (of a gate, gives) to what it reads (gives) instead."""


def changing(projection: Projection, change: Change, *, first: bool = False) -> Any:
    """Register a hook that changes what a map reads, or what a gate gives; its handle.

    Args:
        first: before hooks that are there, so that it sees what they have not changed.
    """

    def reads(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        instead = change(module, x)
        return (
            tuple(instead if value is x else value for value in args),
            {name: instead if value is x else value for name, value in kwargs.items()},
        )

    def gives(module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return change(module, output)

    if projection.gates:
        return projection.module.register_forward_hook(gives, prepend=first)
    return projection.module.register_forward_pre_hook(reads, with_kwargs=True, prepend=first)


def _thin(
    cut: MapSparsity,
    axes: str,
    norms: dict[nn.Module, torch.Tensor],
    count: Callable[[_Thinned], None],
    module: nn.Module,
    x: torch.Tensor,
) -> torch.Tensor:
    """What a linear map reads instead of its input."""
    now = _TOKENS.get()
    how = (cut.by, cut.value, cut.center, cut.kept, cut.group)
    if now is not None and now.last is not None and now.last[0] is x and now.last[1] == how and not cut.weighted:
        thinned = now.last[2]  # maps that read one tensor often have one cut
    else:
        keep = kept(cut, x.detach(), column_norms(module, norms) if cut.weighted else None)
        thinned = _applied(x, keep, cut.center, None if now is None else now.sparse, axes)
        if now is not None:
            now.last = (x, how, thinned)
    count(thinned)
    return thinned.x


def _applied(x: torch.Tensor, keep: torch.Tensor, center: float, sparse: torch.Tensor | None, axes: str) -> _Thinned:
    instead = x.new_full((), center)
    if sparse is None:
        return _Thinned(torch.where(keep, x, instead), (~keep).sum(), torch.tensor(x.numel(), device=x.device))
    where = over_tokens(sparse, x, axes).unsqueeze(-1)
    count = where.sum() * x.shape[-1]
    gone = ~keep & where
    return _Thinned(torch.where(gone, instead, x), gone.sum(), count)


def over_tokens(sparse: torch.Tensor, x: torch.Tensor, axes: str) -> torch.Tensor:
    """bool[rows, tokens] of tokens, in the axes of what a map reads: bool[x.shape[:-1]]."""
    where = (sparse.T if axes == "tokens first" else sparse).to(x.device)
    return where.reshape(x.shape[:-1])


def kept(cut: MapSparsity, x: torch.Tensor, norms: torch.Tensor | None = None) -> torch.Tensor:
    """bool[..., units]: which elements stay as they are; NaN stays.

    Args:
        x: [..., units].
        norms: [units] of the columns of the weight, where sizes are weighted.
    """
    sizes = (x - cut.center).abs() if cut.center else x.abs()
    if norms is not None:
        sizes = sizes * norms.to(x.dtype)
    if cut.by == THRESHOLD:
        stays = ~(sizes <= cut.value)
    elif cut.by == TOP_K:
        number = sizes.shape[-1] - int(cut.value * sizes.shape[-1])
        stays = _largest(sizes, number)
    else:
        assert cut.by == TOP_P
        stays = _covering(sizes, cut.value)
    if cut.group:
        grouped = sizes.reshape(*sizes.shape[:-1], -1, cut.group)
        stays = stays & _largest(grouped, cut.kept).reshape(sizes.shape)
    return stays


def _largest(sizes: torch.Tensor, number: int) -> torch.Tensor:
    """bool, True at the ``number`` largest along the last axis."""
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    return chosen.scatter_(-1, sizes.topk(number, dim=-1, sorted=False).indices, True)


def _covering(sizes: torch.Tensor, share: float) -> torch.Tensor:
    """bool, True at the fewest elements along the last axis whose sum is a share of all."""
    ordered, order = sizes.float().sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    needed = before < share * ordered.sum(dim=-1, keepdim=True)
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, order, needed)


def column_norms(module: nn.Module, known: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
    """float32[inputs]: the norm of what each input of a linear map is multiplied by."""
    if module not in known:
        known[module] = torch.linalg.vector_norm(weight_of(module).float(), dim=0)
    return known[module]


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map, [outputs, inputs], as it computes now.

    Raises:
        ModelError: it is quantized.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelError(f"The weight of a {type(module).__name__} is quantized: it cannot be read as numbers.")
    return weight.detach().T if type(module).__name__ == "Conv1D" else weight.detach()
