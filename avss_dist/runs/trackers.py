"""Reports of runs to experiment trackers: settings, progress, and scores by layer at the end."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import TRACKERS
from avss_dist.runs.events import LOG_SECONDS, RunEnded, RunPlanned, RunStarted, ShardMeasured
from avss_dist.system.streams import complain, prints_to_stderr

if TYPE_CHECKING:
    from avss_dist.runs.run import PlannedRun, Run

PROJECT = "avss"
PROGRESS, LAYER = "tokens", "layer"  # axes that values are logged over
Values = Mapping[str, float]


class TrackedRun(Protocol):
    """An open run in a tracker."""

    def log(self, axis: str, at: int, values: Values) -> None:
        """Log values at a number of tokens, or at a layer."""

    def end(self, failed: bool) -> None:
        """Close the run."""


class Tracker:
    """Callback that reports measured runs to a tracker. Runs that are done already are not reported again.

    A run is named by its id in the tracker, and resumes there after an interruption. If the tracker fails, the run
    continues without it.

    Args:
        tracker: one of ``settings.TRACKERS``, with or without a project: ``wandb`` or ``wandb:project``. The default
            project comes from the tracker's environment variable, or is ``avss``.

    Raises:
        ConfigError: the tracker is not installed.
    """

    def __init__(self, tracker: str) -> None:
        self._tracker, _, self._project = tracker.partition(":")
        try:
            self._library = importlib.import_module(self._tracker)
        except ImportError as error:
            raise ConfigError(
                f"`tracker` {self._tracker} cannot be loaded: {error}.",
                f"pip install {self._tracker}, or in a clone of avss_dist: pip install -e '.[{self._tracker}]'.",
            ) from None
        self._runs: dict[str, TrackedRun] = {}
        self._progress: dict[str, tuple[int, int, int, float, float]] = {}
        self._lock = threading.Lock()  # trackers open one run at a time

    def __call__(self, event: object) -> None:
        """Report an event."""
        match event:
            case RunPlanned(name, planned):
                self._open(name, planned)
            case RunStarted(name, num_tokens, done_tokens):
                now = time.monotonic()
                self._progress[name] = done_tokens, num_tokens, done_tokens, now, now
            case ShardMeasured(name, num_tokens):
                self._advance(name, num_tokens)
            case RunEnded(name, run):
                self._end(name, run)

    def _open(self, name: str, planned: PlannedRun) -> None:
        """Open the run in the tracker, with its settings."""
        with self._forgiving(name), self._lock, prints_to_stderr():
            self._runs[name] = _OPEN[self._tracker](
                self._library, self._project, planned.run.run_id, run_config(planned)
            )

    def _advance(self, name: str, num_tokens: int) -> None:
        """Log the progress, at most every `LOG_SECONDS` and at the end."""
        before, total, done, begun, logged_at = self._progress[name]
        done, now = done + num_tokens, time.monotonic()
        if (tracked := self._runs.get(name)) and (done == total or now - logged_at >= LOG_SECONDS):
            with self._forgiving(name):
                speed = (done - before) / max(now - begun, 1e-9)
                tracked.log(PROGRESS, done, {"progress/done": done / total, "progress/tokens_per_second": speed})
            logged_at = now
        self._progress[name] = before, total, done, begun, logged_at

    def _end(self, name: str, run: Run) -> None:
        """Log the scores by layer, and close the run."""
        if tracked := self._runs.get(name):
            with self._forgiving(name), prints_to_stderr():
                for values in run.table().to_pylist() if run.status == "done" else ():
                    layer = values.pop("layer")
                    tracked.log(
                        LAYER, layer, {f"layers/{key}": value for key, value in values.items() if value is not None}
                    )
                tracked.end(run.status != "done")
            self._runs.pop(name, None)

    def close(self) -> None:
        """Close the runs that did not finish."""
        for name, tracked in list(self._runs.items()):
            with self._forgiving(name), prints_to_stderr():
                tracked.end(True)
        self._runs.clear()

    @contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a library, a server or a network: nothing of the measurement
            self._runs.pop(name, None)
            complain(f"{name}: no further reports of this run to {self._tracker}: {error}")


def run_config(planned: PlannedRun) -> dict[str, Any]:
    """Return the configuration of a run for a tracker: names, places and settings."""
    spec = planned.replica_spec
    return {
        "run_id": planned.run.run_id,
        "warehouse": str(planned.run.warehouse),
        "model": str(spec.checkpoint.name),
        "revision": spec.checkpoint.revision,
        "corpus": str(planned.corpus.source),
        "num_tokens": planned.corpus.num_tokens,
        "partition": spec.placement.partition,
        "replicas": str(planned.replicas),
        **spec.settings.as_dict(),
    }


class _Trackio:
    def __init__(self, trackio: Any, project: str, run_id: str, config: Mapping[str, Any]) -> None:
        self._run = trackio.init(
            project=project or os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=run_id,
            config=dict(config),
            resume="allow",
            embed=False,
        )

    def log(self, axis: str, at: int, values: Values) -> None:
        self._run.log({axis: at, **values}, step=at)

    def end(self, failed: bool) -> None:
        self._run.finish()


class _Wandb:
    def __init__(self, wandb: Any, project: str, run_id: str, config: Mapping[str, Any]) -> None:
        self._run = wandb.init(
            project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run_id,
            name=run_id,
            config=dict(config),
            resume="allow",
            reinit="create_new",
        )
        self._run.define_metric("progress/*", step_metric=PROGRESS)
        self._run.define_metric("layers/*", step_metric=LAYER)

    def log(self, axis: str, at: int, values: Values) -> None:
        self._run.log({axis: at, **values})

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, mlflow: Any, project: str, run_id: str, config: Mapping[str, Any]) -> None:
        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        experiment = project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        existing = self._client.get_experiment_by_name(experiment)
        experiment_id = existing.experiment_id if existing else self._client.create_experiment(experiment)
        runs = self._client.search_runs([experiment_id], f"tags.mlflow.runName = '{run_id}'", max_results=1)
        run = runs[0] if runs else self._client.create_run(experiment_id, run_name=run_id)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        for key, value in config.items():
            self._client.set_tag(self._id, key, str(value))

    def log(self, axis: str, at: int, values: Values) -> None:
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        self._client.log_batch(self._id, metrics=[metric(key, float(value), now, at) for key, value in values.items()])

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


_OPEN: dict[str, Any] = dict(zip(TRACKERS, (_Trackio, _Wandb, _Mlflow), strict=True))
