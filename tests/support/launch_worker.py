"""What a raylet starts in the place of Ray's ``setup_worker.py``: it asks `warm_workers` for the worker, and waits.

python launch_worker.py ARGUMENTS-OF-SETUP-WORKER
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence


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
    hand_over("ray worker", sys.argv[1:])
