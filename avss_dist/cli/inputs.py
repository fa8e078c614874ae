"""Check of the models, texts, tasks and plans that a command names, before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from avss_dist.core.errors import AvssError, ConfigError
from avss_dist.core.request import Request
from avss_dist.core.streams import complain
from avss_dist.corpus.seen import SELF
from avss_dist.corpus.sources import require_files
from avss_dist.models.checkpoint.locate import locate, require_checkpoint
from avss_dist.pruning.repair.registry import split_weight
from avss_dist.read_requests import RunRequest
from avss_dist.requests import EstimateRequest, RunCommandRequest
from avss_dist.runs.job_file import read_job
from avss_dist.tasks.harness_files import is_task_file, require_task

RequestType = TypeVar("RequestType", bound=Request)

MODELS = ("model", "student", "teacher", "base")
TEXTS = ("corpus", "corpora", "repair_corpora", "watch")
PLANS = ("plan", "sparse")


def require_inputs(request: RequestType) -> RequestType:
    """Return a request whose models, texts, tasks, plans and warehouse are there. Its job file, if it has one, is read.

    What is on the hub or at a URI is looked for only if it is the one model of the request.

    Raises:
        AvssError: some of them do not exist. All are named.
    """
    if isinstance(request, RunCommandRequest):
        if request.job is None:
            return request
        job = read_job(request.job, watch=request.watches)
        lines = {spec.model: f"{job.path}:{spec.line}: " for spec in job.specs}
        _require_some(lines)
        return replace(request, job=job)
    problems = _Problems()
    weights = not (isinstance(request, EstimateRequest) or getattr(request, "allow_pickle", False))
    for model in _values(request, MODELS):
        problems.note(require_checkpoint, model, weights=weights)
    for text in _values(request, TEXTS):
        problems.note(_require_text, text)
    for task in _values(request, ("tasks",)):
        problems.note(require_task, task)
    for plan in _values(request, PLANS):
        problems.note(_require_plan, plan)
    if isinstance(request, RunRequest):
        problems.note(_require_warehouse, str(request.warehouse))
    for subject in _values(request, ("subjects",)):
        problems.note(_require_plan if is_task_file(subject) else require_checkpoint, subject)
    models = _values(request, ("models",))
    if len(models) == 1:
        problems.note(require_checkpoint, models[0], weights=weights)
    problems.raise_all()
    if len(models) > 1:
        _require_some(dict.fromkeys(models, ""))
    return request


class _Problems(list[AvssError]):
    """Errors of several checks."""

    def note(self, check: Callable[..., object], value: str, **options: object) -> None:
        """Run a check of a value, and keep its error."""
        try:
            check(value, **options)
        except AvssError as error:
            self.append(error)

    def raise_all(self) -> None:
        """Raise the one error as it is, or an error that names several."""
        if len(self) == 1:
            raise self[0]
        if self:
            raise ConfigError.combine([ConfigError(error.message, error.hint) for error in self])


def _values(request: Request, names: Sequence[str]) -> list[str]:
    """Return the texts and paths in fields of a request, of those that it has."""
    values: list[str] = []
    for name in names:
        value = getattr(request, name, None)
        if isinstance(value, str):
            values.append(value)
        elif isinstance(value, tuple):
            values += value
    return list(dict.fromkeys(values))


def _require_text(corpus: str) -> None:
    text = split_weight(corpus)[0]
    if text != SELF:
        require_files(text.full)


def _require_warehouse(root: str) -> None:
    if "://" not in root and not Path(root, "runs").is_dir():
        from avss_dist.warehouse.reader import Warehouse

        Warehouse(root).runs()  # says what is wrong


def _require_plan(path: str) -> None:
    from avss_dist.plans.plan import read_plan_file  # pyarrow with it

    read_plan_file(path)


def _require_some(models: dict[str, str]) -> None:
    """Refuse several models if none of them is there, and name those that are not, whose runs will fail, otherwise.

    Args:
        models: start of the message on a model, by the model.
    """
    problems = _Problems()
    for model, where in models.items():
        try:
            locate(model, weights=False)
        except AvssError as error:
            problems.append(ConfigError(f"{where}{error.message}", error.hint))
    if len(problems) == len(models):
        problems.raise_all()
    for problem in problems:
        complain(f"{problem.message} This run will fail, and the others go on.")
