"""``avss`` beside a test, which stops it or kills it."""

from __future__ import annotations

import os
import signal
from select import select
from tempfile import TemporaryFile

from support.launch_worker import ask, returncode


class Command:
    """``avss`` with these arguments, while `warm_workers` is on; killed when it is forgotten.

    Attributes:
        pid: the number of the process.
        environment: what it has beside this process's.
        program: "python" runs a script with arguments in the place of ``avss``.
    """

    def __init__(self, *arguments: object, program: str = "avss", **environment: str) -> None:
        self._printed = TemporaryFile("w+")  # noqa: SIM115
        self._said = TemporaryFile("w+")  # noqa: SIM115
        given = {**os.environ, **environment}
        with open(os.devnull) as nothing:
            files = [nothing.fileno(), self._printed.fileno(), self._said.fileno()]
            self.pid, self._socket = ask(program, list(map(str, arguments)), given, files)

    def running(self) -> bool:
        return not select([self._socket], [], [], 0)[0]

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str, str]:
        """Its exit code, or minus the number of a signal, what it printed, and what it said on standard error."""
        code = returncode(self._socket)
        self._socket.close()
        for stream in (self._printed, self._said):
            stream.seek(0)
        return code, self._printed.read(), self._said.read()

    def kill(self) -> None:
        """By SIGKILL, before it has ended."""
        if self.running():
            self.send(signal.SIGKILL)
        code, _, said = self.wait()
        assert code == -signal.SIGKILL, said
