"""Weights of at most two layers in memory: the one that computes, and the next one, which is being read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from avss_dist.partition.streaming.buffers import AnyBuffer, ReadBuffer, ZeroCopyBuffer, buffer_bytes, readahead
from avss_dist.partition.streaming.weights import Part, StreamedWeights
from avss_dist.system.memory import release_freed_memory

LARGE_BYTES = 64_000_000  # of a layer: beside its arithmetic, taking fresh pages once costs nothing


class Window:
    """Context in which one layer's weights are in the model at a time; at its end no weights and no thread remain.

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
        self._buffer = self._buffer_of(index)
        self._loaded, self._reading = index, None
        if index in self._coming:
            del self._coming[: self._coming.index(index) + 1]
        self._read_ahead()

    def _buffer_of(self, index: int) -> AnyBuffer | None:
        if not self._stream:
            return self._read(index, None)
        _, future = self._reading or self._start_reading(index)
        return future.result()

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
            self._thread.submit(_readahead, self._parts[self._coming[0]])

    def _start_reading(self, index: int) -> tuple[int, Future[AnyBuffer | None]]:
        self._reading = (index, self._thread.submit(self._read, index, self._mark()))
        return self._reading

    def _mark(self) -> Any:
        """Return an event after the device's current work, which may still use memory that the next weights take."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream else None

    def _read(self, index: int, mark: Any) -> AnyBuffer | None:
        """Load a layer's weights; return the buffer that holds some of them, or None."""
        part = self._parts[index]
        buffer = self._buffers.pop() if self._buffers else self._new_buffer()
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self._stream:
                self._stream.wait_event(mark)
            self._weights.load(part, self._device, buffer)
            if self._stream:
                self._stream.synchronize()
        if part.uses(buffer):
            return buffer
        buffer.clear()
        self._buffers.append(buffer)
        return None

    def _new_buffer(self) -> AnyBuffer:
        return ReadBuffer(self._largest, pinned=True) if self._stream else ZeroCopyBuffer()


def _readahead(part: Part) -> None:
    for stored in part.stored:
        readahead(stored)
