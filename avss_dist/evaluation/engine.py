"""Plan cells, measure those that are missing, keep each as it comes, and combine them into results."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from avss_dist.corpus.shards import CorpusPlan, tokenize_corpus
from avss_dist.errors import AvssError, ConfigError, CorpusError, RunFailed
from avss_dist.executors.base import Executor
from avss_dist.intervention import NO_INTERVENTION, Intervention, InterventionKey, describe_removed, whole_layers
from avss_dist.models.auto import require_head
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer, text_config
from avss_dist.models.pinning import pin
from avss_dist.names import LOSS
from avss_dist.partition.base import Placement, fingerprint_part
from avss_dist.partition.choose import place
from avss_dist.settings import MOST_LISTED, SCHEMA_VERSION, Execution, Settings, fingerprint, split_options
from avss_dist.system.versions import package_versions
from avss_dist.tasks.base import Measure, Result, Task, combine
from avss_dist.tasks.cells import Cell, CellOutcome, CellResult
from avss_dist.text import RedactedURI
from avss_dist.warehouse.patches import Patches
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store


@dataclass(frozen=True, eq=False, kw_only=True)
class PlannedTask:
    """A task of one checkpoint, ready to be measured under any intervention; ``settings`` are `pinned`."""

    checkpoint: Checkpoint
    settings: Settings
    task: Task
    placement: Placement

    @cached_property
    def _fingerprinted(self) -> Mapping[str, Any]:
        """All that tells the evaluation of the unchanged model apart."""
        return {
            "schema": SCHEMA_VERSION,
            "checkpoint": self.checkpoint.revision,
            "task": self.task.key,
            "settings": self.settings.numbers(statistics=False),
            **fingerprint_part(self.placement),
        }

    def run_id(self, intervention: Intervention = NO_INTERVENTION) -> str:
        """Return the id of the evaluation that results under an intervention belong to.

        Sparsity and residual scale make another evaluation; removals and a patch make other cells of the same one.
        """
        key = intervention.key
        changed = {"sparsity": key.sparsity, "factor": key.residual_scale}
        print_ = fingerprint(**self._fingerprinted, **{name: value for name, value in changed.items() if value})
        return f"{self.checkpoint.slug}-{print_[:10]}"

    def cells(self, interventions: Iterable[Intervention] = (NO_INTERVENTION,)) -> list[Cell]:
        """Return a cell for each part of the task and each intervention; each once."""
        parts = list(enumerate(self.task.parts))
        return [self.cell(part, measure, one) for one in dict.fromkeys(interventions) for part, measure in parts]

    def cell(self, part: int, measure: Measure, intervention: Intervention = NO_INTERVENTION) -> Cell:
        """Return the cell of one part of the task under an intervention."""
        return Cell(
            run_id=self.run_id(intervention),
            checkpoint=self.checkpoint,
            settings=self.settings,
            task=self.task.name,
            part=part,
            measure=measure,
            placement=self.placement,
            intervention=intervention,
        )


class CellReporter(Protocol):
    """Hears how an evaluation goes."""

    def started(self, cells: Sequence[Cell], done: int) -> None: ...
    def underway(self, cell: Cell, what: str, share: float) -> None: ...
    def advanced(self, cell: Cell) -> None: ...


class SilentCells:
    """Says nothing."""

    def started(self, cells: Sequence[Cell], done: int) -> None: ...
    def underway(self, cell: Cell, what: str, share: float) -> None: ...
    def advanced(self, cell: Cell) -> None: ...


def failure(failed: Sequence[tuple[Cell, AvssError]]) -> AvssError:
    """One error that tells of all cells that failed: the first mistake, else that they failed."""
    cell, error = next(((c, e) for c, e in failed if not isinstance(e, RunFailed)), failed[0])
    what = f"{cell.task} of {cell.checkpoint.name}"
    if removed := cell.intervention.removed:
        what += f" without {'layers ' if whole_layers(removed) else ''}{describe_removed(removed)}"
    others = f" {len(failed) - 1} more failed." if len(failed) > 1 else ""
    return type(error)(f"{what}: {error.message}{others}", error.hint)


def evaluation_options(options: dict[str, Any]) -> tuple[Settings, Execution]:
    """Keyword options of an evaluation as Settings and Execution.

    Raises:
        ConfigError: an option is unknown, has a wrong value, or has no effect on an evaluation.
    """
    settings, execution = split_options(options)
    given = {**settings.as_dict(), "tracker": execution.tracker}
    default = {**Settings().as_dict(), "tracker": None}
    problems = [
        ConfigError(f"`{name}` has no effect: it is for the scoring of layers alone.", "Leave it out.")
        for name in ("sites", "thresholds", "tracker")
        if given[name] != default[name]
    ]
    if problems:
        raise ConfigError.of(problems)
    return settings, execution


def require_intended(number: int, most: int, what: str, hint: str, *, allow_many: bool) -> None:
    """Refuse more work than ``most``, unless the user wants so much; nothing of that size has been made yet.

    Args:
        what: a sentence's begin, and its noun after the number: ``"{} passes would be made"``.
        hint: what makes it less.

    Raises:
        ConfigError: it is more, and ``allow_many`` is not set.
    """
    if number > most and not allow_many:
        raise ConfigError(f"{what.format(f'{number:,}')}.", f"{hint} More than {most:,} need `allow_many`.")


def require_listable(number: int, what: str, hint: str) -> None:
    """Refuse more pieces of work than can be listed, whether the user wants so many or not.

    Args:
        what: a plural noun.
        hint: what makes it fewer.

    Raises:
        ConfigError: it is more than ``settings.MOST_LISTED``.
    """
    if number > MOST_LISTED:
        raise ConfigError(f"{number:,} {what} are more than one command takes: {MOST_LISTED:,}.", hint)


def placed(checkpoint: Checkpoint, settings: Settings, execution: Execution, executor: Executor) -> Placement:
    """How the replicas of an evaluation are spread; ``settings`` are `pinned`.

    Raises:
        ConfigError: there is not what the partition needs.
    """
    placement = place(checkpoint, settings, execution, executor.devices, head=True)
    executor.replicas(placement)
    return placement


def pinned(settings: Settings, checkpoint: Checkpoint, device: str) -> Settings:
    """Settings with every ``auto`` decided; refuses rows that the model cannot read, and a model without a head."""
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    require_head(checkpoint.name, config)
    return pin(settings, checkpoint, config, device)


def plan_text(checkpoint: Checkpoint, corpus: str, settings: Settings, *, skip_sequences: int = 0) -> CorpusPlan:
    """The rows of a corpus after the first ``skip_sequences``, in the checkpoint's tokens.

    Raises:
        CorpusError: it cannot be read, is too short, or has nothing to predict.
    """
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    made = tokenize_corpus(corpus, tokenizer, settings, skip_sequences=skip_sequences)
    if max(int(shard.lengths.max()) for shard in made.shards) <= max(1, settings.skip_first_tokens):
        raise CorpusError(
            f"No row of {RedactedURI(corpus)} has a token that is predicted from others before it and counts.",
            "Make `sequence_length` at least 2, and larger than `skip_first_tokens`; or take longer documents.",
        )
    return made


def measure(
    cells: Sequence[Cell],
    store: Store,
    executor: Executor,
    reporter: CellReporter | None = None,
    *,
    fresh: bool = False,
    to_first_mistake: bool = False,
) -> list[tuple[Cell, AvssError]]:
    """Measure the cells that are not in the warehouse yet, and keep each as it comes; returns those that failed.

    Args:
        fresh: measure those too that are there.
        to_first_mistake: measure no more once a cell has failed for a mistake of the user's.

    Raises:
        AvssError: the workers or the warehouse failed; what was measured is kept.
    """
    reporter = reporter or SilentCells()
    wanted = {(cell.run_id, cell.cell_id): cell for cell in cells}
    done = set() if fresh else {(run, cell) for run in {run for run, _ in wanted} for cell in store.cell_ids(run)}
    missing = [cell for key, cell in wanted.items() if key not in done]
    reporter.started(list(wanted.values()), len(wanted) - len(missing))
    failed = []
    with closing(Rounds(store, executor, reporter)) as rounds:
        for cell, outcome in rounds.run(missing):
            if isinstance(outcome, AvssError):
                failed.append((cell, outcome))
                if to_first_mistake and not isinstance(outcome, RunFailed):
                    break
    return failed


class Rounds:
    """Cells that are measured round after round, where the next ones depend on what the last ones gave.

    Workers keep their models open in between. Each cell is kept as it comes.
    """

    def __init__(self, store: Store, executor: Executor, reporter: CellReporter) -> None:
        self._store, self._reporter = store, reporter
        self._asked: SimpleQueue[Sequence[Cell] | None] = SimpleQueue()
        self._outcomes = executor.run_cells(iter(self._asked.get, None), reporter.underway)

    def run(self, cells: Sequence[Cell]) -> Iterator[CellOutcome]:
        """Yield the result of every cell, in any order; all must be taken before the next round.

        Raises:
            AvssError: the workers or the warehouse failed; what was measured is kept.
        """
        if cells:
            self._asked.put(cells)
        for cell, outcome in islice(self._outcomes, len(cells)):
            if not isinstance(outcome, AvssError):
                self._keep(cell, outcome)
            self._reporter.advanced(cell)
            yield cell, outcome

    def _keep(self, cell: Cell, outcome: CellResult) -> None:
        kept = Patches(self._store.storage)
        patches = [None if row.patch is None else kept.write(row.patch) for row in outcome.rows]
        self._store.write_cell(
            _identity(cell, cell.run_id, outcome.family), cell.cell_id, _rows(cell, outcome, patches)
        )

    def close(self) -> None:
        """Let the workers go."""
        self._asked.put(None)
        self._outcomes.close()


def commit(planned: PlannedTask, store: Store, intervention: Intervention = NO_INTERVENTION) -> list[Result]:
    """Write the results of all cells of an evaluation to ``evaluations``; of a loss, its perplexity too.

    Args:
        intervention: one that belongs to the evaluation (`PlannedTask.run_id`).

    Returns:
        The results under every intervention that belongs to it.
    """
    run_id = planned.run_id(intervention)
    rows = store.cells(run_id).to_pylist()
    results = combine(rows, len(planned.task.parts))
    if results:
        seconds: defaultdict[tuple[InterventionKey, int | None], float] = defaultdict(float)
        for row in rows:
            seconds[InterventionKey.of_row(row), row["layer"]] += row["seconds"] or 0.0
        common = {
            "task": planned.task.name,
            "settings": json.dumps({**planned.settings.as_dict(), **planned.task.options}),
            "versions": package_versions(),
            "created_at": datetime.now(UTC),
        }
        store.write_evaluations(
            _identity(planned, run_id, rows[0]["family"]),
            [
                {**common, **row, "seconds": seconds[result.intervention, result.layer]}
                for result in results
                for row in _metric_rows(result)
            ],
        )
    return results


def commit_all(planned: PlannedTask, interventions: Iterable[Intervention], store: Store) -> list[Result]:
    """Write and return the results of every evaluation that interventions belong to; see `commit`."""
    evaluations = {planned.run_id(intervention): intervention for intervention in interventions}
    return [result for one in evaluations.values() for result in commit(planned, store, one)]


def metrics(result: Result) -> Iterator[tuple[str, float, float]]:
    """Name, value and standard error of a result; of a loss, of its perplexity too (by the delta method)."""
    yield result.metric, result.value, result.stderr
    if result.metric == LOSS:
        perplexity = float(np.exp(result.value))
        yield "perplexity", perplexity, perplexity * result.stderr


def _metric_rows(result: Result) -> Iterator[dict[str, Any]]:
    row = {**result.intervention.row(), "layer": result.layer, "num_samples": len(result.samples)}
    for metric, value, stderr in metrics(result):
        yield {**row, "metric": metric, "value": value, "stderr": stderr}


def _identity(work: Cell | PlannedTask, run_id: str, family: str) -> RunIdentity:
    checkpoint = work.checkpoint
    return RunIdentity(run_id=run_id, model=checkpoint.name, revision=checkpoint.revision, family=family)


def _rows(cell: Cell, measured: CellResult, patches: Sequence[str | None]) -> list[Mapping[str, Any]]:
    share, key = measured.seconds / max(1, len(measured.rows)), cell.intervention.key
    return [
        {
            **key._replace(removed=key.removed if row.removed is None else row.removed, patch=patch or key.patch).row(),
            "task": cell.task,
            "metric": row.metric,
            "layer": row.layer,
            "part": cell.part,
            "samples": row.samples.tolist(),
            "weights": row.weights.tolist(),
            "device": measured.device,
            "seconds": share,
            "created_at": datetime.now(UTC),
        }
        for row, patch in zip(measured.rows, patches, strict=True)
    ]
