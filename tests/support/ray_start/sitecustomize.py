"""On the path of ``ray start`` and of commands that it makes quicker: see `support.warm_workers`.

The workers of a node that is started so, also by ``python -c "from avss_dist ..."``, are forked from a warm process,
and so are ``avss`` and the scripts of benchmarks.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn


def hand_over(program: str, arguments: list[str]) -> NoReturn:
    """Run a program in a forked process in the place of this one."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import launch_worker

    os._exit(launch_worker.hand_over(program, arguments) & 255)


if "AVSS_TEST_WORKERS" in os.environ and len(sys.orig_argv) > 1:
    program = Path(sys.orig_argv[1]).name
    arguments = sys.orig_argv[2:]
    scripted = program == "-c" and arguments[0].startswith("from avss_dist")
    if program == "ray" or scripted:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from launch_worker import fork_workers

        fork_workers(jobs=not scripted)
    elif program == "avss" or (program, *arguments[:1]) == ("-m", "avss_dist"):
        hand_over("avss", arguments if program == "avss" else arguments[1:])
    elif Path(sys.orig_argv[1]).parent.name == "benchmarks":
        hand_over("python", sys.orig_argv[1:])
