"""llama.cpp's converter and library against transformers on models of many families, whole and pruned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp_py_sync")

from runtimes.llama_cpp_families import (
    FAMILIES,
    LAYERS,
    Comparison,
    Family,
    FamilyOutcomes,
    Outcome,
    compare_family,
    rows_of_text,
)
from safetensors.torch import load_file, save_file
from support.llama_cpp_converter import Converter, converting, fetch

pytestmark = pytest.mark.nightly

DIFFERENT = 0.1
"""Largest difference of a logit, in standard deviations of all logits, that is more than rounding."""

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
each_misread_family = pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.is_misread], ids=lambda family: family.name
)


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converter]:
    with converting(fetch(tmp_path_factory.mktemp("llama.cpp"))) as converter:
        yield converter


@pytest.fixture(scope="module")
def outcomes(converter: Converter, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], FamilyOutcomes]:
    work = tmp_path_factory.mktemp("families")
    return cache(lambda family: compare_family(family, converter, work))


@each_family
def test_the_whole_model_is_the_same(family: Family, outcomes: Callable[[Family], FamilyOutcomes]) -> None:
    assert outcomes(family).whole.is_same, outcomes(family).whole


@each_family
def test_a_cut_that_llama_cpp_reads_is_the_same(family: Family, outcomes: Callable[[Family], FamilyOutcomes]) -> None:
    """If a rule of llama.cpp says something of the family's cut, the one that keeps the pattern takes its place."""
    assert outcomes(family).read.is_same, outcomes(family).read


@each_family
def test_nothing_is_said_of_a_cut_that_llama_cpp_reads(
    family: Family, outcomes: Callable[[Family], FamilyOutcomes]
) -> None:
    assert outcomes(family).read.warnings == ()


@each_misread_family
def test_a_cut_that_breaks_a_rule_is_computed_differently(
    family: Family, outcomes: Callable[[Family], FamilyOutcomes]
) -> None:
    """Else llama.cpp has no such rule any more, and `models/checkpoint/layer_kinds.py` warns for nothing."""
    misread = outcomes(family).misread
    assert misread is not None
    assert misread.largest > DIFFERENT


@each_misread_family
def test_a_cut_that_breaks_a_rule_is_warned_of(family: Family, outcomes: Callable[[Family], FamilyOutcomes]) -> None:
    misread = outcomes(family).misread
    assert misread is not None
    assert len(misread.warnings) == 1


def swap_layers(checkpoint: Path) -> None:
    """Swap layers 1 and 2."""
    file = checkpoint / "model.safetensors"
    swapped = {}
    for name, tensor in load_file(file).items():
        other = re.sub(r"layers\.([12])\.", lambda match: f"layers.{3 - int(match[1])}.", name)
        swapped[other] = tensor
    save_file(swapped, file, metadata={"format": "pt"})


def change_setting(checkpoint: Path, name: str, value: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))


def shift_rope(checkpoint: Path) -> None:
    change_setting(checkpoint, "rope_parameters", {"rope_type": "default", "rope_theta": 20000.0})


def widen_window(checkpoint: Path) -> None:
    change_setting(checkpoint, "sliding_window", 32)


def change_kinds(checkpoint: Path) -> None:
    change_setting(checkpoint, "layer_types", ["full_attention", *["sliding_attention"] * (LAYERS - 1)])


@pytest.mark.parametrize(
    ("model_type", "plant"),
    [("llama", swap_layers), ("llama", shift_rope), ("gemma2", widen_window), ("olmo3", change_kinds)],
    ids=["swapped layers", "another base of rope", "another window", "another kind"],
)
def test_a_planted_error_is_seen(
    model_type: str, plant: Callable[[Path], None], converter: Converter, tmp_path: Path
) -> None:
    (family,) = [family for family in FAMILIES if family.model_type == model_type]
    checkpoint = family.save(tmp_path / "checkpoint")
    planted = family.save(tmp_path / "planted")
    plant(planted)
    file = converter.convert(planted, tmp_path / "planted.gguf")

    outcome = Comparison(checkpoint, family.rows(), converter, tmp_path).compare(checkpoint, file)

    assert outcome.largest > DIFFERENT


@pytest.mark.parametrize("dropped", [(), (3, 7, 12, 13, 14, 17, 25, 26)], ids=["whole", "pruned"])
def test_smollm2_is_the_same(dropped: tuple[int, ...], smollm2: Path, converter: Converter, tmp_path: Path) -> None:
    """Its 4 rows of 256 tokens and 135 million parameters take seconds."""
    comparison = Comparison(smollm2, rows_of_text(smollm2, 4, 256), converter, tmp_path)

    outcome = comparison.compare_without(dropped) if dropped else comparison.compare_whole()

    assert outcome.is_same, outcome


@pytest.mark.parametrize("dropped", [(), (13, 14, 15, 17)], ids=["whole", "pruned by its pattern"])
def test_gemma3_is_the_same(dropped: tuple[int, ...], gemma3: Path, converter: Converter, tmp_path: Path) -> None:
    """Its row of 640 tokens is longer than the sliding window of 512."""
    comparison = Comparison(gemma3, rows_of_text(gemma3, 1, 640), converter, tmp_path)

    outcome = comparison.compare_without(dropped) if dropped else comparison.compare_whole()

    assert outcome.is_same, outcome


@pytest.fixture(scope="module")
def misread_gemma3(gemma3: Path, converter: Converter, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome without layers 7, 8, 9 and 14, after which llama.cpp reads others as layers of full attention."""
    work = tmp_path_factory.mktemp("gemma3")
    return Comparison(gemma3, rows_of_text(gemma3, 1, 640), converter, work).compare_without((7, 8, 9, 14))


def test_gemma3_without_layers_of_its_pattern_is_computed_differently(misread_gemma3: Outcome) -> None:
    assert misread_gemma3.largest > DIFFERENT


def test_gemma3_without_layers_of_its_pattern_is_warned_of(misread_gemma3: Outcome) -> None:
    assert len(misread_gemma3.warnings) == 1
