"""What a raylet starts in the place of Ray's ``setup_worker.py``: it asks `warm_workers` for the worker, and waits.

python launch_worker.py ARGUMENTS-OF-SETUP-WORKER
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def hand_over(program: str, arguments: list[str]) -> int:
    """Have a process that is forked from the warm one run this program; the exit code.

    It has this process's environment, folder and first three files, and the signals that this process is sent.
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["AVSS_TEST_WORKERS"])
        wish = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        asked = json.dumps({"program": program, **wish}).encode()
        socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(asked)
        process = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(process, number))
        return int.from_bytes(server.recv(1), "big")


if __name__ == "__main__":
    hand_over("ray worker", sys.argv[1:])
