"""Waiting for what other processes do, and finding Ray's among them."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle

from avss_dist.executors.ray import gang, watch
from avss_dist.executors.ray.worker import Worker
from avss_dist.runs.events import RunEvent, ShardMeasured


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for an event, however long a loaded machine takes for it; the test's own timeout is the only bound.

    Asking takes a quarter of a core at most, which leaves the rest to the processes that are waited for.
    """
    while True:
        began = time.thread_time()
        if condition():
            return
        time.sleep(max(0.01, 3 * (time.thread_time() - began)))


def ray_processes(name: str = "ray::Worker") -> list[psutil.Process]:
    """The processes of Ray clusters that this process, or a child of it, started; by default those of workers."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if p.is_running() and p.name().startswith(name)]


class Harming:
    """Callback that sends signals to workers of the next run, each to another one: when so many shards have arrived."""

    def __init__(self, signals: Mapping[int, signal.Signals]) -> None:
        self.arrived = 0
        self.signals = signals
        self.victims: list[psutil.Process] = []
        self._earlier = ray_processes()  # those of the last run may be about to end

    def __call__(self, event: RunEvent) -> None:
        if not isinstance(event, ShardMeasured):
            return
        self.arrived += 1
        if self.arrived in self.signals:
            victim = next(p for p in ray_processes() if p not in self._earlier + self.victims)
            victim.send_signal(self.signals[self.arrived])
            self.victims.append(victim)


class SlowWorker(Worker):
    """As one does that must import torch first."""

    def __init__(self, *args: Any) -> None:
        time.sleep(2)
        super().__init__(*args)


class FreezesAtStart(threading.Thread):
    """Stops the processes of the next workers, so many, as soon as they have one: none has reported then.

    Until they are dead, no worker is given longer to start than to make progress.
    """

    def __init__(self, number: int, patch: pytest.MonkeyPatch) -> None:
        super().__init__(daemon=True)
        self._number, self._patch = number, patch
        self._before = set(ray._private.state.actors())
        self.victims: list[psutil.Process] = []
        patch.setattr(gang, "Worker", SlowWorker)
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
        self.start()

    def run(self) -> None:
        while len(self.victims) < self._number:
            time.sleep(0.01)
            for name, actor in ray._private.state.actors().items():
                if name not in self._before and actor["ActorClassName"].endswith("Worker") and actor["Pid"]:
                    self._before.add(name)
                    self.victims.append(psutil.Process(actor["Pid"]))
                    self.victims[-1].send_signal(signal.SIGSTOP)
                    self.were_starting = ray._private.state.actors(name)["State"] == "PENDING_CREATION"
                    if len(self.victims) == self._number:
                        break
        self._patch.setattr(watch, "START_SECONDS", 0.0)
        wait_until(lambda: not any(victim.is_running() for victim in self.victims))
        self._patch.undo()
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
