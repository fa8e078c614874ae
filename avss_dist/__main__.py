"""The command line: ``avss``, or ``python -m avss_dist``."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    try:
        from avss_dist.cli import main as run

        run()
    except KeyboardInterrupt:  # while commands are imported; what comes later is theirs
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
