"""Language models with a vision tower, read as text: what can be done with them is in a table, and tried again here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.capabilities import AGAIN, VERSION, YES, Row, families_markdown, read_table, try_family
from support.documentation import DOCS, read
from support.families import model_types
from support.tiers import all_of

TRIED = ("gemma3", "qwen2_5_vl", "smolvlm", "llama4", "t5gemma2")
"""Files and modules differ in their names; the tower of llama4 has a head of its own; t5gemma2 has an encoder."""


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Row]:
    return {row.key: row for row in read_table()}


@pytest.mark.skipif(not transformers.__version__.startswith(VERSION), reason=f"the table is of transformers {VERSION}")
def test_the_table_has_every_family_that_transformers_maps(table: dict[tuple[str, str], Row]) -> None:
    assert sorted(table) == model_types(), AGAIN


@pytest.mark.parametrize("family", all_of(TRIED, ["gemma3", "smolvlm", "t5gemma2"]))
def test_what_the_table_says_of_a_family(family: str, table: dict[tuple[str, str], Row], tmp_path: Path) -> None:
    row = try_family("image-text", family, tmp_path)
    assert row == table["image-text", family], AGAIN
    if row.pruned == YES:
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "less"))
        kept = {name for name in before if any(part in name for part in ("vision", "project", "connector", "visual"))}
        assert kept and all(torch.equal(before[name], after[name]) for name in kept)
        assert len(after) < len(before)


def test_the_documentation_has_the_table_and_its_numbers(table: dict[tuple[str, str], Row]) -> None:
    assert families_markdown(table.values()) in read(DOCS / "reference/inputs.md"), AGAIN
