"""Sessions of evaluation: they plan tasks, measure cells that a warehouse lacks, store them, and combine results."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from avss_dist.core.errors import AvssError, RunFailed
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    Intervention,
    InterventionKey,
    describe_removed,
    whole_layers,
)
from avss_dist.core.process import package_versions
from avss_dist.core.settings import Settings
from avss_dist.core.values import NewRow, TableRow
from avss_dist.distillation.curve import ignore
from avss_dist.evaluation.events import CellDone, CellsStarted, CellUnderway, OnEvent
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import plan_task
from avss_dist.models.checkpoint.loading import pin, require_head, text_config
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.partition.choose import place
from avss_dist.partition.execution import Execution
from avss_dist.plans.choice import PlanError
from avss_dist.plans.map_plans import PrecisionPlan
from avss_dist.plans.seen import READ_TEXTS
from avss_dist.runs.local import Executor, open_executor
from avss_dist.runs.threads import Submissions
from avss_dist.tasks.results import Result, combine
from avss_dist.tasks.task import Cell, CellOutcome, CellResult, MetricRow
from avss_dist.warehouse.checks import checkpoint_name
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

Work = Mapping[PlannedTask, Collection[Intervention]]
"""Tasks, each with the interventions under which it is measured."""
RunRound = Callable[[Sequence[Cell]], Iterator[CellOutcome]]
"""Function that measures a round of cells, and yields the outcome of each."""
FailedCell = tuple[Cell, AvssError]
"""A cell, and why it failed."""


class EvaluationSession:
    """Measures tasks of models on an executor, and stores every cell in a warehouse as soon as it is measured.

    A cell is one part of a task under one intervention, such as a set of layers that are left out. It is not measured
    again if the session has measured it, or if the warehouse has it and ``fresh`` is not set. A cell whose file is
    damaged is measured again. `EvaluationSession.open` opens a session, `place` names a model, `plan_task` a task of
    it, and `measure` measures. Inside `keeping_workers`, models stay open between measurements.

    Args:
        store: the warehouse.
        executor: measures cells.
        execution: options that spread replicas.
        on_event: receives every event.
        settings: settings of models that are placed without their own.

    Attributes:
        fresh: measure cells again that are in the warehouse, once per session.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        execution: Execution | None = None,
        on_event: OnEvent | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.store = store
        self.executor = executor
        self.execution = execution or Execution()
        self.settings = settings or Settings()
        self.fresh = self.execution.fresh
        self.on_event = ignore if on_event is None else on_event
        self._measured: defaultdict[str, set[str]] = defaultdict(set)  # ids of this session's cells, by evaluation
        self._workers: RunRound | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        warehouse: str | Path,
        settings: Settings | None = None,
        execution: Execution | None = None,
        on_event: OnEvent | None = None,
        *,
        create: bool = True,
    ) -> Iterator[EvaluationSession]:
        """Create a warehouse if it does not exist, and start an executor, which is closed at the end of the block.

        Args:
            warehouse: folder or URI of the warehouse.
            settings: settings of the models and texts; the defaults without them.
            execution: partition, replicas and executor; the defaults without it.
            on_event: receives every event.
            create: create the warehouse. Without one, nothing can be measured.

        Raises:
            AvssError: the warehouse or the executor cannot be opened.
        """
        settings = settings or Settings()
        execution = execution or Execution()
        store = Store(warehouse)
        if create:
            store.storage.create()
        with closing(open_executor(execution, settings)) as executor:
            yield cls(store, executor, execution, on_event, settings)

    def place(
        self, model: str | Checkpoint, settings: Settings | None = None, execution: Execution | None = None
    ) -> PlacedModel:
        """Decide every setting of a model, and the placement of its replicas. Nothing is loaded yet.

        Args:
            model: hub id or folder of the model, or its checkpoint.
            settings: those of the session by default.
            execution: options of the placement; those of the session by default.

        Raises:
            ConfigError: the requirements of the partition are not met.
            ModelError: the checkpoint is not found, has no head, or cannot read such rows.
        """
        settings = settings or self.settings
        execution = execution or self.execution
        checkpoint = model
        if isinstance(checkpoint, str):
            checkpoint = resolve(checkpoint, trust_remote_code=settings.trust_remote_code)
        config = text_config(checkpoint)
        require_head(checkpoint.name, config)
        pinned = pin(settings, checkpoint, config, self.executor.devices.kind)
        placement = place(checkpoint, pinned, execution, self.executor.devices, head=True)
        self.executor.replicas(placement)
        return PlacedModel(checkpoint=checkpoint, settings=pinned, placement=placement)

    def plan_task(self, model: PlacedModel, name: str) -> PlannedTask:
        """Return a task of a model, ready to be measured.

        Args:
            name: ``perplexity:CORPUS``, ``truthfulqa:FILE``, or a task of lm-evaluation-harness.

        Raises:
            AvssError: no task has this name, or its data cannot be loaded.
        """
        return plan_task(model, name)

    def measure(self, work: Work) -> dict[PlannedTask, list[Result]]:
        """Measure tasks under interventions, write the results, and return them by task.

        Args:
            work: tasks, each with its interventions.

        Returns:
            Results of each task in every metric. They tell their intervention, and include those that were measured
            earlier.

        Raises:
            AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
        """
        cells: list[Cell] = []
        for task, interventions in work.items():
            cells += task.cells(interventions)
        return self.run(cells, work)

    def results(self, planned: PlannedTask, interventions: Iterable[Intervention] = (NO_INTERVENTION,)) -> list[Result]:
        """Write and return the results of the evaluations that interventions belong to, combined from all cells.

        Each loss is written with its perplexity.
        """
        settings = {**planned.settings.as_dict(), **planned.task.options}
        if planned.task.read:
            settings[READ_TEXTS] = [text.values() for text in planned.task.read]
        results = []
        run_ids = dict.fromkeys(planned.run_id(intervention) for intervention in interventions)
        for run_id in run_ids:
            cells = self.store.cells.read(run_id).to_pylist()
            combined = combine(cells, len(planned.task.parts))
            if not combined:
                continue
            common = {
                "task": planned.task.name,
                "settings": json.dumps(settings),
                "versions": package_versions(),
                "created_at": datetime.now(UTC),
            }
            rows = [{**common, **row} for row in _evaluation_rows(combined, cells)]
            self.store.write_rows("evaluations", identity(planned.checkpoint, run_id, cells[0]["family"]), rows)
            results += combined
        return results

    def keep_precision(self, planned: PlannedTask, intervention: Intervention, plan: PrecisionPlan) -> None:
        """Write the number formats of a precision plan beside the results of a task.

        Args:
            intervention: intervention of the results, which applies the plan.
        """
        rounding = intervention.key.rounding
        run_id = planned.run_id(intervention)
        common = {"rounding": rounding, "method": plan.why.get("by"), "created_at": datetime.now(UTC)}
        rows = []
        for entry in plan.rounded:
            row = {
                "layer": entry.layer,
                "map": entry.map,
                "format": entry.format,
                "num_weights": entry.weights,
                "bits_per_weight": entry.bits,
            }
            rows.append(common | row)
        family = self.store.cells.read(run_id)["family"][0].as_py()
        self.store.write_rows(
            "precision", identity(planned.checkpoint, run_id, family), rows, fingerprint(rounding=rounding)[:20]
        )

    @contextmanager
    def keeping_workers(self) -> Iterator[None]:
        """Keep workers and their open models between calls inside the block, for cells that depend on earlier ones."""
        with self._open_workers() as workers:
            self._workers = workers
            try:
                yield
            finally:
                self._workers = None

    def run(
        self, cells: Iterable[Cell], tasks: Work | None = None, *, fits: bool = False
    ) -> dict[PlannedTask, list[Result]]:
        """Measure cells that are not known yet, and store each as soon as it is measured.

        Args:
            tasks: tasks of the cells whose results are written and returned, each with its interventions.
            fits: the cells fit patches that are missing. Measure known cells, too, and stop once a cell has failed
                because of a mistake of the user.

        Raises:
            AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
        """
        requested = {(cell.run_id, cell.cell_id): cell for cell in cells}
        missing = [cell for cell in requested.values() if fits or not self.is_known(cell)]
        self.on_event(CellsStarted(list(requested.values()), len(requested) - len(missing)))
        if self._workers is not None and not fits:
            failed = self._run_round(self._workers, missing, fits=fits)
        else:
            with self._open_workers() as workers:
                failed = self._run_round(workers, missing, fits=fits)
        results = {}
        if tasks is not None:
            for planned, interventions in tasks.items():
                results[planned] = self.results(planned, interventions)
        if failed:
            raise failure(failed)
        return results

    def _run_round(self, workers: RunRound, cells: Sequence[Cell], *, fits: bool) -> list[FailedCell]:
        """Measure cells on open workers, and return those that failed.

        Args:
            fits: stop once a cell has failed because of a mistake of the user.
        """
        failed: list[FailedCell] = []
        for cell, outcome in workers(cells):
            if not isinstance(outcome, AvssError):
                continue
            failed.append((cell, outcome))
            is_mistake = not isinstance(outcome, RunFailed)
            if fits and is_mistake:
                break
        return failed

    @contextmanager
    def _open_workers(self) -> Iterator[RunRound]:
        """Open workers that keep their models between rounds of cells, and release them at the end of the block.

        The function of the context measures a round: it stores and yields the outcome of every cell, in any order. All
        must be taken before the next round.
        """
        rounds: Submissions[Sequence[Cell]] = Submissions()
        outcomes = self.executor.run_cells(rounds, self._report_progress)

        def run_round(cells: Sequence[Cell]) -> Iterator[CellOutcome]:
            if cells:
                rounds.submit(cells)
            for cell, outcome in islice(outcomes, len(cells)):
                notes: Sequence[str] = ()
                if isinstance(outcome, CellResult):
                    self._write(cell, outcome)
                    notes = outcome.notes
                self.on_event(CellDone(cell, notes))
                yield cell, outcome

        try:
            yield run_round
        finally:
            rounds.close()
            outcomes.close()

    def _report_progress(self, cell: Cell, step: str, share: float) -> None:
        self.on_event(CellUnderway(cell, step, share))

    def _write(self, cell: Cell, measured: CellResult) -> None:
        """Write the rows of a measured cell, and the patches that it has fitted."""
        rows = []
        for row in measured.rows:
            values = {
                "task": cell.task,
                "metric": row.metric,
                "layer": row.layer,
                "part": cell.part,
                "samples": row.samples.tolist(),
                "weights": row.weights.tolist(),
                "device": measured.device,
                "seconds": measured.seconds / len(measured.rows),
                "created_at": datetime.now(UTC),
            }
            rows.append({**self._key(cell, row).row(), **values})
        self.store.cells.write(identity(cell.checkpoint, cell.run_id, measured.family), cell.cell_id, rows)
        self._measured[cell.run_id].add(cell.cell_id)

    def _key(self, cell: Cell, row: MetricRow) -> InterventionKey:
        """Return the intervention that a row of a cell describes. A patch that the cell has fitted is written."""
        key = cell.intervention.key
        if row.removed is not None:
            key = key._replace(removed=row.removed)
        if row.rounding:
            key = key._replace(rounding=row.rounding)
        if row.patch is not None:
            key = key._replace(patch=self.store.storage.write_patch(row.patch))
        return key

    def is_known(self, cell: Cell) -> bool:
        """Whether this session has measured a cell, or the warehouse has it, which does not count if it is fresh."""
        if cell.cell_id in self._measured[cell.run_id]:
            return True
        return not self.fresh and cell.cell_id in self.store.cells.ids(cell.run_id)

    def known_rows(self, run_id: str) -> list[NewRow]:
        """Return the rows of the known cells of an evaluation. See `is_known`."""
        rows = self.store.cells.read(run_id, self._measured[run_id] if self.fresh else None)
        return list(rows.to_pylist())


def _evaluation_rows(results: Iterable[Result], cells: Sequence[TableRow]) -> Iterator[NewRow]:
    """Yield a row of ``evaluations`` for each metric of results, without the columns of the evaluation.

    Args:
        cells: rows of ``cells`` that the results were combined from.
    """
    seconds: defaultdict[tuple[InterventionKey, int | None], float] = defaultdict(float)
    for cell in cells:
        seconds[InterventionKey.of_row(cell), cell["layer"]] += cell["seconds"] or 0.0
    for result in results:
        for metric, value, stderr in result.metrics():
            yield {
                **result.intervention.row(),
                "layer": result.layer,
                "num_samples": len(result.samples),
                "metric": metric,
                "value": value,
                "stderr": stderr,
                "seconds": seconds[result.intervention, result.layer],
            }


def failure(failed: Sequence[FailedCell]) -> AvssError:
    """Return one error for all cells that failed: the first mistake, or else the first failure."""
    mistakes = [(cell, error) for cell, error in failed if not isinstance(error, RunFailed)]
    cell, error = (mistakes or failed)[0]
    subject = f"{cell.task} of {cell.checkpoint.name}"
    removed = cell.intervention.removed
    if removed:
        layers = "layers " if whole_layers(removed) else ""
        subject += f" without {layers}{describe_removed(removed)}"
    message = f"{subject}: {error.message}"
    if len(failed) > 1:
        message += f" {len(failed) - 1} more failed."
    return type(error)(message, error.hint)


def checkpoint_of_run(run: TableRow, *, trust_remote_code: bool) -> Checkpoint:
    """Return the checkpoint that a run has scored.

    Args:
        run: a row of ``runs``.

    Raises:
        PlanError: the checkpoint has changed since it was scored.
    """
    revision = run["revision"] or ""
    checkpoint = resolve(checkpoint_name(run), trust_remote_code=trust_remote_code)
    if checkpoint.revision != revision:
        raise PlanError(
            f"{run['run_id']} is of {run['model']} at {revision[:12]}; it is at {checkpoint.revision[:12]} now.",
            "Score it again.",
        )
    return checkpoint


def results_under(results: Iterable[Result], key: InterventionKey = NO_INTERVENTION.key) -> list[Result]:
    """Return the results of a model under an intervention, without those of its single layers."""
    return [result for result in results if result.layer is None and result.intervention == key]


def identity(checkpoint: Checkpoint, run_id: str, family: str) -> RunIdentity:
    """Return the columns of every row of an evaluation of a checkpoint."""
    return RunIdentity(run_id=run_id, model=checkpoint.name, revision=checkpoint.revision, family=family)
