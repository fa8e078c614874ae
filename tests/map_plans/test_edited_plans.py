"""Precision plans whose sizes were edited: what contradicts the formats or the model is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import avss_dist
from avss_dist.map_plans.plans import MapPrecision, PrecisionPlan
from avss_dist.models.number_formats import FORMATS
from avss_dist.pruning.plan import read_checked_plan
from avss_dist.pruning.selection import PlanError


def plan_of(model: Path, *maps: MapPrecision) -> PrecisionPlan:
    bits = sum(entry.bits * entry.weights for entry in maps) / sum(entry.weights for entry in maps)
    return PrecisionPlan(model=str(model), num_layers=3, bits=bits, rounded=maps)


def rounded_map(format: str, layer: int = 0, outputs: int = 128, inputs: int = 64) -> MapPrecision:
    bits = FORMATS[format].bits(outputs, inputs)
    return MapPrecision(layer=layer, map="mlp.up_proj", format=format, weights=outputs * inputs, bits=bits)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_bits_of_any_shape(name: str) -> None:
    for shape in ((1, 256), (256, 256), (1000, 4096)):
        assert rounded_map(name, outputs=shape[0], inputs=shape[1]).wrong_bits(shape) is None
        plan_of(Path("org/a"), rounded_map(name, outputs=shape[0], inputs=shape[1]))


@pytest.mark.parametrize(("format", "bits"), [("bf16", "has 16 bits"), ("int8", "int8 has 8.00195 to 24 bits")])
def test_bits_that_the_format_does_not_have_are_refused(format: str, bits: str, wide: Path, tmp_path: Path) -> None:
    """As after a search and replace in the file."""
    plan_of(wide, rounded_map("int4-g32"), rounded_map("int4-g32", layer=1)).write(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace("int4-g32", format))
    with pytest.raises(PlanError, match=bits) as told:
        read_checked_plan(PrecisionPlan, tmp_path / "plan.yaml")
    assert "'mlp.up_proj' of layer 0, has bits 4.5" in told.value.message and "and 1 other map" in told.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 8_192_000}, "has 8,192,000 weights, and in .* 8,192"),
        ({"bits": 8.5}, "has `bits` 8.5, and int8 has 8.25 bits per weight"),
        ({"map": "mlp.other"}, "is not in"),
    ],
)
def test_sizes_that_the_model_does_not_have_are_refused(
    change: dict[str, Any], message: str, wide: Path, tmp_path: Path
) -> None:
    plan_of(wide, rounded_map("int8", layer=1), replace(rounded_map("int8"), **change)).write(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match=f"plan.yaml: map 2 of the key 'rounded', .*{message}"):
        avss_dist.evaluate(
            (str(tmp_path / "plan.yaml"),), tasks=("perplexity:builtin:pydoc",), warehouse=tmp_path / "w"
        )
