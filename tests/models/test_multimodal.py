"""Language models with a vision tower, read as text: what can be done with them is in a table, and tried again here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.capabilities import AGAIN, VERSION, YES, Row, families_markdown, in_words, read_table, try_family
from support.checkpoints import VOCABULARY
from support.command_line import avss
from support.documentation import DOCS, ROOT, read
from support.families import model_types, tiny_model

TRIED = ("gemma3", "qwen2_5_vl", "smolvlm", "llama4", "t5gemma2")
"""Files and modules differ in their names; the tower of llama4 has a head of its own; t5gemma2 has an encoder."""


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Row]:
    return {row.key: row for row in read_table()}


@pytest.mark.skipif(not transformers.__version__.startswith(VERSION), reason=f"the table is of transformers {VERSION}")
def test_the_table_has_every_family_that_transformers_maps(table: dict[tuple[str, str], Row]) -> None:
    assert sorted(table) == model_types(), AGAIN


@pytest.mark.parametrize("family", TRIED)
def test_what_the_table_says_of_a_family(family: str, table: dict[tuple[str, str], Row], tmp_path: Path) -> None:
    row = try_family("image-text", family, tmp_path)
    assert row == table["image-text", family], AGAIN
    if row.pruned == YES:
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "less"))
        kept = {name for name in before if any(part in name for part in ("vision", "project", "connector", "visual"))}
        assert kept and all(torch.equal(before[name], after[name]) for name in kept)
        assert len(after) < len(before)


def test_the_documentation_has_the_table_and_its_numbers(table: dict[tuple[str, str], Row]) -> None:
    assert families_markdown(table.values()) in read(DOCS / "reference/families.md"), AGAIN
    assert in_words(table.values()) in " ".join(read(ROOT / "README.md").split()), AGAIN


def test_from_scores_to_a_pruned_checkpoint(save_checkpoint: Callable[[Any, Path], Path], tmp_path: Path) -> None:
    model = tiny_model("image-text", "gemma3")
    model.resize_token_embeddings(VOCABULARY)
    folder = save_checkpoint(model, tmp_path / "gemma3")
    warehouse, plan = tmp_path / "warehouse", tmp_path / "plan.yaml"
    small = ("--sequence-length", "32", "--max-sequences", "2", "--executor", "local")
    done = avss("score", folder, "--corpus", "builtin:pydoc", "-w", warehouse, *small)
    assert done.exit_code == 0, done.stderr
    assert avss("plan", "-w", warehouse, "--by", "block_influence", "--count", "1", "-o", plan).exit_code == 0
    text = tmp_path / "held_out.txt"
    text.write_text("Layers of a language model that reads images, too. " * 40)
    done = avss("evaluate", plan, "--task", f"perplexity:{text}", "--warehouse", warehouse, *small)
    assert done.exit_code == 0, done.stderr
    done = avss("prune", folder, plan, "-o", tmp_path / "less")
    assert done.exit_code == 0 and "(largest difference 0)" in done.stdout, done.stderr
