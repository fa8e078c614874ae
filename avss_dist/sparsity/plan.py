"""Sparsity plans: the inputs of linear maps that become zero, and the reason, as a YAML file. Layers count from 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import (
    MAX_LAYERS,
    SPARSITY_RULES,
    THRESHOLD,
    TOP_K,
    Intervention,
    MapSparsity,
    Sparsity,
)
from avss_dist.core.text import describe_bytes
from avss_dist.core.validation import OneOf, checked
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

METHODS = {
    "uniform": "the same sparsity everywhere, by thresholds",
    "loss": "where the predicted loss rises the least, by one backward pass",
    "teal": "greedily inside of each block, by what its output changes (TEAL, arXiv 2408.14690)",
    "acttail": "by the heavy tail of each weight's spectrum, the largest of each token (ActTail, arXiv 2603.12272)",
    "wina": "the same everywhere, the largest of each token, weighted by columns (WINA, arXiv 2505.19427)",
}
"""Methods of allocating a sparsity over linear maps, with their meanings."""
PROJECTIONS = "projections"
MAX_UNITS = 10**9
TOLERANCE = 1e-3  # of a plan's sparsity, as its maps are written with six decimals
Share = Annotated[float, Field(ge=0, lt=1)]


@checked
class MapPlan:
    """Criterion for the inputs of one linear map that become zero.

    Raises:
        ConfigError: values are invalid; every problem is named.
    """

    layer: Annotated[int, Field(ge=0)]
    """Index of the layer, from 0."""
    map: Name
    """Module path of the map below the layer."""
    site: Name
    """Site that is its input."""
    outputs: Annotated[int, Field(ge=1, le=MAX_UNITS)]
    """Number of output units."""
    inputs: Annotated[int, Field(ge=1, le=MAX_UNITS)]
    """Number of input units."""
    sparsity: Share
    """Expected share of zeros among its inputs."""
    by: Annotated[str, OneOf((THRESHOLD, TOP_K))]
    """Criterion of zeros: inputs up to a size, or a share of each token's inputs."""
    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Size or share of the criterion."""

    def __post_init__(self) -> None:
        if self.by == TOP_K and self.inputs - int(self.value * self.inputs) < 1:
            message = f"`value` {self.value:g} leaves none of the {self.inputs} units of a token."
            raise PlanError(message, "Keep one at least.")


@checked
class SparsityPlan:
    """Plan of the activations of a model that become zero.

    Raises:
        ConfigError: values are invalid; every problem is named.
    """

    model: Name
    """Hub id or folder of the checkpoint."""
    revision: Name | None = None
    """The hub's commit, or the hash of the checkpoint's content; any revision by default."""
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    """Number of layers of the whole model."""
    sparsity: Share
    """Expected share of the weights of all linear maps of the plan that meet a zero, per sparse token. It must be the
    mean of the sparsities of `projections`, weighted by their numbers of weights."""
    rule: Annotated[str, OneOf(SPARSITY_RULES)] = SPARSITY_RULES[0]
    """Rule for the tokens that are made sparse."""
    weighted: bool = False
    """Weight sizes by the norms of the columns that the inputs meet."""
    why: Mapping[str, Reason] = Field(default_factory=dict)
    """Method and inputs by which the plan was chosen."""
    run_id: Name | None = None
    """Run whose activations were counted; none for a plan written by hand."""
    findings: Lines = ()
    """Caveats of the plan, for people."""
    projections: Annotated[tuple[MapPlan, ...], Field(strict=False, min_length=1)]
    """The linear maps."""

    def __post_init__(self) -> None:
        named = [(entry.layer, entry.map) for entry in self.projections]
        problems = problems_of_maps(PROJECTIONS, named, self.num_layers)
        planned = sum(entry.sparsity * entry.outputs * entry.inputs for entry in self.projections) / self.weights
        if abs(self.sparsity - planned) > TOLERANCE:
            problems.append(
                PlanError(
                    f"`sparsity` is {self.sparsity:g}, and the maps of `{PROJECTIONS}` have {planned:.6g} on average, "
                    "each by the number of its weights.",
                    f"Write sparsity: {planned:.6g}, or change the maps.",
                )
            )
        if problems:
            raise ConfigError.combine(problems)

    @property
    def intervention(self) -> Intervention:
        """Intervention that applies the plan to its model."""
        maps = [
            MapSparsity(
                layer=entry.layer,
                path=entry.map,
                outputs=entry.outputs,
                inputs=entry.inputs,
                by=entry.by,
                value=entry.value,
                weighted=self.weighted,
            )
            for entry in self.projections
        ]
        return Intervention(sparsity=Sparsity(maps=tuple(maps), rule=self.rule))

    def write(self, path: str | Path) -> None:
        """Write the YAML file.

        Raises:
            PlanError: the file cannot be written.
            StorageFull: there is no space left.
        """
        values = {name: value for name, value in asdict(self).items() if value not in (None, False)}
        values["why"] = dict(self.why)
        values["findings"] = list(self.findings)
        maps = values.pop(PROJECTIONS)
        lines = to_yaml({PROJECTIONS: [entry | {"sparsity": round(entry["sparsity"], 6)} for entry in maps]}, flow=True)
        write_text(path, f"# Sparsity of activations. Layers count from 0.\n{to_yaml(values)}{lines}")

    def describe(self) -> list[str]:
        """Return lines for people that describe the plan and its reason."""
        saved = self.saved_weights
        return [
            f"{self.sparsity:.1%} of the weights of {len(self.projections)} linear maps meet a zero, rule {self.rule}.",
            describe_origin(self.model, self.revision, self.run_id),
            f"Chosen {describe_reason(self.why, METHODS)}.",
            f"Per token {2 * saved:,} FLOP of {2 * self.weights:,} are saved, and {saved:,} weights need not be read: "
            f"{describe_bytes(2 * saved)} of {describe_bytes(2 * self.weights)} in 16 bits.",
            *(f"{site}: {share:.3f} on average." for site, share in self.by_site().items()),
            *(f"Finding: {line}" for line in self.findings),
        ]

    @property
    def weights(self) -> int:
        """Number of weights of all linear maps."""
        return sum(entry.outputs * entry.inputs for entry in self.projections)

    @property
    def saved_weights(self) -> int:
        """Number of weights that meet a zero, per token."""
        return round(sum(entry.sparsity * entry.outputs * entry.inputs for entry in self.projections))

    def by_site(self) -> dict[str, float]:
        """Return the mean sparsity by site, weighted by the maps' numbers of weights."""
        sums: dict[str, list[float]] = {}
        for entry in self.projections:
            size = entry.outputs * entry.inputs
            zero, total = sums.get(entry.site, [0.0, 0.0])
            sums[entry.site] = [zero + entry.sparsity * size, total + size]
        return {site: zero / size for site, (zero, size) in sums.items()}


def read_sparsity_plan(path: str | Path) -> SparsityPlan:
    """Read a sparsity plan from its file.

    Raises:
        PlanError: the file cannot be read, or is invalid; the message names every problem with its line and key.
    """
    return read_checked_plan(SparsityPlan, path)
