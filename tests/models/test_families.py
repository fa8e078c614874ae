"""Text families that transformers knows: a tiny random model of each is built, observed and scored again.

By default a family of each class of structure is tried, and with ``--nightly`` all of them.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from support.capabilities import AGAIN, VERSION, YES, Row, read_table, try_scoring
from support.families import model_types, tiny_model
from support.tiers import all_of

from avss_dist.core.settings import SITES
from avss_dist.models.loading import open_module, quiet
from avss_dist.models.structure import find_down_projection

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
    return {row.key: row for row in read_table() if row.kind != "image-text"}


@of_this_transformers
@pytest.mark.parametrize(("kind", "family"), all_of(model_types("causal", "masked"), CLASSES))
def test_a_family_is_scored_as_the_table_says(kind: str, family: str, table: dict[tuple[str, str], Row]) -> None:
    """Every refusal has its reason; common families have every site."""
    torch.manual_seed(0)
    with quiet():
        found = try_scoring(kind, family)
    row = table[kind, family]
    assert (found.built == YES, found.scored) == (row.built == YES, row.scored), AGAIN
    if family in (*CAUSAL, *ENCODERS):
        assert found.sites == SITES


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
    for layer in backbone.structure.layers:
        tap, found = layer.taps.get("neuron"), find_down_projection(layer.module, backbone.hidden_size)
        assert (found and found[1]) is (tap and tap.module), layer.name
