"""A causal language model with its head: its predictions, unchanged and under an intervention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from traceback import walk_tb
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from avss_dist.core.devices import to_device
from avss_dist.core.errors import ModelError, first_line
from avss_dist.core.intervention import (
    THRESHOLD,
    Intervention,
    Removal,
    Sparsity,
    Sublayer,
    describe_removed,
    layer_of,
)
from avss_dist.core.settings import Settings
from avss_dist.core.streams import portion, report
from avss_dist.corpus.shards import Batch
from avss_dist.models.change.experts import require_experts
from avss_dist.models.change.number_formats import NumberFormat
from avss_dist.models.change.patches import Patch, decode_patch, patch_changes
from avss_dist.models.change.remaining import remaining_modules
from avss_dist.models.change.removal import removal_changes
from avss_dist.models.change.rounding import require_fit, rounding_changes
from avss_dist.models.change.skipping import resumption, skip_of
from avss_dist.models.change.sparsity import SparsityCounts, sparsity_changes
from avss_dist.models.change.sublayers import find_obstacles
from avss_dist.models.checkpoint.loading import Backbone, no_head, predictor, quiet
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.forward import Change, Forward, Output, changing
from avss_dist.models.generation import find_cache_obstacle
from avss_dist.models.gradients import WatcherT, backpropagate, loss_gradients
from avss_dist.models.predictions import counted_predictions, probe_batch
from avss_dist.models.structure.head import LOGIT_BYTES, Head, float32_pieces, pieces
from avss_dist.models.structure.layers import Layer, probe_tokens, representatives, require_single_use
from avss_dist.models.watching import recording
from avss_dist.stats.layer_stats import Float64

_PACKAGE = f"{__name__.partition('.')[0]}."

T = TypeVar("T")


class LanguageModel:
    """An open causal language model, whose losses, logits and gradients leave it unchanged.

    All layers of this class are in the memory of this process. Partitions that offload or split layers have subclasses
    with equal results.

    Args:
        backbone: the model, opened with its head.
        device: device of the token ids.

    Attributes:
        backbone: the model as it was opened.
        head: maps the hidden states after the last layer to logits.
        layers: transformer blocks, in order.
        family: ``model_type`` of the configuration.
        device: device of token ids and results.
        reports: whether the results of this process count; one of several ranks with equal results reports.
        notes: remarks for people on how the model computes, collected while it does.
        replays: results of `gradients.can_replay`, by the layers that run.
        keeps_hidden_states: whether `watching.recording` and `skipping.resumption` work on its layers and save time.
            Otherwise the passes of `together` share one reading of the weights.
        weights_stay: whether weights are in memory, and whole, from pass to pass. Otherwise they are patched and
            rounded while their layer runs, and backward passes use the unchanged ones.
        whole_weights: whether this process has every weight of a layer whole while the layer runs.
        no_gradients: message and hint of the refusal of gradients; None if they can be computed.
        lockstep: number of ranks that must run equally many passes, each over its own batches.

    Raises:
        ModelError: the model has no head that predicts the next token, or sees the next token.
    """

    reports = True
    keeps_hidden_states = True
    weights_stay = True
    whole_weights = True
    no_gradients: tuple[str, str] | None = None
    lockstep = 1

    def __init__(self, checkpoint: Checkpoint, settings: Settings, backbone: Backbone, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.device = device
        self.notes: dict[str, None] = {}
        self._cache_obstacles: dict[frozenset[int], str | None] = {}
        self.replays: dict[frozenset[int], bool] = {}
        self.backbone = backbone
        self.module: Any = predictor(backbone.model)
        if self.module.get_output_embeddings() is None:
            raise no_head(checkpoint.name, type(self.module).__name__)
        self.layers: tuple[Layer, ...] = backbone.layers
        self.family: str = backbone.columns["family"]
        try:
            with quiet(), torch.no_grad():
                self.head = Head(self.module, self.layers, device)
        except (TypeError, ValueError, AttributeError) as error:  # These come from the model's own code.
            raise ModelError(
                f"{type(self.module).__name__} cannot predict from token ids alone: {first_line(error)}"
            ) from error

        if self.head.looks_ahead:
            raise ModelError(
                f"'{checkpoint.name}' ({type(self.module).__name__}) sees the tokens that it would predict: each token "
                "attends to later ones.",
                "Name a causal language model.",
            )

    @property
    def token_bytes(self) -> int:
        """Number of bytes of a token's hidden states between two layers."""
        return max(1, self.backbone.columns["hidden_size"]) * int(self.module.dtype.itemsize)

    @cached_property
    def obstacles(self) -> dict[int, str]:
        """Reasons, by layer, why its sublayers cannot be left out alone, from `sublayers.find_obstacles`."""
        try:
            with torch.no_grad():
                run = partial(self.module, input_ids=probe_tokens(self.device), use_cache=False)
                return find_obstacles(self.layers, run)
        except Exception:  # A model's own code can raise anything where layers did not run.
            return dict.fromkeys(range(len(self.layers)), "what layers give on is not hidden states alone")

    @cached_property
    def resumes(self) -> bool:
        """Whether a pass resumed from recorded hidden states equals, bit by bit, a pass that skips the layer.

        Tried on a few tokens, with `representatives` of the layers.
        """
        if not all(layer.form for layer in self.layers):
            return False
        batch = probe_batch()
        try:
            with torch.no_grad():
                with recording(self.layers) as inputs:
                    self.hidden_states(batch)
                for layer in representatives(self.layers):
                    with changing(resumption(self.layers, layer.index, inputs.pop(layer.index))):
                        resumed = self.hidden_states(batch)
                    with self.without((layer.index,)):
                        if not torch.equal(resumed, self.hidden_states(batch)):
                            return False
        except Exception:  # A model's own code can raise anything where layers did not run.
            return False
        return True

    @contextmanager
    def applying(self, intervention: Intervention) -> Iterator[SparsityCounts | None]:
        """Have the model compute with an intervention inside the context. Interventions of different kinds may nest.

        Yields:
            Counts of activations that became zero, or None if the intervention has no sparsity.

        Raises:
            ModelError: the intervention does not fit the model, or the model's own code fails without what is removed,
                for example because a later layer reads keys and values of a removed one. Errors of other code pass
                unchanged.
        """
        changes: list[Change] = []
        counts = None
        if intervention.patch:
            patch, _ = decode_patch(intervention.patch.read())
            changes += self._patch_changes(patch)
        if intervention.rounding:
            self._require_whole_weights()
            changes += rounding_changes(self.layers, intervention.rounding, when_called=not self.weights_stay)
        if intervention.sparsity:
            self._require_sparsifiable(intervention.sparsity)
            counts = SparsityCounts(intervention.sparsity)
            changes += sparsity_changes(self.module, self.layers, counts)
        if intervention.removed:
            self.require_layers(intervention.removed)
            changes += removal_changes(self.layers, intervention.removed)
        with self._explaining(intervention.removed), changing(changes):
            yield counts

    def without(self, removed: Collection[Removal]) -> AbstractContextManager[SparsityCounts | None]:
        """Have the model compute without layers, sublayers and experts inside the context, as `applying` does."""
        return self.applying(Intervention(removed=tuple(removed)))

    def patched(self, patch: Patch) -> AbstractContextManager[None]:
        """Have the model compute with a patch inside the context."""
        return changing(self._patch_changes(patch))

    def _patch_changes(self, patch: Patch) -> list[Change]:
        return patch_changes(self.layers, patch, when_called=not self.weights_stay)

    @contextmanager
    def _explaining(self, removed: Collection[Removal]) -> Iterator[None]:
        """Raise ModelError inside the context if the model's own code fails without what is removed."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            if not removed or not _is_raised_by(error, self.module):
                raise
            raise ModelError(
                f"'{self.checkpoint.name}' does not run with these layers left out: {describe_removed(removed)}. "
                f"{type(error).__name__}: {first_line(error)}",
                "A layer behind may need what one of them computes. Leave out others.",
            ) from error

    def require_layers(self, removed: Collection[Removal]) -> None:
        """Refuse layers and experts that the model does not have, and sublayers and experts that cannot be removed.

        Raises:
            ModelError: a layer, sublayer or expert cannot be removed; the message names the first.
        """
        number = len(self.layers)
        for removal in removed:
            if layer_of(removal) >= number:
                raise ModelError(
                    f"There is no layer {layer_of(removal)}: '{self.checkpoint.name}' has {number}, from 0."
                )
        for removal in removed:
            if isinstance(removal, Sublayer) and removal.layer in self.obstacles:
                raise ModelError(
                    f"{removal} cannot be left out alone: {self.obstacles[removal.layer]}.",
                    "Leave out whole layers of this model.",
                )
        require_experts(self.layers, removed)

    def require_roundable(self, layers: Iterable[Layer], formats: Iterable[NumberFormat]) -> None:
        """Refuse layers whose weights cannot be rounded alone, and formats that cannot take their linear maps.

        Raises:
            ModelError: `whole_weights` is not set, a layer is used more than once, or a map has another shape.
        """
        self._require_whole_weights()
        every_format = list(formats)
        for layer in layers:
            require_single_use(self.layers, layer, "rounded alone")
            for projection in layer.projections:
                for target in every_format:
                    require_fit(self.layers, layer, projection, target)

    def _require_whole_weights(self) -> None:
        """Refuse to round weights where a rank has a part of each.

        Raises:
            ModelError: `whole_weights` is not set.
        """
        if not self.whole_weights:
            raise ModelError(
                "Each rank has a part of each weight, and the scales of a rounded weight are those of the whole.",
                "Use single, device_map, streaming, fsdp or zero3.",
            )

    def value(self, layer: int, path: str) -> torch.Tensor:
        """Return a parameter of a layer."""
        return self.layers[layer].module.get_parameter(path).detach()

    def _require_sparsifiable(self, sparsity: Sparsity) -> None:
        """Refuse rules that need all units of a token where a rank has some of them.

        Raises:
            ModelError: `whole_weights` is not set, and a rule chooses the largest units, or weighs them.
        """
        if self.whole_weights:
            return
        for cut in sparsity.maps:
            if cut.by != THRESHOLD or cut.weighted:
                raise ModelError(
                    "Each rank has some of a token's units, and cannot choose the largest of all.",
                    "Use single, device_map, streaming, fsdp or zero3, or a plan of thresholds.",
                )

    @contextmanager
    def running(self, layer: Layer) -> Iterator[Forward]:
        """Load the weights of a layer inside the context, and yield a function that calls it alone."""
        yield layer.module

    def total(self, counts: list[list[int]]) -> list[list[int]]:
        """Return the sum of counts over the ranks that share the passes."""
        return counts

    def local_indices(self, count: int) -> range:
        """Return the indices of the work items that this copy of the model takes, out of ``count``.

        A copy that is alone takes all.
        """
        return range(count)

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors over the copies that share work, in place. A collective: all copies call it."""

    def generate(self, **kwargs: object) -> Output:
        """Call the module's ``generate``.

        Where layers are left out, it runs on the remaining layers alone, with a key-value cache. If that is not known
        to compute the same, the layers are skipped, no cache is used, and `notes` has the reason.
        """
        skipped = self._skipped
        if not skipped or kwargs.get("use_cache") is False:
            return self.module.generate(**kwargs)
        if obstacle := self.cache_obstacle():
            note = f"{self.checkpoint.name} generates without a key-value cache, which is slow: {obstacle}."
            self.notes[note] = None
            return self.module.generate(**kwargs | {"use_cache": False})
        with changing(remaining_modules(self.module, self.layers, skipped)):
            return self.module.generate(**kwargs)

    @property
    def _skipped(self) -> frozenset[int]:
        """Layers that are left out in this context."""
        return frozenset(layer.index for layer in self.layers if skip_of(layer.module))

    def cache_obstacle(self) -> str | None:
        """Return why the layers that are not left out here cannot generate with a key-value cache, or None."""
        skipped = self._skipped
        if skipped not in self._cache_obstacles:
            self._cache_obstacles[skipped] = self._find_cache_obstacle(skipped)
        return self._cache_obstacles[skipped]

    def _find_cache_obstacle(self, skipped: frozenset[int]) -> str | None:
        return find_cache_obstacle(self.module, self.layers, skipped, self.device)

    def each(self, function: Callable[[Batch], T], batches: Sequence[Batch], activity: str = "Reading text") -> list[T]:
        """Return the result of a function for every batch. Its passes may run on another rank, or interleaved.

        Args:
            activity: name of the work in the progress that is reported.
        """
        results = []
        for number, batch in enumerate(batches):
            report(activity, number / len(batches))
            with portion(number / len(batches), 1 / len(batches)):
                results.append(function(batch))
        return results

    def together(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of functions that run the model. Their passes may run on another rank, or interleaved."""
        return [function() for function in functions]

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return the input of the head, [rows, tokens, units] on the model's device, in the caller's gradient mode."""
        run = partial(self.module, input_ids=to_device(batch.input_ids, self.device, torch.int64), use_cache=False)
        if not batch.attention_mask.all():
            run = partial(run, attention_mask=to_device(batch.attention_mask, self.device))
        return self.head.hidden_states(run).to(self.device)

    def pieces(self, number: int) -> list[slice]:
        """Return slices of ``number`` tokens whose float32 logits take at most `LOGIT_BYTES` each."""
        return pieces(number, self.head.vocabulary, LOGIT_BYTES)

    def logits(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (slice of tokens, logits float32[slice, vocabulary]) for hidden states of tokens, [tokens, units]."""
        for piece in self.pieces(len(hidden)):
            for part, logits in float32_pieces(self.head.logits(hidden[piece])):
                yield slice(piece.start + part.start, piece.start + part.stop), logits

    def losses(self, batch: Batch) -> Float64:
        """Return each row's summed negative log-likelihood of its counted tokens, float64[rows], in nats."""
        return self.sums(batch)[0]

    def sums(self, batch: Batch, *, entropies: bool = False) -> Float64:
        """Return `losses`, and the entropy of the predictions over the same tokens, float64[1 or 2, rows] in nats."""
        kinds = 1 + entropies
        with torch.no_grad():
            predictions = counted_predictions(batch, self.device)
            labels = predictions.labels
            measured = torch.empty((kinds, len(labels)), dtype=torch.float64, device=self.device)
            hidden = self.hidden_states(batch).flatten(0, 1).index_select(0, predictions.positions)
            for piece, logits in self.logits(hidden):
                measured[0, piece] = cross_entropy(logits, labels[piece], reduction="none").double()
                if entropies:
                    logs = logits.log_softmax(dim=-1)
                    measured[1, piece] = -(logs.exp() * logs).sum(dim=-1).double()
        by_token = torch.zeros((kinds, *predictions.mask.shape), dtype=torch.float64)
        by_token[:, torch.from_numpy(predictions.mask)] = measured.cpu()
        return by_token.numpy().sum(axis=2)

    def losses_under(
        self, batches: Sequence[Batch], interventions: Sequence[Intervention], activity: str = "Reading text"
    ) -> list[Float64]:
        """Return the `losses` of all batches, float64[rows], under each intervention.

        The interventions differ only in what they remove and round. One that leaves the first layers as the first
        intervention does is cheaper: its passes begin where the two differ.

        Args:
            activity: name of the work in the progress that is reported.
        """
        by_batch = self.each(partial(self._losses_under, interventions, activity), batches, activity)
        return [np.concatenate(losses) for losses in zip(*by_batch, strict=True)]

    def _losses_under(self, interventions: Sequence[Intervention], activity: str, batch: Batch) -> list[Float64]:
        first = interventions[0]
        branches = self.branches(interventions)
        recorded = [self.layers[layer] for layer in set(branches.values())]
        with self.applying(first), recording(recorded) as inputs:
            results = [self.losses(batch)]
        for number, intervention in enumerate(interventions[1:], 1):
            report(activity, number / len(interventions))
            start: list[Change] = []
            if intervention in branches:
                layer = branches[intervention]
                last = last_layer_not_run(intervention, layer)
                start = resumption(self.layers, last, inputs[layer].clone())
            with self.applying(intervention), changing(start):
                results.append(self.losses(batch))
        return results

    def branches(self, interventions: Sequence[Intervention]) -> dict[Intervention, int]:
        """Return the interventions whose passes can begin from the first one's, and the layer where they differ."""
        first = interventions[0]
        branches: dict[Intervention, int] = {}
        if len(interventions) == 1 or not self.resumes:
            return branches
        for intervention in interventions[1:]:
            layer = min(first.differing_layers(intervention), default=-1)
            if layer not in first.removed and last_layer_not_run(intervention, layer) >= 0:
                branches[intervention] = layer
        return branches

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[WatcherT], *, draws: int = 0, seed: int = 0
    ) -> list[WatcherT]:
        """Run a forward and a backward pass of each batch's summed losses inside its watcher, and return the watchers.

        A layer may run more than once. Hooks tell the passes apart by whether gradients are enabled. A model for which
        gradients layer by layer are not found to be equal on a few tokens keeps the activations of all layers, also
        for watchers that would let layers run again.

        Args:
            watchers: observers, one for each batch.
            draws: number of further backward passes through the same forward pass, each with labels that are drawn
                from the model's predictions instead of the text.
            seed: seed of the draws, which depend on a row's tokens and not on its batch.

        Raises:
            ModelError: this replica computes no gradients.
        """
        if self.no_gradients:
            raise ModelError(*self.no_gradients)
        for number, (batch, watcher) in enumerate(zip(batches, watchers, strict=True)):
            report(watcher.activity, number / len(batches))
            with portion(number / len(batches), 1 / len(batches)):
                backpropagate(self, batch, watcher, draws, seed)
        return list(watchers)

    def loss_gradients(self, hidden: torch.Tensor, batch: Batch, draws: int = 0, seed: int = 0) -> torch.Tensor:
        """Return gradients of the summed loss at `hidden_states`, as `gradients.loss_gradients` does."""
        return loss_gradients(self, hidden, batch, draws, seed)


def _is_raised_by(error: Exception, model: torch.nn.Module) -> bool:
    """Whether an error comes out of the code of a model, not out of its callers or of actions and hooks in it."""
    modules = set(model.modules())
    innermost = False
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith(_PACKAGE):
            innermost = False
            continue
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.nn.Module) and caller in modules:
            innermost = True
    return innermost


def last_layer_not_run(intervention: Intervention, layer: int) -> int:
    """Return the last layer that is not run in a pass resumed at the input of ``layer``.

    It is the layer itself if the intervention removes it, else the one before.
    """
    return layer if layer in intervention.removed else layer - 1
