"""What a raylet starts in the place of Ray's ``setup_worker.py``: it asks `warm_workers` for the worker, and waits.

python launch_worker.py ARGUMENTS-OF-SETUP-WORKER
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["AVSS_TEST_WORKERS"])
        asked = json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(asked)
        server.recv(1)  # until the worker has ended


if __name__ == "__main__":
    main()
