"""Precision plans: the number formats that the weights of linear maps are rounded to, and the reason, as a YAML file.

Layers count from 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import MAX_LAYERS, Intervention, RoundedPlace, Rounding
from avss_dist.core.registry import PRECISION_METHODS
from avss_dist.core.text import count_of, describe_bytes
from avss_dist.core.validation import OneOf, checked
from avss_dist.models.number_formats import FORMATS
from avss_dist.pruning.plan import (
    Lines,
    Name,
    Reason,
    describe_origin,
    describe_reason,
    problems_of_maps,
    read_checked_plan,
    to_yaml,
    write_text,
)
from avss_dist.pruning.selection import PlanError

ROUNDED = "rounded"
TOLERANCE = 1e-3  # of a plan's bits per weight
MAP_TOLERANCE = 1e-5  # of a map's bits per weight, which are written with six digits


@checked
class MapPrecision:
    """Number format of the weight of one linear map.

    Raises:
        ConfigError: values are invalid; every problem is named.
    """

    layer: Annotated[int, Field(ge=0)]
    """Index of the layer, from 0."""
    map: Name
    """Module path of the map below the layer."""
    format: Annotated[str, OneOf(tuple(FORMATS))]
    """Number format."""
    weights: Annotated[int, Field(ge=1)]
    """Number of weights."""
    bits: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Bits per weight in the format, with its share of scales."""

    def contradiction(self, *shapes: tuple[int, int]) -> str | None:
        """Return how the bits contradict the format of a map of one of these shapes (outputs, inputs), or None."""
        possible = [FORMATS[self.format].bits(*shape) for shape in shapes]
        if min(possible) - MAP_TOLERANCE <= self.bits <= max(possible) + MAP_TOLERANCE:
            return None
        expected = " to ".join(f"{bits:.6g}" for bits in sorted({min(possible), max(possible)}))
        return f"has `bits` {self.bits:g}, and {self.format} has {expected} bits per weight"


@checked
class PrecisionPlan:
    """Plan of the number formats of a model's weights.

    Raises:
        ConfigError: values are invalid; every problem is named.
    """

    model: Name
    """Hub id or folder of the checkpoint."""
    revision: Name | None = None
    """The hub's commit, or the hash of the checkpoint's content; any revision by default."""
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    """Number of layers of the whole model."""
    bits: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Bits per weight, a mean over the weights of `rounded`."""
    why: Mapping[str, Reason] = Field(default_factory=dict)
    """Method and inputs by which the plan was chosen."""
    run_id: Name | None = None
    """Run of the checkpoint; none for a plan written by hand."""
    evaluation: Name | None = None
    """Evaluation whose predicted losses chose the plan. Its text is not held out."""
    findings: Lines = ()
    """Caveats of the plan, for people."""
    rounded: Annotated[tuple[MapPrecision, ...], Field(strict=False, min_length=1)]
    """The linear maps. All other weights stay as they are."""

    def __post_init__(self) -> None:
        named = [(entry.layer, entry.map) for entry in self.rounded]
        problems = problems_of_maps(ROUNDED, named, self.num_layers)
        wrong = [
            f"Map {number} of `{ROUNDED}`, '{entry.map}' of layer {entry.layer}, {problem}"
            for number, entry in enumerate(self.rounded, start=1)
            if (problem := entry.contradiction((1, entry.weights), (entry.weights, 1)))  # extremes of all shapes
        ]
        if wrong:
            others = f", and {count_of(len(wrong) - 1, 'other map')} alike" if len(wrong) > 1 else ""
            problems.append(PlanError(f"{wrong[0]}{others}.", "Write the bits of the formats, or use avss quantize."))
        if abs(self.bits - (mean := self.size / self.weights)) > TOLERANCE:
            problems.append(
                PlanError(
                    f"`bits` is {self.bits:g}, and the maps of `{ROUNDED}` have {mean:.6g} bits per weight on average.",
                    f"Write bits: {mean:.6g}, or change the maps.",
                )
            )
        if problems:
            raise ConfigError.combine(problems)

    @property
    def weights(self) -> int:
        """Number of weights of the linear maps."""
        return sum(entry.weights for entry in self.rounded)

    @property
    def size(self) -> float:
        """Number of bits of the linear maps."""
        return sum(entry.bits * entry.weights for entry in self.rounded)

    @property
    def intervention(self) -> Intervention:
        """Intervention that applies the plan to its model."""
        places = [RoundedPlace(layer=entry.layer, path=entry.map, format=entry.format) for entry in self.rounded]
        return Intervention(rounding=Rounding(tuple(places)))

    def write(self, path: str | Path) -> None:
        """Write the YAML file.

        Raises:
            PlanError: the file cannot be written.
            StorageFull: there is no space left.
        """
        values = {name: value for name, value in asdict(self).items() if value is not None}
        values |= {"why": dict(self.why), "findings": list(self.findings), "bits": round(self.bits, 6)}
        maps = [entry | {"bits": round(entry["bits"], 6)} for entry in values.pop(ROUNDED)]
        lines = to_yaml({ROUNDED: maps}, flow=True)
        write_text(path, f"# Number formats of weights. Layers count from 0.\n{to_yaml(values)}{lines}")

    def describe(self) -> list[str]:
        """Return lines for people that describe the plan and its reason."""
        by_format: Counter[str] = Counter()
        for entry in self.rounded:
            by_format[entry.format] += entry.weights
        shares = ", ".join(f"{weights / self.weights:.1%} {name}" for name, weights in by_format.most_common())
        return [
            f"{self.bits:.3f} bits per weight of {count_of(len(self.rounded), 'linear map')}: "
            f"{describe_bytes(self.size / 8)} of {describe_bytes(2 * self.weights)} in 16 bits.",
            describe_origin(self.model, self.revision, self.run_id),
            f"Chosen {describe_reason(self.why, PRECISION_METHODS)}.",
            f"Of the weights, {shares}.",
            *(f"Finding: {line}" for line in self.findings),
        ]


def read_precision_plan(path: str | Path) -> PrecisionPlan:
    """Read a precision plan from its file.

    Raises:
        PlanError: the file cannot be read, or is invalid; the message names every problem with its line and key.
    """
    return read_checked_plan(PrecisionPlan, path)
