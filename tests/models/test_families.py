"""Families that transformers knows, against their table: a tiny random model of each is built and tried again.

By default a family of each class of structure is tried, and with ``--nightly`` all text families, and some of the
language models with a vision tower, which are read as text.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from support.capabilities import AGAIN, VERSION, YES, Row, families_markdown, read_table, try_family, try_scoring
from support.checkpoints import weights_in
from support.documentation import DOCS, read
from support.families import model_types, tiny_model
from support.tiers import all_of

from avss_dist.core.sites import SITES
from avss_dist.models.checkpoint.loading import open_module, quiet
from avss_dist.models.structure.find import find_down_projection

of_this_transformers = pytest.mark.skipif(
    not transformers.__version__.startswith(VERSION), reason=f"the table is of transformers {VERSION}"
)
CAUSAL = ("llama", "gemma3_text", "qwen3", "mistral", "gpt2", "gpt_neox", "opt", "phi", "falcon", "bloom")
ENCODERS = ("bert", "distilbert", "roberta", "modernbert")
CLASSES = [("causal", name) for name in ("llama", "gpt2", "bloom", "opt", "mamba", "mixtral", "xlm")] + [
    ("masked", "bert"),
    ("masked", "albert"),
]


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Row]:
    return {row.key: row for row in read_table()}


@of_this_transformers
@pytest.mark.parametrize(("kind", "family"), all_of(model_types("causal", "masked"), CLASSES))
def test_a_family_is_scored_as_the_table_says(kind: str, family: str, table: dict[tuple[str, str], Row]) -> None:
    """Every refusal has its reason; common families have every site."""
    torch.manual_seed(0)
    with quiet():
        scored = try_scoring(kind, family)
    row = table[kind, family]
    assert (scored.built == YES) == (row.built == YES), AGAIN
    assert scored.scored == row.scored, AGAIN
    if family in (*CAUSAL, *ENCODERS):
        assert scored.sites == SITES


@pytest.mark.parametrize(
    "family",
    all_of(
        ("llama", "gemma3_text", "gpt2", "falcon", "opt", "bloom", "gpt_neox", "phi3", "mixtral", "nemotron_h", "axk2"),
        ("llama", "gpt2", "opt", "mixtral", "nemotron_h"),
    ),
)
def test_the_map_that_ends_an_mlp_is_known_without_a_pass(family: str) -> None:
    """The one that a pass finds; none where experts are routed."""
    backbone = open_module(tiny_model("causal", family))
    for layer in backbone.layers:
        tap = layer.taps.get("neuron")
        down_projection = find_down_projection(layer.module, backbone.columns["hidden_size"])
        assert (down_projection and down_projection[1]) is (tap and tap.module), layer.name


TRIED = ("gemma3", "qwen2_5_vl", "smolvlm", "llama4", "t5gemma2")
"""Files and modules differ in their names; the tower of llama4 has a head of its own; t5gemma2 has an encoder."""


@of_this_transformers
def test_the_table_has_every_family_that_transformers_maps(table: dict[tuple[str, str], Row]) -> None:
    assert sorted(table) == model_types(), AGAIN


@pytest.mark.parametrize("family", all_of(TRIED, ["gemma3", "smolvlm", "t5gemma2"]))
def test_what_the_table_says_of_a_family(family: str, table: dict[tuple[str, str], Row], tmp_path: Path) -> None:
    row = try_family("image-text", family, tmp_path)
    assert row == table["image-text", family], AGAIN
    if row.pruned == YES:
        before = weights_in(tmp_path / "whole")
        after = weights_in(tmp_path / "less")
        unchanged = {name for name in before if re.search("vision|project|connector|visual", name)}
        assert unchanged
        for name in unchanged:
            assert torch.equal(before[name], after[name])
        assert len(after) < len(before)


def test_the_documentation_has_the_table_and_its_numbers(table: dict[tuple[str, str], Row]) -> None:
    assert families_markdown(table.values()) in read(DOCS / "reference/inputs.md"), AGAIN
