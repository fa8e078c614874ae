"""The head of a causal language model: the logits of some tokens at a time, by the model's own code.

What a family does with logits (it scales or caps them, or leaves some out) is in its ``forward``. So that is what runs
for each piece: its body, which has run, gives what it gave of a few tokens before, and its output embeddings take the
hidden states of the piece in place of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from avss_dist.models.layers import PROBE_SHAPE, Layer
from avss_dist.models.skipping import replaced_forwards
from avss_dist.system.context import bound

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By how much logits of pieces may differ from those of all tokens, of the largest, for the head to be split."""


class Head(Protocol):
    """From what a model gives its head to logits.

    Attributes:
        vocabulary: how many logits a token has.
    """

    vocabulary: int

    def hidden_states(self, run: Callable[[], Any]) -> torch.Tensor:
        """[rows, tokens, units], where they are: what the head is given in a forward pass. ``run`` runs the model."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary] of hidden states, [tokens, units]."""


def find_head(module: Any, layers: Sequence[Layer], device: torch.device) -> Head:
    """The head of a model, by one forward pass over ``PROBE_SHAPE`` tokens.

    A model whose logits of pieces are not those of all tokens is not split: it has the logits of a batch at once.
    """
    ids = torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=device).reshape(PROBE_SHAPE)
    linear = module.get_output_embeddings()
    if isinstance(linear, nn.Module):
        linear.forward = partial(_forward, linear.forward)
    seen = _Use()
    with torch.no_grad(), _outputs(module, layers) as outputs, bound(_USE, seen):
        logits: torch.Tensor = module(input_ids=ids, use_cache=False).logits
    whole = WholeHead(logits.shape[-1])
    if not outputs or len(seen.given) != 1 or seen.given[0].shape[:-1] != PROBE_SHAPE or seen.given[0].dim() != 3:
        return whole
    body = min(outputs, key=lambda path: path.count("."))
    head = SplitHead(module, module.get_submodule(body), outputs[body], ids, whole.vocabulary)
    try:
        with torch.no_grad():
            found = head.logits(seen.given[0].flatten(0, 1))
    except Exception:  # a model's own code can raise anything where less runs than it expects
        return whole
    expected = logits.flatten(0, 1)
    most = TOLERANCES.get(found.dtype, 0.0) * expected.abs().max()
    return head if found.shape == expected.shape and bool(((found - expected).abs() <= most).all()) else whole


class WholeHead:
    """See `Head`: of a model that is not split, what the head is given is taken to be the logits."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def hidden_states(self, run: Callable[[], Any]) -> torch.Tensor:
        """See `Head`."""
        logits: torch.Tensor = run().logits
        return logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Head`."""
        return hidden


class SplitHead:
    """See `Head`.

    Args:
        body: what of the model runs its layers; it gave ``output`` of ``input_ids``.
    """

    def __init__(self, module: Any, body: nn.Module, output: Any, input_ids: torch.Tensor, vocabulary: int) -> None:
        self._module, self._body, self._output, self._input_ids = module, body, output, input_ids
        self.vocabulary = vocabulary

    def hidden_states(self, run: Callable[[], Any]) -> torch.Tensor:
        """See `Head`. The output embeddings do not run."""
        use = _Use(runs=False)
        with bound(_USE, use):
            run()
        (given,) = use.given
        return given

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Head`."""
        with bound(_USE, _Use(instead=hidden[None])), replaced_forwards({self._body: lambda *_, **__: self._output}):
            logits: torch.Tensor = self._module(input_ids=self._input_ids, use_cache=False).logits
        return logits.squeeze(0)


@dataclass(frozen=True)
class _Use:
    """What output embeddings do with what they are given in a pass.

    Attributes:
        given: it is kept here.
        runs: they run; else they give nothing that is of use.
        instead: what they take in its place.
    """

    given: list[torch.Tensor] = field(default_factory=list)
    runs: bool = True
    instead: torch.Tensor | None = None


_USE: ContextVar[_Use | None] = ContextVar("use", default=None)  # passes may run interleaved


def _forward(own: Callable[..., Any], given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The ``forward`` of output embeddings, whose own one is ``own``."""
    use = _USE.get()
    if use is None:
        return own(given, *args, **kwargs)
    if use.instead is not None:
        return own(use.instead, *args, **kwargs)
    use.given.append(given)
    return own(given, *args, **kwargs) if use.runs else given.new_zeros((*given.shape[:-1], 1))


@contextmanager
def _outputs(module: nn.Module, layers: Sequence[Layer]) -> Iterator[dict[str, Any]]:
    """Inside, what the modules give that hold the layers, by path; not the model itself."""
    outputs: dict[str, Any] = {}
    path = next(name for name, child in module.named_modules() if child is layers[0].module)
    parts = path.split(".")

    def keep(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        outputs[path] = output

    with ExitStack() as stack:
        for end in range(1, len(parts)):
            above = ".".join(parts[:end])
            handle = module.get_submodule(above).register_forward_hook(partial(keep, above))
            stack.callback(handle.remove)
        yield outputs
