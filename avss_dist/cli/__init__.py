"""The command line: parse, call, print.

Exit codes: 0 done, 1 a run failed, 2 a mistake, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
"""

from avss_dist.cli.program import app, main

__all__ = ["app", "main"]
