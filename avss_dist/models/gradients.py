"""Gradients of the losses of a language model, through the whole model or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol, TypeVar

import torch

from avss_dist.core.devices import to_device
from avss_dist.core.streams import portion, report
from avss_dist.corpus.shards import Batch
from avss_dist.models.change.replay import MapGradients, Record, pass_back
from avss_dist.models.change.skipping import skip_of
from avss_dist.models.change.sparsity import dense
from avss_dist.models.forward import RunThrough, changing
from avss_dist.models.predictions import counted_predictions, probe_batch
from avss_dist.models.structure.head import Head, draw_labels, loss_gradient, uniform_numbers
from avss_dist.models.structure.layers import Layer


class Watcher(Protocol):
    """Observer of the hidden states and gradients of one batch, through hooks.

    Attributes:
        activity: name of the work in the progress that is reported.
        keeps: maximum number of hidden states of the batch that it keeps for each layer.
        runs_by_layer: whether each layer may run again for its backward passes, so that the activations of one layer
            are in memory. The watcher then sees every layer run twice with gradients, and no backward pass through the
            first run. The gradients are the same.
    """

    @property
    def activity(self) -> str: ...

    @property
    def keeps(self) -> int: ...

    @property
    def runs_by_layer(self) -> bool: ...

    def watch(self) -> AbstractContextManager[None]:
        """Listen inside the context, which may be entered several times."""
        ...


WatcherT = TypeVar("WatcherT", bound=Watcher)


class DifferentiableModel(Protocol):
    """A language model with gradients. See `causal_lm.LanguageModel`, which is one."""

    @property
    def layers(self) -> tuple[Layer, ...]: ...

    @property
    def head(self) -> Head: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def weights_stay(self) -> bool: ...

    @property
    def replays(self) -> dict[frozenset[int], bool]: ...

    def hidden_states(self, batch: Batch) -> torch.Tensor: ...

    def pieces(self, number: int) -> list[slice]: ...


def backpropagate(model: DifferentiableModel, batch: Batch, watcher: Watcher, draws: int, seed: int) -> None:
    """Run the passes of a batch, as `LanguageModel.backpropagate` does, through the whole model or layer by layer."""
    if watcher.runs_by_layer and can_replay(model):
        _run_by_layer(model, batch, watcher, draws, seed)
    else:
        _run_whole(model, batch, watcher, draws, seed)


def _run_whole(model: DifferentiableModel, batch: Batch, watcher: Watcher, draws: int, seed: int) -> None:
    """Run a batch's passes through the whole model."""
    with watcher.watch(), torch.enable_grad():
        hidden = model.hidden_states(batch)
        gradients = loss_gradients(model, hidden.detach(), batch, draws, seed)
        for number, gradient in enumerate(gradients):
            # The forward pass is the first step.
            report(watcher.activity, (1 + number) / (2 + draws))
            hidden.backward(gradient, retain_graph=number < draws)


def _run_by_layer(model: DifferentiableModel, batch: Batch, watcher: Watcher, draws: int, seed: int) -> None:
    """Run a batch's forward pass, and then each layer again for its backward passes."""
    layers = _running_layers(model)
    record = Record(layers[-1])
    recorded = [RunThrough(layer.module, partial(record.run_with_gradients, layer)) for layer in layers]
    with watcher.watch(), torch.enable_grad(), changing(recorded):
        hidden = model.hidden_states(batch)
    gradients = list(loss_gradients(model, hidden.detach(), batch, draws, seed))
    pass_back(hidden, record.leaf.pop(), gradients)
    for number, layer in enumerate(reversed(layers), 1):
        # The forward pass is the first step.
        report(watcher.activity, number / (1 + len(layers)))
        with watcher.watch():
            record.pass_back(layer.module, layer.module, gradients)


def _running_layers(model: DifferentiableModel) -> list[Layer]:
    """Return the layers that are not skipped in the current context."""
    return [layer for layer in model.layers if not skip_of(layer.module)]


def can_replay(model: DifferentiableModel) -> bool:
    """Whether gradients layer by layer are those of the whole model, bit by bit, without the skipped layers.

    Tried on a few tokens, once for each set of layers. They differ if more than hidden states goes from layer to layer,
    if something is computed between two layers, or if a layer changes its input in place.
    """
    layers = _running_layers(model)
    if not model.weights_stay or not layers:
        return False
    if not all(layer.form for layer in layers):
        return False
    indices = frozenset(layer.index for layer in layers)
    if indices not in model.replays:
        model.replays[indices] = _try_replay(model, layers)
    return model.replays[indices]


def _try_replay(model: DifferentiableModel, layers: Sequence[Layer]) -> bool:
    batch = probe_batch()
    whole = MapGradients(layers)
    by_layer = MapGradients(layers)
    with dense(), portion(0, 0):
        _run_whole(model, batch, whole, draws=1, seed=0)
        try:
            _run_by_layer(model, batch, by_layer, draws=1, seed=0)
        except RuntimeError:  # of autograd, where a graph is cut at the wrong tensors
            return False
    return by_layer.equals(whole)


def loss_gradients(
    model: DifferentiableModel, hidden: torch.Tensor, batch: Batch, draws: int = 0, seed: int = 0
) -> torch.Tensor:
    """Return gradients of the summed loss at `LanguageModel.hidden_states`, [1 + draws, *hidden.shape].

    The first is that of the text's labels, the others are those of the draws.
    """
    predictions = counted_predictions(batch, model.device)
    uniform = to_device(uniform_numbers(batch, draws, seed)[:, predictions.mask], model.device)
    inputs = hidden.flatten(0, 1).index_select(0, predictions.positions)
    gradients = inputs.new_empty((1 + draws, *inputs.shape))
    for piece in model.pieces(len(inputs)):
        with torch.enable_grad():
            leaf = inputs[piece].requires_grad_()
            logits = model.head.logits(leaf)
        drawn = draw_labels(logits.detach(), uniform[:, piece])
        for number, labels in enumerate((predictions.labels[piece], *drawn)):
            gradient = loss_gradient(logits.detach(), labels)
            (gradients[number, piece],) = torch.autograd.grad(logits, leaf, gradient, retain_graph=number < draws)
    result = hidden.new_zeros((1 + draws, *hidden.shape))
    result.flatten(1, 2).index_copy_(1, predictions.positions, gradients)
    return result
