"""A tracker that fails costs a training nothing."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback

from avss_dist.distillation.trainer import TrackerCallback


class FailingTracker(TrainerCallback):
    """Tracker that can be opened, and cannot log."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.heard.append("begin")

    def on_log(self, *_: Any, **__: Any) -> None:
        raise OSError("no network")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.heard.append("end")


def test_training_goes_on_without_a_tracker_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = FailingTracker()
    callback = TrackerCallback(tracker)
    for event in ("on_train_begin", "on_log", "on_log", "on_train_end"):
        getattr(callback, event)(None, None, None)
    assert tracker.heard == ["begin"], "nothing is passed on after a failure"
    assert capsys.readouterr().err.count("No further reports to the tracker, training goes on: no network") == 1
