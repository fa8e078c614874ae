"""A causal language model with its head: what it predicts, with any of its layers left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from avss_dist.corpus.shards import Batch
from avss_dist.errors import ModelError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import PROBE_SHAPE, Layer
from avss_dist.models.loading import Backbone, quiet
from avss_dist.models.patching import Patch, patched
from avss_dist.models.skipping import Recorded, recording, resuming, skipping
from avss_dist.models.sublayers import find_obstacles, require_sublayers, without_sublayers
from avss_dist.removal import Drop, is_whole, layer_of, whole_layers
from avss_dist.settings import Settings
from avss_dist.stats.layer_stats import Float64

PROBE_TOKENS = 16
WIDENED_BYTES = 16 << 20  # of logits: larger pieces would be taken from the system anew each time

T = TypeVar("T")


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
        layers: its transformer blocks, in order.
        family: ``config.model_type``.
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
        self.module: Any = backbone.model
        if self.module.get_output_embeddings() is None:
            raise _no_head(checkpoint, self.module)
        self.layers: tuple[Layer, ...] = backbone.structure.layers
        self.family = backbone.family
        with quiet():
            self.forms = self._find_forms()

    def _find_forms(self) -> dict[int, type]:
        """How layers return hidden states (`skipping.Recorded`): what is known of a layer is no reason to run it."""
        with recording(self.layers) as recorded:
            self._probe()
        return recorded.forms

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

        It is tried on a few tokens, with each layer.
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
            self.logits(batch)
        for layer in self.layers:  # left out as this class does it, for a subclass may not be ready to
            with resuming(self.layers, layer.index, recorded):
                resumed = self.logits(batch)
            with LanguageModel.without(self, (layer.index,)):
                if not torch.equal(resumed, self.logits(batch)):
                    return False
        return True

    def require_layers(self, drop: Collection[int]) -> None:
        """Refuse layers that the model does not have, and sublayers that cannot be left out.

        Raises:
            ModelError: the message names the first.
        """
        if wrong := [layer for layer in map(layer_of, drop) if layer >= len(self.layers)]:
            raise ModelError(f"There is no layer {wrong[0]}: '{self.checkpoint.name}' has {len(self.layers)}, from 0.")
        if not all(map(is_whole, drop)):
            require_sublayers(self.obstacles, drop)

    @contextmanager
    def without(self, drop: Collection[int]) -> Iterator[None]:
        """Inside, the model computes without these layers and sublayers."""
        self.require_layers(drop)
        with skipping(self.layers, whole_layers(drop), self.forms), without_sublayers(self.layers, drop):
            yield

    @contextmanager
    def patched(self, patch: Patch) -> Iterator[None]:
        """Inside, the model computes with other values of some parameters; see `patching.patched`."""
        with patched(self.layers, patch):
            yield

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

    def logits(self, batch: Batch) -> torch.Tensor:
        """[rows, tokens, vocabulary], on the model's device and in its dtype; gradients follow the caller's mode."""
        input_ids = torch.from_numpy(batch.input_ids).to(self.device, torch.int64)
        padded = {} if batch.attention_mask.all() else {"attention_mask": self._place(batch.attention_mask)}
        logits: torch.Tensor = self.call(input_ids=input_ids, use_cache=False, **padded).logits
        return logits

    def losses(self, batch: Batch) -> Float64:
        """float64[rows]: the negative log-likelihood, in nats, of each row's counted tokens given those before them."""
        with torch.no_grad():
            return np.array([row.item() for row in self.row_losses(self.logits(batch), batch)], np.float64)

    def row_losses(self, logits: Iterable[torch.Tensor], batch: Batch) -> Iterator[torch.Tensor]:
        """The loss of each row, float64[], from `logits`; `WIDENED_BYTES` of them are in float32 at a time."""
        targets = torch.from_numpy(batch.input_ids).to(self.device, torch.int64)[:, 1:]
        counted = self._place(predicted(batch))
        for row, target, counts in zip(logits, targets, counted, strict=True):
            some = max(1, WIDENED_BYTES // (4 * row.shape[-1]))
            pieces = zip(row[:-1].split(some), target.split(some), strict=True)
            tokens = torch.cat([cross_entropy(piece.float(), of, reduction="none") for piece, of in pieces])
            yield tokens.double().where(counts, 0).sum()

    def losses_without(self, batches: Sequence[Batch], drops: Sequence[Drop]) -> list[Float64]:
        """For each set of layers, float64[rows]: `losses` of all batches without them.

        Sets that have the first one's layers and more are cheaper: their passes begin where they differ.
        """
        found = self.each(partial(self._losses_of_batch, drops), batches)
        return [np.concatenate(of_batches) for of_batches in zip(*found, strict=True)]

    def _losses_of_batch(self, drops: Sequence[Drop], batch: Batch) -> list[Float64]:
        first, branches = drops[0], self.branches(drops)
        with self.without(first), recording([self.layers[layer] for layer in set(branches.values())]) as recorded:
            losses = [self.losses(batch)]
        for drop in drops[1:]:
            with self.without(drop):
                if drop not in branches:
                    losses.append(self.losses(batch))
                    continue
                layer = branches[drop]
                behind = begins_behind(drop, layer)
                with resuming(self.layers, behind, Recorded({behind: recorded.inputs[layer]}, self.forms)):
                    losses.append(self.losses(batch))
        return losses

    def branches(self, drops: Sequence[Drop]) -> dict[Drop, int]:
        """Sets of layers whose passes can begin from the first set's, and the layer where they differ."""
        first = set(drops[0])
        if len(drops) == 1 or not self.resumes:
            return {}
        differ = {drop: min(map(layer_of, first ^ set(drop)), default=-1) for drop in drops[1:]}
        return {drop: at for drop, at in differ.items() if at not in first and begins_behind(drop, at) >= 0}

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
            ModelError: gradients cannot be had of this replica.
        """
        for batch, watcher in zip(batches, watchers, strict=True):
            with watcher.watch(), torch.enable_grad():
                logits = self.logits(batch)
                for number, gradient in enumerate(self.logit_gradients(logits, batch, draws, seed)):
                    logits.backward(gradient, retain_graph=number < draws)
        return list(watchers)

    def logit_gradients(
        self, logits: torch.Tensor, batch: Batch, draws: int = 0, seed: int = 0
    ) -> Iterator[torch.Tensor]:
        """Of the summed losses, [rows, tokens, vocabulary]: of the text's own labels, then of each draw's."""
        with torch.no_grad():
            labels = torch.from_numpy(batch.input_ids).to(self.device, torch.int64)[:, 1:]
            drawn = self._draw_labels(logits.detach(), batch, draws, seed) if draws else ()
        for of in (labels, *drawn):
            with torch.no_grad():
                gradient = self._gradients_of_labels(logits.detach(), batch, of)
            yield gradient

    def _gradients_of_labels(self, logits: torch.Tensor, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
        """Of cross entropy: what is predicted, less 1 at the label; `WIDENED_BYTES` are in float32 at a time."""
        counted, found = self._place(predicted(batch)), torch.zeros_like(logits)
        some = max(1, WIDENED_BYTES // (4 * logits.shape[-1]))
        for row, into, targets, counts in zip(logits, found, labels, counted, strict=True):
            pieces = (row[:-1].split(some), into[:-1].split(some), targets.split(some), counts.split(some))
            for piece, part, target, count in zip(*pieces, strict=True):
                probabilities = piece.float().softmax(dim=-1)
                probabilities.scatter_add_(1, target[:, None], probabilities.new_full((len(target), 1), -1.0))
                part.copy_(probabilities.masked_fill_(~count[:, None], 0))
        return found

    def _draw_labels(self, logits: torch.Tensor, batch: Batch, draws: int, seed: int) -> torch.Tensor:
        """int64[draws, rows, tokens - 1], by inverting the distribution function at uniform numbers."""
        found = logits.new_zeros((draws, len(logits), logits.shape[1] - 1), dtype=torch.int64)
        some = max(1, WIDENED_BYTES // (4 * logits.shape[-1]))
        for number, (row, ids, real) in enumerate(zip(logits, batch.input_ids, batch.attention_mask, strict=True)):
            uniform = torch.from_numpy(_uniform(ids[real], draws, seed)).to(self.device)  # [tokens - 1, draws]
            pieces = zip(row[: len(uniform)].split(some), uniform.split(some), strict=True)
            labels = [
                torch.searchsorted(piece.double().softmax(dim=-1).cumsum(dim=-1), at, right=True).clamp_max_(
                    row.shape[-1] - 1
                )
                for piece, at in pieces
            ]
            if labels:
                found[:, number, : len(uniform)] = torch.cat(labels).T
        return found

    def _place(self, mask: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(mask)).to(self.device)


def _no_head(checkpoint: Checkpoint, module: Any) -> ModelError:
    name, config = type(module).__name__, module.config
    if config.get_text_config() is not config:
        return ModelError(
            f"'{checkpoint.name}' ({name}) is multimodal: only models of text alone can be evaluated.",
            "Save its language model, head and all, as a checkpoint of its own, and evaluate that.",
        )
    return ModelError(
        f"'{checkpoint.name}' ({name}) has no head that predicts the next token.", "Evaluate a causal language model."
    )


def _uniform(ids: np.ndarray, draws: int, seed: int) -> Float64:
    """float64[tokens - 1, draws] in [0, 1), by the tokens of a row and a seed."""
    digest = np.frombuffer(hashlib.sha256(ids.astype(np.int32).tobytes()).digest(), np.uint32)
    return np.random.default_rng([seed, *digest.tolist()]).random((max(0, len(ids) - 1), draws))


def begins_behind(drop: Drop, layer: int) -> int:
    """Behind which layer a pass begins with what a layer is given: that layer, if it is left out, or the one before."""
    return layer if layer in drop else layer - 1


def predicted(batch: Batch) -> np.ndarray:
    """bool[rows, tokens - 1]: which tokens, of all but the first, are predicted and count."""
    return batch.observed[:, 1:] & batch.attention_mask[:, :-1]
