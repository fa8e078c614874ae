"""Waiting for what other processes do, and finding Ray's among them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping

import psutil

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


def threads_of_drivers() -> list[str]:
    """Return the names of the threads of drivers that are alive."""
    names = ("planner", "committer", "executor")
    return [thread.name for thread in threading.enumerate() if thread.name in names]
