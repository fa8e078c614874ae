"""What a raylet starts in the place of Ray's ``setup_worker.py``: it asks `warm_workers` for the worker, and waits.

python launch_worker.py ARGUMENTS-OF-SETUP-WORKER
python launch_worker.py agent SCRIPT-OF-AN-AGENT ARGUMENTS
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

ASKS_BY_PIPE = "RAY_enable_pipe_based_agent_to_parent_health_check"
"""With this variable, an agent sees by its standard input that its raylet lives, and not by its own parent."""


def fork_workers(set_attribute: Callable[[Any, str, Any], None] = setattr, *, jobs: bool = False) -> None:
    """Give the clusters that this process starts such workers and agents, and none of the processes that nothing asks.

    Args:
        jobs: whether jobs are submitted to them, which takes the dashboard.
    """
    from ray._private import ray_constants, services
    from ray._private.node import Node

    launcher = __file__
    program = services._build_python_executable_command_memory_profileable

    def command(component: str, *arguments: Any, **options: Any) -> list[str]:
        agents = (ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT)
        return [*program(component, *arguments, **options), *([launcher, "agent"] if component in agents else [])]

    set_attribute(ray_constants, "SETUP_WORKER_FILENAME", launcher)
    set_attribute(services, "_build_python_executable_command_memory_profileable", command)
    for start in ("start_monitor", "start_log_monitor", *(() if jobs else ("start_api_server",))):
        set_attribute(Node, start, lambda *_, **__: None)


def ask(
    program: str, arguments: list[str], environment: dict[str, str], files: Sequence[int] = (0, 1, 2)
) -> tuple[int, socket.socket]:
    """Have a process that is forked from the warm one run this program, here and with these first three files.

    It is killed when the socket is closed, or ended with the process that has it open.

    Returns:
        Its number, and what says with four bytes how it ended; see `returncode`.
    """
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["AVSS_TEST_WORKERS"])
    wish = {"program": program, "arguments": arguments, "environment": environment, "folder": os.getcwd()}
    asked = json.dumps(wish).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], list(files))
    server.sendall(asked)
    return int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big"), server


def returncode(server: socket.socket) -> int:
    """Wait for the program's end: its exit code, or minus the number of a signal."""
    return int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big", signed=True)


def hand_over(program: str, arguments: list[str]) -> int:
    """The exit code of a program that has this process's environment, files and the signals that it is sent."""
    process, server = ask(program, arguments, dict(os.environ))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(process, number))
    return returncode(server)


if __name__ == "__main__":
    if sys.argv[1] == "agent":
        sys.exit(hand_over("ray agent", sys.argv[2:]) & 255)
    hand_over("ray worker", sys.argv[1:])
