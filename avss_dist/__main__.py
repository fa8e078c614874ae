"""The command line: ``avss``, or ``python -m avss_dist``."""

from __future__ import annotations

import gc
import sys

YOUNG_OBJECTS = 10_000  # before a collection; at Python's 700, collections are a quarter of the time that imports take


def main() -> None:
    """The console script."""
    gc.set_threshold(YOUNG_OBJECTS)
    try:
        from avss_dist.cli import main as run

        run()
    except KeyboardInterrupt:  # while commands are imported; what comes later is theirs
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
