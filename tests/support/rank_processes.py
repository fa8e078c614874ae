"""Ranks without Ray: processes in one torch.distributed group, over gloo, which `warm_workers` forks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from avss_dist.partition.group import join
from support.launch_worker import ask, returncode

SECONDS = 180.0
TURNS = 10  # functions that the same processes run: each model leaves threads of gloo behind, which use the cores


class Gang:
    """Processes in one torch.distributed group, which run functions of a test together, while `warm_server` is on.

    Attributes:
        stdout: the files of what they print, by rank.
    """

    def __init__(self, world: int, folder: Path) -> None:
        self.stdout = [folder / f"stdout-{world}-{rank}" for rank in range(world)]
        self._processes: list[tuple[int, socket.socket]] = []
        self._start()

    def _start(self) -> None:
        """Start processes in the place of those that were there."""
        self.stop()
        self._turns = 0
        self._pipes: list[Connection] = []
        self._processes = []
        world = str(len(self.stdout))
        shared = [bytes(multiprocessing.current_process().authkey).hex(), world, str(free_port())]
        for rank, path in enumerate(self.stdout):
            ours, theirs = multiprocessing.Pipe()
            arguments = [json.dumps(sys.path), str(rank), *shared]
            with path.open("ab") as stdout, theirs:
                files = theirs.fileno(), stdout.fileno(), 2
                self._processes.append(ask("rank", arguments, dict(os.environ), files))
            self._pipes.append(ours)

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned on each rank, or the exception that it raised there."""
        if self._turns == TURNS:
            self._start()
        self._turns += 1
        for pipe in self._pipes:
            pipe.send((function, args))
        deadline = time.monotonic() + SECONDS
        answers: dict[Any, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = [pipe for pipe in self._pipes if pipe not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                pytest.fail(f"{len(waiting)} ranks gave no answer in {SECONDS:.0f} seconds")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                answers[pipe] = pipe.recv()
        return [answers[pipe] for pipe in self._pipes]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned on each rank."""
        outcomes = self.outcomes(function, *args)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def lose(self, rank: int) -> None:
        """Kill the process of a rank; the other ranks go on."""
        process, server = self._processes[rank]
        os.kill(process, signal.SIGKILL)
        returncode(server)
        del self._pipes[rank]

    def freeze(self, rank: int) -> None:
        """Stop the process of a rank where it is; the other ranks go on."""
        os.kill(self._processes[rank][0], signal.SIGSTOP)
        del self._pipes[rank]

    def stop(self) -> None:
        """Kill all processes."""
        for _, server in self._processes:
            server.close()


def free_port() -> int:
    """Return a port at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def member(rank: str, key: str, world: str, port: str) -> None:
    """Run functions that come through standard input, until it ends."""
    multiprocessing.current_process().authkey = bytes.fromhex(key)  # tensors are sent through shared memory
    pipe = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    torch.set_num_threads(1)
    join(int(rank), int(world), "127.0.0.1", int(port), device=torch.device("cpu"), timeout_seconds=SECONDS)
    with suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                answer = function(*args)
            except Exception as error:
                answer = error
            pipe.send(answer)
