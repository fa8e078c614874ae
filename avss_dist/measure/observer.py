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
from avss_dist.models.forward import Arguments, Keywords, Output
from avss_dist.models.structure.layers import (
    Experts,
    Layer,
    Routing,
    as_rows,
    first_tensor,
    input_tensor,
    routing_of,
    tensors_of,
    with_replaced,
)
from avss_dist.partition.group import RowSplit
from avss_dist.stats.layer_stats import ROW_FIELDS, ExpertStats, LayerKey, LayerStats, StratumKey

ALL_ROWS = RowSplit()
UNIT_SITES = ("block", "update", *INPUT_SITES)


@dataclass(frozen=True, eq=False)
class EnteredLayer:
    """A layer that is running.

    Attributes:
        hidden: hidden states that it received, or None.
        version: their autograd version at that time, which reveals changes in place.
    """

    layer: Layer
    hidden: torch.Tensor | None
    version: int


@dataclass
class Pass:
    """A forward pass in progress: its observer, the tokens to count, and the running layer.

    Attributes:
        mask: bool[rows, tokens], true for tokens that count.
        local_rows: rows that this process counts.
        copies: tokens that count, by device. See `on`.
        calls: number of calls of each layer's module so far.
        entered: the running layer; None between layers, and in a pass without tokens that count.
    """

    observer: Observer
    mask: torch.Tensor
    local_rows: slice
    pairing: Pairing | None
    copies: dict[torch.device, CountedTokens] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    entered: EnteredLayer | None = None

    def on(self, device: torch.device) -> CountedTokens:
        """Return the tokens that count, on a device."""
        if device not in self.copies:
            self.copies[device] = CountedTokens(self.mask, device, self.local_rows, self.pairing)
        return self.copies[device]


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
        sums = self._sums_of(layer, experts, routing.hidden.device)
        sums["router"][0] += len(routing.index)
        for slot, output in enumerate(outputs):
            index = routing.index[:, slot]
            gates = routing.gates[:, slot].double()
            x = output.double()
            squares = x.square().sum(dim=1)
            chosen = (index[:, None] == torch.arange(experts.number, device=index.device)).double()
            columns = torch.stack([torch.ones_like(gates), gates], dim=1)
            sums["routed"] += chosen.T @ columns
            elements = torch.full_like(gates, x.shape[1])
            columns = torch.stack([gates * squares.sqrt(), elements, x.sum(dim=1), squares], dim=1)
            finite = torch.isfinite(squares)
            sums["outputs"] += chosen.T @ torch.where(finite[:, None], columns, 0)

    def add_entropy(self, layer: int, experts: Experts, logits: torch.Tensor) -> None:
        """Add the router's entropy over the tokens that count.

        Args:
            logits: [tokens, experts], the router's output.
        """
        wide = logits.double()
        if experts.normalized:
            shares = wide / wide.sum(dim=-1, keepdim=True)
        else:
            shares = wide.softmax(dim=-1)
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
            sums = {
                "routed": torch.zeros((experts.number, 2), dtype=torch.float64, device=device),
                "outputs": torch.zeros((experts.number, 4), dtype=torch.float64, device=device),
                "router": torch.zeros(2, dtype=torch.float64, device=device),
            }
            if experts.router is None:
                sums["router"][1] = torch.nan
            self._sums[layer] = sums
        return self._sums[layer]


class Hooks:
    """Hooks on layers, which hand activations to the `Observer` whose forward pass runs in their context.

    Passes may run concurrently, each in a thread, greenlet or context of its own. `attached` registers the hooks.
    """

    def __init__(self, layers: Sequence[Layer], sites: Sequence[str]) -> None:
        self.layers = layers
        self.sites = sites

    def hand(self, read: Callable[..., None], module: nn.Module, *call: object) -> None:
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
            enter = partial(hooks.hand, Observer.enter)
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            leave = partial(hooks.hand, Observer.leave)
            stack.enter_context(module.register_forward_hook(leave))
        for site, module, reads in _distinct_taps(layers, sites):
            if reads == "input":
                read = partial(hooks.hand, partial(Observer.read_input, site=site))
                stack.enter_context(module.register_forward_pre_hook(read, with_kwargs=True))
            else:
                read = partial(hooks.hand, partial(Observer.read_output, site=site))
                stack.enter_context(module.register_forward_hook(read))
        if experts:
            for routed in dict.fromkeys(layer.experts for layer in layers):
                if routed is not None:
                    _attach_to_experts(stack, hooks, routed)
        yield hooks


def _distinct_taps(layers: Sequence[Layer], sites: Sequence[str]) -> list[tuple[str, nn.Module, str]]:
    """Return site, module and ``reads`` of each tap once, although layers may share modules."""
    taps: dict[tuple[str, nn.Module, str], None] = {}
    for site in sites:
        for layer in layers:
            if site in layer.taps:
                tap = layer.taps[site]
                taps[site, tap.module, tap.reads] = None
    return list(taps)


def _attach_to_experts(stack: ExitStack, hooks: Hooks, experts: Experts) -> None:
    """Attach hooks to the routed experts of a layer and to their router, until a stack of contexts ends."""
    read = partial(hooks.hand, partial(Observer.read_experts, experts=experts))
    stack.enter_context(experts.module.register_forward_pre_hook(read, with_kwargs=True))
    if experts.router is not None:
        read = partial(hooks.hand, partial(Observer.read_router, experts=experts))
        stack.enter_context(experts.router.register_forward_hook(read))


@dataclass(frozen=True, eq=False)
class _BatchOfRows:
    """Statistics of the rows of a batch.

    Attributes:
        places: positions of the rows in the corpus, int64[rows].
        stats: the fields of `RowStats`, on the device that computed them.
    """

    places: np.ndarray
    stats: Tensors


@dataclass(frozen=True, eq=False)
class _SentStats:
    """Statistics on their way to the host.

    Attributes:
        keys: keys of the statistics, in order.
        wait: waits for the transfer, and returns the statistics.
    """

    keys: list[StratumKey]
    wait: Callable[[], list[LayerStats]]

    def arrived(self) -> dict[StratumKey, LayerStats]:
        """Wait for the transfer, and return the statistics by key."""
        return dict(zip(self.keys, self.wait(), strict=True))


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
        self.split = split
        self.experts = ExpertCounter()
        self._passes = passes
        self._heartbeat = heartbeat
        self._thresholds = np.asarray(thresholds, np.float64)
        self._by_call = {(layer.module, layer.call): layer for layer in hooks.layers}
        self._accumulators: dict[StratumKey, Accumulator] = {}
        self._stats: dict[StratumKey, LayerStats] = {}
        self._coming: list[_SentStats] = []
        self._num_observed: Counter[int] = Counter()
        self._row_batches: defaultdict[LayerKey, list[_BatchOfRows]] = defaultdict(list)
        self._kernels: dict[torch.device, Kernels] = {}
        self._unit_sites: tuple[str, ...] = UNIT_SITES
        if set(INPUT_SITES) & set(hooks.sites):
            # Sums by unit of the inputs of linear maps include those of neurons.
            self._unit_sites = (*UNIT_SITES, "neuron")

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
        mask = torch.from_numpy(np.ascontiguousarray(observed))
        observed_pass = Pass(self, mask, self.split.rows(len(observed)), pairing)
        with bound(PASSES, (*PASSES.get(), observed_pass)):
            yield

    def send(self) -> None:
        """Start the transfer of the counts to the host. `strata` waits for it."""
        self._finish()
        self._coming.append(self._send(list(self._accumulators)))

    def send_rows(self) -> Callable[[], dict[LayerKey, PlacedRows]]:
        """Start the transfer of the row statistics, and return a function that waits for it and returns them."""
        keys = sorted(self._row_batches)
        places: list[np.ndarray] = []
        statistics: list[Tensors] = []
        for key in keys:
            batches = self._row_batches[key]
            places.append(np.concatenate([batch.places for batch in batches]))
            statistics.append({name: torch.cat([batch.stats[name] for batch in batches]) for name in ROW_FIELDS})
        arrived = to_host(statistics)

        def wait() -> dict[LayerKey, PlacedRows]:
            return {key: (rows, stats) for key, rows, stats in zip(keys, places, arrived(), strict=True)}

        return wait

    def strata(self) -> dict[StratumKey, LayerStats]:
        """Return the statistics of all passes so far, by (layer index, site, stratum).

        The stratum of unpaired text is an empty string.
        """
        self.send()
        for sent in self._coming:
            self._stats |= sent.arrived()
        self._coming.clear()
        return dict(sorted(self._stats.items()))

    def _send(self, keys: list[StratumKey]) -> _SentStats:
        """Start the transfer of some accumulators, and forget them."""
        accumulators = [self._accumulators.pop(key) for key in keys]
        return _SentStats(keys, send_stats(accumulators))

    def enter(self, current: Pass, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        """Record the start of a layer."""
        if self._heartbeat:
            self._heartbeat()
        if not current.mask.numpy().any():
            return
        layer = self._by_call.get((module, current.calls[module]))
        hidden = input_tensor(args, kwargs)
        current.calls[module] += 1
        if layer is None:
            raise ModelError(
                f"A layer ran more often than when the model was opened ({current.calls[module]} times in one pass)."
            )
        version = 0 if hidden is None else hidden._version
        current.entered = EnteredLayer(layer, hidden, version)

    def leave(self, current: Pass, module: nn.Module, _args: Arguments, output: Output) -> None:
        """Add the statistics of a layer at its end."""
        entered = current.entered
        current.entered = None
        if entered is None or entered.layer.module is not module:
            return
        if "block" in self.hooks.sites or "update" in self.hooks.sites:
            self._add_block(current, entered, output)
        self._finish()
        index = entered.layer.index
        self._num_observed[index] += 1
        if self._num_observed[index] == self._passes:
            self._conclude(index)

    def _conclude(self, layer: int) -> None:
        """Turn accumulators of a layer that are on the host into results, which are ten times smaller."""
        keys = [key for key in self._accumulators if key[0] == layer]
        if all(self._accumulators[key].device.type == "cpu" for key in keys):
            self._stats |= self._send(keys).arrived()

    def read_input(self, current: Pass, module: nn.Module, args: Arguments, kwargs: Keywords, *, site: str) -> None:
        """Add the statistics of the input of a site's module inside a layer, before it runs."""
        self._read(current, module, first_tensor((*args, *kwargs.values())), site)

    def read_output(self, current: Pass, module: nn.Module, _args: Arguments, output: Output, *, site: str) -> None:
        """Add the statistics of the output of a site's module inside a layer, after it ran."""
        self._read(current, module, first_tensor(output), site)

    def _read(self, current: Pass, module: nn.Module, tensor: torch.Tensor | None, site: str) -> None:
        if current.entered is None or tensor is None:
            return
        layer = current.entered.layer
        tap = layer.taps.get(site)
        if tap is None or tap.module is not module:
            return
        x = self._rows(current, layer, tap.axes, tap.scaled(tensor.detach()))
        if tap.exchange:
            x = tap.exchange(x)
        else:
            x = x[current.local_rows]
        self._add(current, layer, site, x)

    def read_experts(
        self, current: Pass, module: nn.Module, args: Arguments, kwargs: Keywords, *, experts: Experts
    ) -> None:
        """Add the statistics of the routed experts of a layer before they run.

        They run once for each of the k slots, with gates of 1, as their usual output is a sum over slots.
        """
        routing = routing_of(tensors_of(args, kwargs))
        if routing is None or current.entered is None:
            return
        layer = current.entered.layer
        places = self._counted_places(current, layer, routing.index)
        counted = Routing(
            hidden=routing.hidden.index_select(0, places),
            index=routing.index.index_select(0, places),
            gates=routing.gates.index_select(0, places),
        )

        def output(slot: int) -> torch.Tensor:
            index = counted.index[:, slot : slot + 1]
            instead = {
                id(routing.hidden): counted.hidden,
                id(routing.index): index,
                id(routing.gates): torch.ones_like(counted.gates[:, slot : slot + 1]),
            }
            positional, keywords = with_replaced(args, kwargs, instead)
            return module.forward(*positional, **keywords)

        outputs = (output(slot) for slot in range(counted.index.shape[1]))
        if self.split.rank == 0:
            self.experts.add(layer.index, experts, counted, outputs)
        else:
            # Ranks that share the experts run them together, and the first one counts.
            deque(outputs, maxlen=0)

    def read_router(
        self, current: Pass, _module: nn.Module, _args: Arguments, output: Output, *, experts: Experts
    ) -> None:
        """Add the entropy of the router of a layer, after it ran."""
        logits = first_tensor(output)
        if current.entered is None or logits is None or self.split.rank:
            return
        layer = current.entered.layer
        logits = logits.reshape(-1, experts.number)
        places = self._counted_places(current, layer, logits)
        self.experts.add_entropy(layer.index, experts, logits.index_select(0, places))

    def _counted_places(self, current: Pass, layer: Layer, rows: torch.Tensor) -> torch.Tensor:
        """Return the positions of counted tokens among the rows that the experts of a layer see.

        Raises:
            ModelError: if ``rows`` has another number of tokens than the batch.
        """
        if len(rows) != current.mask.numel():
            raise ModelError(
                f"The experts of layer {layer.index} see {len(rows)} tokens in a batch of {current.mask.numel()}.",
                "Score it without `experts`.",
            )
        return current.on(rows.device).own_places

    def _add_block(self, current: Pass, entered: EnteredLayer, output: Output) -> None:
        """Add the statistics of a layer's output, and those of its update of the residual stream."""
        layer = entered.layer
        before = entered.hidden
        after = first_tensor(output)
        if after is None:
            raise ModelError(f"{layer} returns a {type(output).__name__}, no hidden states.")
        if before is not None and before._version != entered.version:
            raise ModelError(f"{layer} changes its input in place; it cannot be observed.")
        is_comparable = before is not None and before.shape == after.shape
        after = self._rows(current, layer, layer.axes, after)[current.local_rows]
        if before is None or not is_comparable:
            self._add(current, layer, "block", after)
            return
        before = self._rows(current, layer, layer.axes, before)[current.local_rows]
        self._add(current, layer, "block", after, before)
        like = after.new_empty((0, 0, after.shape[2]), dtype=torch.promote_types(after.dtype, before.dtype))
        for _, mask, into in self._accumulators_of(current, layer, "update", like):
            self._kernels_of(after.device).add_update(into, after, before, mask)
        if current.pairing:
            self._add_rows(current, layer, "update", after - before)

    def _rows(self, current: Pass, layer: Layer, axes: str, tensor: torch.Tensor) -> torch.Tensor:
        x = as_rows(tensor.detach(), axes, *current.mask.shape, place=layer)
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(f"{layer} computes in {x.dtype}.", "Use `dtype` float32.")
        return x

    def _add(self, current: Pass, layer: Layer, site: str, x: torch.Tensor, before: torch.Tensor | None = None) -> None:
        for stratum, mask, into in self._accumulators_of(current, layer, site, x, geometry=before is not None):
            self._kernels_of(x.device).add(into, x, mask, before)
            if site == "block":
                first_tokens = current.on(x.device).first_tokens[stratum]
                into.add_first_tokens(x.flatten(0, 1).index_select(0, first_tokens))
        self._add_rows(current, layer, site, x, before)

    def _add_rows(
        self, current: Pass, layer: Layer, site: str, x: torch.Tensor, before: torch.Tensor | None = None
    ) -> None:
        if current.pairing is None or site not in self.hooks.sites or not len(x):
            return
        rows = row_tensors(x, current.on(x.device), self._thresholds, before)
        places = current.pairing.rows[current.local_rows]
        self._row_batches[layer.index, site].append(_BatchOfRows(places, rows))

    def _accumulators_of(
        self, current: Pass, layer: Layer, site: str, like: torch.Tensor, *, geometry: bool = False
    ) -> Iterator[tuple[str, torch.Tensor, Accumulator]]:
        """Yield each stratum with its mask and the accumulator of a layer's site, if the site is measured."""
        if site not in self.hooks.sites:
            return
        for stratum, mask in current.on(like.device).masks.items():
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
