"""Ray workers and torch ranks that need not import torch and transformers, which costs more than most tests do.

A process for each process of tests has imported them. It forks a Ray worker when a raylet asks, and a rank when
`rank_processes` asks. A worker runs Ray's ``default_worker.py`` with the arguments, the environment and the files that
the raylet gave. Clusters that are started by other programs (`cluster/local.sh`, ``ray start``, the command line, fault
campaigns) have Ray's own workers, unless they are given `ray_start_environment`. Nodes with such workers lack the
processes of Ray that no test asks anything.

    python warm_workers.py SOCKET PROCESS        until that process ends
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

# What a worker and `avss` import, but ray: it reads its configuration from the environment as soon as it is imported.
MODULES = (
    "accelerate",
    "aiohttp",
    "avss_dist.cli",
    "avss_dist.measure.kernels.cpu",
    "avss_dist.measure.shard",
    "avss_dist.models.causal_lm",
    "avss_dist.partition.replica",
    "avss_dist.runs.scoring",
    "avss_dist.tasks.task",
    "avss_dist.warehouse.encoding",
    "deepspeed",
    "jsonschema",
    "pandas",
    "pyarrow.dataset",
    "requests",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
READY = b"ready\n"


def fork_workers(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Give the clusters that this process starts such workers, and none of the processes that no test asks anything."""
    from ray._private import ray_constants
    from ray._private.node import Node

    set_attribute(ray_constants, "SETUP_WORKER_FILENAME", str(Path(__file__).with_name("launch_worker.py")))
    for start in ("start_monitor", "start_log_monitor", "start_api_server"):  # see `sitecustomize`
        set_attribute(Node, start, lambda *_, **__: None)


@contextmanager
def warm_server(folder: Path) -> Iterator[None]:
    """Let this process ask a server of its own, whose socket is in a folder. It ends with this process."""
    path = folder / "workers"
    command = [sys.executable, __file__, str(path), str(os.getpid())]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout is not None
    with server.stdout as said:
        line = said.readline()
        while line != READY:  # libraries may print before
            assert line, "the server ended"
            line = said.readline()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVSS_TEST_WORKERS", str(path))
        yield


@contextmanager
def forking_workers() -> Iterator[None]:
    """Clusters that this process starts meanwhile have workers that `warm_server` forks."""
    with pytest.MonkeyPatch.context() as patch:
        fork_workers(patch.setattr)
        yield


@contextmanager
def own_workers() -> Iterator[None]:
    """Clusters that this process starts inside have Ray's own workers, which are children of their raylets."""
    from ray._private import ray_constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", "setup_worker.py")
        yield


def ray_start_environment() -> dict[str, str]:
    """What ``ray start`` must be given for a node with such workers, while `warm_server` is on.

    ``avss`` is forked so too where it has this environment, that of the node's own jobs included.
    """
    folder = Path(__file__).with_name("ray_start")
    return {
        "AVSS_TEST_WORKERS": os.environ["AVSS_TEST_WORKERS"],
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def serve(path: str, process: int) -> None:
    """Fork a process for each connection, until another process ends."""
    ended = os.pidfd_open(process)
    gc.disable()
    for module in MODULES:
        importlib.import_module(module)
    load_kernels()
    assert "ray" not in sys.modules
    gc.freeze()  # workers' collections leave alone what they share
    gc.enable()
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        os.write(1, READY)
        os.dup2(2, 1)  # who reads the former one may end first
        while True:
            key, _ = selector.select()[0]
            if key.fileobj == ended:
                return
            if key.fileobj is not listener:
                key.data()
                continue
            launcher, _ = listener.accept()
            with suppress(OSError):  # tests kill launchers, also before they have said what they want
                answer(selector, launcher)


def load_kernels() -> None:
    """Use the kernels of a CPU once, which compiles them or loads what was compiled."""
    import numpy as np
    import torch

    from avss_dist.core.thresholds import THRESHOLDS
    from avss_dist.measure.kernels.cpu import CpuKernels
    from avss_dist.measure.kernels.reference import Accumulator

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 2, 4, dtype=dtype)
        mask = torch.ones(1, 2, dtype=torch.bool)
        CpuKernels().add(Accumulator(x, np.array(THRESHOLDS), units=True, geometry=True), x, mask, x)


def answer(selector: selectors.BaseSelector, launcher: socket.socket) -> None:
    """Fork the process that a launcher asks for."""
    size, descriptors, _, _ = socket.recv_fds(launcher, 8, 3)
    asked = launcher.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    if not asked:
        return
    worker = os.fork()
    if worker == 0:
        try:
            become(descriptors, **json.loads(asked))
        except SystemExit as end:
            end_quickly(end.code)
        except BaseException:
            traceback.print_exc()
            end_quickly(1)
        end_quickly(0)
    for descriptor in descriptors:
        os.close(descriptor)
    watch(selector, worker, launcher)
    launcher.sendall(worker.to_bytes(8, "big"))


def watch(selector: selectors.BaseSelector, worker: int, launcher: socket.socket) -> None:
    """Have the worker and what the raylet started in its place end together, whoever of them is killed."""
    process = os.pidfd_open(worker)

    def launcher_ended() -> None:
        selector.unregister(launcher)
        signal.pidfd_send_signal(process, signal.SIGKILL)

    def worker_ended() -> None:
        _, status = os.waitpid(worker, 0)
        selector.unregister(process)
        os.close(process)
        if launcher in selector.get_map():
            selector.unregister(launcher)
            with suppress(OSError):
                launcher.send(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
                launcher.shutdown(socket.SHUT_RDWR)  # workers that were forked since have it open too
        launcher.close()

    selector.register(launcher, selectors.EVENT_READ, launcher_ended)
    selector.register(process, selectors.EVENT_READ, worker_ended)


def end_quickly(code: str | int | None) -> NoReturn:
    """As a program ends, but that it does not take apart all that was imported, which copies every page of it."""
    threading._shutdown()
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


def become(
    descriptors: list[int], *, program: str, arguments: list[str], environment: dict[str, str], folder: str
) -> None:
    """Run the program as if the launcher's parent had started this process."""
    os.setpgrp()  # the raylet ends the whole group of a worker
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if program == "avss":
        sys.argv = [program, *arguments]
        runpy.run_module("avss_dist", run_name="__main__", alter_sys=True)
    elif program == "rank":
        sys.path[:] = json.loads(arguments[0])
        importlib.import_module("support.rank_processes").member(*arguments[1:])
    elif program == "python":
        fork_workers()
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        become_ray_worker(arguments)


def become_ray_worker(arguments: list[str]) -> None:
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers.setup_worker import parser

    own, program = parser.parse_known_args(arguments)
    context = RuntimeEnvContext.deserialize(own.serialized_runtime_env_context or "{}")
    update_envs(context.env_vars)
    for folder in shlex.split(" ".join(context.command_prefix))[1::3]:  # cd FOLDER &&
        os.chdir(folder)
    sys.argv = program
    sys.path[0] = str(Path(program[0]).parent)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
