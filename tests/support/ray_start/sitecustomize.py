"""On the path of ``ray start``, the workers of its node are forked from a warm process: see `support.warm_workers`."""

import os
import sys
from pathlib import Path

if "AVSS_TEST_WORKERS" in os.environ and Path(sys.orig_argv[1]).name == "ray":
    from ray._private import ray_constants

    ray_constants.SETUP_WORKER_FILENAME = str(Path(__file__).parents[1] / "launch_worker.py")
