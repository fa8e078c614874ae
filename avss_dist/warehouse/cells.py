"""The cells of evaluations: what each part of a task gave, in a file of its own."""

from __future__ import annotations

from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyarrow as pa

from avss_dist.core.errors import DamagedFile
from avss_dist.core.values import TableRow
from avss_dist.warehouse.checks import checked_rows
from avss_dist.warehouse.encoding import encode_rows, parse
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMAS, Damage, RunIdentity


class Cells:
    """The cells of the evaluations of a warehouse. Each file is read once.

    Args:
        reader: reader of the warehouse, which notes damaged cells in its `damaged`.
    """

    def __init__(self, reader: Warehouse) -> None:
        self._reader = reader
        self._rows: dict[str, dict[str, pa.Table | None]] = {}
        """Rows of cells by cell id, None until they are read, by evaluation."""
        self._listed: set[str] = set()
        """Evaluations whose folder was listed."""
        self._unreadable: dict[str, set[str]] = {}
        """Ids of cells whose file cannot be read, by evaluation."""

    def write(self, run: RunIdentity, cell_id: str, rows: Sequence[TableRow]) -> None:
        """Write the measurements of one cell of an evaluation. Rows lack the columns of RunIdentity."""
        data = encode_rows("cells", asdict(run), rows)
        storage = self._reader.storage
        storage.write(storage.path("cells", run.run_id, cell_id), data)
        cells = self._rows.setdefault(run.run_id, {})
        cells[cell_id] = None
        self._unreadable.get(run.run_id, set()).discard(cell_id)
        with suppress(pa.ArrowInvalid):  # `read` notes the cell as damaged
            cells[cell_id] = checked_rows("cells", run.run_id, parse(data))

    def ids(self, run_id: str) -> Set[str]:
        """Return the ids of the measured cells of an evaluation that can be read.

        The folder of the evaluation is listed, and its files are read, at the first call. Afterwards this object adds
        the cells that it writes itself. A cell that another process writes in the meantime is missing here until
        `read` is called: it would be measured again, and its file replaced by one with the same values.
        """
        if run_id not in self._listed:
            self.read(run_id)
        return self._rows[run_id].keys()

    def read(self, run_id: str, cell_ids: Set[str] | None = None) -> pa.Table:
        """Read the rows of measured cells of an evaluation, in the order of cell ids.

        The folder of the evaluation is listed again, so that the cells of other processes are read too. Files that
        this object has written or read before are not opened. A cell whose file is damaged is left out and is noted in
        `damaged` of the reader.

        Args:
            cell_ids: ids of the cells to read; None reads all.
        """
        self._list(run_id)
        cells = self._rows[run_id]
        wanted = set(cells)
        if cell_ids is not None:
            wanted &= cell_ids
        unread = [cell_id for cell_id in cells if cell_id in wanted and cells[cell_id] is None]
        with ThreadPoolExecutor() as pool:
            read = pool.map(partial(self._read_file, run_id), unread)
            for cell_id, rows in zip(unread, read, strict=True):
                if rows is None:
                    del cells[cell_id]
                    self._unreadable.setdefault(run_id, set()).add(cell_id)
                else:
                    cells[cell_id] = rows
        tables = [SCHEMAS["cells"].empty_table()]
        for cell_id, rows in sorted(cells.items()):
            if cell_id in wanted:
                tables.append(rows)
        return pa.concat_tables(tables)

    def read_each(self, run_id: str) -> dict[str, pa.Table]:
        """Read the rows of each measured cell of an evaluation, by cell id. See `read`.

        Cells of two models or evaluations that have the same id and no change of the model read the same samples.
        """
        self.read(run_id)
        return {cell_id: rows for cell_id, rows in self._rows[run_id].items() if rows is not None}

    def _list(self, run_id: str) -> None:
        """Add the cells that are in the folder of an evaluation, and whose file was not found to be unreadable."""
        self._listed.add(run_id)
        cells = self._rows.setdefault(run_id, {})
        unreadable = self._unreadable.get(run_id, set())
        for path in self._reader.storage.files("cells", run_id):
            cell_id = Path(path).stem
            if cell_id not in unreadable:
                cells.setdefault(cell_id, None)

    def _read_file(self, run_id: str, cell_id: str) -> pa.Table | None:
        try:
            return self._reader.read_file("cells", run_id, cell_id)
        except DamagedFile as error:
            self._reader.damaged.setdefault(run_id, Damage("cells", error.message))
            return None
