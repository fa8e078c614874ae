"""On the path of ``ray start`` and of commands that it makes quicker: see `support.warm_workers`.

The workers of a node that is started so, also by ``python -c "from avss_dist ..."``, are forked from a warm process,
and so is ``avss``.
"""

import os
import sys
from pathlib import Path

if "AVSS_TEST_WORKERS" in os.environ:
    program = Path(sys.orig_argv[1]).name
    arguments = sys.orig_argv[2:]
    scripted = program == "-c" and arguments[0].startswith("from avss_dist")
    if program == "ray" or scripted:
        from ray._private import ray_constants
        from ray._private.node import Node

        ray_constants.SETUP_WORKER_FILENAME = str(Path(__file__).parents[1] / "launch_worker.py")
        for start in ("start_monitor", "start_log_monitor", *(["start_api_server"] if scripted else [])):
            setattr(Node, start, lambda *_, **__: None)
    elif program == "avss" or (program, *arguments[:1]) == ("-m", "avss_dist"):
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from launch_worker import hand_over

        os._exit(hand_over("avss", arguments if program == "avss" else arguments[1:]) & 255)
