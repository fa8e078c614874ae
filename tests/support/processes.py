"""Waiting for what other processes do, and finding Ray's among them."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for an event, however long a loaded machine takes for it; the test's own timeout is the only bound."""
    while not condition():
        time.sleep(0.01)


def ray_processes(name: str = "ray::Worker") -> list[psutil.Process]:
    """The processes of Ray clusters that this process, or a child of it, started; by default those of workers."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if p.is_running() and p.name().startswith(name)]
