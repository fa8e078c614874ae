"""Hidden states of the whole model and of the pruned one at a cut, computed with one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import Removal, experts_by_layer, layer_of, whole_layers
from avss_dist.core.registry import LAYERWISE, PARTITIONS
from avss_dist.core.settings import Execution, Settings
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.expert_removal import require_experts, without_experts
from avss_dist.models.layers import as_rows, first_tensor, probe_tokens
from avss_dist.models.loading import Backbone, forward_function, load
from avss_dist.models.patching import Parameter, patched
from avss_dist.models.skipping import Recorded, recording, resuming, skipping
from avss_dist.partition.choose import place
from avss_dist.partition.open import open_replica
from avss_dist.pruning.repair.projection import (
    CapturedCall,
    OutputProjection,
    RepairError,
    captured,
    find_output_projection,
)
from avss_dist.system.devices import available_memory, devices_here, free_device

Visit = Callable[[int, torch.Tensor, "CutStates"], None]
"""Takes a batch's number, the whole model's hidden states [rows, tokens, units], and those of the pruned model."""
MEMORY_SHARE = 4  # one part in this many of the free memory holds hidden states


@dataclass(frozen=True)
class CutStates:
    """Hidden states of the pruned model at a cut, for one batch.

    Attributes:
        hidden: [rows, tokens, units], after the last layer before the cut.
        linear, last: calls of the projection's linear map and of its last module, [rows, tokens, units].
    """

    hidden: torch.Tensor
    linear: CapturedCall
    last: CapturedCall


class _ResumePoints:
    """Outputs of one layer for each batch, from which later passes resume, as many as fit in ``room`` bytes."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._states: dict[int, tuple[int, torch.Tensor]] = {}

    def put(self, batch: int, layer: int, hidden: torch.Tensor) -> None:
        """Store the output of a layer in place of an earlier layer's."""
        _, old = self._states.pop(batch, (0, None))
        self._room += 0 if old is None else old.nbytes
        if layer >= 0 and hidden.nbytes <= self._room:
            self._room -= hidden.nbytes
            self._states[batch] = layer, hidden.cpu()

    def get(self, batch: int) -> tuple[int, torch.Tensor] | None:
        """Return the stored layer and its output. Return None if nothing is stored."""
        return self._states.get(batch)


class HiddenStateSource:
    """Computes the hidden states of some batches, with layers and experts removed or not, and weights changed or not.

    A pass resumes where an earlier one over the same batch was, if the family allows it and nothing before that point
    has changed. Cuts are therefore visited in order of depth.

    Args:
        drop: layers and experts that the pruned model lacks.
        starts: layers behind which passes of the whole model will resume.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        batches: Sequence[Batch],
        drop: Collection[Removal],
        starts: Collection[int],
    ) -> None:
        self._layers, self._drop, self._device = backbone.structure.layers, {*drop}, device
        require_experts(self._layers, drop)
        self._batches = batches
        self._forward = forward_function(backbone.module)
        self._changed: dict[Parameter, torch.Tensor] = {}
        with torch.no_grad(), recording(self._layers) as recorded:
            whole = first_tensor(self._probe())
            self._forms = dict(recorded.forms)
            room = available_memory() // MEMORY_SHARE if self._resumes(recorded, whole, starts) else 0
        self._of_whole, self._of_pruned = _ResumePoints(room // 2), _ResumePoints(room // 2)

    def output_projection(self, layer: int) -> OutputProjection:
        """Return the output projection of a layer.

        Raises:
            RepairError: it has none.
        """
        with torch.no_grad(), skipping(self._layers, self._after(layer), self._forms):
            return self._find_projection(layer, self._probe)

    def _find_projection(self, layer: int, run: Callable[[], Any]) -> OutputProjection:
        removed = experts_by_layer(self._drop).get(layer, ())
        return find_output_projection(self._layers[layer], run, partial(self.value, layer), removed)

    def change(self, layer: int, path: str, value: torch.Tensor) -> None:
        """Change a parameter of the pruned model. The whole model keeps its value."""
        self._changed[layer, path] = value

    def value(self, layer: int, path: str) -> torch.Tensor:
        """Return a parameter of the whole model."""
        return self._layers[layer].module.get_parameter(path).detach()

    def has(self, layer: int, path: str) -> bool:
        """Whether a layer has a parameter of this path."""
        return path in dict(self._layers[layer].module.named_parameters())

    def visit(self, projection: OutputProjection, last: int, visit: Visit, numbers: Iterable[int]) -> None:
        """Compute the hidden states of batches, in order, and pass them to ``visit``.

        Args:
            projection: projection in the pruned model at which its states are captured.
            last: layer of the whole model after which its hidden states are taken.
            numbers: indices of the batches.
        """
        for number in numbers:
            visit(number, self._whole(number, last), self._pruned(number, projection))

    def _whole(self, number: int, layer: int) -> torch.Tensor:
        """Return the whole model's hidden states after a layer, [rows, tokens, units]."""
        stored = self._of_whole.get(number)
        if stored is not None and stored[0] == layer:
            hidden = stored[1].to(self._device)
        else:
            with captured({"layer": self._layers[layer].module}) as calls:
                self._run(number, self._after(layer), stored)
            hidden = calls["layer"].output
            self._of_whole.put(number, layer, hidden)
        return self._rows(hidden, self._layers[layer].axes, number)

    def _pruned(self, number: int, projection: OutputProjection) -> CutStates:
        """Return the pruned model's states at a projection, with all changes so far."""
        layer = projection.layer
        skipped = self._after(layer.index) | {*whole_layers(self._drop)}
        with self._patched(), without_experts(self._layers, self._drop), _captured_at(projection) as calls:
            self._run(number, skipped, self._of_pruned.get(number))
        self._of_pruned.put(number, layer.index - 1, calls["layer"].input)
        return self._cut_states(number, projection, calls)

    def _cut_states(self, number: int, projection: OutputProjection, calls: Mapping[Any, CapturedCall]) -> CutStates:
        hidden = self._rows(calls["layer"].output, projection.layer.axes, number)
        linear, last = (self._call_rows(calls[path], number) for path in (projection.linear, projection.last))
        return CutStates(hidden, linear, last)

    def _call_rows(self, call: CapturedCall, number: int) -> CapturedCall:
        return replace(
            call, input=self._rows(call.input, "rows", number), output=self._rows(call.output, "rows", number)
        )

    def _patched(self) -> AbstractContextManager[None]:
        """Return a context inside which the model computes with the changes so far."""
        return patched(self._layers, self._changed)

    def _after(self, layer: int) -> set[int]:
        """Return the indices of the layers after one, which need not run."""
        return set(range(layer + 1, len(self._layers)))

    def _run(self, number: int, skipped: Collection[int], start: tuple[int, torch.Tensor] | None) -> None:
        """Run a pass over a batch without some layers, from the beginning or from a stored output of a layer."""
        with torch.no_grad(), skipping(self._layers, skipped, self._forms), self._resuming(start):
            self._pass(number)

    def _pass(self, number: int) -> None:
        batch = self._batches[number]
        input_ids = torch.from_numpy(batch.input_ids).to(self._device, torch.int64)
        mask = None if batch.attention_mask.all() else np.ascontiguousarray(batch.attention_mask)
        self._forward(input_ids, None if mask is None else torch.from_numpy(mask).to(self._device))

    def _resuming(self, start: tuple[int, torch.Tensor] | None) -> AbstractContextManager[None]:
        if start is None:
            return nullcontext()
        layer, hidden = start
        return resuming(self._layers, layer, Recorded({layer: hidden.to(self._device)}, self._forms))

    def _probe(self) -> Any:
        ids = probe_tokens(self._device)
        return self._forward(ids, None)

    def _resumes(self, recorded: Recorded, whole: torch.Tensor | None, starts: Collection[int]) -> bool:
        """Whether passes that resume behind these layers equal whole passes exactly, tried on a few tokens."""
        if whole is None or len(recorded.forms) < len(self._layers):
            return False
        states = {start: recorded.inputs[start + 1] for start in starts}
        try:
            for start in states.items():
                with self._resuming(start):
                    resumed = first_tensor(self._probe())
                if resumed is None or not torch.equal(resumed, whole):
                    return False
        except Exception:  # a model's own code can raise anything where layers did not run
            return False
        return True

    def _rows(self, tensor: torch.Tensor, axes: str, number: int) -> torch.Tensor:
        rows = as_rows(tensor, axes, *self._batches[number].input_ids.shape)
        if rows is None:
            raise RepairError(
                f"Hidden states have the shape {tuple(tensor.shape)}, which is not rows x tokens x units."
            )
        return rows


class GatheredHiddenStateSource(HiddenStateSource):
    """Hidden states of a model whose ranks hold parts of its weights, and run equally many passes.

    No hidden states are kept between cuts, because ranks have room for different numbers of them.
    """

    def __init__(self, model: LanguageModel, batches: Sequence[Batch], *places: Any) -> None:
        self._model = model
        super().__init__(model.backbone, model.device, batches, *places)

    def value(self, layer: int, path: str) -> torch.Tensor:
        """See `HiddenStateSource`."""
        return self._model.value(layer, path)

    def _patched(self) -> AbstractContextManager[None]:
        return self._model.patched(self._changed)

    def _resumes(self, recorded: Recorded, whole: torch.Tensor | None, starts: Collection[int]) -> bool:
        return False


class SharedHiddenStateSource(HiddenStateSource):
    """Hidden states of a model that reads its weights once for all passes of `LanguageModel.together`.

    All batches share two readings of the weights for a cut. No hidden states are kept between cuts.
    """

    def __init__(
        self,
        model: LanguageModel,
        batches: Sequence[Batch],
        drop: Collection[Removal],
        starts: Collection[int],
    ) -> None:
        self._model, self._layers, self._drop = model, model.layers, {*drop}
        require_experts(self._layers, drop)
        self._batches, self._device = batches, model.device
        self._forward = forward_function(model.backbone.module)
        self._changed: dict[Parameter, torch.Tensor] = {}

    def output_projection(self, layer: int) -> OutputProjection:
        """See `HiddenStateSource`."""
        hidden = self._probe_inputs[layer] if layer > 0 and self._model.resumes else None  # reads no earlier weight

        def run() -> Any:
            with nullcontext() if hidden is None else self._model.beginning(layer - 1, hidden.clone()):
                return self._model.together([self._probe])[0]

        with self._model.without(self._after(layer)):
            return self._find_projection(layer, run)

    @cached_property
    def _probe_inputs(self) -> dict[int, torch.Tensor]:
        """Input of each layer of the whole model for the probe's tokens."""
        with recording(self._layers) as recorded:
            self._model.together([self._probe])
        return recorded.inputs

    def value(self, layer: int, path: str) -> torch.Tensor:
        """See `HiddenStateSource`."""
        return self._model.value(layer, path)

    def visit(self, projection: OutputProjection, last: int, visit: Visit, numbers: Iterable[int]) -> None:
        """See `HiddenStateSource`."""
        layer = self._layers[last]

        def whole(number: int) -> torch.Tensor:
            with self._model.without(self._after(last)), captured({"layer": layer.module}) as calls:
                self._pass(number)
            return self._rows(calls["layer"].output, layer.axes, number).cpu()

        def pruned(number: int) -> None:
            behind = self._after(projection.layer.index)
            skipped = behind | {removal for removal in self._drop if layer_of(removal) not in behind}
            patch = self._model.patched(self._changed)
            with self._model.without(skipped), patch, _captured_at(projection) as calls:
                self._pass(number)
            visit(number, wanted.pop(number).to(self._device), self._cut_states(number, projection, calls))

        wanted = dict(enumerate(self._model.together([partial(whole, i) for i in range(len(self._batches))])))
        self._model.together([partial(pruned, number) for number in numbers])


def _captured_at(projection: OutputProjection) -> AbstractContextManager[dict[Any, CapturedCall]]:
    """Return the context that records the calls of a projection's modules, by path, and of its layer."""
    module = projection.layer.module
    paths = {path: module.get_submodule(path) for path in (projection.linear, projection.last)}
    return captured({"layer": module} | paths, {projection.linear: projection.read_units})


OpenHiddenStates = Callable[[Sequence[Batch], Collection[Removal], Collection[int]], HiddenStateSource]
"""Takes batches, dropped layers and experts, and starts, and returns the `HiddenStateSource` of an open model."""


def hidden_states_of(model: LanguageModel) -> OpenHiddenStates:
    """Return the function that opens the hidden states of a model."""
    if model.lockstep > 1:
        return partial(GatheredHiddenStateSource, model)
    if model.keeps_hidden_states:
        return partial(HiddenStateSource, model.backbone, model.device)
    return partial(SharedHiddenStateSource, model)


@contextmanager
def opened_hidden_states(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, execution: Execution
) -> Iterator[OpenHiddenStates]:
    """Open a checkpoint for a repair: whole on a device, or streamed if it does not fit or that is requested.

    Raises:
        ConfigError: another partition is requested, or its memory limits are too small.
        ModelError: the checkpoint cannot be opened, or streamed: it predicts no next token, for example.
    """
    able = [name for name, info in PARTITIONS.items() if info.whole or info.layerwise]
    if execution.partition not in ("auto", *able):
        raise ConfigError(
            f"In this process a repair is not fitted in `partition` {execution.partition}.",
            f"Use {' or '.join(able)}, or name a `warehouse`: workers fit it then.",
        )
    placement = place(checkpoint, settings, execution, devices_here(device.type), head=True)
    if PARTITIONS[placement.partition].whole:
        backbone = load(checkpoint, settings, device)
        yield lambda *text: HiddenStateSource(backbone, device, *text)
        del backbone
    else:
        streamed = replace(placement, partition=LAYERWISE)
        with closing(open_replica(checkpoint, settings, streamed, head=True)) as replica:
            assert replica.language_model is not None
            yield hidden_states_of(replica.language_model)
    free_device(device)
