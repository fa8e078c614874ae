"""Rules that end a training, from its history alone, and a tracker that fails."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback

from avss_dist.distillation.curve import COMPLETE, DIVERGED, NO_IMPROVEMENT, best, ending, evaluations
from avss_dist.distillation.trainer import TrackerCallback


def history(*losses: float) -> list[dict[str, Any]]:
    """Evaluations with these losses, the first before training, ten steps apart."""
    return [{"eval_loss": loss, "step": 10 * number} for number, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ((1.0, 0.9, 0.8), None),
        ((1.0, 0.9, 0.8, 0.7, 0.6), COMPLETE),
        ((1.0, 0.8, 0.9, 0.85, 0.8), NO_IMPROVEMENT),
        ((1.0, 0.8, 0.9, 0.85), None),
        ((1.0, 1.2, 1.1, 1.0, 0.9), COMPLETE),
        ((1.0, 0.8, 2.1), DIVERGED),
        ((1.0, float("nan")), DIVERGED),
        ((), None),
    ],
)
def test_ending(losses: tuple[float, ...], reason: str | None) -> None:
    assert ending(history(*losses), steps=40) == reason


def test_a_loss_that_is_not_finite_is_divergence() -> None:
    steps = [{"loss": 0.9, "step": 1}, {"loss": float("inf"), "step": 2}]
    assert ending([*history(1.0), *steps], steps=40) == DIVERGED


def test_the_best_evaluation_is_a_trained_one() -> None:
    lowest = best(evaluations(history(0.5, 0.9, 0.8, 0.8)))
    assert lowest is not None and lowest.step == 20
    assert best(evaluations(history(0.5))) is None


def test_an_evaluation_has_the_mean_loss_of_the_steps_before_it() -> None:
    entries = [*history(1.0), {"loss": 0.8, "step": 1}, {"loss": 0.6, "step": 2}, {"eval_loss": 0.7, "step": 2}]
    entries += [{"loss": 0.5, "step": 3}, {"eval_loss": 0.6, "eval_kept/a": 0.9, "step": 3}]
    points = evaluations(entries)
    assert [point.train_loss for point in points] == [None, pytest.approx(0.7), 0.5]
    assert points[2].kept == {"a": 0.9}


# Trackers


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
