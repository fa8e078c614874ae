"""Passes through a model of which one layer has its weights at a time: all run through it before the next one comes.

Each pass has a greenlet of its own, in which the model's code runs unchanged. Where it calls a layer it is paused until
that layer's weights are there.
"""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from avss_dist.models.layers import LayerCall, first_tensor, input_tensor
from avss_dist.models.patching import holding
from avss_dist.models.skipping import Skip, give
from avss_dist.partition.streaming.buffers import AnyBuffer
from avss_dist.partition.streaming.hidden_states import HiddenStateOffloader
from avss_dist.partition.streaming.weights import Part, Weights
from avss_dist.partition.streaming.window import Window
from avss_dist.system.context import bound

T = TypeVar("T")
Fork = Callable[[torch.Tensor], object]
"""Another pass, which begins with the hidden states that it is given."""


@dataclass(frozen=True)
class Beginning:
    """Where a pass begins: what its ``call``-th layer, from 0, returns; those before it do not run.

    ``forms`` says how layers return hidden states; see `skipping.Recorded`.
    """

    call: int
    hidden: torch.Tensor
    forms: Mapping[nn.Module, type]


@dataclass(frozen=True)
class Record:
    """Tensors of a forward pass that its backward pass needs.

    Attributes:
        last: the last layer that runs, and how it returns hidden states. Gradients are enabled after it.
        calls: of every layer that runs.
        leaf: what the last layer returned.
    """

    last: nn.Module
    form: type
    calls: dict[nn.Module, LayerCall] = field(default_factory=dict)
    leaf: list[torch.Tensor] = field(default_factory=list)

    def keep(self, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keep what a layer is called with; its hidden states as they are now."""
        call = LayerCall(args, kwargs)
        self.calls[layer] = call.given(call.hidden.clone())

    def cut(self, output: Any) -> Any:
        """Return the tensor that the last layer passes on in place of its output."""
        hidden = first_tensor(output)
        assert hidden is not None
        self.leaf.append(hidden.detach().requires_grad_())
        torch.set_grad_enabled(True)  # no pass is paused any more until this one has ended
        return give(self.form, self.leaf[0])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Behaviour of all passes in a context at each layer.

    Attributes:
        skips: layers that are left out.
        begins: where the pass begins, if that is not the first layer.
        forks: passes that begin where this one comes to a layer, with a copy of what that is given.
        record: what is kept for a backward pass.
        changes: values of parameters of a layer, by path, in place of the layer's own.
    """

    skips: Mapping[nn.Module, Skip] = field(default_factory=dict)
    begins: Beginning | None = None
    forks: Mapping[nn.Module, Sequence[Fork]] = field(default_factory=dict)
    record: Record | None = None
    changes: Mapping[nn.Module, Mapping[str, torch.Tensor]] = field(default_factory=dict)


PLAN: ContextVar[Plan] = ContextVar("plan", default=Plan())  # noqa: B039  (it is frozen)


def planned(plan: Plan) -> AbstractContextManager[None]:
    """Have passes inside follow a plan."""
    return bound(PLAN, plan)


@dataclass
class _Pass:
    """Progress of a pass."""

    calls: int = 0  # of layers
    _seen: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def note(self, hidden: torch.Tensor | None) -> None:
        """Remember hidden states, as long as something else refers to them."""
        if hidden is not None and all(ref() is not hidden for ref in self._seen):
            self._seen.append(weakref.ref(hidden))

    def alive(self) -> list[torch.Tensor]:
        """Hidden states to which something else refers: the newest, and the inputs of earlier layers."""
        self._seen = [ref for ref in self._seen if ref() is not None]
        return [tensor for ref in self._seen if (tensor := ref()) is not None]


@dataclass(frozen=True)
class _Arrival:
    """A pass comes to a layer, by index, as its ``calls``-th; with the hidden states that it holds."""

    index: int
    calls: int
    hidden: Sequence[torch.Tensor]
    forks: Sequence[Callable[[], object]]


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


class Passes:
    """Runs functions that call the model, layer by layer.

    Args:
        modules: the layers, in the order of ``parts``, their weights.
        order: their indices, as a pass calls them.
        device_bytes, host_bytes, folder: see `HiddenStateOffloader`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        weights: Weights,
        parts: Sequence[Part],
        order: Sequence[int],
        device: torch.device,
        device_bytes: int,
        host_bytes: int | None,
        folder: str | None,
    ) -> None:
        self._weights, self._parts, self._order, self._device = weights, parts, order, device
        self._device_bytes, self.host_bytes, self._folder = device_bytes, host_bytes, folder
        self._buffers: list[AnyBuffer] = []
        self._modules = list(modules)
        self._stops = [_Stop(module, index) for index, module in enumerate(modules)]

    @property
    def running(self) -> bool:
        """Whether this is inside of a pass."""
        return _PASS.get() is not None

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Run functions, and those that they fork, each in a copy of this context; returns their results."""
        found: dict[int, T] = {}

        def run(i: int) -> None:
            found[i] = functions[i]()

        if functions:
            waiting = HiddenStateOffloader(self._device, self._device_bytes, self.host_bytes, self._folder)
            with self.window() as window, waiting as hidden:
                _Schedule(window, hidden).run([partial(run, i) for i in range(len(functions))])
        return [found[i] for i in range(len(functions))]

    @contextmanager
    def window(self, *, backwards: bool = False) -> Iterator[Window]:
        """One layer's weights at a time, without gradients unless code enables them; see `Window`."""
        order = self._order[::-1] if backwards else self._order
        with torch.no_grad(), Window(self._weights, self._parts, order, self._device, self._buffers) as window:
            yield window

    def index(self, layer: nn.Module) -> int:
        """Of a layer, and of its weights."""
        return self._modules.index(layer)

    def call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a layer whose weights are there."""
        return self._stops[self.index(layer)].call(*args, **kwargs)

    def close(self) -> None:
        """Leave the layers as they were."""
        for stop in self._stops:
            stop.remove()


class _Schedule:
    """Scheduler of interleaved passes: runs the pass that is furthest behind, with all passes at the same layer."""

    def __init__(self, window: Window, hidden: HiddenStateOffloader) -> None:
        self._window, self._hidden = window, hidden
        self._waiting: dict[greenlet, _Arrival] = {}

    def run(self, functions: Sequence[Callable[[], object]]) -> None:
        """Until all have ended. Where one raises, the others are unwound."""
        try:
            for function in functions:
                self._start(function)
            while self._waiting:
                index = min(self._waiting.values(), key=lambda arrival: arrival.calls).index
                self._window.load(index)
                for one in [one for one, arrival in self._waiting.items() if arrival.index == index]:
                    del self._waiting[one]
                    self._hidden.restore(one)
                    self._resume(one)
        finally:
            for one in self._waiting:
                one.throw()

    def _start(self, function: Callable[[], object]) -> None:
        def run() -> None:
            _PASS.set(_Pass())
            function()

        one = greenlet(run)
        one.gr_context = contextvars.copy_context()
        self._resume(one)

    def _resume(self, one: greenlet) -> None:
        """Run a pass until its next layer, or to its end."""
        arrival = one.switch()
        if one.dead:
            return
        self._waiting[one] = arrival
        self._hidden.offload(one, arrival.hidden)
        for fork in arrival.forks:
            self._start(fork)


class _Stop:
    """Makes a layer, when a pass calls it, first switch to the greenlet that schedules, with an `_Arrival`.

    The layer stays the module that it is, with its hooks and attributes; only its class's ``__call__`` is extended.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        self._layer, self._kind, self._index = layer, type(layer), index

        def call(_layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._arrive(*args, **kwargs)

        names = {name: getattr(self._kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        layer.__class__ = type(self._kind.__name__, (self._kind,), {**names, "__call__": call})

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer itself, whose weights are there."""
        changes = PLAN.get().changes.get(self._layer, {})
        with holding({self._layer.get_parameter(path): value for path, value in changes.items()}):
            return self._kind.__call__(self._layer, *args, **kwargs)

    def _arrive(self, *args: Any, **kwargs: Any) -> Any:
        now, plan, layer = _PASS.get(), PLAN.get(), self._layer
        assert now is not None, "a layer was called outside of Passes.run"
        now.calls += 1
        hidden = input_tensor(args, kwargs)
        now.note(hidden)
        begins = plan.begins
        if begins is not None and now.calls <= begins.call + 1:
            return give(begins.forms[layer], begins.hidden if now.calls == begins.call + 1 else hidden)
        skip = plan.skips.get(layer)
        if skip is not None and skip.form is not None:
            return skip(*args, **kwargs)
        self._pause(now, hidden, plan.forks.get(layer, ()))
        if skip is not None:
            return skip(*args, **kwargs)
        if plan.record is None:
            return self.call(*args, **kwargs)
        plan.record.keep(layer, args, kwargs)
        output = self.call(*args, **kwargs)
        return plan.record.cut(output) if layer is plan.record.last else output

    def _pause(self, now: _Pass, hidden: torch.Tensor | None, forks: Sequence[Fork]) -> None:
        """Return when the layer's weights are there."""
        scheduler = getcurrent().parent
        assert scheduler is not None
        begun = [partial(fork, hidden.clone()) for fork in forks if hidden is not None]
        scheduler.switch(_Arrival(self._index, now.calls, now.alive(), begun))

    def remove(self) -> None:
        """Give the layer its class back."""
        self._layer.__class__ = self._kind
