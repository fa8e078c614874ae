"""Output to the standard streams, and progress bars.

The rest of this package returns texts. `emit` and `console` write to standard output, `say` and `complain` to standard
error. `set_verbosity` selects how many of the messages that are neither results nor errors are printed.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import logging
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, TextIO, TypeVar

from avss_dist.core.process import bound
from avss_dist.core.text import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

_UNWRITABLE = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.EBADF)
# Verbosities
QUIET = 0
USUAL = 1
VERBOSE = 2
_verbosity = USUAL  # of the process, as threads report as well
WIDTH = 132  # of tables if standard output is not a terminal: wide enough for every table


def prepare() -> None:
    """Prepare the standard streams to print any text, such as paths that are not UTF-8.

    A closed standard output stays unwritable, and no file that is opened later takes its place.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            errors = "surrogateescape" if is_utf8 else "replace"
            stream.reconfigure(errors=errors)


@contextmanager
def complete_output() -> Iterator[None]:
    """Flush standard output at the end of the block, also if the block ends by an exit with code 0.

    Raises:
        SystemExit: it cannot be written: code 1 after a message, or code 0 if the reader has closed the pipe.
    """
    output = _duplicate(sys.stdout)
    try:
        try:
            yield
        except SystemExit as end:
            if not end.code:
                sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        # The framework that prints help turns a broken pipe into an exit of its own.
        is_broken_pipe = isinstance(end, BrokenPipeError) or isinstance(end.__context__, BrokenPipeError)
        # A connection to a server breaks with the same error.
        if not is_broken_pipe or _has_reader(output):
            raise
        raise SystemExit(0) from None
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITABLE:
            raise
        reason = "it is closed" if error.errno == errno.EBADF else error.strerror
        complain(f"Error: standard output cannot be written: {reason}.")
        raise SystemExit(1) from None
    finally:
        if output is not None:
            os.close(output)
        _discard_unwritable(sys.stdout)
        _discard_unwritable(sys.stderr)


def _duplicate(stream: TextIO) -> int | None:
    """Return another descriptor of what a stream writes to; None if it has none.

    The framework that prints help replaces the stream's own descriptor once its pipe is closed.
    """
    try:
        return os.dup(stream.fileno())
    except (OSError, ValueError):
        return None


def _has_reader(descriptor: int | None) -> bool:
    """Whether what is written to a descriptor still arrives: false of a pipe whose other end is closed."""
    if descriptor is None:
        return True
    poll = select.poll()
    poll.register(descriptor, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _discard_unwritable(stream: TextIO) -> None:
    """Discard the output of a stream if it cannot be written. Python would try again, and exit with code 120."""
    with suppress(OSError, ValueError):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def emit(text: object, *, end: str = "\n", flush: bool = False) -> None:
    """Print to standard output."""
    print(printable(str(text)), end=end, flush=flush)


def emit_json(value: object, *, indent: int | None = None) -> None:
    """Print a value as JSON. Characters that are not ASCII, and control characters, are escaped."""
    emit(json.dumps(value, default=str, indent=indent).replace("\x7f", "\\u007f"))


def binary_output() -> IO[bytes]:
    """Return standard output as a stream of bytes."""
    return sys.stdout.buffer


def set_verbosity(level: int) -> None:
    """Set the verbosity: ``QUIET``, ``USUAL`` or ``VERBOSE``, which also shows what libraries log."""
    global _verbosity
    _verbosity = level
    if level == VERBOSE:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)


def say(message: str, file: TextIO | None = None, *, least: int = USUAL) -> None:
    """Print a status message to standard error, or to a file. A message that cannot be written is lost.

    Args:
        least: lowest verbosity at which the message is printed.
    """
    if _verbosity >= least:
        complain(message, file)


def complain(message: str, file: TextIO | None = None) -> None:
    """Print an error, as `say` does, at any verbosity."""
    with suppress(OSError):
        print(printable(message), file=file or sys.stderr, flush=True)


def can_ask() -> bool:
    """Whether somebody can answer a question: standard input is a terminal."""
    return sys.stdin.isatty()


def ask(question: str) -> bool:
    """Ask a question on standard error, and return whether the answer is yes. No answer is a no."""
    print(printable(f"{question} [y/N] "), end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def console(*, stderr: bool = False) -> Console:
    """Return a console for tables and bars on standard output or standard error."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # to `complete_output`

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield segment._replace(text=printable(segment.text))

    quiet = stderr and _verbosity == QUIET
    terminal = Output(highlight=False, stderr=stderr, quiet=quiet)
    if terminal.is_terminal:
        return terminal
    width = WIDTH
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit():
        width = int(columns)
    return Output(highlight=False, stderr=stderr, width=width, quiet=quiet)


Item = TypeVar("Item")
ProgressCallback = Callable[[str, float], None]
"""Receives the current activity, and the share of it that is done (0 to 1)."""
_CALLBACK: ContextVar[ProgressCallback | None] = ContextVar("progress_callback", default=None)


def progress_to(callback: ProgressCallback) -> AbstractContextManager[None]:
    """Make `tracked` call a callback inside the block instead of showing a bar."""
    return bound(_CALLBACK, callback)


@contextmanager
def portion(start: float, size: float) -> Iterator[None]:
    """Count the progress reported inside the block as that of a part of a longer activity.

    Args:
        start: share of the longer activity that was done before.
        size: share of it that the part is.
    """
    callback = _CALLBACK.get()
    if callback is None:
        yield
        return
    with progress_to(lambda what, share: callback(what, start + size * share)):
        yield


def tracked(items: Sequence[Item], what: str, *, bar: bool = True) -> Iterable[Item]:
    """Return the items, and show or report the progress through them.

    Args:
        bar: show a bar on standard error if no callback receives the progress, and if standard error is a terminal. The
            bar disappears at the end.
    """
    if bar and items and _CALLBACK.get() is None and sys.stderr.isatty():
        from rich.progress import track

        return track(items, what, console=console(stderr=True), transient=True)
    return _reported(items, what)


def _reported(items: Sequence[Item], what: str) -> Iterator[Item]:
    for number, item in enumerate(items):
        report(what, number / len(items))
        yield item


def report(what: str, share: float) -> None:
    """Pass the share of an activity that is done to the callback of `progress_to`, if there is one."""
    callback = _CALLBACK.get()
    if callback is not None:
        callback(what, share)
