"""Plans: layers, sublayers and routed experts to drop, with a reason. A plan is a small YAML file that names its model
and its run.

Layers and experts count from 0. A sublayer is written ``attention.7`` or ``mlp.7``, and expert 12 of layer 7 is
``expert.7.12``.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pyarrow as pa
from pydantic import Field, WithJsonSchema

from avss_dist.core.errors import AvssError, ConfigError, without_secrets
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
from avss_dist.core.settings import Settings
from avss_dist.core.text import basename, describe_bytes, describe_count
from avss_dist.core.validation import RedactedText, check, checked
from avss_dist.core.yaml_files import Document, YamlKind, read_yaml, to_yaml
from avss_dist.corpus.seen import SeenText, SeenTexts, distinct
from avss_dist.plans.choice import RANDOM, Choice, PlanError, Rows
from avss_dist.plans.ground_truth import LayerTruth
from avss_dist.plans.seen import seen_by_run
from avss_dist.stats.catalog import BLOCK_DISTANCE, EXPERT_SCORES, LOWEST_SHARE, READING, SCORES
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.names import MEASURED_ONLY

if TYPE_CHECKING:
    from avss_dist.models.checkpoint.size import Footprint


T = TypeVar("T")
_HINT = "avss plan makes one."


def _run_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise PlanError(f"'{text}' is not a run id.", "A run id has letters, digits, dots, hyphens and underscores.")
    return text


def _reason(value: Any) -> Any:
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

    def values(self) -> dict[str, Any]:
        """Return the fields as plain values, as files and JSON have them."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["why"] = dict(self.why)
        plain["seen"] = [text.values() for text in self.seen]
        names = [name for name in plain if name not in _LAST_FIELDS]
        names += [name for name in _LAST_FIELDS if name in plain]
        return {name: plain[name] for name in names}

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
            row: dict[str, Any] = {"layer": layer, "left_out": parts.get(layer)}
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

    def values(self) -> dict[str, Any]:
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


def seen_lines(seen: list[dict[str, Any]]) -> str:
    """Return the lines of a plan's file for the texts that were read, none without any."""
    return to_yaml({"seen": seen}, flow=True) if seen else ""


def describe_reason(why: Mapping[str, Any], meanings: Mapping[str, str] = MEANINGS) -> str:
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


def make_plan(
    rows: Rows,
    run: Mapping[str, Any],
    choice: Choice,
    truth: LayerTruth | None = None,
) -> Plan:
    """Make a plan from the rows of ``scores`` of one run.

    Args:
        truth: measurement of `avss ablate`, or score that people bring, that layers are chosen by, if they are.

    Raises:
        PlanError: as `Choice.drop`, or the run's layers are not one list of the model.
    """
    _, number = layer_list(rows, str(run["model"]))
    why = reasons(choice)
    if truth is None:
        return plan_of(rows, run, choice.drop(choice.scores(rows, {})), why)
    if choice.by == BLOCK_DISTANCE:
        drop = choice.drop_block(truth.values, number)
    else:
        drop = choice.drop(choice.scores(rows, {choice.by: truth.by_layer(number)}))
    if truth.run_id:
        why["evaluation"] = truth.run_id
        why["task"] = truth.task
    return plan_of(rows, run, drop, why, truth.seen)


def plan_of(
    rows: Rows, run: Mapping[str, Any], removed: Removals, why: Mapping[str, Any], seen: Iterable[SeenText] = ()
) -> Plan:
    """Return a plan that removes these layers and sublayers from the checkpoint of a run.

    Args:
        seen: texts that were read for the choice, beside that of the run.

    Raises:
        PlanError: the run's layers are not one list of the model.
    """
    path, number = layer_list(rows, str(run["model"]))
    return Plan(
        model=run["model"],
        revision=run["revision"],
        num_layers=number,
        layers=path,
        drop=removed,
        why=why,
        run_id=None if run.get("status") == MEASURED_ONLY else run["run_id"],
        seen=distinct([*seen_by_run(run), *seen]),
    )


def layer_list(rows: Rows, model: str) -> tuple[str, int]:
    """Return the module path and length of the layer list of a run.

    Raises:
        PlanError: the layers are not one list of modules that are used once.
    """
    name_by_layer = {row["layer"]: row["layer_name"] for row in rows}
    names = [name_by_layer[layer] for layer in sorted(name_by_layer)]
    paths = {name.rpartition(".")[0] for name in names}
    indices = [name.rpartition(".")[2] for name in names]
    consecutive = [str(index) for index in range(len(names))]
    if len(paths) != 1 or indices != consecutive:
        raise PlanError(
            f"The layers of {model} are not one list of modules that are used once: none can be dropped.",
            f"They are {', '.join(names[:6])} ...",
        )
    return paths.pop(), len(names)


def reasons(choice: Choice) -> dict[str, Any]:
    """Return the reason of a plan for a choice."""
    values = asdict(choice)
    reading = values.pop("reading")
    seed = values.pop("seed")
    why = {name: value for name, value in values.items() if value not in (None, False, 0)}
    if choice.by == RANDOM:
        why["seed"] = seed
    if not choice.share and not choice.count:
        why["share"] = LOWEST_SHARE
    if choice.by == "avss" and reading is not None:
        why.update(zip(READING, reading, strict=True))
    return why


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


def run_size(run: Mapping[str, Any]) -> Footprint:
    """Return the size of the checkpoint that a run has scored. The headers of a hub id are read from the hub.

    Args:
        run: a row of ``runs``.

    Raises:
        ModelError: the checkpoint does not exist any more, or cannot be read.
    """
    from avss_dist.models.checkpoint.size import footprint

    settings = settings_of(run)
    options = {name: settings[name] for name in ("dequantize", "layers", "trust_remote_code") if settings.get(name)}
    model = run["model"]
    if not _is_local(model):
        model += f"@{run['revision']}"
    return footprint(model, Settings(dtype=run["dtype"] or "auto", **options))


def local_run_size(run: Mapping[str, Any]) -> Footprint | None:
    """Return `run_size` for a checkpoint on this machine, or None if it is elsewhere or cannot be read."""
    if not _is_local(run["model"]):
        return None
    try:
        return run_size(run)
    except AvssError:
        return None


def _is_local(model: str) -> bool:
    """Whether a model's name is a file or folder of this machine."""
    return Path(model).expanduser().exists()


def count_for_memory(size: Footprint, memory: float) -> int:
    """Return the minimum number of layers to drop so that any choice of them leaves at most these bytes of weights.

    Raises:
        PlanError: the whole model has no more, or no number of layers is enough.
    """
    excess = size.weight_bytes - memory
    weights = describe_bytes(size.weight_bytes)
    if excess <= 0:
        raise PlanError(
            f"The model has {describe_count(size.num_parameters)} parameters in {weights} as it is, which meets "
            "`memory` already.",
            "Lower it.",
        )
    # Bytes of the smallest layer, of the two smallest, and so on: any choice of as many layers frees at least these.
    freed = list(accumulate(sorted(size.layer_bytes)))[:-1]
    maximum = freed[-1] if freed else 0
    if excess > maximum:
        raise PlanError(
            f"`memory` cannot be met: with one layer left, {describe_bytes(size.weight_bytes - maximum)} of {weights} "
            "stay.",
            "Quantize the remaining layers instead.",
        )
    return 1 + bisect_left(freed, excess)


def describe_savings(plan: Plan, size: Footprint) -> str:
    """Return a line on what a model without some layers saves. Sublayers that are left out save nothing in a file.

    Args:
        size: size of the whole model.
    """
    saved = sum(size.layer_bytes[layer] for layer in plan.dropped_layers)
    cache_bytes = sum(size.cache_bytes[layer] for layer in plan.dropped_layers)
    share = saved / size.weight_bytes
    saved_parameters = round(share * size.num_parameters)
    layers = f"{len(plan.dropped_layers)} of {size.num_layers} layers"
    parameters = f"{describe_count(saved_parameters)} of {describe_count(size.num_parameters)} parameters ({share:.1%})"
    weights = f"{describe_bytes(saved)} of {describe_bytes(size.weight_bytes)}"
    cache = f"{describe_count(cache_bytes)} of {describe_count(sum(size.cache_bytes))} bytes of keys and values"
    return f"Saves {layers}, {parameters}, {weights}, and {cache} for each token."
