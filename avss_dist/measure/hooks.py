"""Observe forward passes of a backbone: hooks that only read, reductions on the device that holds the activation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from avss_dist.corpus.pairs import Pairing
from avss_dist.errors import ModelError
from avss_dist.measure.experts import ExpertCounter, expert_hooks
from avss_dist.measure.kernels.base import Accumulator, Kernels, send_stats
from avss_dist.measure.kernels.choose import kernels_for
from avss_dist.measure.passes import PASSES, Entered, Pass
from avss_dist.measure.rows import ObservedTokens, PlacedRows, RowsOf, masks_by_stratum, row_tensors
from avss_dist.models.layers import Layer, as_rows, first_tensor, input_tensor
from avss_dist.partition.base import RowSplit
from avss_dist.settings import INPUT_SITES
from avss_dist.stats.layer_stats import LayerKey, LayerStats, StratumKey
from avss_dist.stats.merging import merge_strata
from avss_dist.system.context import bound
from avss_dist.system.devices import to_host

ALL_ROWS = RowSplit()
UNIT_SITES = ("block", "update", *INPUT_SITES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Hooks:
    """Hooks on layers, which hand what they see to the `Observer` whose forward pass runs in their context.

    Passes may run at once, each in a thread, a greenlet or a context of its own. Attach hooks before they begin, and
    remove them after they end.
    """

    def __init__(self, layers: Sequence[Layer], sites: Sequence[str], *, experts: bool = False) -> None:
        self.layers, self.sites, self._experts = layers, sites, experts
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register every hook."""
        handles = self._handles
        for module in dict.fromkeys(layer.module for layer in self.layers):
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        for site in self.sites:
            taps = [layer.taps[site] for layer in self.layers if site in layer.taps]
            for module, reads in dict.fromkeys((tap.module, tap.reads) for tap in taps):
                if reads == "input":
                    hook = self._reader_of_input(site)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(self._reader_of_output(site)))
        if self._experts:
            handles += expert_hooks(self.layers, self._pass)

    def remove(self) -> None:
        """Leave no hook on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _pass(self) -> Pass | None:
        """The pass that runs in this context, if it is one that these hooks serve."""
        return next((now for now in reversed(PASSES.get()) if now.observer.hooks is self), None)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if now := self._pass():
            now.observer.enter(now, module, input_tensor(args, kwargs))

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        if (now := self._pass()) and now.entered:
            now.observer.leave(now, module, output)

    def _reader_of_output(self, site: str) -> Callable[[nn.Module, Any, Any], None]:
        def read(module: nn.Module, _args: Any, output: Any) -> None:
            if (now := self._pass()) and now.entered:
                now.observer.read(now, site, module, first_tensor(output))

        return read

    def _reader_of_input(self, site: str) -> Callable[[nn.Module, Any, Any], None]:
        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            if (now := self._pass()) and now.entered:
                now.observer.read(now, site, module, first_tensor((*args, *kwargs.values())))

        return read


@contextmanager
def attached(layers: Sequence[Layer], sites: Sequence[str], *, experts: bool = False) -> Iterator[Hooks]:
    """Hooks for any number of observers; whatever happens inside, no hook is left afterwards.

    Args:
        layers: of `structure.find_structure`.
        sites: which of ``settings.SITES`` to measure.
        experts: measure routed experts too.
    """
    hooks = Hooks(layers, sites, experts=experts)
    try:
        hooks.attach()
        yield hooks
    finally:
        hooks.remove()


class Observer:
    """Accumulates LayerStats while forward passes run inside `batch`; see `observe` for its arguments."""

    def __init__(
        self,
        hooks: Hooks,
        thresholds: Sequence[float],
        *,
        split: RowSplit = ALL_ROWS,
        passes: int | None = None,
        beat: Callable[[], None] | None = None,
    ) -> None:
        self.hooks = hooks
        self.split, self.experts = split, ExpertCounter()
        self._passes, self._beat = passes, beat
        self._thresholds = np.asarray(thresholds, np.float64)
        self._by_call = {(layer.module, layer.call): layer for layer in hooks.layers}
        self._accumulators: dict[StratumKey, Accumulator] = {}
        self._stats: dict[StratumKey, LayerStats] = {}
        self._coming: list[tuple[list[StratumKey], Callable[[], list[LayerStats]]]] = []
        self._of_rows: defaultdict[LayerKey, RowsOf] = defaultdict(RowsOf)
        self._left: Counter[int] = Counter()
        self._kernels: dict[torch.device, Kernels] = {}
        inputs = set(INPUT_SITES) & set(hooks.sites)  # of linear maps, whose every unit is summed
        self._unit_sites = (*UNIT_SITES, "neuron") if inputs else UNIT_SITES

    @contextmanager
    def batch(self, observed: np.ndarray, pairing: Pairing | None = None) -> Iterator[None]:
        """Count the forward pass inside: ``observed`` is bool[rows, tokens], True where a token counts.

        Of paired text, ``pairing`` says what its rows are: each stratum is counted apart, and each row is measured.

        A batch in which nothing counts adds nothing, and neither does a forward pass outside of `batch`. Passes of one
        observer may take turns, as in greenlets, but not run at once.
        """
        mask = torch.from_numpy(np.ascontiguousarray(observed)) if observed.any() else None
        own = self.split.rows(len(observed))
        strata = {} if mask is None else masks_by_stratum(mask[own], pairing and pairing.part(own))
        with bound(PASSES, (*PASSES.get(), Pass(self, mask, own, strata, pairing))):
            yield

    def send(self) -> None:
        """Have devices send what they counted. They can do other work until `result` or `strata` waits for it."""
        self._finish()
        self._coming.append(self._send(list(self._accumulators)))

    def send_rows(self) -> Callable[[], dict[LayerKey, PlacedRows]]:
        """Have devices send the statistics of rows of paired text; what is returned waits for them."""
        keys = sorted(self._of_rows)
        arrived = to_host([tensor for key in keys for tensor in self._of_rows[key].tensors()])

        def wait() -> dict[LayerKey, PlacedRows]:
            arrays = iter(arrived())
            return {key: self._of_rows[key].to_stats(arrays) for key in keys}

        return wait

    def result(self) -> dict[LayerKey, LayerStats]:
        """Everything counted so far, by (layer index, site)."""
        return merge_strata(self.strata())

    def strata(self) -> dict[StratumKey, LayerStats]:
        """The same by (layer index, site, stratum), which is empty where the text is not paired."""
        self.send()
        for keys, arrived in self._coming:
            self._stats |= zip(keys, arrived(), strict=True)
        self._coming.clear()
        return dict(sorted(self._stats.items()))

    def _send(self, keys: list[StratumKey]) -> tuple[list[StratumKey], Callable[[], list[LayerStats]]]:
        return keys, send_stats([self._accumulators.pop(key) for key in keys], self._thresholds)

    def enter(self, now: Pass, module: nn.Module, hidden: torch.Tensor | None) -> None:
        """A layer begins."""
        if self._beat:
            self._beat()
        if now.mask is None:
            return
        call = now.calls.get(module, 0)
        now.calls[module] = call + 1
        layer = self._by_call.get((module, call))
        if layer is None:
            raise ModelError(f"A layer ran more often than when the model was opened ({call + 1} times in one pass).")
        now.entered = Entered(layer, hidden, hidden._version if hidden is not None else 0)

    def leave(self, now: Pass, module: nn.Module, output: Any) -> None:
        """A layer ends."""
        entered, now.entered = now.entered, None
        if entered is None or entered.layer.module is not module:
            return
        if {"block", "update"} & set(self.hooks.sites):
            self._add_block(now, entered, output)
        self._finish()
        self._count_pass(entered.layer)

    def read(self, now: Pass, site: str, module: nn.Module, tensor: torch.Tensor | None) -> None:
        """A module inside of a layer has run, or begins."""
        layer = now.entered.layer if now.entered else None
        tap = layer.taps.get(site) if layer else None
        if layer is None or tap is None or tap.module is not module or tensor is None:
            return
        x = self._rows(now, layer, tap.axes, tensor)
        self._add(now, layer, site, tap.exchange(x) if tap.exchange else x[now.own])

    def _count_pass(self, layer: Layer) -> None:
        """After its last pass, conclude a layer whose accumulators, ten times its results, are in host memory."""
        self._left[layer.index] += 1
        if self._left[layer.index] == self._passes:
            keys = [key for key in self._accumulators if key[0] == layer.index]
            if all(self._accumulators[key].is_on_host for key in keys):
                _, arrived = self._send(keys)
                self._stats |= zip(keys, arrived(), strict=True)

    def _add_block(self, now: Pass, entered: Entered, output: Any) -> None:
        layer, before = entered.layer, entered.hidden
        after = first_tensor(output)
        if after is None:
            raise ModelError(f"Layer {layer.index} ({layer.name}) returns a {type(output).__name__}, no hidden states.")
        if before is not None and before._version != entered.version:
            raise ModelError(f"Layer {layer.index} ({layer.name}) changes its input in place; it cannot be observed.")
        comparable = before is not None and before.shape == after.shape
        after = self._rows(now, layer, layer.axes, after)[now.own]
        if before is None or not comparable:
            self._add(now, layer, "block", after)
            return
        before = self._rows(now, layer, layer.axes, before)[now.own]
        self._add(now, layer, "block", after, before)
        self._add_update(now, layer, after, before)

    def _rows(self, now: Pass, layer: Layer, axes: str, tensor: torch.Tensor) -> torch.Tensor:
        assert now.mask is not None
        rows, tokens = now.mask.shape
        x = as_rows(tensor.detach(), axes, rows, tokens)
        if x is None:
            raise ModelError(
                f"Layer {layer.index} ({layer.name}) sees {list(tensor.shape)} in a batch of {rows} x {tokens} tokens: "
                "the model pads, pools or extends its rows.",
                "If it pads rows to a multiple, make `sequence_length` one.",
            )
        if x.dtype not in DTYPES:
            raise ModelError(f"Layer {layer.index} ({layer.name}) computes in {x.dtype}.", "Use `dtype` float32.")
        return x

    def _add(self, now: Pass, layer: Layer, site: str, x: torch.Tensor, before: torch.Tensor | None = None) -> None:
        for stratum, mask, into in self._accumulators_of(now, layer, site, x, geometry=before is not None):
            self._kernels_of(x.device).add(into, x, mask, before)
            if site == "block":
                into.add_first_tokens(x.flatten(0, 1).index_select(0, now.first_tokens_on(x.device)[stratum]))
        self._add_rows(now, layer, site, x, before)

    def _add_update(self, now: Pass, layer: Layer, after: torch.Tensor, before: torch.Tensor) -> None:
        like = after.new_empty((0, 0, after.shape[2]), dtype=torch.promote_types(after.dtype, before.dtype))
        for _, mask, into in self._accumulators_of(now, layer, "update", like):
            self._kernels_of(after.device).add_update(into, after, before, mask)
        if now.pairing:
            self._add_rows(now, layer, "update", after - before)

    def _add_rows(
        self, now: Pass, layer: Layer, site: str, x: torch.Tensor, before: torch.Tensor | None = None
    ) -> None:
        if now.mask is None or now.pairing is None or site not in self.hooks.sites or not len(x):
            return
        if x.device not in now.tokens:
            now.tokens[x.device] = ObservedTokens.of(now.mask[now.own], x.device)
        rows = row_tensors(x, now.tokens[x.device], self._thresholds, before)
        self._of_rows[layer.index, site].add(now.pairing.rows[now.own], rows)

    def _accumulators_of(
        self, now: Pass, layer: Layer, site: str, like: torch.Tensor, *, geometry: bool = False
    ) -> Iterator[tuple[str, torch.Tensor, Accumulator]]:
        """Yield each stratum with its mask and the accumulator of a layer's site, if the site is measured."""
        if site not in self.hooks.sites:
            return
        for stratum, mask in now.masks_on(like.device).items():
            key = (layer.index, site, stratum)
            if key not in self._accumulators:
                units = site in self._unit_sites
                self._accumulators[key] = Accumulator(like, self._thresholds, units=units, geometry=geometry)
            yield stratum, mask, self._accumulators[key]

    def _kernels_of(self, device: torch.device) -> Kernels:
        if device not in self._kernels:
            self._kernels[device] = kernels_for(device)
        return self._kernels[device]

    def _finish(self) -> None:
        for kernels in self._kernels.values():
            kernels.finish()


@contextmanager
def observe(
    layers: Sequence[Layer],
    sites: Sequence[str],
    thresholds: Sequence[float],
    *,
    passes: int | None = None,
    beat: Callable[[], None] | None = None,
) -> Iterator[Observer]:
    """Hook the layers; whatever happens inside, no hook is left afterwards. Observers may be nested.

    Args:
        layers: of `structure.find_structure`.
        sites: which of ``settings.SITES`` to measure.
        thresholds: absolute near-zero thresholds, ascending.
        passes: how many will be counted, if that is known: after the last, a layer's accumulators are given up.
        beat: called whenever a layer begins.

    Raises:
        ModelError: (from the forward pass) a layer gives tensors that cannot be counted; the message names it.
    """
    with attached(layers, sites) as hooks:
        yield Observer(hooks, thresholds, passes=passes, beat=beat)
