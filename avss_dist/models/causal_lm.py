"""A causal language model with its head: its predictions, as it is and under an intervention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from avss_dist.corpus.shards import Batch
from avss_dist.errors import ModelError, first_line
from avss_dist.intervention import Intervention, Removal, Sparsity, layer_of, whole_layers
from avss_dist.models.auto import no_head, predictor
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.head import Head, find_head
from avss_dist.models.labels import LOGIT_BYTES, draw_labels, loss_gradient, pieces, uniform_numbers, widened
from avss_dist.models.layers import PROBE_SHAPE, Layer
from avss_dist.models.loading import Backbone, quiet
from avss_dist.models.patching import Patch, decode_patch, patched
from avss_dist.models.skipping import Recorded, explaining, recording, representatives, resuming, skipping
from avss_dist.models.sparsifying import SparsityCounts, sparsified
from avss_dist.models.sublayers import find_obstacles, require_sublayers, without_sublayers
from avss_dist.settings import Settings
from avss_dist.stats.layer_stats import Float64
from avss_dist.system.devices import to_device

PROBE_TOKENS = 16

T = TypeVar("T")
_OfTokens = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and labels, float32[tokens]


class Watching(Protocol):
    """Sees the hidden states and the gradients of one batch, by hooks, while it is entered.

    Attributes:
        keeps: hidden states of the batch that it keeps for each layer, at most.
    """

    @property
    def keeps(self) -> int: ...

    def watch(self) -> AbstractContextManager[None]:
        """May be entered several times for one batch."""


Watcher = TypeVar("Watcher", bound=Watching)


class LanguageModel:
    """Opened once, asked often; nothing that is asked leaves a trace.

    This class asks a model whose layers are all in reach of this process. Partitions of which that is not true have
    classes of their own, which give the same answers.

    Args:
        backbone: the model, opened with its head.
        device: where it takes token ids.

    Attributes:
        backbone: the model as it was opened.
        head: from what its last layer gives to logits.
        layers: its transformer blocks, in order.
        forms: how layers return hidden states (`skipping.Recorded`): what is known of a layer is no reason to run it.
        family: ``model_type`` of the configuration.
        device: where it computes.
        reports: whether the answers of this process count; of several that give the same, one's do.
        keeps_hidden_states: `skipping.recording` and `resuming` work on its layers, and cost less than whole passes.

    Raises:
        ModelError: the model predicts no next token.
    """

    reports = True
    keeps_hidden_states = True

    def __init__(self, checkpoint: Checkpoint, settings: Settings, backbone: Backbone, device: torch.device) -> None:
        self.checkpoint, self.settings, self.device = checkpoint, settings, device
        self.backbone = backbone
        self.module: Any = predictor(backbone.model)
        if self.module.get_output_embeddings() is None:
            raise no_head(checkpoint.name, type(self.module).__name__)
        self.layers: tuple[Layer, ...] = backbone.structure.layers
        self.family = backbone.family
        try:
            with quiet(), torch.no_grad(), recording(self.layers) as recorded:
                self.head: Head = find_head(self.module, self.layers, device)
        except (TypeError, ValueError, AttributeError) as error:  # of the model's own code
            name = type(self.module).__name__
            raise ModelError(f"{name} predicts nothing of token ids alone: {first_line(error)}") from error
        self.forms = recorded.forms

    @property
    def token_bytes(self) -> int:
        """Bytes of the hidden states of a token between two layers."""
        return max(1, self.backbone.hidden_size) * int(self.module.dtype.itemsize)

    def _probe(self) -> None:
        """A pass over a few tokens."""
        input_ids = torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=self.device).reshape(PROBE_SHAPE)
        with torch.no_grad():
            self.module(input_ids=input_ids, use_cache=False)

    @cached_property
    def obstacles(self) -> dict[int, str]:
        """Why the sublayers of a layer cannot be left out alone, by layer; see `sublayers.find_obstacles`."""
        try:
            return find_obstacles(self.layers, self._probe)
        except Exception:  # as below
            return dict.fromkeys(range(len(self.layers)), "what layers give on is not hidden states alone")

    @cached_property
    def resumes(self) -> bool:
        """Whether a pass that begins at a layer, from recorded hidden states, gives exactly what skipping it gives.

        It is tried on a few tokens, with `skipping.representatives` of the layers.
        """
        try:
            with torch.no_grad():
                return self._resumes_exactly()
        except Exception:  # a model's own code can raise anything where layers did not run
            return False

    def _resumes_exactly(self) -> bool:
        if len(self.forms) < len(self.layers):
            return False
        real = np.ones((1, PROBE_TOKENS), np.bool_)
        batch = Batch(input_ids=np.arange(PROBE_TOKENS, dtype=np.int32)[None], attention_mask=real, observed=real)
        with recording(self.layers) as recorded:
            self.hidden_states(batch)
        for layer in representatives(self.layers):  # left out as this class does it: a subclass may not be ready to
            with resuming(self.layers, layer.index, recorded):
                resumed = self.hidden_states(batch)
            with LanguageModel.without(self, (layer.index,)):
                if not torch.equal(resumed, self.hidden_states(batch)):
                    return False
        return True

    @contextmanager
    def applying(self, intervention: Intervention) -> Iterator[SparsityCounts | None]:
        """Inside, the model computes with an intervention. Interventions nest where each changes something else.

        Partitions whose weights are elsewhere carry out the steps in their own way: `patched`, `sparsified`, `without`.

        Yields:
            The numbers of activations that became zero; None for an intervention without sparsity.

        Raises:
            ModelError: the model cannot be changed like that.
        """
        with ExitStack() as stack:
            if intervention.patch:
                stack.enter_context(self.patched(decode_patch(intervention.patch.read())[0]))
            counts = stack.enter_context(self.sparsified(intervention.sparsity)) if intervention.sparsity else None
            if intervention.removed:
                stack.enter_context(self.without(intervention.removed, intervention.residual_scale))
            yield counts

    def require_layers(self, removed: Collection[Removal]) -> None:
        """Refuse layers that the model does not have, and sublayers that cannot be left out.

        Raises:
            ModelError: the message names the first.
        """
        if wrong := [layer for layer in map(layer_of, removed) if layer >= len(self.layers)]:
            raise ModelError(f"There is no layer {wrong[0]}: '{self.checkpoint.name}' has {len(self.layers)}, from 0.")
        if len(whole_layers(removed)) < len(removed):
            require_sublayers(self.obstacles, removed)

    @contextmanager
    def without(self, removed: Collection[Removal], residual_scale: float = 0.0) -> Iterator[None]:
        """Inside, the model computes without layers and sublayers; see `Intervention`."""
        self.require_layers(removed)
        skipped = skipping(self.layers, whole_layers(removed), self.forms, residual_scale)
        with skipped, without_sublayers(self.layers, removed), explaining(self.checkpoint.name, removed):
            yield

    @contextmanager
    def patched(self, patch: Patch) -> Iterator[None]:
        """Inside, the model computes with other values of some parameters; see `patching.patched`."""
        with patched(self.layers, patch):
            yield

    @contextmanager
    def sparsified(self, sparsity: Sparsity) -> Iterator[SparsityCounts]:
        """Inside, the model computes with sparse activations; see `sparsifying.sparsified`."""
        with sparsified(self.module, self.layers, sparsity) as counts:
            yield counts

    @contextmanager
    def running(self, layer: Layer) -> Iterator[Callable[..., Any]]:
        """Inside, a layer's weights are there, and it can be called alone, by what is given."""
        yield layer.module

    def total(self, counts: list[list[int]]) -> list[list[int]]:
        """Counts of the passes of all ranks that share them."""
        return counts

    def local_indices(self, count: int) -> range:
        """Return the indices of the pieces of work that this copy of the model takes; all of them if it is alone."""
        return range(count)

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make each tensor its sum over the copies that share work, in place; all of them call this."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """Call the module's ``generate``."""
        return self.module.generate(**kwargs)

    def each(self, function: Callable[[Batch], T], batches: Sequence[Batch]) -> list[T]:
        """The function of every batch. It asks the model, and may run elsewhere, or interleaved with the others."""
        return [function(batch) for batch in batches]

    def together(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """What functions give that ask the model, each on its own; they may run interleaved."""
        return [function() for function in functions]

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """[rows, tokens, units], on the model's device: what its head is given; gradients follow the caller's mode."""
        input_ids = to_device(batch.input_ids, self.device, torch.int64)
        padded = {} if batch.attention_mask.all() else {"attention_mask": to_device(batch.attention_mask, self.device)}
        run = partial(self.call, input_ids=input_ids, use_cache=False, **padded)
        return self.head.hidden_states(run).to(self.device)

    def pieces(self, number: int) -> list[slice]:
        """Of so many tokens, those whose logits are there at a time: `LOGIT_BYTES` of them at most, in float32."""
        return pieces(number, self.head.vocabulary, LOGIT_BYTES)

    def logits(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Which tokens, and their logits, float32[some, vocabulary]; of `hidden_states` of tokens, [tokens, units]."""
        for piece in self.pieces(len(hidden)):
            for part, logits in widened(self.head.logits(hidden[piece])):
                yield slice(piece.start + part.start, piece.start + part.stop), logits

    def losses(self, batch: Batch) -> Float64:
        """float64[rows]: the negative log-likelihood, in nats, of each row's counted tokens given those before them."""
        return self._sums(batch, [_surprise])[0]

    def losses_and_entropies(self, batch: Batch) -> Float64:
        """float64[2, rows]: `losses`, and summed over the same tokens the entropy, in nats, of what is predicted."""
        return self._sums(batch, [_surprise, _entropy])

    def _sums(self, batch: Batch, measures: Sequence[_OfTokens]) -> Float64:
        """float64[measures, rows]: what measures give of each row's counted tokens, summed."""
        counted = torch.from_numpy(predicted(batch))
        found = torch.zeros((len(measures), *counted.shape), dtype=torch.float64)
        with torch.no_grad():
            places, labels = self._predicted(batch)
            of_tokens = torch.empty((len(measures), len(labels)), dtype=torch.float64, device=self.device)
            for some, logits in self.logits(self.hidden_states(batch).flatten(0, 1).index_select(0, places)):
                for values, of in zip(of_tokens, measures, strict=True):
                    values[some] = of(logits, labels[some]).double()
        found[:, counted] = of_tokens.cpu()
        return found.sum(dim=2).numpy()

    def _predicted(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """int64[n], on the device: places, among those of all rows one after another, of tokens after which one is
        predicted that counts; and which one."""
        rows, before = predicted(batch).nonzero()
        labels = batch.input_ids[rows, before + 1]
        places = rows * batch.input_ids.shape[1] + before
        return to_device(places, self.device), to_device(labels, self.device, torch.int64)

    def losses_under(self, batches: Sequence[Batch], interventions: Sequence[Intervention]) -> list[Float64]:
        """Return for each intervention float64[rows]: `losses` of all batches.

        Interventions that remove the layers of the first one and more are cheaper: their passes begin where they
        differ. They differ in what they remove alone.
        """
        by_batch = self.each(partial(self._losses_of_batch, interventions), batches)
        return [np.concatenate(losses) for losses in zip(*by_batch, strict=True)]

    def _losses_of_batch(self, interventions: Sequence[Intervention], batch: Batch) -> list[Float64]:
        first, branches = interventions[0], self.branches(interventions)
        with self.applying(first), recording([self.layers[layer] for layer in set(branches.values())]) as recorded:
            losses = [self.losses(batch)]
        for intervention in interventions[1:]:
            with self.applying(intervention):
                if intervention not in branches:
                    losses.append(self.losses(batch))
                    continue
                layer = branches[intervention]
                behind = begins_behind(intervention, layer)
                with resuming(self.layers, behind, Recorded({behind: recorded.inputs[layer]}, self.forms)):
                    losses.append(self.losses(batch))
        return losses

    def branches(self, interventions: Sequence[Intervention]) -> dict[Intervention, int]:
        """Return the interventions whose passes can begin from the first one's, and the layer where they differ."""
        first = set(interventions[0].removed)
        if len(interventions) == 1 or interventions[0].residual_scale or not self.resumes:
            return {}
        differ = {one: min(map(layer_of, first ^ set(one.removed)), default=-1) for one in interventions[1:]}
        return {one: at for one, at in differ.items() if at not in first and begins_behind(one, at) >= 0}

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[Watcher], *, draws: int = 0, seed: int = 0
    ) -> list[Watcher]:
        """A forward and a backward pass of each batch's summed losses, each within its watcher; the watchers.

        Hooks must tell passes apart by whether gradients are enabled: a layer may run more than once.

        Args:
            draws: further backward passes through the same forward pass, each with labels that are drawn from what
                the model predicts, in place of the text's own.
            seed: of the draws; they depend on a row's tokens, and not on the batch that it is in.

        Raises:
            ModelError: this replica computes no gradients.
        """
        for batch, watcher in zip(batches, watchers, strict=True):
            with watcher.watch(), torch.enable_grad():
                hidden = self.hidden_states(batch)
                for number, gradient in enumerate(self.loss_gradients(hidden.detach(), batch, draws, seed)):
                    hidden.backward(gradient, retain_graph=number < draws)
        return list(watchers)

    def loss_gradients(self, hidden: torch.Tensor, batch: Batch, draws: int = 0, seed: int = 0) -> torch.Tensor:
        """Of summed losses at `hidden_states`, [1 + draws, *hidden.shape]: of the text's labels, then each draw's."""
        places, labels = self._predicted(batch)
        uniform = to_device(uniform_numbers(batch, draws, seed)[:, predicted(batch)], self.device)
        given = hidden.flatten(0, 1).index_select(0, places)
        found = given.new_empty((1 + draws, *given.shape))
        for piece in self.pieces(len(given)):
            with torch.enable_grad():
                leaf = given[piece].requires_grad_()
                logits = self.head.logits(leaf)
            drawn = draw_labels(logits.detach(), uniform[:, piece])
            for number, of in enumerate((labels[piece], *drawn)):
                gradient = loss_gradient(logits.detach(), of)
                (found[number, piece],) = torch.autograd.grad(logits, leaf, gradient, retain_graph=number < draws)
        every = hidden.new_zeros((1 + draws, *hidden.shape))
        every.flatten(1, 2).index_copy_(1, places, found)
        return every


def _surprise(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits, labels, reduction="none")


def _entropy(logits: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
    logs = logits.log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


def begins_behind(intervention: Intervention, layer: int) -> int:
    """Return the layer behind which a pass begins with the input of a layer: itself if removed, else the one before."""
    return layer if layer in intervention.removed else layer - 1


def predicted(batch: Batch) -> np.ndarray:
    """bool[rows, tokens - 1]: which tokens, of all but the first, are predicted and count."""
    return batch.observed[:, 1:] & batch.attention_mask[:, :-1]
