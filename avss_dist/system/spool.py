"""Growing array: in memory while it is small, then in a file that is memory-mapped for reading."""

from __future__ import annotations

import math
import tempfile

import numpy as np
from numpy.typing import NDArray

KEPT_BYTES = 64 << 20  # in memory


class Spool:
    """Growing array, int32[rows, width].

    The file has no name, so it is deleted with the process. If it cannot be written, the rows stay in memory.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._waiting = [np.zeros((0, width), np.int32)]
        self._max_waiting_bytes: float = KEPT_BYTES
        self._rows_written = 0

    def add(self, rows: NDArray[np.int32]) -> None:
        """Append rows."""
        self._waiting.append(rows)
        if sum(waiting.nbytes for waiting in self._waiting) > self._max_waiting_bytes:
            self._write()

    def array(self) -> NDArray[np.int32]:
        """Return all rows. Rows in a file are read-only."""
        if self._rows_written:
            self._write()
        waiting = np.concatenate(self._waiting)
        if not self._rows_written:
            return waiting
        written = np.asarray(np.memmap(self._file, np.int32, "r", shape=(self._rows_written, self._width)))
        return np.concatenate([written, waiting]) if len(waiting) else written

    def _write(self) -> None:
        rows = np.concatenate(self._waiting)
        try:
            if not self._rows_written:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the array)
            self._file.seek(4 * self._width * self._rows_written)
            self._file.write(rows.tobytes())
            self._file.flush()
        except OSError:
            self._max_waiting_bytes = math.inf
            return
        self._rows_written += len(rows)
        self._waiting = self._waiting[:1]
