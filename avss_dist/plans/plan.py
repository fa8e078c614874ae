"""Plans: layers, sublayers and routed experts to drop, with a reason. A plan is a small YAML file that names its model
and its run.

Layers and experts count from 0. A sublayer is written ``attention.7`` or ``mlp.7``, and expert 12 of layer 7 is
``expert.7.12``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pyarrow as pa
from pydantic import Field, WithJsonSchema

from avss_dist.core.errors import ConfigError, without_secrets
from avss_dist.core.files import write_output
from avss_dist.core.intervention import (
    MAX_LAYERS,
    PARTS,
    Intervention,
    Removal,
    Removals,
    Sublayer,
    count_removed,
    describe_removed,
    experts_by_layer,
    joined,
    layer_of,
    parse_removal,
    removal_names,
    whole_layers,
)
from avss_dist.core.results import TabularResult
from avss_dist.core.text import basename
from avss_dist.core.validation import RedactedText, check, checked
from avss_dist.core.values import JsonObject, NewObject, NewRow
from avss_dist.core.yaml_files import Document, YamlKind, read_yaml, to_yaml
from avss_dist.corpus.seen import SeenTexts
from avss_dist.plans.choice import PlanError
from avss_dist.stats.catalog import EXPERT_SCORES, SCORES

if TYPE_CHECKING:
    pass


T = TypeVar("T")
_HINT = "avss plan makes one."


def _run_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise PlanError(f"'{text}' is not a run id.", "A run id has letters, digits, dots, hyphens and underscores.")
    return text


def _reason(value: object) -> object:
    if not isinstance(value, str | int | float | bool | None):
        raise PlanError("A reason must be a text or a number.")
    if isinstance(value, str):
        return str(without_secrets(value))
    return value


_REMOVAL_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": rf"^(({'|'.join(PARTS)})\.\d+|expert\.\d+\.\d+)$"},
    ]
}
FileRemoval = Annotated[Removal, check(parse_removal, before=True), WithJsonSchema(_REMOVAL_SCHEMA)]
Lines = Annotated[tuple[RedactedText, ...], Field(strict=False)]
Name = Annotated[str, Field(min_length=1)]
Reason = Annotated[Any, check(_reason)]

MEANINGS = EXPERT_SCORES | {name: info.meaning for name, info in SCORES.items()}
"""Meaning of every criterion that layers or experts are chosen by."""


@checked
class ModelPlan:
    """Plan of a change of a model.

    Raises:
        ConfigError: values that do not make a plan. The message has every problem.
    """

    model: Name
    """Hub id or folder of the checkpoint."""
    revision: Name | None = None
    """The hub's commit, or the hash of the checkpoint's content; any by default."""
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    """Layers of the whole model."""
    why: Mapping[str, Reason] = Field(default_factory=dict)
    """Criterion and options by which it was chosen."""
    run_id: Annotated[str, check(_run_id)] | None = None
    """Run whose measurements were read; none for a plan by hand."""
    findings: Lines = ()
    """Findings that speak against the choice."""
    seen: SeenTexts = ()
    """Texts that were read on the way to it, on which it is not evaluated."""

    def values(self) -> NewObject:
        """Return the fields as plain values, as files and JSON have them."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["why"] = dict(self.why)
        plain["seen"] = [text.values() for text in self.seen]
        for name in _LAST_FIELDS:
            if name in plain:
                plain[name] = plain.pop(name)
        return plain

    @property
    def label(self) -> str:
        """Name for people of the model with the change, where the plan has no file."""
        return basename(self.model)

    def _describe(self, headline: str, *lines: str, meanings: Mapping[str, str] = MEANINGS) -> list[str]:
        """Return lines for people: a headline, the origin and the reason of the plan, other lines, and findings.

        Args:
            meanings: meaning of each criterion by which the plan may be made.
        """
        checkpoint = self.model
        if self.revision:
            checkpoint += f" at {self.revision[:12]}"
        origin = f"Run: {self.run_id}." if self.run_id else "Of no run."
        description = [headline, f"Model: {checkpoint}. {origin}", f"Chosen {describe_reason(self.why, meanings)}."]
        description += lines
        description += [f"Finding: {finding}" for finding in self.findings]
        return description


_LAST_FIELDS = ("why", "run_id", "evaluation", "findings", "evaluated", "seen")
"""Fields that are the last ones of a plan's file, in their order."""


@checked
class Plan(ModelPlan, TabularResult):
    """Layers, sublayers and routed experts to drop from a model.

    Raises:
        ConfigError: values that do not make a plan. The message has every problem.
    """

    layers: Name
    """Module path of the layer list, below the model's head."""
    drop: Annotated[tuple[FileRemoval, ...], Field(strict=False)] = ()
    """Layers to drop, from 0, sublayers, and routed experts: 3, attention.7, mlp.9, expert.8.12."""
    evaluated: Lines = ()
    """Evaluations of the model without these layers that the warehouse had when the plan was made."""

    def __post_init__(self) -> None:
        removed = joined(self.drop)
        problems = [*self._repetitions(), *self._impossible(removed)]
        if problems:
            raise PlanError.combine(problems)
        object.__setattr__(self, "drop", removed)

    def _repetitions(self) -> Iterator[PlanError]:
        """Yield an error for the first entry of `drop` that is listed twice, and for one that another entry holds."""
        repeated = [removal for removal, times in Counter(self.drop).items() if times > 1]
        if repeated:
            yield PlanError(f"`drop` has {repeated[0]} twice.", "Keep one of them.")
        layers = set(self.dropped_layers)
        contained = sorted(entry for entry in self.drop if not isinstance(entry, int) and entry.layer in layers)
        if contained:
            part = contained[0]
            yield PlanError(f"`drop` has {part} and the whole layer {part.layer}.", f"Leave out {part}.")

    def _impossible(self, removed: Removals) -> Iterator[PlanError]:
        """Yield an error for removals that a model with so many layers cannot lose."""
        number = self.num_layers
        if not removed:
            yield PlanError("The plan drops no layer.", "List at least one in `drop`.")
        highest = max((layer_of(removal) for removal in removed), default=0)
        if highest >= number:
            yield PlanError(f"There is no layer {highest}: the model has {number}, from 0.")
        elif len(whole_layers(removed)) == number:
            yield PlanError(f"The plan drops all {number} layers.", "Leave at least one.")

    def table(self) -> pa.Table:
        """Return a table with a row for each layer, and the part of it that is left out, if any.

        A plan of experts also has the column ``experts``: the experts of the layer that are left out.
        """
        parts: dict[int, str] = {}
        for entry in self.drop:
            if isinstance(entry, Sublayer):
                parts[entry.layer] = entry.part
            elif isinstance(entry, int):
                parts[entry] = "layer"
        rows = []
        for layer in range(self.num_layers):
            row: NewRow = {"layer": layer, "left_out": parts.get(layer)}
            if self.experts:
                row["experts"] = list(self.experts.get(layer, ()))
            rows.append(row)
        return pa.Table.from_pylist(rows)

    __repr__ = TabularResult.__repr__

    def summary(self) -> str:
        """Return the model and what is dropped of it, in a line."""
        return f"{self.model} without {describe_removed(self.drop)}, of {self.num_layers} layers"

    @property
    def intervention(self) -> Intervention:
        """Intervention that the plan makes on its model."""
        return Intervention(removed=self.drop)

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """Layers that are dropped as a whole."""
        return whole_layers(self.drop)

    @cached_property
    def keep(self) -> tuple[int, ...]:
        """Layers that are not dropped as a whole."""
        dropped = set(self.dropped_layers)
        return tuple(layer for layer in range(self.num_layers) if layer not in dropped)

    @cached_property
    def experts(self) -> dict[int, tuple[int, ...]]:
        """Indices of the routed experts that are dropped from each layer that loses some."""
        return experts_by_layer(self.drop)

    @property
    def label(self) -> str:
        """Name for people of the model without what is dropped."""
        return f"{super().label} without {describe_removed(self.drop)}"

    def require_no_sublayers(self, why: str) -> None:
        """Raise PlanError if the plan drops sublayers.

        Args:
            why: sentence that says why they cannot be dropped, for the message.
        """
        sublayers = [removal for removal in self.drop if isinstance(removal, Sublayer)]
        if sublayers:
            raise PlanError(
                f"The plan drops {describe_removed(sublayers)} alone. {why}.",
                "Evaluate the plan as it is, or make one that drops whole layers.",
            )

    def values(self) -> NewObject:
        """Return the fields as plain values, as files and JSON have them."""
        return super().values() | {"drop": removal_names(self.drop)}

    def write(self, path: str | Path) -> None:
        """Write the YAML file.

        Raises:
            PlanError: the file cannot be written.
            StorageFull: there is no space left.
        """
        values = self.values()
        layers = {"drop": values.pop("drop"), "keep": list(self.keep)}
        remarks = {"findings": list(values.pop("findings")), "evaluated": list(values.pop("evaluated"))}
        seen = seen_lines(values.pop("seen"))
        text = "# Layers count from 0.\n"
        text += to_yaml(values)
        text += to_yaml(layers, flow=True)
        text += to_yaml(remarks)
        text += seen
        write_output(path, text, PlanError)

    def describe(self) -> list[str]:
        """Return lines for people: the removed layers, the origin, the reason, findings and evaluations."""
        if self.experts and not self.dropped_layers:
            dropped = f"{count_removed(self.drop)} in {len(self.experts)} of {self.num_layers} layers"
        elif len(self.dropped_layers) < len(self.drop):
            dropped = f"{count_removed(self.drop)} of {self.num_layers}"
        else:
            dropped = f"{len(self.drop)} of {self.num_layers} layers"
        lines = self._describe(f"Drops {dropped}: {describe_removed(self.drop)}.")
        lines += [f"Evaluated: {evaluation}" for evaluation in self.evaluated]
        if not self.evaluated:
            lines.append("Not evaluated yet when the plan was made.")
        return lines


def seen_lines(seen: list[NewRow]) -> str:
    """Return the lines of a plan's file for the texts that were read, none without any."""
    return to_yaml({"seen": seen}, flow=True) if seen else ""


def describe_reason(why: JsonObject, meanings: Mapping[str, str] = MEANINGS) -> str:
    """Return a reason as text: ``by loss (rise of the loss ...): share 0.25, last 1``.

    Args:
        meanings: meaning of each criterion.
    """
    if not why:
        return "by hand"
    by = str(why.get("by", "hand"))
    text = f"by {by}"
    if by in meanings:
        text += f" ({meanings[by]})"
    options = [f"{key} {value}" for key, value in why.items() if key != "by"]
    if options:
        text += f": {', '.join(options)}"
    return text


def read_plan(path: str | Path) -> Plan:
    """Read a plan of layers from its file.

    Raises:
        PlanError: the file cannot be read, or is not a plan. The message has every problem with its line and key.
    """
    document = read_plan_file(path)
    values = dict(document.value)
    keep = values.pop("keep", None)
    plan = document.parse(Plan, values)
    if plan and keep not in (None, list(plan.keep)):  # `keep` is for readers, and may be left out
        hint = f"Write keep: {list(plan.keep)}, or leave it out."
        document.report(("keep",), ConfigError("`keep` must list the layers that `drop` leaves.", hint))
    return document.require_valid(plan)


def read_checked_plan(cls: type[T], path: str | Path) -> T:
    """Read a plan of another kind from its file.

    Args:
        cls: checked class of the plan.

    Raises:
        PlanError: the file cannot be read, or is invalid; the message names every problem with its line and key.
    """
    document = read_plan_file(path)
    return document.require_valid(document.parse(cls, document.value))


def read_plan_file(path: str | Path) -> Document:
    """Read the keys and values of a plan's file, whichever kind of plan it is.

    Raises:
        PlanError: the file cannot be read, or is not a mapping.
    """
    return read_yaml(Path(path), YamlKind(noun="plan", hint=_HINT, error=PlanError))
