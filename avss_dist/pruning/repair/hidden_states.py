"""Hidden states of the whole model and of the pruned one at a cut, computed with one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from avss_dist.core.intervention import Removal, experts_by_layer, layer_of, whole_layers
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.experts import require_experts, without_experts
from avss_dist.models.interventions import Parameter, Recorded, recording, resuming, skipping
from avss_dist.models.layers import as_rows, first_tensor, probe_tokens
from avss_dist.models.loading import forward_function
from avss_dist.pruning.repair.projection import (
    CapturedCall,
    OutputProjection,
    RepairError,
    captured,
    find_output_projection,
)
from avss_dist.system.devices import available_memory, to_device

Visit = Callable[[int, torch.Tensor, torch.Tensor, CapturedCall, CapturedCall], None]
"""Takes a batch's number, the hidden states of the whole and of the pruned model, after the last layer before the cut,
and the calls of the projection's linear map and of its last module, each [rows, tokens, units]."""
States = tuple[torch.Tensor, CapturedCall, CapturedCall]
MEMORY_SHARE = 4  # one part in this many of the free memory holds hidden states


class HiddenStateSource:
    """Computes the hidden states of some batches, with layers and experts removed or not, and weights changed or not.

    A pass resumes where an earlier one over the same batch was, if the family allows it and nothing before that point
    has changed. Cuts are therefore visited in order of depth. Of a model whose ranks hold parts of its weights no
    hidden states are kept between cuts, because ranks have room for different numbers of them. Of a model that reads
    its weights once for all passes of `LanguageModel.together`, all batches share two readings for a cut.

    Args:
        drop: layers and experts that the pruned model lacks.
        starts: layers behind which passes of the whole model will resume.

    Attributes:
        changed: changed parameters of the pruned model, in the dtypes of the checkpoint's files. The whole model keeps
            their values.
    """

    def __init__(
        self, model: LanguageModel, batches: Sequence[Batch], drop: Collection[Removal], starts: Collection[int]
    ) -> None:
        self._layers, self._drop, self._device = model.layers, {*drop}, model.device
        require_experts(self._layers, drop)
        self._batches, self._model = batches, model
        self._forward = forward_function(model.backbone.module)
        self.changed: dict[Parameter, torch.Tensor] = {}
        self._stored: dict[tuple[str, int], tuple[int, torch.Tensor]] = {}
        self._shared = model if model.lockstep == 1 and not model.keeps_hidden_states else None
        if self._shared:
            return
        with torch.no_grad(), recording(self._layers) as recorded:
            whole = first_tensor(self._probe())
            self._forms = dict(recorded.forms)
            alone = model.lockstep == 1
            room = available_memory() // MEMORY_SHARE if alone and self._resumes(recorded, whole, starts) else 0
        self._room = {"whole": room // 2, "pruned": room // 2}

    def output_projection(self, layer: int) -> OutputProjection:
        """Return the output projection of a layer.

        Raises:
            RepairError: it has none.
        """
        removed = experts_by_layer(self._drop).get(layer, ())
        find = partial(find_output_projection, self._layers[layer], value=partial(self.value, layer), removed=removed)
        if (model := self._shared) is None:
            with torch.no_grad(), skipping(self._layers, self._after(layer), self._forms):
                return find(run=self._probe)
        hidden = self._probe_inputs[layer] if layer > 0 and model.resumes else None  # reads no earlier weight

        def run() -> Any:
            with nullcontext() if hidden is None else model.beginning(layer - 1, hidden.clone()):
                return model.together([self._probe])[0]

        with model.without(self._after(layer)):
            return find(run=run)

    @cached_property
    def _probe_inputs(self) -> dict[int, torch.Tensor]:
        """Input of each layer of the whole model for the probe's tokens."""
        assert self._shared
        with recording(self._layers) as recorded:
            self._shared.together([self._probe])
        return recorded.inputs

    def value(self, layer: int, path: str) -> torch.Tensor:
        """Return a parameter of the whole model."""
        return self._model.value(layer, path)

    def visit(
        self, projection: OutputProjection, last: int, visit: Visit, numbers: Iterable[int], *, units: bool = False
    ) -> None:
        """Compute the hidden states of batches, in order, and pass them to ``visit``.

        Args:
            projection: projection in the pruned model at which its states are captured.
            last: layer of the whole model after which its hidden states are taken.
            numbers: indices of the batches.
            units: also read the units of routed experts.
        """
        if (model := self._shared) is None:
            for number in numbers:
                visit(number, self._whole(number, last), *self._pruned(number, projection, units=units))
            return
        layer, behind = self._layers[last], self._after(projection.layer.index)
        skipped = behind | {removal for removal in self._drop if layer_of(removal) not in behind}

        def whole(number: int) -> torch.Tensor:
            with model.without(self._after(last)), captured({"layer": layer.module}) as calls:
                self._pass(number)
            return self._rows(calls["layer"].output, layer.axes, number).cpu()

        def pruned(number: int) -> None:
            with (
                model.without(skipped),
                self._model.patched(self.changed),
                _captured_at(projection, units=units) as calls,
            ):
                self._pass(number)
            visit(number, targets.pop(number).to(self._device), *self._states(number, projection, calls))

        targets = dict(enumerate(model.together([partial(whole, i) for i in range(len(self._batches))])))
        model.together([partial(pruned, number) for number in numbers])

    def _whole(self, number: int, layer: int) -> torch.Tensor:
        """Return the whole model's hidden states after a layer, [rows, tokens, units]."""
        stored = self._stored.get(("whole", number))
        if stored is not None and stored[0] == layer:
            hidden = stored[1].to(self._device)
        else:
            with captured({"layer": self._layers[layer].module}) as calls:
                self._run(number, self._after(layer), stored)
            hidden = calls["layer"].output
            self._store("whole", number, layer, hidden)
        return self._rows(hidden, self._layers[layer].axes, number)

    def _pruned(self, number: int, projection: OutputProjection, *, units: bool) -> States:
        """Return the pruned model's states at a projection, with all changes so far."""
        layer = projection.layer
        skipped = self._after(layer.index) | {*whole_layers(self._drop)}
        without = without_experts(self._layers, self._drop)
        with self._model.patched(self.changed), without, _captured_at(projection, units=units) as calls:
            self._run(number, skipped, self._stored.get(("pruned", number)))
        self._store("pruned", number, layer.index - 1, calls["layer"].input)
        return self._states(number, projection, calls)

    def _store(self, kind: str, number: int, layer: int, hidden: torch.Tensor) -> None:
        """Store the output of a layer in place of an earlier layer's if there is room, for later passes to resume."""
        if old := self._stored.pop((kind, number), None):
            self._room[kind] += old[1].nbytes
        if layer >= 0 and hidden.nbytes <= self._room[kind]:
            self._room[kind] -= hidden.nbytes
            self._stored[kind, number] = layer, hidden.cpu()

    def _states(self, number: int, projection: OutputProjection, calls: Mapping[Any, CapturedCall]) -> States:
        linear, last = (
            replace(
                calls[path],
                input=self._rows(calls[path].input, "rows", number),
                output=self._rows(calls[path].output, "rows", number),
            )
            for path in (projection.linear, projection.last)
        )
        return self._rows(calls["layer"].output, projection.layer.axes, number), linear, last

    def _after(self, layer: int) -> set[int]:
        """Return the indices of the layers after one, which need not run."""
        return set(range(layer + 1, len(self._layers)))

    def _run(self, number: int, skipped: Collection[int], start: tuple[int, torch.Tensor] | None) -> None:
        """Run a pass over a batch without some layers, from the beginning or from a stored output of a layer."""
        with torch.no_grad(), skipping(self._layers, skipped, self._forms), self._resuming(start):
            self._pass(number)

    def _pass(self, number: int) -> None:
        batch = self._batches[number]
        mask = None if batch.attention_mask.all() else to_device(batch.attention_mask, self._device)
        self._forward(to_device(batch.input_ids, self._device, torch.int64), mask)

    def _resuming(self, start: tuple[int, torch.Tensor] | None) -> AbstractContextManager[None]:
        if start is None:
            return nullcontext()
        layer, hidden = start
        return resuming(self._layers, layer, hidden.to(self._device, copy=True), self._forms)

    def _probe(self) -> Any:
        return self._forward(probe_tokens(self._device), None)

    def _resumes(self, recorded: Recorded, whole: torch.Tensor | None, starts: Collection[int]) -> bool:
        """Whether passes that resume behind these layers equal whole passes exactly, tried on a few tokens."""
        if whole is None or len(recorded.forms) < len(self._layers):
            return False

        def is_equal(start: int) -> bool:
            with self._resuming((start, recorded.inputs[start + 1])):
                resumed = first_tensor(self._probe())
            return resumed is not None and torch.equal(resumed, whole)

        with suppress(Exception):  # a model's own code can raise anything where layers did not run
            return all(map(is_equal, starts))
        return False

    def _rows(self, tensor: torch.Tensor, axes: str, number: int) -> torch.Tensor:
        if (rows := as_rows(tensor, axes, *self._batches[number].input_ids.shape)) is None:
            raise RepairError(
                f"Hidden states have the shape {tuple(tensor.shape)}, which is not rows x tokens x units."
            )
        return rows


def _captured_at(projection: OutputProjection, *, units: bool) -> AbstractContextManager[dict[Any, CapturedCall]]:
    """Return the context that records the calls of a projection's modules, by path, and of its layer."""
    module = projection.layer.module
    paths = {path: module.get_submodule(path) for path in (projection.linear, projection.last)}
    read = {projection.linear: projection.down} if units and projection.down else {}
    return captured({"layer": module} | paths, read)
