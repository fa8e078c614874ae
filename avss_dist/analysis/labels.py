"""Short names of runs, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from avss_dist.core.text import basename, printable
from avss_dist.warehouse.checks import settings_of

_TELLING = ("dtype", "corpus", "revision")  # what tells runs of one model apart, before settings


def run_labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return short names that differ: the model's, with as few details as tell runs of one model apart."""
    labels = [basename(run["model"] or run["run_id"]) for run in runs]
    for detail in _details(runs):
        labels = _distinct_labels(labels, detail)
    return [printable(label) for label in labels]


def _details(runs: Sequence[Mapping[str, Any]]) -> Iterator[list[str | None]]:
    """Yield one detail after the other, by run: dtype, corpus, revision, each setting, last the run's own number."""
    for name in _TELLING:
        yield [None if run[name] is None else basename(run.get(f"{name}_name") or run[name]) for run in runs]
    settings = [settings_of(run) for run in runs]
    for key in dict.fromkeys(key for one in settings for key in one if key not in _TELLING):
        yield [f"{key}={one[key]}" if one.get(key) else None for one in settings]
    yield [run["run_id"][-10:] for run in runs]


def _distinct_labels(labels: Sequence[str], detail: Sequence[str | None]) -> list[str]:
    """Return labels with the detail appended to equal labels that differ in it."""
    values: dict[str, set[str | None]] = {}
    for label, value in zip(labels, detail, strict=True):
        values.setdefault(label, set()).add(value)
    return [
        f"{label} · {value}" if value is not None and len(values[label]) > 1 else label
        for label, value in zip(labels, detail, strict=True)
    ]
