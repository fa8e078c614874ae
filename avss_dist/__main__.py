"""The command line: ``avss``, or ``python -m avss_dist``."""

from __future__ import annotations

import gc
import sys

from avss_dist.core.process import exit_code, raise_on_sigterm

YOUNG_OBJECTS = 100_000  # before a collection; at Python's 700, collections are a quarter of the time that imports take


def main() -> None:
    """Run the console script."""
    gc.set_threshold(YOUNG_OBJECTS)
    raise_on_sigterm()
    try:
        from avss_dist.cli import main as run

        run()
    except KeyboardInterrupt:  # while commands are imported; later, commands handle it
        print("Stopped.", file=sys.stderr)
        sys.exit(exit_code())


if __name__ == "__main__":
    main()
