"""Plans over the linear maps of a model, as YAML files: inputs that become zero, or number formats of weights.

Layers count from 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from avss_dist.core.files import write_output
from avss_dist.core.intervention import (
    SPARSITY_RULES,
    THRESHOLD,
    TOP_K,
    Intervention,
    MapSparsity,
    RoundedPlace,
    Rounding,
    Sparsity,
)
from avss_dist.core.text import count_of, describe_bytes
from avss_dist.core.validation import OneOf, checked
from avss_dist.core.yaml_files import to_yaml
from avss_dist.models.change.number_formats import FORMATS
from avss_dist.plans.catalog import PRECISION_METHODS, SPARSITY_METHODS
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import ModelPlan, Name, seen_lines

MAX_MAP_UNITS = 10**9
MEAN_TOLERANCE = 1e-3
"""Largest difference between the mean that a plan names and that of its maps, which are written with six decimals."""
MAP_TOLERANCE = 1e-5
"""Largest error of a map's bits per weight, which are written with six digits."""
POINT = 0.01
"""A percentage point."""
DECIMALS = 6
"""Decimals of sparsities and of bits per weight in a plan's file."""
ShareOfZeros = Annotated[float, Field(ge=0, lt=1)]


@checked
class PlannedMap:
    """A linear map of a plan.

    Raises:
        ConfigError: values are invalid; every problem is named.
    """

    layer: Annotated[int, Field(ge=0)]
    """Index of the layer, from 0."""
    map: Name
    """Module path of the map below the layer."""


@checked
class MapPlan(PlannedMap):
    """Criterion for the inputs of one linear map that become zero."""

    site: Name
    """Site that is its input."""
    outputs: Annotated[int, Field(ge=1, le=MAX_MAP_UNITS)]
    """Number of output units."""
    inputs: Annotated[int, Field(ge=1, le=MAX_MAP_UNITS)]
    """Number of input units."""
    sparsity: ShareOfZeros
    """Expected share of zeros among its inputs."""
    by: Annotated[str, OneOf((THRESHOLD, TOP_K))]
    """Criterion of zeros: inputs up to a size, or a share of each token's inputs."""
    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Size or share of the criterion."""

    def __post_init__(self) -> None:
        if self.by != TOP_K:
            return
        zeros = int(self.value * self.inputs)
        if zeros >= self.inputs:
            raise PlanError(
                f"`value` {self.value:g} leaves none of the {self.inputs} units of a token.", "Keep one at least."
            )

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs

    def contradiction(self, model: str, outputs: int, inputs: int) -> str | None:
        """Return how the entry contradicts the shape that the map has in a model, or None."""
        if (inputs, outputs) == (self.inputs, self.outputs):
            return None
        return f"has {self.inputs} inputs and {self.outputs} outputs, and in {model} {inputs} and {outputs}"


@checked
class MapPrecision(PlannedMap):
    """Number format of the weight of one linear map."""

    format: Annotated[str, OneOf(tuple(FORMATS))]
    """Number format."""
    weights: Annotated[int, Field(ge=1)]
    """Number of weights."""
    bits: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Bits per weight in the format, with its share of scales."""

    def wrong_bits(self, *shapes: tuple[int, int]) -> str | None:
        """Return how the bits contradict the format of a map of one of these shapes (outputs, inputs), or None."""
        possible = [FORMATS[self.format].bits(outputs, inputs) for outputs, inputs in shapes]
        minimum = min(possible)
        maximum = max(possible)
        if minimum - MAP_TOLERANCE <= self.bits <= maximum + MAP_TOLERANCE:
            return None
        expected = f"{minimum:.6g}"
        if minimum < maximum:
            expected += f" to {maximum:.6g}"
        return f"has `bits` {self.bits:g}, and {self.format} has {expected} bits per weight"

    def contradiction(self, model: str, outputs: int, inputs: int) -> str | None:
        """Return how the entry contradicts the shape that the map has in a model, or None."""
        if self.weights != outputs * inputs:
            return f"has {self.weights:,} weights, and in {model} {outputs * inputs:,}"
        return self.wrong_bits((outputs, inputs))


@checked
class LinearMapPlan(ModelPlan):
    """Plan over the linear maps of a model. A field and a field of every map have the name of its budget.

    Attributes:
        key: field that holds the linear maps.
        budget: field of the mean over all maps, weighted by their numbers of weights.
        comment: first line of the file.
    """

    key: ClassVar[str]
    budget: ClassVar[str]
    comment: ClassVar[str]

    def __post_init__(self) -> None:
        problems = []
        places = {(entry.layer, entry.map) for entry in self.maps}
        if len(places) < len(self.maps):
            problems.append(PlanError(f"`{self.key}` names a linear map twice."))
        last = max(entry.layer for entry in self.maps)
        if last >= self.num_layers:
            problems.append(PlanError(f"There is no layer {last}: the model has {self.num_layers}, from 0."))
        actual_mean = self.total / self.weights
        if abs(self.mean - actual_mean) > MEAN_TOLERANCE:
            average = f"{actual_mean:.6g}"
            hint = f"Write {self.budget}: {average}, or change the maps."
            if self.budget == "bits":
                average += " bits per weight"
            problem = PlanError(
                f"`{self.budget}` is {self.mean:g}, and the maps of `{self.key}` have {average} on average, each by "
                "the number of its weights.",
                hint,
            )
            problems.append(problem)
        if problems:
            raise PlanError.combine(problems)

    @property
    def maps(self) -> Sequence[MapPlan | MapPrecision]:
        """The linear maps."""
        return tuple(getattr(self, self.key))

    @property
    def mean(self) -> float:
        """Mean of the budget over all weights, as the plan names it."""
        return float(getattr(self, self.budget))

    @property
    def label(self) -> str:
        """Name for people of the model with the plan's mean: ``model, sparsity 0.5 by uniform``."""
        method = self.why.get("by", "hand")
        return f"{super().label}, {self.budget} {self.mean:.4g} by {method}"

    @property
    def weights(self) -> int:
        """Number of weights of the linear maps."""
        return sum(entry.weights for entry in self.maps)

    @property
    def total(self) -> float:
        """Sum of the budget over all weights, such as the bits of the linear maps."""
        return float(sum(self._amount(entry) * entry.weights for entry in self.maps))

    def _amount(self, entry: MapPlan | MapPrecision) -> float:
        """Return the budget of a map: its sparsity, or its bits per weight."""
        return float(getattr(entry, self.budget))

    def write(self, path: str | Path) -> None:
        """Write the YAML file.

        Raises:
            PlanError: the file cannot be written.
            StorageFull: there is no space left.
        """
        values = self.values()
        values["findings"] = list(self.findings)
        values[self.budget] = round(self.mean, DECIMALS)
        seen = seen_lines(values.pop("seen"))
        maps = []
        for entry in values.pop(self.key):
            row = asdict(entry)
            row[self.budget] = round(self._amount(entry), DECIMALS)
            maps.append(row)
        written = {name: value for name, value in values.items() if value is not None and value is not False}
        text = f"# {self.comment} Layers count from 0.\n"
        text += to_yaml(written)
        text += seen
        text += to_yaml({self.key: maps}, flow=True)
        write_output(path, text, PlanError)


@checked
class SparsityPlan(LinearMapPlan):
    """Plan of the activations of a model that become zero.

    Raises:
        ConfigError: values are invalid; every problem is named.
    """

    sparsity: ShareOfZeros
    """Expected share of the weights of all linear maps of the plan that meet a zero, per sparse token. It must be the
    mean of the sparsities of `projections`, weighted by their numbers of weights."""
    rule: Annotated[str, OneOf(SPARSITY_RULES)] = SPARSITY_RULES[0]
    """Rule for the tokens that are made sparse."""
    weighted: bool = False
    """Weight sizes by the norms of the columns that the inputs meet."""
    projections: Annotated[tuple[MapPlan, ...], Field(strict=False, min_length=1)]
    """The linear maps."""

    key = "projections"
    budget = "sparsity"
    comment = "Sparsity of activations."

    @property
    def intervention(self) -> Intervention:
        """Intervention that applies the plan to its model."""
        maps = []
        for entry in self.projections:
            sparse_map = MapSparsity(
                layer=entry.layer,
                path=entry.map,
                outputs=entry.outputs,
                inputs=entry.inputs,
                by=entry.by,
                value=entry.value,
                weighted=self.weighted,
            )
            maps.append(sparse_map)
        return Intervention(sparsity=Sparsity(maps=tuple(maps), rule=self.rule))

    def describe(self) -> list[str]:
        """Return lines for people that describe the plan and its reason."""
        zeros: defaultdict[str, float] = defaultdict(float)
        sizes: Counter[str] = Counter()
        for entry in self.projections:
            zeros[entry.site] += entry.sparsity * entry.weights
            sizes[entry.site] += entry.weights
        by_site = [f"{site}: {zeros[site] / size:.3f} on average." for site, size in sizes.items()]
        maps = f"{len(self.projections)} linear maps"
        return self._describe(
            f"{self.sparsity:.1%} of the weights of {maps} meet a zero, rule {self.rule}.",
            self._describe_savings(),
            *by_site,
            meanings=SPARSITY_METHODS,
        )

    def _describe_savings(self) -> str:
        """Return a sentence on the operations and the weights that zeros save for each token."""
        saved = round(self.total)
        # A weight costs a multiplication and an addition, and has two bytes.
        operations = f"{2 * saved:,} FLOP of {2 * self.weights:,}"
        size = f"{describe_bytes(2 * saved)} of {describe_bytes(2 * self.weights)}"
        return f"Per token {operations} are saved, and {saved:,} weights need not be read: {size} in 16 bits."

    def describe_realized(self, measured: Mapping[tuple[int, str], float]) -> str | None:
        """Return a sentence that compares the plan with measured shares of zeros, by layer and path of a map.

        Returns:
            None if no map of the plan was measured.
        """
        deviations: dict[tuple[int, str], float] = {}
        for entry in self.projections:
            place = (entry.layer, entry.map)
            if place in measured:
                deviations[place] = abs(measured[place] - entry.sparsity)
        if not deviations:
            return None
        layer, path = max(deviations, key=lambda place: deviations[place])
        farthest = f"the farthest, {path} of layer {layer},"
        points = f"{100 * deviations[layer, path]:.2g} points"
        close = [deviation for deviation in deviations.values() if deviation <= POINT]
        if len(close) == len(deviations):
            return f"Every linear map is within a point of its sparsity; {farthest} by {points}."
        if any(entry.by != THRESHOLD for entry in self.projections):
            cause = "Their share is right on average of the text that was counted alone."
        else:
            cause = "Thresholds are of other text, and of the dense model: maps after sparse ones read less."
        share = f"{len(close) / len(deviations):.0%} of the linear maps"
        return f"{share} are within a point of their sparsity; {farthest} is off by {points}. {cause}"


@checked
class PrecisionPlan(LinearMapPlan):
    """Plan of the number formats of a model's weights.

    Raises:
        ConfigError: values are invalid; every problem is named.
    """

    bits: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Bits per weight, a mean over the weights of `rounded`."""
    evaluation: Name | None = None
    """Evaluation whose predicted losses chose the plan. Its text is not held out."""
    rounded: Annotated[tuple[MapPrecision, ...], Field(strict=False, min_length=1)]
    """The linear maps. All other weights stay as they are."""

    key = "rounded"
    budget = "bits"
    comment = "Number formats of weights."

    def __post_init__(self) -> None:
        wrong = []
        for number, entry in enumerate(self.rounded, start=1):
            # A plan has no shapes. The bits per weight of any shape lie between those of a single row and column.
            problem = entry.wrong_bits((1, entry.weights), (entry.weights, 1))
            if problem is not None:
                wrong.append(f"Map {number} of `{self.key}`, '{entry.map}' of layer {entry.layer}, {problem}")
        if not wrong:
            return
        message = wrong[0]
        if len(wrong) > 1:
            message += f", and {count_of(len(wrong) - 1, 'other map')} alike"
        raise PlanError(f"{message}.", "Write the bits of the formats, or use avss quantize.")

    @property
    def intervention(self) -> Intervention:
        """Intervention that applies the plan to its model."""
        places = []
        for entry in self.rounded:
            places.append(RoundedPlace(layer=entry.layer, path=entry.map, format=entry.format))
        return Intervention(rounding=Rounding(tuple(places)))

    def describe(self) -> list[str]:
        """Return lines for people that describe the plan and its reason."""
        by_format: Counter[str] = Counter()
        for entry in self.rounded:
            by_format[entry.format] += entry.weights
        shares = [f"{weights / self.weights:.1%} {name}" for name, weights in by_format.most_common()]
        maps = count_of(len(self.rounded), "linear map")
        size = f"{describe_bytes(self.total / 8)} of {describe_bytes(2 * self.weights)} in 16 bits"
        return self._describe(
            f"{self.bits:.3f} bits per weight of {maps}: {size}.",
            f"Of the weights, {', '.join(shares)}.",
            meanings=PRECISION_METHODS,
        )
