"""Measure routed experts: hooks that read what a router gives to each, and what each gives back, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from avss_dist.errors import ModelError
from avss_dist.measure.passes import Pass
from avss_dist.models.experts import Experts, Routing, routing_of
from avss_dist.models.layers import Layer, first_tensor
from avss_dist.stats.experts import ExpertStats
from avss_dist.system.devices import sent, to_host


@dataclass
class _Sums:
    """Of one layer, on the device of its experts: [experts, 5] of counts, and as many of sums; the router's two."""

    routed: torch.Tensor
    outputs: torch.Tensor
    router: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of it."""
        return self.routed, self.outputs, self.router


@dataclass
class ExpertCounter:
    """Sums by layer, of the passes of one observer."""

    _sums: dict[int, _Sums] = field(default_factory=dict)

    def add(self, layer: int, experts: Experts, routing: Routing, outputs: Iterable[torch.Tensor]) -> None:
        """Add a batch.

        Args:
            routing: of the tokens that count.
            outputs: [tokens, units] of each of their k experts, for a gate of 1.
        """
        sums = self._of(layer, experts, routing.hidden.device)
        sums.router[0] += len(routing.index)
        for slot, output in enumerate(outputs):
            index, gates = routing.index[:, slot], routing.gates[:, slot].double()
            x = output.double()
            squares, total = x.square().sum(dim=1), x.sum(dim=1)
            finite = torch.isfinite(squares)
            chosen = (index[:, None] == torch.arange(experts.number, device=index.device)).double()
            columns = torch.stack([torch.ones_like(gates), gates], dim=1)
            sums.routed += chosen.T @ columns
            elements = torch.full_like(gates, x.shape[1])
            columns = torch.stack([gates * squares.sqrt(), elements, total, squares], dim=1)
            sums.outputs += chosen.T @ torch.where(finite[:, None], columns, 0)

    def add_entropy(self, layer: int, experts: Experts, given: torch.Tensor) -> None:
        """Add what a router gives, [tokens, experts], for the tokens that count."""
        wide = given.double()
        shares = wide / wide.sum(dim=-1, keepdim=True) if experts.normalized else wide.softmax(dim=-1)
        self._of(layer, experts, given.device).router[1] += torch.special.entr(shares).sum()

    def send(self) -> Callable[[], dict[int, ExpertStats]]:
        """Have devices send what they counted; what is returned waits for it, and gives the statistics by layer."""
        layers = sorted(self._sums)
        arrived = to_host([part for layer in layers for part in self._sums[layer].tensors])

        def wait() -> dict[int, ExpertStats]:
            arrays = iter(arrived())
            return {layer: _to_stats(next(arrays), next(arrays), next(arrays)) for layer in layers}

        return wait

    def _of(self, layer: int, experts: Experts, device: torch.device) -> _Sums:
        if layer not in self._sums:
            zeros = partial(torch.zeros, dtype=torch.float64, device=device)
            router = zeros(2)
            if experts.router is None:
                router[1] = torch.nan
            self._sums[layer] = _Sums(zeros(experts.number, 2), zeros(experts.number, 4), router)
        return self._sums[layer]


def _to_stats(routed: np.ndarray, outputs: np.ndarray, router: np.ndarray) -> ExpertStats:
    return ExpertStats(
        routed_tokens=routed[:, 0].astype(np.int64),
        gate_sum=routed[:, 1].copy(),
        gated_norm_sum=outputs[:, 0].copy(),
        output_count=outputs[:, 1].astype(np.int64),
        output_sum=outputs[:, 2].copy(),
        output_sum_sq=outputs[:, 3].copy(),
        token_count=np.full(len(routed), int(router[0]), np.int64),
        router_entropy_sum=np.full(len(routed), router[1]),
    )


Current = Callable[[], Pass | None]
"""The pass that is under way, if there is one that counts."""


def expert_hooks(layers: Sequence[Layer], current: Current) -> list[Any]:
    """Hook the experts and routers of layers; returns the handles."""
    handles: list[Any] = []
    for experts in dict.fromkeys(layer.experts for layer in layers if layer.experts):
        read = partial(_read_experts, experts, current)
        handles.append(experts.module.register_forward_pre_hook(read, with_kwargs=True))
        if experts.router is not None:
            handles.append(experts.router.register_forward_hook(partial(_read_router, experts, current)))
    return handles


def _read_experts(experts: Experts, current: Current, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Run the experts once for each of the k places, with gates of 1: what they give together is a sum."""
    routing = routing_of([t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)])
    now = current()
    if now is None or routing is None or (counts := _places(now, routing.index)) is None:
        return
    layer, kept = counts
    counted = Routing(*(x.index_select(0, kept) for x in (routing.hidden, routing.index, routing.gates)))

    def output(slot: slice) -> torch.Tensor:
        instead = {
            id(routing.hidden): counted.hidden,
            id(routing.index): counted.index[:, slot],
            id(routing.gates): torch.ones_like(counted.gates[:, slot]),
        }
        positional = [instead.get(id(value), value) for value in args]
        named = {name: instead.get(id(value), value) for name, value in kwargs.items()}
        given: torch.Tensor = module.forward(*positional, **named)
        return given

    outputs = (output(slice(slot, slot + 1)) for slot in range(counted.index.shape[1]))
    now.observer.experts.add(layer, experts, counted, outputs)


def _read_router(experts: Experts, current: Current, _module: nn.Module, _args: Any, output: Any) -> None:
    given, now = first_tensor(output), current()
    if now is None or given is None:
        return
    given = given.reshape(-1, experts.number)
    if counts := _places(now, given):
        layer, kept = counts
        now.observer.experts.add_entropy(layer, experts, given.index_select(0, kept))


def _places(now: Pass, rows: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """The layer that runs, and among rows, one for each token of the batch, the places of those that count.

    None where nothing counts.
    """
    mask = now.own_answers
    if mask is None or now.entered is None or now.observer.split.rank:  # its gates are the first one's
        return None
    layer = now.entered.layer.index
    if len(rows) != mask.numel():
        raise ModelError(
            f"The experts of layer {layer} see {len(rows)} tokens in a batch of {mask.numel()}.",
            "Score it without `experts`.",
        )
    return layer, sent(np.flatnonzero(mask.numpy()), rows.device)
