"""What a process says where it ends without a word: killed, or by a library that ends it from its own code."""

from __future__ import annotations

import subprocess


class LastWords:
    """Has a text printed on standard error should this process end before `close`.

    A shell waits for a line from this process; where none comes, nobody is left to write one.
    """

    def __init__(self, text: str) -> None:
        command = ["/bin/sh", "-c", 'read -r _ || printf "%s\\n" "$0" >&2', text]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """Nothing is to be said."""
        try:
            self._shell.communicate(b"\n")
        finally:  # Ctrl-C comes twice
            self._shell.kill()
