"""Interleaved passes through a model with the weights of one layer in memory: all run it before the next is loaded.

Each pass has a greenlet of its own, in which the model's code runs unchanged. When it calls a layer, it is paused until
the layer's weights are loaded.
"""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from avss_dist.models.interventions import in_form, skip_of
from avss_dist.models.layers import LayerCall, first_tensor, input_tensor
from avss_dist.partition.streaming.buffers import AnyBuffer, ReadBuffer, ZeroCopyBuffer, buffer_bytes, readahead
from avss_dist.partition.streaming.hidden_states import HiddenStateOffloader
from avss_dist.partition.streaming.weights import Part, StreamedWeights
from avss_dist.system.memory import release_freed_memory

LARGE_BYTES = 64_000_000  # of a layer: beside its arithmetic, taking fresh pages once costs nothing
T = TypeVar("T")
Fork = Callable[[torch.Tensor], object]
"""Function that runs another pass from given hidden states."""


class Window:
    """Context in which one layer's weights are in the model at a time.

    At its end no weights and no thread remain.

    Args:
        parts: weights of the layers, by index.
        order: indices of the layers in their expected order, for reading ahead.
        buffers: memory to read into, reused from pass to pass; empty at first.
    """

    def __init__(
        self,
        weights: StreamedWeights,
        parts: Sequence[Part],
        order: Sequence[int],
        device: torch.device,
        buffers: list[AnyBuffer],
    ) -> None:
        self._weights, self._parts, self._device, self._buffers = weights, parts, device, buffers
        self._coming = list(order)
        self._loaded: int | None = None
        self._reading: tuple[int, Future[AnyBuffer | None]] | None = None
        self._buffer: AnyBuffer | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._largest = max(buffer_bytes(part.stored) for part in parts)

    def __enter__(self) -> Window:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="avss-weights")
        self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._reading:
            index, future = self._reading
            failed = future.cancelled() or future.exception() is not None
            self._release(index, None if failed else future.result())
        self._unload()

    def load(self, index: int) -> None:
        """Load a layer's weights, after unloading those of another layer, and start to read the next layer's."""
        if index == self._loaded:
            return
        self._unload()
        if self._stream is None and self._largest >= LARGE_BYTES:
            release_freed_memory()
        if self._reading and self._reading[0] != index:
            self._release(self._reading[0], self._reading[1].result())
            self._reading = None
        if self._stream:
            _, future = self._reading or self._start_reading(index)
            self._buffer = future.result()
        else:
            self._buffer = self._read(index, None)
        self._loaded, self._reading = index, None
        if index in self._coming:
            del self._coming[: self._coming.index(index) + 1]
        self._read_ahead()

    def _unload(self) -> None:
        if self._loaded is not None:
            self._release(self._loaded, self._buffer)
            self._loaded = self._buffer = None

    def _release(self, index: int, buffer: AnyBuffer | None) -> None:
        self._parts[index].unload()
        if buffer:
            buffer.clear()
            self._buffers.append(buffer)

    def _read_ahead(self) -> None:
        """Start to read the next layer: to a GPU by a copy, for a CPU into the page cache."""
        if self._coming and self._stream:
            self._start_reading(self._coming[0])
        elif self._coming:
            self._thread.submit(readahead, self._parts[self._coming[0]].stored)

    def _start_reading(self, index: int) -> tuple[int, Future[AnyBuffer | None]]:
        """Start to copy a layer, after the device's current work, which may still use memory that its weights take."""
        mark = torch.cuda.current_stream(self._device).record_event()
        self._reading = (index, self._thread.submit(self._read, index, mark))
        return self._reading

    def _read(self, index: int, mark: Any) -> AnyBuffer | None:
        """Load a layer's weights. Return the buffer that holds some of them on a CPU, or None."""
        part = self._parts[index]
        buffer: AnyBuffer
        if self._buffers:
            buffer = self._buffers.pop()
        else:
            buffer = ReadBuffer(self._largest, pinned=True) if self._stream else ZeroCopyBuffer()
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self._stream:
                self._stream.wait_event(mark)
            self._weights.load(part, self._device, buffer)
            if self._stream:
                self._stream.synchronize()
        if self._stream is None:
            return buffer
        buffer.clear()
        self._buffers.append(buffer)
        return None


@dataclass(frozen=True)
class Record:
    """Tensors of a forward pass that its backward pass needs.

    Attributes:
        last: the last layer that runs. Gradients are enabled after it.
        form: type of its output; see `interventions.Recorded`.
        calls: arguments of the call of every layer that runs.
        leaf: the last layer's output, as the only item.
    """

    last: nn.Module
    form: type
    calls: dict[nn.Module, LayerCall] = field(default_factory=dict)
    leaf: list[torch.Tensor] = field(default_factory=list)

    def keep(self, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Record the arguments of a layer's call, with a copy of its hidden states."""
        call = LayerCall(args, kwargs)
        self.calls[layer] = call.with_hidden(call.hidden.clone())

    def cut(self, output: Any) -> Any:
        """Return a leaf tensor in place of the last layer's output, and enable gradients."""
        hidden = first_tensor(output)
        assert hidden is not None
        self.leaf.append(hidden.detach().requires_grad_())
        torch.set_grad_enabled(True)  # no pass is paused any more until this one has ended
        return in_form(self.leaf[0], self.form)


FORKS: ContextVar[Mapping[nn.Module, Sequence[Fork]]] = ContextVar("forks", default=MappingProxyType({}))
"""Passes that start when one of this context reaches a layer, from a copy of the layer's input."""
RECORD: ContextVar[Record | None] = ContextVar("record", default=None)
"""Record of the passes of this context for their backward passes."""


@dataclass
class _Pass:
    """Progress of a pass.

    Attributes:
        calls: number of calls of layers so far.
        layer: index of the layer at which it waits.
        forks: passes that start there.
    """

    calls: int = 0
    layer: int = -1
    forks: list[Callable[[], object]] = field(default_factory=list)
    _seen: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def note(self, hidden: torch.Tensor | None) -> None:
        """Remember hidden states by a weak reference."""
        if hidden is not None and all(ref() is not hidden for ref in self._seen):
            self._seen.append(weakref.ref(hidden))

    def alive(self) -> list[torch.Tensor]:
        """Return the hidden states that something else still refers to, such as inputs of earlier layers."""
        self._seen = [ref for ref in self._seen if ref() is not None]
        return [tensor for ref in self._seen if (tensor := ref()) is not None]


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


class Passes:
    """Runner of functions that call the model, interleaved layer by layer.

    Args:
        modules: the layers.
        parts: their weights, in the same order.
        order: indices of the layers in the order of a pass.
        device_bytes, host_bytes: see `HiddenStateOffloader`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        weights: StreamedWeights,
        parts: Sequence[Part],
        order: Sequence[int],
        device: torch.device,
        device_bytes: int,
        host_bytes: int | None,
    ) -> None:
        self._weights, self._parts, self._order, self._device = weights, parts, order, device
        self._device_bytes, self.host_bytes = device_bytes, host_bytes
        self._buffers: list[AnyBuffer] = []
        self._modules = list(modules)
        for index, module in enumerate(modules):
            _pause(module, index)

    @property
    def running(self) -> bool:
        """Whether the caller is inside of a pass."""
        return _PASS.get() is not None

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Run functions and their forks, each in a copy of this context, and return the functions' results.

        The pass that is furthest behind runs next, with all passes at the same layer. If one raises, the others are
        unwound.
        """
        results: dict[int, T] = {}
        waiting: dict[greenlet, _Pass] = {}

        def keep(i: int) -> None:
            results[i] = functions[i]()

        def start(function: Callable[[], object]) -> None:
            current = _Pass()

            def run() -> None:
                _PASS.set(current)
                function()

            started = greenlet(run)
            started.gr_context = contextvars.copy_context()
            resume(started, current)

        def resume(paused: greenlet, current: _Pass) -> None:
            """Run a pass until its next layer, or to its end."""
            paused.switch()
            if paused.dead:
                return
            waiting[paused] = current
            offloader.offload(paused, current.alive())
            while current.forks:
                start(current.forks.pop(0))

        if not functions:
            return []
        offloader = HiddenStateOffloader(self._device, self._device_bytes, self.host_bytes)
        with self.window() as window, closing(offloader):
            try:
                for i in range(len(functions)):
                    start(partial(keep, i))
                while waiting:
                    index = min(waiting.values(), key=lambda current: current.calls).layer
                    window.load(index)
                    for paused, current in [item for item in waiting.items() if item[1].layer == index]:
                        del waiting[paused]
                        offloader.restore(paused)
                        resume(paused, current)
            finally:
                for paused in waiting:
                    paused.throw()
        return [results[i] for i in range(len(functions))]

    @contextmanager
    def window(self, *, backwards: bool = False) -> Iterator[Window]:
        """Open a `Window` over the layers, with gradients disabled."""
        order = self._order[::-1] if backwards else self._order
        with torch.no_grad(), Window(self._weights, self._parts, order, self._device, self._buffers) as window:
            yield window

    def index(self, layer: nn.Module) -> int:
        """Return the index of a layer and of its weights."""
        return self._modules.index(layer)

    def call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a layer whose weights are loaded."""
        kind: Any = type(layer).__bases__[0]  # the class that it had before it was paused
        return kind.__call__(layer, *args, **kwargs)

    def close(self) -> None:
        """Restore the layers' classes."""
        for layer in self._modules:
            layer.__class__ = type(layer).__bases__[0]


def _pause(layer: nn.Module, index: int) -> None:
    """Have a layer first switch to the scheduler's greenlet, when a pass calls it.

    The layer stays the same module, with its hooks and attributes. Only the ``__call__`` of its class is extended.
    """
    kind = type(layer)

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _arrive(layer, index, partial(kind.__call__, layer), *args, **kwargs)

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    layer.__class__ = type(kind.__name__, (kind,), {**names, "__call__": call})


def _arrive(layer: nn.Module, index: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wait until the weights of a layer are loaded, and call it."""
    current, record, skip = _PASS.get(), RECORD.get(), skip_of(layer)
    assert current is not None, "a layer was called outside of Passes.run"
    current.calls += 1
    hidden = input_tensor(args, kwargs)
    current.note(hidden)
    if skip is not None and skip.form is not None:
        return skip(call, *args, **kwargs)
    forks = FORKS.get().get(layer, ())
    current.layer = index
    current.forks = [] if hidden is None else [partial(fork, hidden.clone()) for fork in forks]
    scheduler = getcurrent().parent
    assert scheduler is not None
    scheduler.switch()  # until the layer's weights are loaded
    if skip is not None or record is None:
        return call(*args, **kwargs)
    record.keep(layer, args, kwargs)
    output = call(*args, **kwargs)
    return record.cut(output) if layer is record.last else output
