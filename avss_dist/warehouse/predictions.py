"""Predictions of a text in a warehouse: a file for each part, of which training reads single rows of tokens."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from avss_dist.core.errors import DamagedFile
from avss_dist.core.text import RedactedURI
from avss_dist.stats.predictions import TopPredictions
from avss_dist.warehouse.encoding import encode, verify_file
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.storage import Storage

TABLE = "predictions"
OPEN_FILES = 64  # that stay open, so that their footers are read once
_COLUMNS = [f.name for f in fields(TopPredictions)]


def encode_predictions(run: RunIdentity, part: int, rows: int, predictions: TopPredictions) -> pa.Buffer:
    """Return the file of a part of a text, with a row group for each row of tokens.

    Args:
        rows: number of rows of tokens.
    """
    positions = len(predictions)
    columns = {name: pa.repeat(value, positions) for name, value in {**asdict(run), "part": part}.items()}
    for name in _COLUMNS:
        values = getattr(predictions, name)
        columns[name] = pa.array(values) if values.ndim == 1 else _lists(values)
    return encode(TABLE, run.run_id, columns, groups=np.bincount(predictions.row, minlength=rows).tolist())


def _lists(values: np.ndarray) -> pa.Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def is_readable(storage: Storage, path: str, rows: int) -> bool:
    """Whether a file is there undamaged, with a number of rows of tokens."""
    try:
        verify_file(storage.filesystem, path)
        with storage.filesystem.open_input_file(path) as source:
            return bool(pq.ParquetFile(source).num_row_groups == rows)
    except (OSError, pa.ArrowException):
        return False


@dataclass(frozen=True)
class StoredPredictions:
    """Predictions of a text in a warehouse. Rows are read when they are asked for.

    Attributes:
        root: address of the warehouse.
        paths: file of each part of the text.
        rows: number of rows of tokens of each part.
    """

    root: RedactedURI
    paths: tuple[str, ...]
    rows: tuple[int, ...]

    def row(self, index: int) -> TopPredictions:
        """Read the predictions of a row of tokens of the text.

        Raises:
            DamagedFile: the file is damaged, or gone.
        """
        first_rows = np.cumsum([0, *self.rows]).tolist()
        part = bisect_right(first_rows, index) - 1
        return _read(self.root, self.paths[part], index - first_rows[part])


def _read(root: RedactedURI, path: str, row: int) -> TopPredictions:
    try:
        table = _file(root, path).read_row_group(row, _COLUMNS, use_threads=False).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise DamagedFile(
            f"Cannot read {path}: {Storage(root).damage(path, error)}",
            "Delete it, and run the same command again: it is measured again.",
        ) from error
    return TopPredictions(**{name: _matrix(table[name].combine_chunks()) for name in _COLUMNS})


def _matrix(cells: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return a column as an array; lists of equal length are its rows."""
    if not pa.types.is_list(cells.type):
        return cells.to_numpy(zero_copy_only=False)
    values = cells.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(cells), len(values) // max(1, len(cells)))


@lru_cache(maxsize=OPEN_FILES)
def _file(root: RedactedURI, path: str) -> pq.ParquetFile:
    source = Storage(root).filesystem.open_input_file(path)
    return pq.ParquetFile(source, page_checksum_verification=True)
