"""Selection of runs by id, model, glob, or part of an id, and short names of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from operator import or_

import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.core.errors import AvssError, QueryError, WarehouseError, nearest, require_known
from avss_dist.core.suggestions import command_line
from avss_dist.core.text import basename, printable
from avss_dist.core.values import JsonObject, NewRow, TableRow
from avss_dist.stats.catalog import SCORES
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.names import MEASURED_ONLY, ROUNDING_TASK
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.removal import Catalog

ABLATION_TASKS = sorted({info.task for info in SCORES.values() if info.task} | {ROUNDING_TASK})
MAX_TRIED = 20  # runs, the newest first
NUMBER_LENGTH = 10  # digits at the end of an id, which differ between runs
_TELLING = ("dtype", "corpus", "seed", "revision")  # what tells runs of one model apart, before settings


def choose_runs(
    warehouse: Warehouse,
    names: Sequence[str],
    *,
    every: bool = False,
    failed: bool = False,
    measured: bool = False,
    columns: Sequence[str] | None = None,
) -> list[NewRow]:
    """Return the ``runs`` rows of the named runs, in the order of the names.

    Args:
        names: run ids, models (the full name or the last part of its path), globs such as ``smollm2-*`` of either, or
            unique parts of an id. A model or a glob selects every run that matches. Parts and globs ignore case.
        every: if there are no names, select every run, ordered by id, instead of the newest one.
        failed: include failed runs, which have no scores.
        measured: include the rows of `measured_checkpoints`.
        columns: columns of the returned rows, by default all.

    Raises:
        QueryError: if a name or a glob matches no run (the message suggests the nearest), a part matches several runs,
            or a named run failed.
    """
    table = warehouse.runs()
    if measured:
        table = pa.concat_tables([table, measured_checkpoints(warehouse, table)])
    # A row of all columns is 20 times as large.
    rows = table.select(["run_id", "model", "status", "error", "created_at"]).to_pylist()
    places = {row["run_id"]: place for place, row in enumerate(rows)}
    rows.sort(key=lambda row: str(row["run_id"]))
    valid: dict[str, TableRow] = {}
    errors: dict[str, str] = {}
    for row in rows:
        if failed or row["status"] in ("done", MEASURED_ONLY):
            valid[row["run_id"]] = row
        else:
            errors[row["run_id"]] = row["error"]
    if not valid and errors.keys().isdisjoint(names):
        raise no_finished_run(warehouse, measured=measured)
    if names:
        chosen = _named_runs(names, valid, errors)
    elif every:
        chosen = list(valid)
    else:
        chosen = [max(valid, key=lambda run_id: str(valid[run_id]["created_at"]))]
    selected = table.take([places[run_id] for run_id in chosen]).select(list(columns or table.column_names))
    return list(selected.to_pylist(maps_as_pydicts="lossy"))


def _named_runs(names: Sequence[str], valid: Mapping[str, TableRow], errors: Mapping[str, str]) -> list[str]:
    """Return the ids of named runs, each once.

    Args:
        valid: rows of the runs that may be chosen, by id.
        errors: errors of the others, by id.

    Raises:
        QueryError: see `choose_runs`.
    """
    models = {run_id: str(row["model"]) for run_id, row in valid.items()}
    chosen: dict[str, None] = {}
    for name in names:
        if name in errors:
            raise QueryError(f"Run '{name}' failed: {errors[name]}", "Fix that, then run avss score again.")
        chosen |= dict.fromkeys(_matching(name, models))
    return list(chosen)


def no_finished_run(warehouse: Warehouse, *, measured: bool = False) -> QueryError:
    """Return the error of a warehouse without a finished run. It says if all of its runs failed.

    Args:
        measured: the layers of a checkpoint without a run may be measured instead.
    """
    failed = warehouse.runs().num_rows
    if failed:
        listing = command_line("ls", "-w", warehouse.root)
        runs = "its only run" if failed == 1 else f"all of its {failed:,} runs"
        return QueryError(
            f"{warehouse.root} has no finished run: {runs} failed.",
            f"{listing} says why. Mend that, and repeat the command that scored the model.",
        )
    remedy = "avss score makes one"
    if measured:
        remedy += ", and avss ablate measures layers without one"
    return QueryError(f"{warehouse.root} has no finished run.", f"{remedy}.")


def measured_checkpoints(warehouse: Warehouse, runs: pa.Table) -> pa.Table:
    """Return a row like those of ``runs`` for each checkpoint whose layers `avss ablate` measured, and that has no run.

    It has the id, time, settings and text of the newest evaluation, and the status `MEASURED_ONLY`.
    """
    is_ablation = reduce(or_, [pc.starts_with(pc.field("task"), task) for task in ABLATION_TASKS])
    columns = ["run_id", "model", "revision", "family", "task", "settings", "created_at"]
    evaluations = warehouse.table("evaluations", where=is_ablation, columns=columns)
    rows = evaluations.group_by(columns, use_threads=False).aggregate([]).to_pylist()
    rows.sort(key=lambda row: (str(row["created_at"]), row["run_id"], row["task"], str(row["settings"])))
    newest = {row["revision"]: row for row in rows}
    scored = set(runs.filter(pc.equal(runs["status"], "done"))["revision"].to_pylist())
    checkpoints = []
    for revision, row in newest.items():
        if revision in scored:
            continue
        _, _, corpus = row["task"].partition(":")
        dtype = json.loads(row["settings"]).get("dtype")
        checkpoints.append({**row, "status": MEASURED_ONLY, "corpus": corpus, "dtype": dtype})
    return pa.Table.from_pylist(checkpoints, schema=runs.schema)


@dataclass(frozen=True, kw_only=True)
class ChosenRun:
    """The run that a command is about.

    Attributes:
        row: row of ``runs``.
        number: number of runs that it was chosen from.
        passed_over: a sentence for each newer run that lacks what the command needs.
    """

    row: NewRow
    number: int
    passed_over: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """Return sentences that say which of several runs was chosen, and why no newer one. Empty for a single run."""
        if self.passed_over:
            first = f"Of {self.number} runs, this is the newest that has what the command needs; `run` names another."
            return [first, *self.passed_over]
        if self.number > 1:
            return [f"This is the newest of {self.number} runs; `run` names another."]
        return []


def newest_run(
    warehouse: Warehouse,
    name: str | None,
    require: Callable[[TableRow], object],
    *,
    measured: bool = False,
) -> ChosenRun:
    """Return the newest run that has what a command needs.

    Args:
        name: a name as for `choose_runs`, which may match several runs of one model. None selects from all runs.
        require: function of a row of ``runs`` that raises QueryError if the run lacks something, or WarehouseError if
            that cannot be read.
        measured: include the rows of `measured_checkpoints`.

    Raises:
        QueryError: if the name matches no run, or runs of several models. If none of the `MAX_TRIED` newest runs has
            what is needed, the error is that of the newest.
    """
    rows = choose_runs(warehouse, [] if name is None else [name], every=True, measured=measured)
    if name is not None and len({row["model"] for row in rows}) > 1:
        names = [row["run_id"] for row in rows]
        raise QueryError(f"'{name}' matches {len(rows)} runs of several models.", f"Name one. {nearest(name, names)}")
    rows.sort(key=lambda row: str(row["created_at"]), reverse=True)
    errors: list[AvssError] = []
    passed_over: list[str] = []
    for row in rows[:MAX_TRIED]:
        try:
            require(row)
        except (QueryError, WarehouseError) as error:
            errors.append(error)
            passed_over.append(f"Run {row['run_id']} is newer and was passed over: {error.message}")
        else:
            return ChosenRun(row=row, number=len(rows), passed_over=tuple(passed_over))
    raise errors[0]


def choose_stored(names: Sequence[str], catalog: Catalog) -> list[str]:
    """Return the ids of runs, by the names that `choose_runs` takes. Where no run has a name, evaluations may have it.

    Raises:
        QueryError: if a name matches nothing, or a part of an id matches several.
    """
    runs = {run_id: run.model for run_id, run in catalog.runs.items()}
    evaluations = {run_id: evaluation.model for run_id, evaluation in catalog.evaluations.items()}
    leftovers = dict.fromkeys(catalog.leftovers, "")
    chosen: dict[str, None] = {}
    for name in names:
        # A name that nothing has is suggested the nearest of all.
        stored = {**runs, **evaluations, **leftovers}
        for models in (runs, evaluations, leftovers):
            if _named(name, models) or _parts(name, models):
                stored = models
                break
        chosen |= dict.fromkeys(_matching(name, stored))
    return list(chosen)


def _matching(name: str, models: Mapping[str, str]) -> list[str]:
    """Return the ids of the runs that a name matches: as an id, a model, a glob, or the begin of a word of one id.

    Args:
        models: models by run id.

    Raises:
        QueryError: if no run matches, or words of several ids do.
    """
    named = _named(name, models)
    if named:
        return named
    if _is_glob(name):
        raise QueryError(f"No run matches '{name}'.", nearest(name, models))
    parts = _parts(name, models)
    if len(parts) > 1:
        raise QueryError(f"'{name}' is part of {len(parts)} runs.", f"{nearest(name, parts)} For all: '*{name}*'.")
    if not parts:
        require_known("run", name, models, QueryError)
    return parts


def _is_glob(name: str) -> bool:
    return not set(name).isdisjoint("*?[")


def _named(name: str, models: Mapping[str, str]) -> list[str]:
    """Return the ids of the runs with a name, of a model with it, or else those that a glob matches."""
    if name in models:
        return [name]
    of_model = []
    for run_id, model in models.items():
        if name in (model, basename(model)):
            of_model.append(run_id)
    if of_model or not _is_glob(name):
        return of_model
    matching = []
    for run_id, model in models.items():
        texts = (run_id, model, basename(model))
        if any(fnmatchcase(text.lower(), name.lower()) for text in texts):
            matching.append(run_id)
    return matching


def _parts(name: str, models: Mapping[str, str]) -> list[str]:
    """Return the run ids with a word that begins with a name."""
    if not name or _is_glob(name):
        return []
    begins_a_word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}", re.IGNORECASE)
    return [run_id for run_id in models if begins_a_word.search(run_id)]


def run_labels(runs: Sequence[TableRow]) -> list[str]:
    """Return short names that differ: the model's, with as few details as tell runs of one model apart."""
    labels = [basename(run["model"] or run["run_id"]) for run in runs]
    for details in _details(runs):
        labels = _with_details(labels, details)
    return [printable(label) for label in labels]


def _with_details(labels: Sequence[str], details: Sequence[str | None]) -> list[str]:
    """Return labels of runs, with their details where those of runs of the same label differ."""
    details_of_label: dict[str, set[str | None]] = {}
    for label, detail in zip(labels, details, strict=True):
        details_of_label.setdefault(label, set()).add(detail)
    extended = []
    for label, detail in zip(labels, details, strict=True):
        if detail is not None and len(details_of_label[label]) > 1:
            extended.append(f"{label} · {detail}")
        else:
            extended.append(label)
    return extended


def _details(runs: Sequence[TableRow]) -> Iterator[list[str | None]]:
    """Yield one detail after the other, by run: dtype, corpus, seed, revision, each setting, last its own number."""
    for name in _TELLING:
        yield [_property(run, name) for run in runs]
    settings = [settings_of(run) for run in runs]
    keys: dict[str, None] = {}
    for setting in settings:
        keys |= dict.fromkeys(setting)
    for key in keys:
        if key not in _TELLING:
            yield [_setting(setting, key) for setting in settings]
    yield [run["run_id"][-NUMBER_LENGTH:] for run in runs]


def _setting(settings: JsonObject, key: str) -> str | None:
    """Return a setting of a run in words. None if it is off."""
    if settings.get(key):
        return f"{key}={settings[key]}"
    return None


def _property(run: TableRow, name: str) -> str | None:
    """Return the last part of the name of a run's property. None if it is not known."""
    if run[name] is None:
        return None
    if name == "seed":
        return f"seed {run[name]}"
    return basename(run.get(f"{name}_name") or run[name])
