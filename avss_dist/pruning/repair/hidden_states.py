"""Hidden states of the whole model and of the pruned one at a cut, computed with one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from avss_dist.core.devices import available_memory, to_device
from avss_dist.core.intervention import Removal, experts_by_layer, layer_of
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.interventions import CapturedCall, Parameter, captured, recording, resuming
from avss_dist.models.layers import Layer, as_rows, probe_tokens
from avss_dist.models.loading import forward_function
from avss_dist.pruning.repair.projection import OutputProjection, find_output_projection

T = TypeVar("T")
MEMORY_SHARE = 4  # one part in this many of the free memory holds hidden states


class HiddenStateSource:
    """Computes the hidden states of some batches, with layers and experts removed or not, and weights changed or not.

    A pass resumes where an earlier one over the same batch was, if the family allows it and nothing before that point
    has changed. Cuts are therefore visited in order of depth. Of a model whose ranks hold parts of its weights no
    hidden states are kept between cuts, because ranks have room for different numbers of them. Of a model that reads
    its weights once for all passes of `LanguageModel.together`, all batches share two readings for a cut.

    Args:
        drop: layers and experts that the pruned model lacks.

    Attributes:
        changed: changed parameters of the pruned model, in the dtypes of the checkpoint's files. The whole model keeps
            their values.
    """

    def __init__(self, model: LanguageModel, batches: Sequence[Batch], drop: Collection[Removal]) -> None:
        self._model, self._batches, self._drop = model, batches, {*drop}
        self._layers, self._device = model.layers, model.device
        self._forward = forward_function(model.backbone.module)
        self.changed: dict[Parameter, torch.Tensor] = {}
        self._stored: dict[tuple[str, int], tuple[int, torch.Tensor]] = {}
        self._interleaves = not model.keeps_hidden_states
        resumes = not self._interleaves and model.lockstep == 1 and model.resumes
        room = available_memory() // MEMORY_SHARE if resumes else 0
        self._room = {"whole": room // 2, "pruned": room // 2}

    def output_projection(self, layer: int) -> OutputProjection:
        """Return the output projection of a layer.

        Raises:
            PlanError: it has none.
        """
        model, removed = self._model, experts_by_layer(self._drop).get(layer, ())
        start = (layer - 1, self._probe_inputs[layer]) if layer > 0 and model.resumes else None  # reads fewer weights

        def run() -> Any:
            with self._resuming(start):
                return self._probe()

        with torch.no_grad(), model.without(self._after(layer)):
            return find_output_projection(self._layers[layer], run, partial(model.value, layer), removed)

    @cached_property
    def _probe_inputs(self) -> dict[int, torch.Tensor]:
        """Input of each layer of the whole model for the probe's tokens."""
        with torch.no_grad(), recording(self._layers) as inputs:
            self._probe()
        return inputs

    def visit(
        self,
        projection: OutputProjection,
        last: int,
        visit: Callable[[int, torch.Tensor, torch.Tensor, CapturedCall, CapturedCall], None],
        numbers: Iterable[int],
        *,
        units: bool = False,
    ) -> None:
        """Compute the hidden states of batches, in order, and pass them to ``visit``.

        Args:
            projection: projection in the pruned model at which its states are captured.
            last: layer of the whole model after which its hidden states are taken.
            visit: takes a batch's number, the hidden states of the whole and of the pruned model after the last layer
                before the cut, and the calls of the projection's linear map and of its last module, each [rows, tokens,
                units].
            numbers: indices of the batches.
            units: also read the units of routed experts.
        """

        def pruned(targets: dict[int, torch.Tensor], number: int) -> None:
            visit(number, targets.pop(number), *self._pruned(number, projection, units=units))

        with torch.no_grad():
            for group in [[*numbers]] if self._interleaves else ([number] for number in numbers):
                targets = dict(zip(group, self._together([partial(self._whole, i, last) for i in group]), strict=True))
                self._together([partial(pruned, targets, number) for number in group])

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
        rows = self._rows(hidden, self._layers[layer], number)
        return rows.cpu() if self._interleaves else rows  # those of all batches wait together

    def _pruned(
        self, number: int, projection: OutputProjection, *, units: bool
    ) -> tuple[torch.Tensor, CapturedCall, CapturedCall]:
        """Return the pruned model's states at a projection, with all changes so far."""
        layer, places = projection.layer, (projection.linear, projection.last)
        behind = self._after(layer.index)
        skipped = behind | {removal for removal in self._drop if layer_of(removal) not in behind}
        modules = {"layer": layer.module} | {path: layer.module.get_submodule(path) for path in places}
        read = {projection.linear: projection.down.units} if units and projection.down else {}
        with self._model.patched(self.changed), captured(modules, read) as calls:
            self._run(number, skipped, self._stored.get(("pruned", number)))
        self._store("pruned", number, layer.index - 1, calls["layer"].input)
        linear, last = (
            replace(
                calls[path],
                input=self._rows(calls[path].input, layer, number, "rows"),
                output=self._rows(calls[path].output, layer, number, "rows"),
            )
            for path in places
        )
        return self._rows(calls["layer"].output, layer, number), linear, last

    def _store(self, kind: str, number: int, layer: int, hidden: torch.Tensor) -> None:
        """Store the output of a layer in place of an earlier layer's if there is room, for later passes to resume."""
        if old := self._stored.pop((kind, number), None):
            self._room[kind] += old[1].nbytes
        if layer >= 0 and hidden.nbytes <= self._room[kind]:
            self._room[kind] -= hidden.nbytes
            self._stored[kind, number] = layer, hidden.cpu()

    def _after(self, layer: int) -> set[Removal]:
        """Return the indices of the layers after one, which need not run."""
        return set(range(layer + 1, len(self._layers)))

    def _run(self, number: int, skipped: Collection[Removal], start: tuple[int, torch.Tensor] | None) -> None:
        """Run a pass over a batch without some layers, from the beginning or from a stored output of a layer."""
        batch = self._batches[number]
        mask = None if batch.attention_mask.all() else to_device(batch.attention_mask, self._device)
        with self._model.without(skipped), self._resuming(start):
            self._forward(to_device(batch.input_ids, self._device, torch.int64), mask)

    def _resuming(self, start: tuple[int, torch.Tensor] | None) -> AbstractContextManager[None]:
        return resuming(self._layers, start[0], start[1].to(self._device, copy=True)) if start else nullcontext()

    def _probe(self) -> Any:
        return self._together([partial(self._forward, probe_tokens(self._device), None)])[0]

    def _together(self, passes: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of passes: interleaved, or one after the other on this rank."""
        return self._model.together(passes) if self._interleaves else [run() for run in passes]

    def _rows(self, tensor: torch.Tensor, layer: Layer, number: int, axes: str = "") -> torch.Tensor:
        return as_rows(tensor, axes or layer.axes, *self._batches[number].input_ids.shape, place=layer)
