"""Routed experts that are removed from an open model.

Inside its ``forward`` a router holds the rows of the remaining experts alone, so that it computes exactly what the
router of a pruned checkpoint does. The indices that it returns are those of the whole model, and the logits of removed
experts are minus infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import (
    Removal,
    experts_by_layer,
)
from avss_dist.core.process import bound
from avss_dist.models.forward import (
    around,
    replace_tensor,
    replaced_attributes,
)
from avss_dist.models.structure.experts import COUNT, ELSEWHERE, ROUTER_TENSORS, require_routed_experts
from avss_dist.models.structure.layers import (
    Layer,
    first_tensor,
)

_Removed = Mapping[nn.Module, frozenset[int]]  # by router


def require_experts(layers: Sequence[Layer], removed: Collection[Removal]) -> None:
    """Refuse experts that the model does not have, or that cannot be removed.

    Raises:
        ModelError: an expert cannot be removed; the message names the layer, and has the reason.
    """
    for index, experts in experts_by_layer(removed).items():
        layer = layers[index]
        routed, called = require_routed_experts(layer.module, index, experts), layer.experts
        if called is None or called.module is not layer.module.get_submodule(routed.experts):
            raise ModelError(
                f"Layer {index} calls its routed experts in a way that is not seen, so none can be removed.",
                ELSEWHERE,
            )


_REMOVED: ContextVar[_Removed] = ContextVar("removed experts", default=MappingProxyType({}))


@contextmanager
def without_experts(layers: Sequence[Layer], removed: Collection[Removal]) -> Iterator[None]:
    """Have routers choose among the remaining experts inside the context.

    Interleaved passes are not affected.

    Args:
        layers: layers of the model, for which `require_experts` passes.
    """
    before = _REMOVED.get()
    routers = dict(before)
    choices = {}
    for index, experts in experts_by_layer(removed).items():
        routed = require_routed_experts(layers[index].module, index, experts)
        router = layers[index].module.get_submodule(routed.router)
        routers[router] = before.get(router, frozenset()) | {*experts}
        if router not in before:
            choices[router] = partial(_choose, router, routed.number)
    with around(choices, weights=True), bound(_REMOVED, routers):
        yield


def _choose(router: nn.Module, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a router of ``number`` experts, as an action of `around`, so that it chooses among the remaining ones.

    It holds their rows alone while it runs. Instance attributes hide its tensors.
    """
    weight: Any = router.weight
    keep = torch.tensor([e for e in range(number) if e not in _REMOVED.get()[router]], device=weight.device)

    def shorten(value: Any) -> Any:
        """Return an argument without the removed experts, if it is a vector with an element for each."""
        is_vector = isinstance(value, torch.Tensor) and value.shape == (number,)
        return value.index_select(0, keep) if is_vector else value

    tensors = {name: getattr(router, name, None) for name in ROUTER_TENSORS}
    rows = {name: t.index_select(0, keep) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    with replaced_attributes([(router, {**rows, COUNT: len(keep)})]):
        output = forward(*map(shorten, args), **{name: shorten(value) for name, value in kwargs.items()})
    logits = first_tensor(output)
    if logits is None or logits.shape[-1] != len(keep):
        raise ModelError(f"A {type(router).__name__} returns no logits of its experts.", ELSEWHERE)
    whole = logits.new_full((*logits.shape[:-1], number), -torch.inf).index_copy(-1, keep, logits)
    index = next((t for t in output if isinstance(t, torch.Tensor) and not t.is_floating_point()), None)
    if index is None:
        raise ModelError(f"A {type(router).__name__} does not choose experts itself.", ELSEWHERE)
    return replace_tensor(replace_tensor(output, logits, whole), index, keep[index].to(index.dtype))
