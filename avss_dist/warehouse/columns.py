"""What tables are made of: columns, and their types in Arrow."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

STRING, BOOL = pa.string(), pa.bool_()
INT32, INT64, FLOAT64 = pa.int32(), pa.int64(), pa.float64()
INT16_LIST, INT32_LIST, INT64_LIST = pa.list_(pa.int16()), pa.list_(INT32), pa.list_(INT64)
FLOAT32_LIST, FLOAT64_LIST, STRING_LIST = pa.list_(pa.float32()), pa.list_(FLOAT64), pa.list_(STRING)
MAP, TIME = pa.map_(STRING, STRING), pa.timestamp("us", "UTC")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        type: of its values; each may be null.
        meaning: one line.
        unit: of a number that has one.
    """

    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the warehouse: what a row is, and its columns in order."""

    meaning: str
    columns: tuple[Column, ...]

    @property
    def schema(self) -> pa.Schema:
        """Of its rows; ``run_id`` is in the path of a file alone."""
        return pa.schema([(column.name, column.type) for column in self.columns])
