"""Hidden states of the whole model and of the pruned one at a cut, computed with one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import nn

from avss_dist.core.devices import available_memory, to_device
from avss_dist.core.intervention import Removal, experts_by_layer, layer_of
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.patches import Parameter
from avss_dist.models.change.skipping import resumption
from avss_dist.models.checkpoint.loading import forward_function
from avss_dist.models.forward import Change, Forward, Output, RunThrough, changing
from avss_dist.models.structure.layers import Layer, LayerCall, as_rows, probe_tokens
from avss_dist.models.watching import CapturedCall, captured, recording
from avss_dist.pruning.repair.neurons import BorrowedNeurons, MlpNeurons, NeuronBank, Recipient, find_neurons
from avss_dist.pruning.repair.projection import OutputProjection, find_output_projection

MEMORY_SHARE = 4
"""One part in this many of the free memory holds hidden states."""


@dataclass(frozen=True, eq=False)
class CutStates:
    """Hidden states of a batch at a cut, each [rows, tokens, units].

    Attributes:
        whole: those of the whole model after the last layer that is removed at the cut.
        pruned: those of the pruned model after the last layer before the cut.
        linear: call of the projection's linear map in the pruned model.
        last: call of the projection's last module in the pruned model.
        borrowed: values of borrowed neurons in the pruned model, which has them beside its own; None without any.
    """

    whole: torch.Tensor
    pruned: torch.Tensor
    linear: CapturedCall
    last: CapturedCall
    borrowed: torch.Tensor | None = None


class LayerOutput(NamedTuple):
    """The output of a layer for a batch, from which a pass resumes."""

    layer: int
    hidden: torch.Tensor


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
        self._model = model
        self._batches = batches
        self._drop = set(drop)
        self._layers = model.layers
        self._device = model.device
        self._forward = forward_function(model.backbone.module)
        self.changed: dict[Parameter, torch.Tensor] = {}
        # Stored outputs by model, "whole" or "pruned", and index of the batch.
        self._stored: dict[tuple[str, int], LayerOutput] = {}
        self._interleaves = not model.keeps_hidden_states
        resumes = not self._interleaves and model.lockstep == 1 and model.resumes
        room = available_memory() // MEMORY_SHARE if resumes else 0
        self._room = {"whole": room // 2, "pruned": room // 2}

    def output_projection(self, layer: int) -> OutputProjection:
        """Return the output projection of a layer.

        Raises:
            PlanError: it has none.
        """
        removed = experts_by_layer(self._drop).get(layer, ())
        with self._probing(layer) as run:
            return find_output_projection(self._layers[layer], run, partial(self._model.value, layer), removed)

    def neurons(self, layer: int) -> MlpNeurons | None:
        """Return the neurons of a layer's MLP, or None if they have no rows of their own."""
        with self._probing(layer) as run:
            return find_neurons(self._layers[layer], run, partial(self._model.value, layer), self._model.patched)

    def have_the_same_values(self, recipient: Recipient, donor: MlpNeurons, borrowed: BorrowedNeurons) -> bool:
        """Whether borrowed neurons have the values of their own layer, see `Recipient.has_the_values_of`."""
        with self._probing(recipient.neurons.layer.index) as run:
            return recipient.has_the_values_of(donor, borrowed, run, self._model.patched)

    @contextmanager
    def _probing(self, layer: int) -> Iterator[Callable[[], None]]:
        """Yield a function that runs a pass of the whole model over the probe's tokens up to a layer."""
        start: LayerOutput | None = None
        # A pass that begins at the layer reads fewer weights.
        if layer > 0 and self._model.resumes:
            start = LayerOutput(layer - 1, self._probe_inputs[layer])

        def run() -> None:
            with self._resuming(start):
                self._probe()

        with torch.no_grad(), self._model.without(self._after(layer)):
            yield run

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
        visit: Callable[[int, CutStates], None],
        numbers: Iterable[int],
        *,
        units: bool = False,
        banks: Sequence[NeuronBank] = (),
    ) -> None:
        """Compute the hidden states of batches, in order, and pass them to ``visit``.

        Args:
            projection: projection in the pruned model at which its states are captured.
            last: layer of the whole model after which its hidden states are taken.
            visit: takes a batch's number and its hidden states.
            numbers: indices of the batches.
            units: also read the units of routed experts.
            banks: borrowed neurons whose values are computed, too.
        """
        states = partial(self._pruned, projection=projection, units=units, banks=banks)
        with torch.no_grad():
            if self._interleaves:
                self._visit_together(states, last, visit, list(numbers))
                return
            for number in numbers:
                visit(number, states(number, whole=self._whole(number, last)))

    def _visit_together(
        self,
        states: Callable[..., CutStates],
        last: int,
        visit: Callable[[int, CutStates], None],
        numbers: Sequence[int],
    ) -> None:
        """Do as `visit`, with the passes of all batches interleaved: first the whole model's, then the pruned one's.

        Args:
            states: `_pruned` of a batch.
        """
        passes = [partial(self._whole, number, last) for number in numbers]
        wholes = dict(zip(numbers, self._model.together(passes), strict=True))

        def visit_pruned(number: int) -> None:
            whole = wholes.pop(number)  # Its memory is free once the batch has been visited.
            visit(number, states(number, whole=whole))

        self._model.together([partial(visit_pruned, number) for number in numbers])

    def _whole(self, number: int, layer: int) -> torch.Tensor:
        """Return the whole model's hidden states after a layer, [rows, tokens, units]."""
        stored = self._stored.get(("whole", number))
        if stored is not None and stored.layer == layer:
            hidden = stored.hidden.to(self._device)
        else:
            with captured({"layer": self._layers[layer].module}) as calls:
                self._run(number, self._after(layer), stored)
            hidden = calls["layer"].output
            self._store("whole", number, layer, hidden)
        rows = self._rows(hidden, self._layers[layer], number)
        # Interleaved, the states of all batches wait together, for which a device may have no room.
        if self._interleaves:
            return rows.cpu()
        return rows

    def _pruned(
        self,
        number: int,
        *,
        projection: OutputProjection,
        whole: torch.Tensor,
        units: bool,
        banks: Sequence[NeuronBank],
    ) -> CutStates:
        """Return the states of the pruned model, with all changes so far, beside those of the whole model."""
        layer = projection.layer
        behind = self._after(layer.index)
        skipped = behind | {removal for removal in self._drop if layer_of(removal) not in behind}
        modules = {
            "layer": layer.module,
            projection.linear: layer.module.get_submodule(projection.linear),
            projection.last: layer.module.get_submodule(projection.last),
        }
        read = {}
        if units and projection.down:
            read[projection.linear] = projection.down.units
        values: list[torch.Tensor] = []
        changes: list[Change] = []
        if banks:
            linear = modules[projection.linear]
            changes.append(RunThrough(layer.module, partial(self._run_with_banks, banks, linear, values)))
        with self._model.patched(self.changed), captured(modules, read) as calls, changing(changes):
            self._run(number, skipped, self._stored.get(("pruned", number)))
        self._store("pruned", number, layer.index - 1, calls["layer"].input)
        borrowed = None
        if banks:
            borrowed = torch.cat([self._rows(part, layer, number, "rows") for part in values], dim=-1)
        return CutStates(
            whole=whole,
            pruned=self._rows(calls["layer"].output, layer, number),
            linear=self._call_rows(calls[projection.linear], layer, number),
            last=self._call_rows(calls[projection.last], layer, number),
            borrowed=borrowed,
        )

    def _run_with_banks(
        self,
        banks: Sequence[NeuronBank],
        linear: nn.Module,
        values: list[torch.Tensor],
        forward: Forward,
        *args: object,
        **kwargs: object,
    ) -> Output:
        """Run a layer with each bank of borrowed neurons, and then as it is.

        Args:
            linear: linear map whose inputs are the neurons.
            values: list to which the values of the borrowed neurons are added.
        """
        call = LayerCall(args, kwargs)
        for bank in banks:
            copied = call.with_hidden(call.hidden.clone())  # The layer may change the original.
            with self._model.patched(bank.patch), captured({"linear": linear}) as calls:
                forward(*copied.args, **copied.kwargs)
            values.append(calls["linear"].input[..., : bank.number])
        return forward(*args, **kwargs)

    def _call_rows(self, call: CapturedCall, layer: Layer, number: int) -> CapturedCall:
        """Return a call of a module below a layer with its input and its output as [rows, tokens, units]."""
        rows_in = self._rows(call.input, layer, number, "rows")
        rows_out = self._rows(call.output, layer, number, "rows")
        return replace(call, input=rows_in, output=rows_out)

    def _store(self, kind: str, number: int, layer: int, hidden: torch.Tensor) -> None:
        """Store the output of a layer in place of an earlier layer's if there is room, for later passes to resume."""
        if old := self._stored.pop((kind, number), None):
            self._room[kind] += old.hidden.nbytes
        if layer >= 0 and hidden.nbytes <= self._room[kind]:
            self._room[kind] -= hidden.nbytes
            self._stored[kind, number] = LayerOutput(layer, hidden.cpu())

    def _after(self, layer: int) -> set[Removal]:
        """Return the indices of the layers after one, which need not run."""
        return set(range(layer + 1, len(self._layers)))

    def _run(self, number: int, skipped: Collection[Removal], start: LayerOutput | None) -> None:
        """Run a pass over a batch without some layers, from the beginning or from a stored output of a layer."""
        batch = self._batches[number]
        mask = None if batch.attention_mask.all() else to_device(batch.attention_mask, self._device)
        with self._model.without(skipped), self._resuming(start):
            self._forward(to_device(batch.input_ids, self._device, torch.int64), mask)

    def _resuming(self, start: LayerOutput | None) -> AbstractContextManager[None]:
        """Have passes begin behind a stored output of a layer inside the context, or at the beginning without one."""
        if start is None:
            return nullcontext()
        hidden = start.hidden.to(self._device, copy=True)
        return changing(resumption(self._layers, start.layer, hidden))

    def _probe(self) -> None:
        """Run a pass over the probe's tokens."""
        probe = partial(self._forward, probe_tokens(self._device), None)
        if self._interleaves:
            self._model.together([probe])
        else:
            probe()

    def _rows(self, tensor: torch.Tensor, layer: Layer, number: int, axes: str = "") -> torch.Tensor:
        """Return a tensor of a batch as [rows, tokens, units].

        Args:
            axes: axes of the tensor, see `as_rows`; those of the layer's hidden states by default.
        """
        return as_rows(tensor, axes or layer.axes, *self._batches[number].input_ids.shape, place=layer)
