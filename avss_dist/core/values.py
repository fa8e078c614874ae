"""Names for values that come from tables and files, whose types only their readers know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TableRow = Mapping[str, Any]
"""Row of a table by column: of a Parquet file, or of a result that is printed."""
NewRow = dict[str, Any]
"""Row of a table that is being filled, by column."""
JsonObject = Mapping[str, Any]
"""Object of a JSON or YAML file by key. Its values are texts, numbers, lists and objects again."""
NewObject = dict[str, Any]
"""Object for a JSON or YAML file that is being filled, by key."""
