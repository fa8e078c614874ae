"""Interleaved passes through a model with the weights of one layer in memory: all run it before the next is loaded.

Each pass has a greenlet of its own, in which the model's code runs unchanged. When it calls a layer, it is paused until
the layer's weights are loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from avss_dist.core.errors import RunFailed
from avss_dist.core.memory import release_freed_memory
from avss_dist.core.streams import report
from avss_dist.models.change.replay import Record
from avss_dist.models.change.skipping import skip_of
from avss_dist.models.forward import Forward, Output
from avss_dist.models.structure.layers import input_tensor
from avss_dist.partition.offload import offload_folder
from avss_dist.partition.streaming.weights import Part, StreamedWeights, buffer_bytes, copied_into, mapped, readahead

LARGE_BYTES = 64_000_000  # of a layer: beside its arithmetic, taking fresh pages once costs nothing
T = TypeVar("T")
Fork = Callable[[torch.Tensor], object]
"""Function that runs another pass from given hidden states."""
_Offloaded = tuple[torch.UntypedStorage, int, str, torch.UntypedStorage | Path | None]
"""Storage, its size, the room that it takes, and its bytes or their file if the storage was emptied."""


class HiddenStateOffloader:
    """Offloader that moves the bytes of waiting tensors out of their storages and back, under live references.

    They stay on the GPU up to a limit, then go to host memory, then to files. A batch may have several tensors, such as
    inputs of earlier layers that the model still refers to.

    Args:
        device: device of the tensors.
        device_bytes: GPU memory that all tensors may take together; 0 on a CPU.
        host_bytes: host memory that the others may take; None is no limit.
    """

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int | None) -> None:
        self._device = device
        self._room: dict[str, float] = {
            "device": device_bytes,
            "host": math.inf if host_bytes is None else host_bytes,
            "files": math.inf,
        }
        self._folder: TemporaryDirectory[str] | None = None
        self._numbers = count()
        self._offloaded: dict[Hashable, list[_Offloaded]] = {}

    def close(self) -> None:
        """Delete what is in files."""
        if self._folder:
            self._folder.cleanup()

    def offload(self, batch: Hashable, tensors: Sequence[torch.Tensor]) -> None:
        """Move the hidden states of a batch out. They must not be used before `restore`.

        Raises:
            RunFailed: the bytes do not fit in memory, and cannot be written to a file.
        """
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            if isinstance(tensor, torch.nn.Parameter):
                continue
            storage = tensor.untyped_storage()
            # A storage that a tensor does not cover is also that of others, which may be used meanwhile.
            is_covered = storage.nbytes() == tensor.nbytes
            if is_covered and tensor.nbytes > 0:
                storages[storage._cdata] = storage
        self._offloaded[batch] = [self._offload_storage(storage) for storage in storages.values()]

    def restore(self, batch: Hashable) -> None:
        """Move the hidden states of a batch back into the storages of its tensors."""
        for storage, size, room, place in self._offloaded.pop(batch, []):
            self._room[room] += size
            if place is None:
                continue
            storage.resize_(size)
            if isinstance(place, Path):
                storage.copy_(torch.UntypedStorage.from_file(str(place), shared=False, nbytes=size))
                place.unlink()
            else:
                storage.copy_(place, non_blocking=True)

    def _offload_storage(self, storage: torch.UntypedStorage) -> _Offloaded:
        """Move the bytes of a storage out, unless there is room for them where they are."""
        size = storage.nbytes()
        room = next(name for name, free in self._room.items() if size <= free)
        self._room[room] -= size
        if room == "device" or (room == "host" and self._device.type == "cpu"):
            return storage, size, room, None
        place: torch.UntypedStorage | Path
        if room == "host":
            place = torch.empty(size, dtype=torch.uint8, pin_memory=True).untyped_storage()
            place.copy_(storage, non_blocking=True)
        else:
            place = self._write(storage)
        storage.resize_(0)
        return storage, size, room, place

    def _write(self, storage: torch.UntypedStorage) -> Path:
        self._folder = self._folder or offload_folder(storage.nbytes())
        file = Path(self._folder.name) / str(next(self._numbers))
        try:
            with file.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, storage.nbytes())  # or a full disk would end the process
        except OSError as error:
            raise RunFailed(
                f"Hidden states cannot be written to {file.parent.parent}: {error.strerror}.",
                "Set the variable TMPDIR to a larger folder, allow more `max_memory`, or lower `sequences_per_shard`.",
            ) from error
        torch.UntypedStorage.from_file(str(file), shared=True, nbytes=storage.nbytes()).copy_(storage)
        return file


class Window:
    """Context in which one layer's weights are in the model at a time.

    At its end no weights and no thread remain.

    Args:
        parts: weights of the layers, by index.
        order: indices of the layers in their expected order, for reading ahead.
        buffer: pinned memory to read a layer into on its way to a GPU; None on a CPU.
    """

    def __init__(
        self,
        weights: StreamedWeights,
        parts: Sequence[Part],
        order: Sequence[int],
        device: torch.device,
        buffer: torch.Tensor | None = None,
    ) -> None:
        self._weights = weights
        self._parts = parts
        self._device = device
        self._buffer = buffer
        self._coming = list(order)
        self._loaded: int | None = None
        self._present: dict[int, Future[None] | None] = {}  # layers in the model, or on their way to a GPU
        self._stream = None if buffer is None else torch.cuda.Stream(device)

    def __enter__(self) -> Window:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="avss-weights")
        self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._unload()

    def load(self, index: int) -> None:
        """Load a layer's weights, after unloading those of another layer, and start to read the next layer's."""
        if index == self._loaded:
            return
        self._loaded = None
        self._unload(keep=index)
        if self._stream:
            (self._present.get(index) or self._start_copying(index)).result()
        else:
            if buffer_bytes(self._parts[index].stored) >= LARGE_BYTES:
                release_freed_memory()
            self._present[index] = None
            self._weights.load(self._parts[index], self._device, mapped)
        self._loaded = index
        if index in self._coming:
            del self._coming[: self._coming.index(index) + 1]
        self._read_ahead()

    def _unload(self, keep: int | None = None) -> None:
        """Unload all layers but one. Errors of a layer that was read for nothing are ignored."""
        for index in self._present.keys() - {keep}:
            if future := self._present.pop(index):
                with suppress(Exception):
                    future.result()
            self._parts[index].unload()

    def _read_ahead(self) -> None:
        """Start to read the next layer: to a GPU by a copy, for a CPU into the page cache."""
        if self._coming and self._stream:
            self._start_copying(self._coming[0])
        elif self._coming:
            self._thread.submit(readahead, self._parts[self._coming[0]].stored)

    def _start_copying(self, index: int) -> Future[None]:
        """Start to copy a layer, after the device's current work, which may still use memory that its weights take."""
        mark = torch.cuda.current_stream(self._device).record_event()
        future = self._present[index] = self._thread.submit(self._copy, index, mark)
        return future

    def _copy(self, index: int, mark: torch.cuda.Event) -> None:
        """Load a layer's weights on a GPU, through the buffer."""
        assert self._stream and self._buffer is not None
        with torch.no_grad(), torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            self._weights.load(self._parts[index], self._device, partial(copied_into, self._buffer))
            self._stream.synchronize()


FORKS: ContextVar[Mapping[nn.Module, Sequence[Fork]]] = ContextVar("forks", default=MappingProxyType({}))
"""Passes that start when one of this context reaches a layer, from a copy of the layer's input."""
RECORD: ContextVar[Record | None] = ContextVar("record", default=None)
"""Record of the passes of this context for their backward passes."""


class _Pass(greenlet):
    """A pass through the model, which is paused at each layer and runs in a copy of this context.

    Attributes:
        calls: number of calls of layers so far.
        layer: index of the layer at which it waits.
        forks: passes that start there.
        hidden: hidden states that something else still refers to, such as inputs of earlier layers, as keys.
    """

    calls = 0
    layer = -1

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(function)
        self.gr_context = copy_context()
        self.forks: list[Callable[[], object]] = []
        self.hidden = WeakTensorKeyDictionary()


class Passes:
    """Runner of functions that call the model, interleaved layer by layer.

    Attributes:
        modules: the layers.

    Args:
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
        self.modules = list(modules)
        self._weights = weights
        self._parts = parts
        self._order = order
        self._device = device
        self._device_bytes = device_bytes
        self.host_bytes = host_bytes
        self._buffer: torch.Tensor | None = None
        if device.type == "cuda":
            size = max(buffer_bytes(part.stored) for part in parts)
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for index, module in enumerate(modules):
            _pause(module, index)

    @property
    def running(self) -> bool:
        """Whether the caller is inside of a pass."""
        return isinstance(getcurrent(), _Pass)

    def run(self, functions: Sequence[Callable[[], T]], activity: str | None = None) -> list[T]:
        """Run functions and their forks, each in a copy of this context, and return the functions' results.

        The pass that is furthest behind runs next, with all passes at the same layer. If one raises, the others are
        unwound.

        Args:
            activity: name of the work in the progress that is reported at each layer; None reports none.
        """
        passes = [_Pass(function) for function in functions]
        results: dict[_Pass, T] = {}
        waiting: list[_Pass] = []

        def resume(current: _Pass) -> None:
            """Run a pass until its next layer, or to its end, and then those that start there."""
            result = current.switch()
            if current.dead:
                results[current] = result
                return
            waiting.append(current)
            offloader.offload(current, list(current.hidden))
            while current.forks:
                resume(_Pass(current.forks.pop(0)))

        offloader = HiddenStateOffloader(self._device, self._device_bytes, self.host_bytes)
        with self.window() as window, closing(offloader):
            try:
                for current in passes:
                    resume(current)
                while waiting:
                    last = min(waiting, key=lambda current: current.calls)
                    index = last.layer
                    if activity:
                        report(activity, (last.calls - 1) / len(self._order))
                    window.load(index)
                    for current in [current for current in waiting if current.layer == index]:
                        waiting.remove(current)
                        offloader.restore(current)
                        resume(current)
            finally:
                for current in waiting:
                    current.throw()
        return [results[current] for current in passes]

    @contextmanager
    def window(self, *, backwards: bool = False) -> Iterator[Window]:
        """Open a `Window` over the layers, with gradients disabled."""
        order = self._order
        if backwards:
            order = order[::-1]
        with torch.no_grad(), Window(self._weights, self._parts, order, self._device, self._buffer) as window:
            yield window

    def call(self, layer: nn.Module, *args: object, **kwargs: object) -> Output:
        """Call a layer whose weights are loaded, without pausing."""
        kind: Any = type(layer).__bases__[0]  # the class that it had before it was paused
        return kind.__call__(layer, *args, **kwargs)

    def close(self) -> None:
        """Restore the layers' classes."""
        for layer in self.modules:
            layer.__class__ = type(layer).__bases__[0]


def _pause(layer: nn.Module, index: int) -> None:
    """Have a layer first switch to the scheduler's greenlet, when a pass calls it.

    The layer stays the same module, with its hooks and attributes. Only the ``__call__`` of its class is extended.
    """
    kind = type(layer)

    def call(layer: nn.Module, *args: object, **kwargs: object) -> Output:
        return _arrive(layer, index, partial(kind.__call__, layer), *args, **kwargs)

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    layer.__class__ = type(kind.__name__, (kind,), {**names, "__call__": call})


def _arrive(layer: nn.Module, index: int, call: Forward, *args: object, **kwargs: object) -> Output:
    """Wait until the weights of a layer are loaded, and call it."""
    current = getcurrent()
    record = RECORD.get()
    skip = skip_of(layer)
    assert isinstance(current, _Pass) and current.parent, "a layer was called outside of Passes.run"
    current.calls += 1
    hidden = input_tensor(args, kwargs)
    if hidden is not None:
        current.hidden[hidden] = True
    if skip is not None and skip.layer.form:
        return skip(call, *args, **kwargs)
    current.layer = index
    if hidden is not None:
        forks = FORKS.get().get(layer, ())
        current.forks = [partial(fork, hidden.clone()) for fork in forks]
    current.parent.switch()  # until the layer's weights are loaded
    if skip is not None or record is None:
        return call(*args, **kwargs)
    # After the last layer gradients are enabled: no pass is paused any more until this one has ended.
    return record.run_without_gradients(layer, call, *args, **kwargs)
