"""The whole model and the pruned one in the same weights: what each computes at a cut, and the weights that change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from avss_dist.corpus.shards import Batch
from avss_dist.errors import ConfigError
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import PROBE_SHAPE, Layer, as_rows, first_tensor
from avss_dist.models.loading import Backbone, forward_function, load
from avss_dist.models.patching import Parameter, patched
from avss_dist.models.skipping import Recorded, recording, resuming, skipping
from avss_dist.partition.choose import place
from avss_dist.partition.open import open_replica
from avss_dist.partition.streaming.language_model import StreamingLanguageModel
from avss_dist.pruning.repair.outlet import Outlet, RepairError, Seen, captured, find_outlet
from avss_dist.pruning.repair.readers import find_readers
from avss_dist.registry import LAYERWISE, PARTITIONS
from avss_dist.settings import Execution, Settings
from avss_dist.system.devices import available_memory, devices_here, free_device

Visit = Callable[[int, torch.Tensor, "AtCut"], None]
"""Sees of a batch, by number: the whole model's stream, [rows, tokens, units], and the pruned model at the outlet."""
VisitMaps = Callable[[int, Mapping[str, Seen], Mapping[str, Seen]], None]
"""Sees of a batch, by number: what maps take and give in the whole model, and in the pruned one, by their paths."""
ROOM = 4  # one part in so many of the memory that is free holds streams


@dataclass(frozen=True)
class AtCut:
    """What the pruned model computes for a batch after the last layer before a cut.

    Attributes:
        stream: [rows, tokens, units] after it.
        linear, last: what the outlet's linear map, and its last module, took and gave: [rows, tokens, units].
    """

    stream: torch.Tensor
    linear: Seen
    last: Seen


class _Kept:
    """Where passes can begin again: for each batch, what one layer gave; of as many batches as there is room for."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._found: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(self, batch: int, layer: int, stream: torch.Tensor) -> None:
        """Keep what a layer gave, in place of what an earlier one did."""
        _, old = self._found.pop(batch, (0, None))
        self._room += 0 if old is None else old.nbytes
        if layer >= 0 and stream.nbytes <= self._room:
            self._room -= stream.nbytes
            self._found[batch] = layer, stream.cpu()

    def get(self, batch: int) -> tuple[int, torch.Tensor] | None:
        """The layer, and what it gave."""
        return self._found.get(batch)


class Streams:
    """A backbone on some batches, with layers left out or not, with changed weights or not.

    A pass begins where an earlier one over the same batch was, if the family allows it, and nothing before that has
    changed since: cuts are visited in order of depth.

    Args:
        drop: the layers that the pruned model is without.
        starts: layers behind which passes of the whole model will begin again.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        batches: Sequence[Batch],
        drop: Collection[int],
        starts: Collection[int],
    ) -> None:
        self._layers, self._drop, self._device = backbone.structure.layers, set(drop), device
        self._batches = batches
        self._forward = forward_function(backbone.module)
        self._changed: dict[Parameter, torch.Tensor] = {}
        with torch.no_grad(), recording(self._layers) as recorded:
            whole = first_tensor(self._probe())
            self._forms = dict(recorded.forms)
            room = available_memory() // ROOM if self._resumes(recorded, whole, starts) else 0
        self._of_whole, self._of_pruned = _Kept(room // 2), _Kept(room // 2)

    def layer(self, index: int) -> Layer:
        """One of the model's."""
        return self._layers[index]

    def outlet(self, layer: int) -> Outlet:
        """That of a layer.

        Raises:
            RepairError: it has none.
        """
        with torch.no_grad(), skipping(self._layers, self._after(layer), self._forms):
            return find_outlet(self._layers[layer], self._probe, partial(self.value, layer))

    def change(self, layer: int, path: str, value: torch.Tensor) -> None:
        """Give a parameter of a layer another value in the pruned model; the whole one keeps its own."""
        self._changed[layer, path] = value

    def value(self, layer: int, path: str) -> torch.Tensor:
        """A parameter as the whole model has it."""
        return self._layers[layer].module.get_parameter(path).detach()

    def has(self, layer: int, path: str) -> bool:
        """Whether a layer has a parameter of this path."""
        return path in dict(self._layers[layer].module.named_parameters())

    def visit(self, outlet: Outlet, last: int, see: Visit, numbers: Iterable[int]) -> None:
        """Show batches, in order: what the whole model has after a layer, and the pruned one at an outlet before it."""
        for number in numbers:
            see(number, self._whole(number, last), self._pruned(number, outlet))

    def readers(self, layer: int) -> list[Sequence[str]]:
        """Those of a layer; see `readers.find_readers`."""
        with torch.no_grad(), skipping(self._layers, self._after(layer), self._forms):
            return find_readers(self._layers[layer], self._probe)

    def visit_maps(self, layer: int, paths: Sequence[str], see: VisitMaps, numbers: Iterable[int]) -> None:
        """Show batches, in order, at linear maps of the layer behind the cut that was visited last."""
        after, modules = self._after(layer), self._maps(layer, paths)
        for number in numbers:
            with captured(modules) as whole:
                self._run(number, after, self._of_whole.get(number))
            with patched(self._layers, self._changed), captured(modules) as now:
                self._run(number, self._drop | after, self._of_pruned.get(number))
            see(number, self._seen_rows(whole, number), self._seen_rows(now, number))

    def _maps(self, layer: int, paths: Sequence[str]) -> dict[str, nn.Module]:
        return {path: self._layers[layer].module.get_submodule(path) for path in paths}

    def _seen_rows(self, seen: Mapping[str, Seen], number: int) -> dict[str, Seen]:
        return {
            path: Seen(*(self._rows(tensor, "rows", number) for tensor in (one.input, one.output)))
            for path, one in seen.items()
        }

    def _whole(self, number: int, layer: int) -> torch.Tensor:
        """[rows, tokens, units] after a layer of the whole model, for a batch."""
        kept = self._of_whole.get(number)
        if kept is not None and kept[0] == layer:
            stream = kept[1].to(self._device)
        else:
            with captured({"layer": self._layers[layer].module}) as seen:
                self._run(number, self._after(layer), kept)
            stream = seen["layer"].output
            self._of_whole.keep(number, layer, stream)
        return self._rows(stream, self._layers[layer].axes, number)

    def _pruned(self, number: int, outlet: Outlet) -> AtCut:
        """What the pruned model computes at an outlet for a batch, with all weights that were changed so far."""
        layer = outlet.layer
        with patched(self._layers, self._changed), captured(_modules(outlet)) as seen:
            self._run(number, self._drop | self._after(layer.index), self._of_pruned.get(number))
        self._of_pruned.keep(number, layer.index - 1, seen["layer"].input)
        return self._at_cut(number, outlet, seen)

    def _at_cut(self, number: int, outlet: Outlet, seen: Mapping[Any, Seen]) -> AtCut:
        found = self._seen_rows({path: seen[path] for path in (outlet.linear, outlet.last)}, number)
        stream = self._rows(seen["layer"].output, outlet.layer.axes, number)
        return AtCut(stream, found[outlet.linear], found[outlet.last])

    def _after(self, layer: int) -> set[int]:
        """The layers after one: none of them need run."""
        return set(range(layer + 1, len(self._layers)))

    def _run(self, number: int, skipped: Collection[int], start: tuple[int, torch.Tensor] | None) -> None:
        """A pass over a batch without some layers, from the beginning or from what a layer gave."""
        with torch.no_grad(), skipping(self._layers, skipped, self._forms), self._from(start):
            self._pass(number)

    def _pass(self, number: int) -> None:
        batch = self._batches[number]
        input_ids = torch.from_numpy(batch.input_ids).to(self._device, torch.int64)
        mask = None if batch.attention_mask.all() else np.ascontiguousarray(batch.attention_mask)
        self._forward(input_ids, None if mask is None else torch.from_numpy(mask).to(self._device))

    def _from(self, start: tuple[int, torch.Tensor] | None) -> AbstractContextManager[None]:
        if start is None:
            return nullcontext()
        layer, stream = start
        return resuming(self._layers, layer, Recorded({layer: stream.to(self._device)}, self._forms))

    def _probe(self) -> Any:
        ids = torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=self._device).reshape(PROBE_SHAPE)
        return self._forward(ids, None)

    def _resumes(self, recorded: Recorded, whole: torch.Tensor | None, starts: Collection[int]) -> bool:
        """Whether passes that begin behind these layers give exactly what whole ones do; tried on a few tokens."""
        if whole is None or len(recorded.forms) < len(self._layers):
            return False
        streams = {start: recorded.inputs[start + 1] for start in starts}
        try:
            for start in streams.items():
                with self._from(start):
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


class StreamedStreams(Streams):
    """The same of a model of which one layer has its weights at a time. All batches share two readings for a cut."""

    def __init__(
        self,
        model: StreamingLanguageModel,
        batches: Sequence[Batch],
        drop: Collection[int],
        starts: Collection[int],
    ) -> None:
        self._model, self._layers, self._drop = model, model.layers, set(drop)
        self._batches, self._device = batches, model.device
        self._forward = forward_function(model.backbone.module)
        self._changed: dict[Parameter, torch.Tensor] = {}

    def outlet(self, layer: int) -> Outlet:
        """See `Streams`."""
        given = self._given[layer] if layer > 0 and self._model.resumes else None  # no earlier weight is read again

        def run() -> Any:
            with nullcontext() if given is None else self._model.beginning(layer - 1, given.clone()):
                return self._model.together([self._probe])[0]

        with self._model.without(self._after(layer)):
            return find_outlet(self._layers[layer], run, partial(self.value, layer))

    def readers(self, layer: int) -> list[Sequence[str]]:
        """See `Streams`."""
        with self._model.without(self._after(layer)):
            return find_readers(self._layers[layer], lambda: self._model.together([self._probe])[0])

    @cached_property
    def _given(self) -> dict[int, torch.Tensor]:
        """What each layer of the whole model is given of the probe's tokens."""
        with recording(self._layers) as recorded:
            self._model.together([self._probe])
        return recorded.inputs

    def value(self, layer: int, path: str) -> torch.Tensor:
        """See `Streams`."""
        return self._model.value(layer, path)

    def visit(self, outlet: Outlet, last: int, see: Visit, numbers: Iterable[int]) -> None:
        """See `Streams`."""
        layer = self._layers[last]

        def whole(number: int) -> torch.Tensor:
            with self._model.without(self._after(last)), captured({"layer": layer.module}) as seen:
                self._pass(number)
            return self._rows(seen["layer"].output, layer.axes, number).cpu()

        def pruned(number: int) -> None:
            skipped = self._drop | self._after(outlet.layer.index)
            with self._model.without(skipped), self._model.patched(self._changed), captured(_modules(outlet)) as seen:
                self._pass(number)
            see(number, wanted.pop(number).to(self._device), self._at_cut(number, outlet, seen))

        wanted = dict(enumerate(self._model.together([partial(whole, i) for i in range(len(self._batches))])))
        self._model.together([partial(pruned, number) for number in numbers])

    def visit_maps(self, layer: int, paths: Sequence[str], see: VisitMaps, numbers: Iterable[int]) -> None:
        """See `Streams`."""
        after, modules = self._after(layer), self._maps(layer, paths)

        def whole(number: int) -> dict[str, Seen]:
            with self._model.without(after), captured(modules) as seen:
                self._pass(number)
            return {path: Seen(one.input.cpu(), one.output.cpu()) for path, one in seen.items()}

        def pruned(number: int) -> None:
            skipped = self._drop | after
            with self._model.without(skipped), self._model.patched(self._changed), captured(modules) as now:
                self._pass(number)
            see(number, self._seen_rows(wanted.pop(number), number), self._seen_rows(now, number))

        wanted = dict(enumerate(self._model.together([partial(whole, i) for i in range(len(self._batches))])))
        self._model.together([partial(pruned, number) for number in numbers])


def _modules(outlet: Outlet) -> dict[str, nn.Module]:
    """What is to be seen at an outlet."""
    module = outlet.layer.module
    return {"layer": module} | {path: module.get_submodule(path) for path in (outlet.linear, outlet.last)}


OpenStreams = Callable[[Sequence[Batch], Collection[int], Collection[int]], Streams]
"""`Streams` of an open model, less what it is open as."""


def streams_of(model: LanguageModel) -> OpenStreams:
    """What opens the streams of a model."""
    if isinstance(model, StreamingLanguageModel):
        return partial(StreamedStreams, model)
    return partial(Streams, model.backbone, model.device)


@contextmanager
def opened_streams(
    checkpoint: Checkpoint, settings: Settings, device: torch.device, execution: Execution
) -> Iterator[OpenStreams]:
    """Inside, a checkpoint is open: whole on a device, or streamed, where it has no room or that is requested.

    Raises:
        ConfigError: another partition is requested, or the memory of this one does not suffice.
        ModelError: it cannot be opened, or streamed: it predicts no next token, for example.
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
        yield lambda *text: Streams(backbone, device, *text)
        del backbone
    else:
        streamed = replace(placement, partition=LAYERWISE)
        with closing(open_replica(checkpoint, settings, streamed, head=True)) as replica:
            assert replica.language_model is not None
            yield streams_of(replica.language_model)
    free_device(device)
