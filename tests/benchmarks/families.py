"""Every family of transformers that a small random configuration can build: scored, evaluated, pruned. A line for each.

The rows are kept in tests/support/families.csv, which tests check. At the end they are printed as
docs/reference/inputs.md has them.
Run by hand: python tests/benchmarks/families.py [KIND [FAMILY ...]]
"""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from support.capabilities import CAPABILITIES, families_markdown, read_table, try_family, write_table
from support.families import model_types


def main(kinds: list[str], families: list[str]) -> None:
    """Try families, print what can be done with each, and write it to the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = model_types()
    for kind, family in known:
        if (kinds and kind not in kinds) or (families and family not in families):
            continue
        with TemporaryDirectory() as folder:
            try:
                row = try_family(kind, family, Path(folder))
            except Exception:  # a defect: there is no row
                print(f"{kind:10} {family:28}", traceback.format_exc(), flush=True)
                continue
        print(f"{kind:10} {family:28}", *(f"{name}: {getattr(row, name)[:80]}" for name in CAPABILITIES), flush=True)
        kept = (old for old in read_table() if old.key in known and old.key != row.key)
        write_table([*kept, row])
    print(families_markdown(read_table()))


if __name__ == "__main__":
    main(sys.argv[1:2], sys.argv[2:])
