"""Observation of a backbone's forward passes: read-only hooks, and reductions on the device of each activation.

`Hooks` hand the activations of layers to the `Observer` whose `Pass` runs in their context. An `ExpertCounter` of the
observer sums the statistics of routed experts.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from avss_dist.core.devices import to_host
from avss_dist.core.errors import ModelError
from avss_dist.core.process import bound
from avss_dist.core.sites import INPUT_SITES
from avss_dist.corpus.pairs import Pairing
from avss_dist.measure.kernels import kernels_for
from avss_dist.measure.kernels.reference import Accumulator, Kernels, Tensors, send_stats
from avss_dist.measure.rows import CountedTokens, PlacedRows, row_tensors
from avss_dist.models.structure.layers import (
    Experts,
    Layer,
    Routing,
    as_rows,
    first_tensor,
    input_tensor,
    routing_of,
    with_replaced,
)
from avss_dist.partition.group import RowSplit
from avss_dist.stats.layer_stats import ROW_FIELDS, ExpertStats, LayerKey, LayerStats, StratumKey

ALL_ROWS = RowSplit()
UNIT_SITES = ("block", "update", *INPUT_SITES)


@dataclass
class Pass:
    """A forward pass in progress: its observer, the tokens to count, and the running layer.

    Attributes:
        mask: bool[rows, tokens], true for tokens that count.
        local_rows: rows that this process counts.
        copies: tokens that count, by device. See `on`.
        calls: number of calls of each layer's module so far.
        entered: the running layer, the hidden states that it received, and their autograd version, which reveals
            changes in place; None between layers, and in a pass without tokens that count.
    """

    observer: Observer
    mask: torch.Tensor
    local_rows: slice
    pairing: Pairing | None
    copies: dict[torch.device, CountedTokens] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    entered: tuple[Layer, torch.Tensor | None, int] | None = None

    def on(self, device: torch.device) -> CountedTokens:
        """Return the tokens that count, on a device."""
        return self.copies.setdefault(device, CountedTokens(self.mask, device, self.local_rows, self.pairing))


PASSES: ContextVar[tuple[Pass, ...]] = ContextVar("passes", default=())
"""Passes in progress in this thread or greenlet, the innermost last."""


@dataclass
class ExpertCounter:
    """Accumulator of expert statistics by layer, over the passes of one observer, on the device of the experts."""

    _sums: dict[int, Tensors] = field(default_factory=dict)

    def add(self, layer: int, experts: Experts, routing: Routing, outputs: Iterable[torch.Tensor]) -> None:
        """Add the tokens of a batch to the sums of a layer.

        Args:
            routing: routing of the tokens that count.
            outputs: [tokens, units], the outputs of each token's k-th expert at a gate of 1, for each k.
        """
        routed, sums, router = self._sums_of(layer, experts, routing.hidden.device).values()
        router[0] += len(routing.index)
        for slot, output in enumerate(outputs):
            index, gates = routing.index[:, slot], routing.gates[:, slot].double()
            x = output.double()
            squares, total = x.square().sum(dim=1), x.sum(dim=1)
            finite = torch.isfinite(squares)
            chosen = (index[:, None] == torch.arange(experts.number, device=index.device)).double()
            columns = torch.stack([torch.ones_like(gates), gates], dim=1)
            routed += chosen.T @ columns
            columns = torch.stack([gates * squares.sqrt(), torch.full_like(gates, x.shape[1]), total, squares], dim=1)
            sums += chosen.T @ torch.where(finite[:, None], columns, 0)

    def add_entropy(self, layer: int, experts: Experts, logits: torch.Tensor) -> None:
        """Add the router's entropy over the tokens that count.

        Args:
            logits: [tokens, experts], the router's output.
        """
        wide = logits.double()
        shares = wide / wide.sum(dim=-1, keepdim=True) if experts.normalized else wide.softmax(dim=-1)
        self._sums_of(layer, experts, logits.device)["router"][1] += torch.special.entr(shares).sum()

    def send(self) -> Callable[[], dict[int, ExpertStats]]:
        """Start the transfer of the sums, and return a function that waits for it and returns statistics by layer."""
        layers = sorted(self._sums)
        arrived = to_host([self._sums[layer] for layer in layers])

        def wait() -> dict[int, ExpertStats]:
            stats = {}
            for layer, sums in zip(layers, arrived(), strict=True):
                routed_tokens, gates = sums["routed"].T.copy()
                norms, elements, outputs, squares = sums["outputs"].T.copy()
                tokens, entropy = sums["router"]
                stats[layer] = ExpertStats(
                    routed_tokens=routed_tokens.astype(np.int64),
                    gate_sum=gates,
                    gated_norm_sum=norms,
                    output_count=elements.astype(np.int64),
                    output_sum=outputs,
                    output_sum_sq=squares,
                    token_count=np.full(len(gates), int(tokens), np.int64),
                    router_entropy_sum=np.full(len(gates), entropy),
                )
            return stats

        return wait

    def _sums_of(self, layer: int, experts: Experts, device: torch.device) -> Tensors:
        """Return the sums of a layer.

        They are ``routed`` float64[experts, 2], tokens and gates; ``outputs`` float64[experts, 4], gate * |output|,
        elements, their sum and sum of squares; and ``router`` float64[2], its tokens and entropy.
        """
        if layer not in self._sums:
            zeros = partial(torch.zeros, dtype=torch.float64, device=device)
            sizes = {"routed": (experts.number, 2), "outputs": (experts.number, 4), "router": (2,)}
            self._sums[layer] = {name: zeros(size) for name, size in sizes.items()}
            if experts.router is None:
                self._sums[layer]["router"][1] = torch.nan
        return self._sums[layer]


class Hooks:
    """Hooks on layers, which hand activations to the `Observer` whose forward pass runs in their context.

    Passes may run concurrently, each in a thread, greenlet or context of its own. `attached` registers the hooks.
    """

    def __init__(self, layers: Sequence[Layer], sites: Sequence[str]) -> None:
        self.layers, self.sites = layers, sites

    def hand(self, read: Callable[..., None], module: nn.Module, *call: Any) -> None:
        """Hand a call of a module to the observer of the pass in progress in this context, if it uses these hooks.

        Args:
            read: method of `Observer` that takes the pass, the module and what torch tells its hooks of the call.
        """
        for observed_pass in reversed(PASSES.get()):
            if observed_pass.observer.hooks is self:
                read(observed_pass.observer, observed_pass, module, *call)
                return


@contextmanager
def attached(layers: Sequence[Layer], sites: Sequence[str], *, experts: bool = False) -> Iterator[Hooks]:
    """Attach hooks for any number of observers, and remove them on exit, also after an exception.

    Args:
        layers: layers, as found by `find.find_structure`.
        sites: the sites of ``core.sites.EVERY_SITE`` to measure.
        experts: whether to measure routed experts.
    """
    hooks = Hooks(layers, sites)
    with ExitStack() as stack:
        for module in dict.fromkeys(layer.module for layer in layers):
            enter, leave = partial(hooks.hand, Observer.enter), partial(hooks.hand, Observer.leave)
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave))
        taps = [(site, layer.taps[site]) for site in sites for layer in layers if site in layer.taps]
        for site, module, reads in dict.fromkeys((site, tap.module, tap.reads) for site, tap in taps):
            read = partial(hooks.hand, partial(Observer.read, site=site, reads=reads))
            if reads == "input":
                stack.enter_context(module.register_forward_pre_hook(read, with_kwargs=True))
            else:
                stack.enter_context(module.register_forward_hook(read))
        for routed in dict.fromkeys(layer.experts for layer in layers if layer.experts and experts):
            read = partial(hooks.hand, partial(Observer.read_experts, experts=routed))
            stack.enter_context(routed.module.register_forward_pre_hook(read, with_kwargs=True))
            if routed.router is not None:
                read = partial(hooks.hand, partial(Observer.read_router, experts=routed))
                stack.enter_context(routed.router.register_forward_hook(read))
        yield hooks


class Observer:
    """Accumulator of LayerStats over the forward passes that run inside `batch`. Observers may be nested.

    A forward pass raises ModelError if the tensors of a layer cannot be counted. The message names the layer.

    Args:
        hooks: hooks of the layers, from `attached`.
        thresholds: absolute near-zero thresholds, ascending.
        split: rows of a batch that this process counts.
        passes: number of passes to be counted, if known. After the last, a layer's accumulators are freed.
        heartbeat: called at the start of every layer.
    """

    def __init__(
        self,
        hooks: Hooks,
        thresholds: Sequence[float],
        *,
        split: RowSplit = ALL_ROWS,
        passes: int | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> None:
        self.hooks = hooks
        self.split, self.experts = split, ExpertCounter()
        self._passes, self._heartbeat = passes, heartbeat
        self._thresholds = np.asarray(thresholds, np.float64)
        self._by_call = {(layer.module, layer.call): layer for layer in hooks.layers}
        self._accumulators: dict[StratumKey, Accumulator] = {}
        self._stats: dict[StratumKey, LayerStats] = {}
        self._coming: list[tuple[list[StratumKey], Callable[[], list[LayerStats]]]] = []
        self._num_observed: Counter[int] = Counter()
        self._row_batches: defaultdict[LayerKey, list[tuple[np.ndarray, Tensors]]] = defaultdict(list)
        self._kernels: dict[torch.device, Kernels] = {}
        # Sums by unit of the inputs of linear maps include those of neurons.
        self._unit_sites = (*UNIT_SITES, "neuron") if set(INPUT_SITES) & set(hooks.sites) else UNIT_SITES

    @contextmanager
    def batch(self, observed: np.ndarray, pairing: Pairing | None = None) -> Iterator[None]:
        """Count the forward pass that runs inside the context.

        A forward pass outside of `batch` is not counted. Passes of one observer may take turns, as in greenlets, but
        must not run concurrently.

        Args:
            observed: bool[rows, tokens], true for tokens that count.
            pairing: description of the rows of paired text. With it, strata are counted separately, and the statistics
                of single rows are measured.
        """
        mask, local_rows = torch.from_numpy(np.ascontiguousarray(observed)), self.split.rows(len(observed))
        with bound(PASSES, (*PASSES.get(), Pass(self, mask, local_rows, pairing))):
            yield

    def send(self) -> None:
        """Start the transfer of the counts to the host. `strata` waits for it."""
        self._finish()
        keys = list(self._accumulators)
        self._coming.append((keys, self._send(keys)))

    def send_rows(self) -> Callable[[], dict[LayerKey, PlacedRows]]:
        """Start the transfer of the row statistics, and return a function that waits for it and returns them."""
        batches = {key: list(zip(*self._row_batches[key], strict=True)) for key in sorted(self._row_batches)}
        arrived = to_host(
            [{name: torch.cat([rows[name] for rows in batch]) for name in ROW_FIELDS} for _, batch in batches.values()]
        )

        def wait() -> dict[LayerKey, PlacedRows]:
            rows = zip(batches.items(), arrived(), strict=True)
            return {key: (np.concatenate(places), stats) for (key, (places, _)), stats in rows}

        return wait

    def strata(self) -> dict[StratumKey, LayerStats]:
        """Return the statistics of all passes so far, by (layer index, site, stratum).

        The stratum of unpaired text is an empty string.
        """
        self.send()
        for keys, arrived in self._coming:
            self._stats |= zip(keys, arrived(), strict=True)
        self._coming.clear()
        return dict(sorted(self._stats.items()))

    def _send(self, keys: list[StratumKey]) -> Callable[[], list[LayerStats]]:
        return send_stats([self._accumulators.pop(key) for key in keys])

    def enter(self, now: Pass, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record the start of a layer."""
        if self._heartbeat:
            self._heartbeat()
        if not now.mask.numpy().any():
            return
        layer, hidden = self._by_call.get((module, now.calls[module])), input_tensor(args, kwargs)
        now.calls[module] += 1
        if layer is None:
            raise ModelError(
                f"A layer ran more often than when the model was opened ({now.calls[module]} times in one pass)."
            )
        now.entered = layer, hidden, hidden._version if hidden is not None else 0

    def leave(self, now: Pass, module: nn.Module, _args: Any, output: Any) -> None:
        """Add the statistics of a layer at its end."""
        entered, now.entered = now.entered, None
        if entered is None or entered[0].module is not module:
            return
        if {"block", "update"} & set(self.hooks.sites):
            self._add_block(now, *entered, output)
        self._finish()
        index = entered[0].index
        self._num_observed[index] += 1
        if self._num_observed[index] == self._passes:  # accumulators on the host become results, ten times smaller
            keys = [key for key in self._accumulators if key[0] == index]
            if all(self._accumulators[key].device.type == "cpu" for key in keys):
                self._stats |= zip(keys, self._send(keys)(), strict=True)

    def read(self, now: Pass, module: nn.Module, args: Any, kwargs_or_output: Any, *, site: str, reads: str) -> None:
        """Add the statistics of a site's module inside a layer: its output after it ran, or its input before."""
        if now.entered is None:
            return
        layer = now.entered[0]
        tap = layer.taps.get(site)
        tensor = first_tensor((*args, *kwargs_or_output.values()) if reads == "input" else kwargs_or_output)
        if tap is None or tap.module is not module or tensor is None:
            return
        x = self._rows(now, layer, tap.axes, tap.scaled(tensor.detach()))
        self._add(now, layer, site, tap.exchange(x) if tap.exchange else x[now.local_rows])

    def read_experts(self, now: Pass, module: nn.Module, args: Any, kwargs: Any, *, experts: Experts) -> None:
        """Add the statistics of the routed experts of a layer before they run.

        They run once for each of the k slots, with gates of 1, as their usual output is a sum over slots.
        """
        routing = routing_of([t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)])
        if routing is None or now.entered is None:
            return
        places = self._counted_places(now, now.entered[0], routing.index)
        counted = Routing(*(x.index_select(0, places) for x in (routing.hidden, routing.index, routing.gates)))

        def output(slot: slice) -> torch.Tensor:
            instead = {
                id(routing.hidden): counted.hidden,
                id(routing.index): counted.index[:, slot],
                id(routing.gates): torch.ones_like(counted.gates[:, slot]),
            }
            positional, keywords = with_replaced(args, kwargs, instead)
            return module.forward(*positional, **keywords)

        outputs = (output(slice(slot, slot + 1)) for slot in range(counted.index.shape[1]))
        if self.split.rank == 0:
            self.experts.add(now.entered[0].index, experts, counted, outputs)
        else:  # ranks that share the experts run them together, and the first one counts
            deque(outputs, maxlen=0)

    def read_router(self, now: Pass, _module: nn.Module, _args: Any, output: Any, *, experts: Experts) -> None:
        """Add the entropy of the router of a layer, after it ran."""
        logits = first_tensor(output)
        if now.entered is None or logits is None or self.split.rank:
            return
        logits, layer = logits.reshape(-1, experts.number), now.entered[0]
        places = self._counted_places(now, layer, logits)
        self.experts.add_entropy(layer.index, experts, logits.index_select(0, places))

    def _counted_places(self, now: Pass, layer: Layer, rows: torch.Tensor) -> torch.Tensor:
        """Return the positions of counted tokens among the rows that the experts of a layer see.

        Raises:
            ModelError: if ``rows`` has another number of tokens than the batch.
        """
        if len(rows) != now.mask.numel():
            raise ModelError(
                f"The experts of layer {layer.index} see {len(rows)} tokens in a batch of {now.mask.numel()}.",
                "Score it without `experts`.",
            )
        return now.on(rows.device).own_places

    def _add_block(self, now: Pass, layer: Layer, before: torch.Tensor | None, version: int, output: Any) -> None:
        after = first_tensor(output)
        if after is None:
            raise ModelError(f"{layer} returns a {type(output).__name__}, no hidden states.")
        if before is not None and before._version != version:
            raise ModelError(f"{layer} changes its input in place; it cannot be observed.")
        comparable = before is not None and before.shape == after.shape
        after = self._rows(now, layer, layer.axes, after)[now.local_rows]
        if before is None or not comparable:
            self._add(now, layer, "block", after)
            return
        before = self._rows(now, layer, layer.axes, before)[now.local_rows]
        self._add(now, layer, "block", after, before)
        like = after.new_empty((0, 0, after.shape[2]), dtype=torch.promote_types(after.dtype, before.dtype))
        for _, mask, into in self._accumulators_of(now, layer, "update", like):
            self._kernels_of(after.device).add_update(into, after, before, mask)
        if now.pairing:
            self._add_rows(now, layer, "update", after - before)

    def _rows(self, now: Pass, layer: Layer, axes: str, tensor: torch.Tensor) -> torch.Tensor:
        x = as_rows(tensor.detach(), axes, *now.mask.shape, place=layer)
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(f"{layer} computes in {x.dtype}.", "Use `dtype` float32.")
        return x

    def _add(self, now: Pass, layer: Layer, site: str, x: torch.Tensor, before: torch.Tensor | None = None) -> None:
        for stratum, mask, into in self._accumulators_of(now, layer, site, x, geometry=before is not None):
            self._kernels_of(x.device).add(into, x, mask, before)
            if site == "block":
                into.add_first_tokens(x.flatten(0, 1).index_select(0, now.on(x.device).first_tokens[stratum]))
        self._add_rows(now, layer, site, x, before)

    def _add_rows(
        self, now: Pass, layer: Layer, site: str, x: torch.Tensor, before: torch.Tensor | None = None
    ) -> None:
        if now.pairing is None or site not in self.hooks.sites or not len(x):
            return
        rows = row_tensors(x, now.on(x.device), self._thresholds, before)
        self._row_batches[layer.index, site].append((now.pairing.rows[now.local_rows], rows))

    def _accumulators_of(
        self, now: Pass, layer: Layer, site: str, like: torch.Tensor, *, geometry: bool = False
    ) -> Iterator[tuple[str, torch.Tensor, Accumulator]]:
        """Yield each stratum with its mask and the accumulator of a layer's site, if the site is measured."""
        if site not in self.hooks.sites:
            return
        for stratum, mask in now.on(like.device).masks.items():
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
