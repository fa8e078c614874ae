"""Text families that transformers knows: a tiny random model of each is built, observed and scored again.

With ``--nightly``, of all of them; otherwise of the common ones and of every third.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from support.capabilities import AGAIN, VERSION, YES, Outcome, Row, read_table, try_scoring
from support.documentation import DOCS, read
from support.families import model_types, tiny_model

from avss_dist.core.settings import SITES
from avss_dist.models.loading import open_module, quiet
from avss_dist.models.sites import find_down_projection

pytestmark = pytest.mark.nightly
of_this_transformers = pytest.mark.skipif(
    not transformers.__version__.startswith(VERSION), reason=f"the table is of transformers {VERSION}"
)
CAUSAL = ("llama", "gemma3_text", "qwen3", "mistral", "gpt2", "gpt_neox", "opt", "phi", "falcon", "bloom")
ENCODERS = ("bert", "distilbert", "roberta", "modernbert")


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Row]:
    return {row.key: row for row in read_table() if row.kind != "image-text"}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[tuple[str, str], Outcome]:
    torch.manual_seed(0)
    every, common = model_types("causal", "masked"), {*CAUSAL, *ENCODERS}
    step = 1 if request.config.getoption("--nightly") else 3
    with quiet():
        return {key: try_scoring(*key) for i, key in enumerate(every) if i % step == 0 or key[1] in common}


@of_this_transformers
def test_the_table(outcomes: dict[tuple[str, str], Outcome], table: dict[tuple[str, str], Row]) -> None:
    """Every refusal has its reason."""
    for key, found in outcomes.items():
        assert (found.built == YES, found.scored) == (table[key].built == YES, table[key].scored), AGAIN


@of_this_transformers
def test_the_table_has_every_family(table: dict[tuple[str, str], Row]) -> None:
    """At least 95% of the causal families that a small config can build are scored."""
    assert sorted(table) == model_types("causal", "masked"), AGAIN
    causal = [row.scored for row in table.values() if row.kind == "causal" and row.built == YES]
    assert causal.count(YES) >= 0.95 * len(causal) and len(causal) >= 148
    number = f"{causal.count(YES)} of the {len(causal)} causal families"
    assert number in " ".join(read(DOCS / "reference/models.md").split())


@pytest.mark.parametrize(
    "family",
    ("llama", "gemma3_text", "gpt2", "falcon", "opt", "bloom", "gpt_neox", "phi3", "mixtral", "nemotron_h", "axk2"),
)
def test_the_map_that_ends_an_mlp_is_known_without_a_pass(family: str) -> None:
    """The one that a pass finds; none where experts are routed."""
    backbone = open_module(tiny_model("causal", family))
    for layer in backbone.structure.layers:
        tap, found = layer.taps.get("neuron"), find_down_projection(layer.module, backbone.hidden_size)
        assert (found and found[1]) is (tap and tap.module), layer.name


def test_common_families_have_every_site(outcomes: dict[tuple[str, str], Outcome]) -> None:
    for family in CAUSAL:
        assert outcomes["causal", family].sites == SITES, family
    for family in ENCODERS:
        assert outcomes["masked", family].sites == SITES, family
