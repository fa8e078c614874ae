"""First-order estimates of layer removal, and norms of gradients and weights, from one backward pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel, predicted
from avss_dist.models.layers import Layer, as_rows, first_tensor, input_tensor
from avss_dist.partition.splitting import whole_norms
from avss_dist.stats.layer_stats import Float64
from avss_dist.system.devices import to_device
from avss_dist.tasks.base import Row, predicted_tokens
from avss_dist.tasks.watching import WATCHED, Watched

TAYLOR = "taylor"  # nats per predicted token; low is unimportant
L1, L2, FROBENIUS = "gradient_l1", "gradient_l2", "weight_frobenius"
CHUNK = 2048  # tokens whose updates exist at once


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradient measures of each layer, from a forward and a backward pass for each batch of a shard.

    - ``taylor``: the sum over tokens of ``|<dL/d out, out - in>|``, where L is the summed negative log-likelihood in
      nats, per predicted token; a sample for each sequence. It estimates, to first order, the change of the loss if the
      layer returned its input; absolute values keep signs from cancelling (Molchanov et al., arXiv 1906.10771, 3.1).
    - ``gradient_l1``, ``gradient_l2``: sums of the norms of the gradients of the weight matrices; a sample for each
      batch, where L is the mean over its predicted tokens (as in the AVSS authors' script, arXiv 2411.02117).
    - ``weight_frobenius``: sum of the norms of the weight matrices.
    """

    shard: Shard

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="gradients", shard=self.shard.content_hash)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`."""
        layers = [layer for layer in model.layers if layer.index not in intervention.removed]
        batches = list(self.shard.batches(model.settings.batch_size))
        passes = [_Pass.start(batch, model.device) for batch in batches]
        with model.applying(intervention), trainable(model.module, layers), _hooked(layers):
            passes = model.backpropagate(batches, passes)
        weights = predicted_tokens(self.shard, model)
        return [row for layer in layers for row in _rows(layer, passes, weights)]


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the weight matrices of a layer, including stacks of matrices (experts), without convolutions."""
    by_id = {
        id(parameter): parameter
        for child in module.modules()
        if not isinstance(child, nn.Conv1d)
        for parameter in child.parameters(recurse=False)
        if len(_shape(parameter)) in (2, 3) and parameter.is_floating_point()
    }
    return list(by_id.values())


def _shape(parameter: nn.Parameter) -> Sequence[int]:
    """Return the shape of the whole parameter, of which this process may have only a part with DeepSpeed ZeRO-3."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


class _SavedTensor:
    """Reference to a tensor that the backward pass saves anyway, so that it takes no further memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self._version = tensor, tensor._version

    @property
    def has_changed(self) -> bool:
        """Whether the tensor was changed in place since."""
        return self.tensor._version != self._version


@dataclass
class _Pass(Watched):
    """Sums that hooks collect in one forward and backward pass, by layer."""

    real: torch.Tensor  # bool[rows, tokens]
    scale: float  # of the norms of gradients
    keeps: int = 1
    # float64, on the devices that computed them: nothing waits for a device before all is under way
    removal: dict[int, torch.Tensor] = field(default_factory=dict)  # [rows]
    norms: defaultdict[tuple[int, int], Any] = field(default_factory=partial(defaultdict, float))  # and by order
    sizes: dict[int, Any] = field(default_factory=dict)  # of the weights
    _calls: Counter[int] = field(default_factory=Counter)
    _saved_input: _SavedTensor | None = None

    @staticmethod
    def start(batch: Batch, device: torch.device) -> _Pass:
        real = to_device(batch.attention_mask, device)
        return _Pass(real=real, scale=max(1.0, float(predicted(batch).sum())))

    def enter(self, uses: Sequence[Layer], module: nn.Module, args: Any, kwargs: Any) -> None:
        if uses[0].index not in self.sizes:  # weights may be gone when the layer has run
            self.sizes |= dict.fromkeys([use.index for use in uses], sum(_norms(w, 2) for w in matrices(module)))
        hidden = input_tensor(args, kwargs)
        self._saved_input = None if hidden is None else _SavedTensor(hidden.detach())

    def leave(self, uses: Sequence[Layer], output: Any) -> None:
        layer = uses[self._calls[uses[0].index] % len(uses)]
        self._calls[uses[0].index] += 1
        out, saved_input, self._saved_input = first_tensor(output), self._saved_input, None
        if out is None or saved_input is None or out.shape != saved_input.tensor.shape:
            raise ModelError(f"Layer {layer.index} ({layer.name}) does not keep the shape of its input.")
        out.register_hook(partial(self._remove, layer, saved_input, _SavedTensor(out.detach())))

    def _remove(
        self, layer: Layer, saved_input: _SavedTensor, saved_output: _SavedTensor, gradient: torch.Tensor
    ) -> None:
        if saved_input.has_changed or saved_output.has_changed:
            raise ModelError(f"Layer {layer.index} ({layer.name}), or one behind it, changes its input in place.")
        chunks = (self._tokens(layer, x).split(CHUNK) for x in (gradient, saved_output.tensor, saved_input.tensor))
        products = [(g.double() * (y.float() - x.float())).sum(dim=1) for g, y, x in zip(*chunks, strict=True)]
        changes = torch.cat(products).abs().view(self.real.shape).where(self.real.to(gradient.device), 0)
        self.removal[layer.index] = changes.sum(dim=1)

    def _tokens(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """Return a layer's input or output as [all tokens, units]."""
        by_row = as_rows(x, layer.axes, *self.real.shape)
        if by_row is None:
            raise ModelError(f"Layer {layer.index} ({layer.name}) does not keep rows and tokens apart.")
        return by_row.flatten(0, 1)

    def accumulate(self, uses: Sequence[Layer], weight: torch.Tensor) -> None:
        """Add the norms of a weight's gradient, and free the gradient."""
        assert weight.grad is not None
        for order in (1, 2):
            norm = _norms(weight.grad, order) / self.scale
            for layer in uses:
                self.norms[layer.index, order] += norm
        weight.grad = None


@contextmanager
def _hooked(layers: Sequence[Layer]) -> Iterator[None]:
    """Report layers to the current pass inside the context, while gradients are enabled.

    Hooks of weights are registered when their layer begins, because streamed weights are replaced between passes.
    """
    uses: defaultdict[nn.Module, list[Layer]] = defaultdict(list)
    for layer in layers:
        uses[layer.module].append(layer)
    with ExitStack() as stack:
        hooked = WeakIdKeyDictionary()

        def enter(layers_of_module: Sequence[Layer], module: nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            WATCHED.get().enter(layers_of_module, module, args, kwargs)
            for weight in matrices(module):
                if weight not in hooked:
                    hooked[weight] = True
                    hook = partial(_accumulate, layers_of_module)
                    stack.callback(weight.register_post_accumulate_grad_hook(hook).remove)

        def leave(layers_of_module: Sequence[Layer], _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                WATCHED.get().leave(layers_of_module, output)

        for module, layers_of_module in uses.items():
            stack.callback(module.register_forward_pre_hook(partial(enter, layers_of_module), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(leave, layers_of_module), with_kwargs=True).remove)
        yield


def _accumulate(uses: Sequence[Layer], weight: torch.Tensor) -> None:
    WATCHED.get().accumulate(uses, weight)


@contextmanager
def trainable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Require gradients of the layers' matrices alone inside the context."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(weight) for layer in layers for weight in matrices(layer.module)}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


def _norms(matrix: torch.Tensor, order: int) -> torch.Tensor:
    """Return the vector norm of a matrix's elements, summed over a stack of matrices."""
    return whole_norms(matrix.detach(), order).sum()


def _rows(layer: Layer, passes: Sequence[_Pass], weights: Float64) -> Iterator[Row]:
    removal = np.concatenate([batch.removal[layer.index].cpu().numpy() for batch in passes])
    yield Row(metric=TAYLOR, samples=removal, weights=weights, layer=layer.index)
    ones = np.ones(len(passes))
    for metric, order in ((L1, 1), (L2, 2)):
        samples = np.array([float(batch.norms[layer.index, order]) for batch in passes])
        yield Row(metric=metric, samples=samples, weights=ones, layer=layer.index)
    size = float(next(batch.sizes[layer.index] for batch in passes))
    yield Row(metric=FROBENIUS, samples=np.array([size]), weights=np.ones(1), layer=layer.index)
