"""Base of observers of one batch's hidden states and gradients, which hooks find in a context variable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.models.layers import Layer, Projection
from avss_dist.system.process import bound


class Watched:
    """Observer of one pass. See `causal_lm.Watching`."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Make this observer current for hooks inside the context."""
        with bound(WATCHED, self):
            yield


WATCHED: ContextVar[Any] = ContextVar("watched", default=None)


@contextmanager
def watched_maps(maps: Iterable[tuple[Layer, Projection]]) -> Iterator[None]:
    """Report linear maps to the current observer inside the context, while gradients are enabled.

    Its method ``see`` is called with the layer, the map, the map's input and its output whenever the map has run.
    """

    def see(layer: Layer, projection: Projection, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and WATCHED.get() is not None:
            x = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            WATCHED.get().see(layer, projection, x, output)

    with ExitStack() as stack:
        for layer, projection in maps:
            hook = partial(see, layer, projection)
            stack.callback(projection.module.register_forward_hook(hook, with_kwargs=True).remove)
        yield
