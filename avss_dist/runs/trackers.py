"""Runs in a tracker of experiments: their settings, how far they are, and their scores by layer at the end."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from avss_dist.errors import ConfigError
from avss_dist.runs.reporter import LOG_SECONDS, Reporter
from avss_dist.settings import TRACKERS
from avss_dist.system.streams import complain, prints_to_stderr

if TYPE_CHECKING:
    from avss_dist.runs.run import PlannedRun, Run

PROJECT = "avss"
PROGRESS, LAYER = "tokens", "layer"  # what values are logged over
Values = Mapping[str, float]


class TrackedRun(Protocol):
    """A run, open in a tracker."""

    def log(self, axis: str, at: int, values: Values) -> None:
        """Values at a place of an axis: at so many tokens, or of a layer."""

    def end(self, failed: bool) -> None:
        """No more follows."""


class Tracker(Reporter):
    """Reports every run that is measured to a tracker; one that is done already is not reported again.

    A run has its id as its name there, and goes on in the same place after an interruption. A tracker that fails is
    left alone, and the run goes on without it.

    Args:
        tracker: one of ``settings.TRACKERS``, and a project of it: ``wandb`` or ``wandb:project``. Without a project
            it is what the tracker's own environment says, or ``avss``.

    Raises:
        ConfigError: it is not installed.
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

    def planned(self, name: str, planned: PlannedRun) -> None:
        """Open the run, with all that its fingerprint is of."""
        with self._forgiving(name), self._lock, prints_to_stderr():
            self._runs[name] = _OPEN[self._tracker](
                self._library, self._project, planned.run.run_id, described(planned)
            )

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """Its shards are about to be measured."""
        now = time.monotonic()
        self._progress[name] = done_tokens, num_tokens, done_tokens, now, now

    def advanced(self, name: str, num_tokens: int) -> None:
        """A shard is measured: logged, if the last one is long ago or this one is the last."""
        before, total, done, begun, said = self._progress[name]
        done, now = done + num_tokens, time.monotonic()
        if (tracked := self._runs.get(name)) and (done == total or now - said >= LOG_SECONDS):
            with self._forgiving(name):
                speed = (done - before) / max(now - begun, 1e-9)
                tracked.log(PROGRESS, done, {"progress/done": done / total, "progress/tokens_per_second": speed})
            said = now
        self._progress[name] = before, total, done, begun, said

    def finished(self, name: str, run: Run) -> None:
        """Log its scores by layer, and close it."""
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
        """End the runs that did not come to their end."""
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
            complain(f"{name}: {self._tracker} hears no more of this run: {error}")


def described(planned: PlannedRun) -> dict[str, Any]:
    """What a tracker shows of a run beside its values: names, places and settings."""
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
        found = self._client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self._client.create_experiment(experiment)
        before = self._client.search_runs([where], f"tags.mlflow.runName = '{run_id}'", max_results=1)
        made = before[0] if before else self._client.create_run(where, run_name=run_id)
        self._id = made.info.run_id
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
