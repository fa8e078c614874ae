"""What one backward pass says about layers: how much their removal would change the loss, to first order; norms."""

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

from avss_dist.corpus.shards import Batch, Shard
from avss_dist.errors import ModelError
from avss_dist.intervention import NO_INTERVENTION, Intervention
from avss_dist.models.causal_lm import LanguageModel, predicted
from avss_dist.models.layers import Layer, as_rows, first_tensor, input_tensor
from avss_dist.settings import fingerprint
from avss_dist.stats.layer_stats import Float64
from avss_dist.system.devices import to_device
from avss_dist.tasks.base import Row, predicted_tokens
from avss_dist.tasks.watching import WATCHED, Watched

TAYLOR = "taylor"  # nats per predicted token; low is unimportant
L1, L2, FROBENIUS = "gradient_l1", "gradient_l2", "weight_frobenius"
CHUNK = 2048  # tokens whose updates exist at once


@dataclass(frozen=True, eq=False)
class Gradients:
    """A forward and a backward pass for each batch of a shard. Of each layer:

    - ``taylor``: the sum over tokens of ``|<dL/d out, out - in>|``, L being the summed negative log-likelihood in nats,
      per predicted token; a sample for each sequence. It is what the loss would change by, to first order, if the
      layer returned its input, without the signs that cancel (Molchanov et al., arXiv 1906.10771, section 3.1).
    - ``gradient_l1``, ``gradient_l2``: norms of the gradient of each weight matrix, added up; a sample for each batch,
      L being the mean over its predicted tokens (as logged by the AVSS authors' script, arXiv 2411.02117).
    - ``weight_frobenius``: norms of the weight matrices, added up.
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
        passes = [_Pass.of(batch, model.device) for batch in batches]
        with model.applying(intervention), trainable(model.module, layers), _hooked(layers):
            passes = model.backpropagate(batches, passes)
        weights = predicted_tokens(self.shard, model)
        return [row for layer in layers for row in _rows(layer, passes, weights)]


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weight matrices of a layer, stacks of them too (experts); convolutions are none."""
    found = {
        id(parameter): parameter
        for child in module.modules()
        if not isinstance(child, nn.Conv1d)
        for parameter in child.parameters(recurse=False)
        if len(_shape(parameter)) in (2, 3) and parameter.is_floating_point()
    }
    return list(found.values())


def _shape(parameter: nn.Parameter) -> Sequence[int]:
    """Of the whole parameter, of which DeepSpeed ZeRO-3 may have left a part."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


class _Kept:
    """A tensor that the backward pass needs too, so that it takes no memory of its own."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self._version = tensor, tensor._version

    @property
    def has_changed(self) -> bool:
        """Whether its numbers are others now."""
        return self.tensor._version != self._version


@dataclass
class _Pass(Watched):
    """What the hooks of one forward and backward pass gather, by layer."""

    real: torch.Tensor  # bool[rows, tokens]
    scale: float  # of the norms of gradients
    keeps: int = 1
    # float64, on the devices that computed them: nothing waits for a device before all is under way
    removal: dict[int, torch.Tensor] = field(default_factory=dict)  # [rows]
    norms: defaultdict[tuple[int, int], Any] = field(default_factory=partial(defaultdict, float))  # and by order
    sizes: dict[int, Any] = field(default_factory=dict)  # of the weights
    _calls: Counter[int] = field(default_factory=Counter)
    _given: _Kept | None = None

    @staticmethod
    def of(batch: Batch, device: torch.device) -> _Pass:
        real = to_device(batch.attention_mask, device)
        return _Pass(real=real, scale=max(1.0, float(predicted(batch).sum())))

    def enter(self, uses: Sequence[Layer], module: nn.Module, args: Any, kwargs: Any) -> None:
        if uses[0].index not in self.sizes:  # weights may be gone when the layer has run
            self.sizes |= dict.fromkeys([use.index for use in uses], sum(_norms(w, 2) for w in matrices(module)))
        given = input_tensor(args, kwargs)
        self._given = None if given is None else _Kept(given.detach())

    def leave(self, uses: Sequence[Layer], output: Any) -> None:
        layer = uses[self._calls[uses[0].index] % len(uses)]
        self._calls[uses[0].index] += 1
        out, given, self._given = first_tensor(output), self._given, None
        if out is None or given is None or out.shape != given.tensor.shape:
            raise ModelError(f"Layer {layer.index} ({layer.name}) does not keep the shape of its input.")
        out.register_hook(partial(self._remove, layer, given, _Kept(out.detach())))

    def _remove(self, layer: Layer, given: _Kept, out: _Kept, gradient: torch.Tensor) -> None:
        if given.has_changed or out.has_changed:
            raise ModelError(f"Layer {layer.index} ({layer.name}), or one behind it, changes its input in place.")
        chunks = (self._tokens(layer, x).split(CHUNK) for x in (gradient, out.tensor, given.tensor))
        products = [(g.double() * (y.float() - x.float())).sum(dim=1) for g, y, x in zip(*chunks, strict=True)]
        changes = torch.cat(products).abs().view(self.real.shape).where(self.real.to(gradient.device), 0)
        self.removal[layer.index] = changes.sum(dim=1)

    def _tokens(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """[all tokens, units] of what a layer takes or gives."""
        found = as_rows(x, layer.axes, *self.real.shape)
        if found is None:
            raise ModelError(f"Layer {layer.index} ({layer.name}) does not keep rows and tokens apart.")
        return found.flatten(0, 1)

    def accumulate(self, uses: Sequence[Layer], weight: torch.Tensor) -> None:
        """Take the norms of a weight's gradient, and free it."""
        assert weight.grad is not None
        for order in (1, 2):
            norm = _norms(weight.grad, order) / self.scale
            for layer in uses:
                self.norms[layer.index, order] += norm
        weight.grad = None


@contextmanager
def _hooked(layers: Sequence[Layer]) -> Iterator[None]:
    """Inside, the pass that is watched hears of its layers, where gradients are enabled.

    Hooks of weights are set as their layer begins: where weights come and go, these are the ones that compute.
    """
    uses: defaultdict[nn.Module, list[Layer]] = defaultdict(list)
    for layer in layers:
        uses[layer.module].append(layer)
    with ExitStack() as stack:
        hooked = WeakIdKeyDictionary()

        def enter(of: Sequence[Layer], module: nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            WATCHED.get().enter(of, module, args, kwargs)
            for weight in matrices(module):
                if weight not in hooked:
                    hooked[weight] = True
                    hear = partial(_accumulate, of)
                    stack.callback(weight.register_post_accumulate_grad_hook(hear).remove)

        def leave(of: Sequence[Layer], _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                WATCHED.get().leave(of, output)

        for module, of in uses.items():
            stack.callback(module.register_forward_pre_hook(partial(enter, of), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(leave, of), with_kwargs=True).remove)
        yield


def _accumulate(uses: Sequence[Layer], weight: torch.Tensor) -> None:
    WATCHED.get().accumulate(uses, weight)


@contextmanager
def trainable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Inside, gradients are of the layers' matrices, and of no other parameter."""
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
    """The norm of a matrix's elements, or the sum of those of a stack."""
    return torch.linalg.vector_norm(matrix.detach(), order, dim=(-2, -1), dtype=torch.float64).sum()


def _rows(layer: Layer, passes: Sequence[_Pass], weights: Float64) -> Iterator[Row]:
    removal = np.concatenate([found.removal[layer.index].cpu().numpy() for found in passes])
    yield Row(metric=TAYLOR, samples=removal, weights=weights, layer=layer.index)
    ones = np.ones(len(passes))
    for metric, order in ((L1, 1), (L2, 2)):
        samples = np.array([float(found.norms[layer.index, order]) for found in passes])
        yield Row(metric=metric, samples=samples, weights=ones, layer=layer.index)
    size = float(next(found.sizes[layer.index] for found in passes))
    yield Row(metric=FROBENIUS, samples=np.array([size]), weights=np.ones(1), layer=layer.index)
