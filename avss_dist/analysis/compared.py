"""Stored evaluations of models on the same samples: which model is better than which, and by how much."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import isnan
from operator import attrgetter, itemgetter

import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.differences import DIFFERENCE_COLUMNS, PairedComparison, compare_results, difference_row
from avss_dist.analysis.section import ReportColumn, ReportRow, ReportTable, Section
from avss_dist.analysis.verdict import (
    describe_metric,
    describe_task,
    evaluates_removals,
    primary_metric,
    readable_value,
    repair_names,
)
from avss_dist.core.intervention import InterventionKey, describe_removed
from avss_dist.core.text import count_of
from avss_dist.core.values import NewRow, TableRow
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.metrics import CHANCE, ENTROPY, is_better_lower
from avss_dist.tasks.results import Result, Retention, combine
from avss_dist.warehouse.cells import Cells
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse, grouped

MAX_SECTIONS = 12  # groups of models that a page shows, the newest
MAX_MODELS = 20  # of a group, the best
MAX_SENTENCES = 6  # of a group
HASH_DIGITS = 8  # of a revision or a patch that tells models of one name apart
UNCHANGED = InterventionKey()


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples that models were evaluated on. Models with equal ones can be compared.

    Attributes:
        task: name of the task.
        cells: ids of its cells under no intervention. An id is a hash of the tokens or questions that the cell reads,
            whichever model reads them.
        dtype: compute dtype.
    """

    task: str
    cells: frozenset[str]
    dtype: str


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluatedModel:
    """A model that was evaluated on a task: a checkpoint, whole or without layers.

    Attributes:
        label: name for people.
        revision: revision of the checkpoint.
        change: key of the removed layers, and of the patch that repairs the model.
        created_at: time of the evaluation.
        results: result by metric.
        whole: result of the unchanged checkpoint by metric; empty for the checkpoint itself.
    """

    label: str
    revision: str
    change: InterventionKey
    created_at: datetime
    results: Mapping[str, Result]
    whole: Mapping[str, Result]


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedModels:
    """Models that were evaluated on the same samples.

    Attributes:
        samples: what they have read.
        models: the models, each as it was evaluated last.
        problems: sentences on models that are missing.
    """

    samples: Samples
    models: list[EvaluatedModel] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def created_at(self) -> datetime:
        """Time of the last evaluation."""
        return max(model.created_at for model in self.models)


def compared_sections(warehouse: Warehouse, revisions: Collection[str] | None = None) -> list[Section]:
    """Return a section for each task on which several models were evaluated with the same samples, the newest first.

    Evaluations of several models whose values by sample are not stored have a section of their own, which says so.

    Args:
        revisions: revisions of checkpoints of which at least one has to be in a section; None allows all.
    """
    sections: list[Section] = []
    groups, problems = compared_models(warehouse)
    for group in groups:
        is_wanted = revisions is None or any(model.revision in revisions for model in group.models)
        if is_wanted and len(sections) < MAX_SECTIONS:
            sections.append(_section(f"compared-{len(sections) + 1}", group))
    if problems and revisions is None:
        sections.append(Section(label="Not compared", sentences=_first_sentences(problems)))
    return sections


def compared_models(warehouse: Warehouse) -> tuple[list[ComparedModels], list[str]]:
    """Return the models that a warehouse has evaluated, by what they have read, and why others are missing.

    Groups are in the order of their last evaluation, the newest first. They have at least two models. A checkpoint that
    is the whole model of others in a group is left out.
    """
    rows = warehouse.table("evaluations", where=pc.field("layer").is_null()).to_pylist()
    repairs = repair_names(rows)
    cells = Cells(warehouse)
    groups: dict[Samples, ComparedModels] = {}
    problems = []
    for run_id, of_run in grouped(filter(evaluates_removals, rows), itemgetter("run_id")).items():
        evaluation = _StoredEvaluation.read(of_run, cells.read_each(run_id))
        samples = evaluation.samples
        if samples is not None:
            group = groups.setdefault(samples, ComparedModels(samples=samples))
            evaluation.add_models(group, repairs)
        elif evaluation.num_models > 1:
            problems.append(
                f"{evaluation.task} of {evaluation.model}: the values by sample are not stored, or not all of them. "
                "Evaluate it again to compare its models."
            )
    compared = []
    for group in groups.values():
        models = _without_wholes(_newest(group.models))
        if len(models) > 1 and _metrics(models):
            compared.append(replace(group, models=models))
    return sorted(compared, key=attrgetter("created_at"), reverse=True), problems


def _first_sentences(sentences: Sequence[str]) -> list[str]:
    """Return the first sentences, and how many more there are."""
    shown = list(sentences[:MAX_SENTENCES])
    more = len(sentences) - len(shown)
    if more:
        shown.append(f"And {more:,} more.")
    return shown


@dataclass(frozen=True, kw_only=True, eq=False)
class _StoredEvaluation:
    """An evaluation of one checkpoint on one task, as it is stored.

    Attributes:
        rows: rows of ``evaluations``.
        results: results by the key of the change of the checkpoint, as far as their cells are stored.
        unchanged_cells: ids of the cells of the unchanged checkpoint; empty if some are missing.
    """

    rows: Sequence[TableRow]
    results: Mapping[InterventionKey, Sequence[Result]]
    unchanged_cells: frozenset[str]

    @classmethod
    def read(cls, rows: Sequence[TableRow], cells: Mapping[str, pa.Table]) -> _StoredEvaluation:
        """Return the evaluation of rows of ``evaluations``, and of the rows of its cells by cell id."""
        stored: list[TableRow] = []
        unchanged_cells = set()
        for cell_id, table in cells.items():
            # Older warehouses have models whose layers were scaled.
            of_cell = [row for row in table.to_pylist() if not row["factor"]]
            stored += of_cell
            if of_cell and all(InterventionKey.of_row(row) == UNCHANGED for row in of_cell):
                unchanged_cells.add(cell_id)
        num_parts = max((row["part"] + 1 for row in stored), default=0)
        if len(unchanged_cells) < num_parts:
            unchanged_cells.clear()
        of_models = [result for result in combine(stored, num_parts) if result.layer is None]
        results = grouped(of_models, attrgetter("intervention"))
        return cls(rows=rows, results=results, unchanged_cells=frozenset(unchanged_cells))

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.rows[0]["task"])

    @property
    def model(self) -> str:
        """Name of the checkpoint."""
        return str(self.rows[0]["model"])

    @property
    def samples(self) -> Samples | None:
        """Samples of the evaluation, by the ids of the cells of the unchanged checkpoint. None if some are missing."""
        if not self.unchanged_cells:
            return None
        dtype = str(settings_of(self.rows[0]).get("dtype", ""))
        return Samples(task=self.task, cells=self.unchanged_cells, dtype=dtype)

    @property
    def num_models(self) -> int:
        """Number of models besides the unchanged checkpoint."""
        return len({InterventionKey.of_row(row) for row in self.rows} - {UNCHANGED})

    def add_models(self, group: ComparedModels, repairs: Mapping[str, str]) -> None:
        """Add the models of the evaluation to a group.

        Args:
            repairs: name of the repair of each patch.
        """
        for change, rows in grouped(self.rows, InterventionKey.of_row).items():
            label = _label(self.model, change, repairs)
            if change not in self.results:
                group.problems.append(
                    f"{label} is not compared: its values by sample are not stored. Evaluate it again."
                )
                continue
            whole = {} if change == UNCHANGED else _by_metric(self.results.get(UNCHANGED, ()))
            group.models.append(
                EvaluatedModel(
                    label=label,
                    revision=rows[0]["revision"] or "",
                    change=change,
                    created_at=rows[0]["created_at"],
                    results=_by_metric(self.results[change]),
                    whole=whole,
                )
            )


def _by_metric(results: Sequence[Result]) -> dict[str, Result]:
    return {result.metric: result for result in results}


def _label(model: str, change: InterventionKey, repairs: Mapping[str, str]) -> str:
    """Return the name of a model: that of its checkpoint, what was removed, and the repair."""
    label = model
    if change.removed:
        label += f" without {describe_removed(change.removed)}"
    if change.patch is not None:
        label += f", repaired by {repairs.get(change.patch, 'a patch')}"
    return label


def _newest(models: Sequence[EvaluatedModel]) -> list[EvaluatedModel]:
    """Return each model as it was evaluated last, with labels that tell all apart."""
    newest: dict[tuple[str, InterventionKey], EvaluatedModel] = {}
    for model in sorted(models, key=attrgetter("created_at")):
        newest[model.revision, model.change] = model
    distinct = []
    for label, of_label in grouped(newest.values(), attrgetter("label")).items():
        for model in of_label:
            if len(of_label) > 1:
                model = replace(model, label=f"{label} ({_describe_hashes(model)})")
            distinct.append(model)
    return distinct


def _describe_hashes(model: EvaluatedModel) -> str:
    """Return the first digits of the revision of a model, and of its patch."""
    text = model.revision[:HASH_DIGITS]
    if model.change.patch is not None:
        text += f", patch {model.change.patch[:HASH_DIGITS]}"
    return text


def _without_wholes(models: Sequence[EvaluatedModel]) -> list[EvaluatedModel]:
    """Return models without the unchanged checkpoints of others."""
    wholes = {model.revision for model in models if model.change != UNCHANGED}
    return [model for model in models if model.change != UNCHANGED or model.revision not in wholes]


def _section(name: str, group: ComparedModels) -> Section:
    """Return the section on models that have read the same samples.

    Args:
        name: base name of its tables.
    """
    metrics = _metrics(group.models)
    primary = primary_metric([{"metric": metric} for metric in metrics])
    sentences = []
    rows = []
    for metric in metrics:
        ranked = _ranked(group.models, metric)[:MAX_MODELS]
        better: EvaluatedModel | None = None
        for model in ranked:
            comparison = None
            if better is not None:
                comparison = _compare(model, better, metric, group.samples.task)
            rows.append(_row(model, metric, comparison))
            if comparison is not None and metric == primary:
                sentences.append(comparison.describe())
            better = model
    any_result = next(iter(group.models[0].results.values()))
    num_samples = len(any_result.samples)
    about = f"{count_of(len(group.models), 'model')}, {count_of(num_samples, 'sample')}, {group.samples.dtype}"
    if len(group.models) > MAX_MODELS:
        about += f"; the best {MAX_MODELS} are shown"
    table = ReportTable(
        name=name,
        title="Models on the same samples, best first",
        columns=_COLUMNS,
        rows=rows,
        caption=_CAPTION,
    )
    return Section(
        label=describe_task(group.samples.task),
        about=about,
        sentences=[*_first_sentences(sentences), *_first_sentences(group.problems)],
        tables=[table],
    )


def _metrics(models: Sequence[EvaluatedModel]) -> list[str]:
    """Return the metrics of models that tell how good one is, in order."""
    metrics: dict[str, None] = {}
    for model in models:
        metrics |= dict.fromkeys(model.results)
    return [metric for metric in metrics if metric not in (CHANCE, ENTROPY)]


def _ranked(models: Sequence[EvaluatedModel], metric: str) -> list[EvaluatedModel]:
    """Return the models that have a metric, the best first. NaN is last."""
    direction = 1 if is_better_lower(metric) else -1

    def order(model: EvaluatedModel) -> tuple[bool, float]:
        value = model.results[metric].value
        return isnan(value), direction * value

    return sorted((model for model in models if metric in model.results), key=order)


def _compare(model: EvaluatedModel, better: EvaluatedModel, metric: str, task: str) -> PairedComparison:
    """Return the comparison of a model with the next better one in a metric."""
    whole = None
    if model.revision == better.revision:
        whole = better.whole.get(metric)
    return compare_results(
        model.results[metric], better.results[metric], whole, label=model.label, reference=better.label, task=task
    )


_COLUMNS = (
    ReportColumn("model", "model", number=False, wraps=True),
    ReportColumn("metric", "metric", number=False),
    ReportColumn("value", "value", "{:z,.4g}".format),
    ReportColumn("kept", "kept", "{:z.1%}".format),
    ReportColumn("compared with", "compared_with", number=False, wraps=True),
    *DIFFERENCE_COLUMNS,
)
_CAPTION = (
    "Each model is compared with the next better one: the difference of the metric, and of what is kept of that of the "
    "whole model, in percentage points, with their 95% intervals over the same samples. No interval where fewer than "
    f"{MINIMUM_UNITS} samples differ."
)


def _row(model: EvaluatedModel, metric: str, comparison: PairedComparison | None) -> ReportRow:
    """Return the row of a metric of a model.

    Args:
        comparison: comparison with the next better model; None for the best.
    """
    values: NewRow = dict.fromkeys(column.key for column in _COLUMNS)
    if comparison is not None:
        values |= difference_row(comparison)
    result = model.results[metric]
    values["model"] = model.label
    values["metric"] = describe_metric(metric)
    values["value"] = readable_value(metric, result.value)
    values["num_samples"] = len(result.samples)
    if metric in model.whole:
        values["kept"] = Retention.of(model.whole[metric], result).value
    return ReportRow(values)
