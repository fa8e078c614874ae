"""Text of the README.md of a warehouse: how its files are read with SQL, pandas and Polars, and every column."""

from __future__ import annotations

from avss_dist.core.text import escape_markdown
from avss_dist.warehouse.schema import TABLES

TITLE = "# Layer scores, measured by avss_dist"
_QUERIES = """
Parquet files of runs, in folders `TABLE/run_id=RUN/`. Layers count from 0; rank 1 is the least important layer. A run
is finished if it has a row in `runs` whose `status` is `done`. The commands of avss_dist read this folder:

```bash
avss query -w . "SELECT model, layer, rank, avss FROM published ORDER BY model, rank"
```

There, the view `published` has the usual reading of the scores, one row for each layer of each run, `latest` has the
newest run of each model, revision and text, and `layers` has both together. The same with other programs:

```python
import duckdb

duckdb.sql(\"\"\"
    SELECT model, layer, rank, avss
    FROM read_parquet('scores/*/*.parquet', hive_partitioning = true)
    WHERE site = 'block' AND recipe = 'pooled' AND threshold_kind = 'absolute' AND threshold = 1e-5
    ORDER BY model, rank
\"\"\").show()
```

```python
import pandas as pd

scores = pd.read_parquet("scores")
usual = scores.query("site == 'block' and recipe == 'pooled' and threshold_kind == 'absolute' and threshold == 1e-5")
print(usual.sort_values(["model", "rank"])[["model", "layer", "rank", "avss"]])
```

```python
import polars as pl

usual = pl.scan_parquet("scores/*/*.parquet").filter(
    site="block", recipe="pooled", threshold_kind="absolute", threshold=1e-5
)
print(usual.select("model", "layer", "rank", "avss").sort("model", "rank").collect())
```
"""


def is_own_readme(text: bytes) -> bool:
    """Whether the text of a file is one that this package, or an earlier version of it, has written."""
    return text.startswith(TITLE.encode())


def readme() -> str:
    """Return the text of the file, with the tables in the order of `TABLES`."""
    parts = [TITLE, _QUERIES]
    for name, table in TABLES.items():
        parts.append(f"## `{name}`\n\n{table.meaning.capitalize()}.\n\n| column | type | meaning |\n|---|---|---|")
        for column in table.columns:
            parts.append(f"| `{column.name}` | {column.type} | {escape_markdown(column.description)} |")
        parts.append("")
    return "\n".join(parts)
