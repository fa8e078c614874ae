"""What every command shares: the app, errors as messages and exit codes, the console."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from avss_dist import __version__
from avss_dist.errors import AvssError, spell_fields
from avss_dist.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

T = TypeVar("T")

_spelling: ContextVar[Mapping[str, str] | None] = ContextVar("_spelling", default=None)  # of the command that runs
_at_end: ContextVar[list[Callable[[], None]] | None] = ContextVar("_at_end", default=None)  # of the command that runs


class Commands(TyperGroup):
    """The commands. One that returns a number ends with it as exit code; an error is a message and its exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        _spelling.set(spelling(command))
        return name, command, rest

    def invoke(self, ctx: Any) -> None:
        _at_end.set([])
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except AvssError as error:
            code = error.exit_code
            say(f"Error: {spelled(str(error))}")
        except KeyboardInterrupt:
            code = 130
            resumes = "fresh" in (_spelling.get() or {})
            kept = " Everything measured so far is kept; run the same command again to finish."
            say(f"Stopped.{kept if resumes else ''}")
        except BrokenPipeError:
            _discard_output()
            code = 0
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT):
                raise
            _discard_output()
            code = 1
            say(f"Error: standard output cannot be written: {error.strerror}.")
        for work in _at_end.get() or ():
            work()
        raise typer.Exit(code or 0)


def at_end(work: Callable[[], None]) -> None:
    """Have something done when the running command has ended, however it did."""
    if (running := _at_end.get()) is not None:
        running.append(work)


def _discard_output() -> None:
    """Send what is still to be flushed nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def spelling(command: Any) -> Mapping[str, str]:
    """How a command spells the fields that it sets: ``{"thresholds": "--threshold", "ranks": "--ranks", ...}``.

    A command's parameters have the names of the fields; their options may have others.
    """
    return {p.name: max(p.opts, key=len) for p in getattr(command, "params", ())}


def spelled(text: str) -> str:
    """A text of the library with its fields as the running command spells them."""
    return spell_fields(text, _spelling.get() or {})


app = typer.Typer(
    cls=Commands,
    help="Which layers of a language model matter: activation variance and sparsity (AVSS) by layer, kept as Parquet.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script ``avss``."""
    _prepare_streams()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()


def _prepare_streams() -> None:
    """Have the standard streams, and print whatever a text holds: paths that are not UTF-8, characters they lack."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # it is closed; else the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "replace")


def say(message: str) -> None:
    """Print to standard error."""
    print(printable(message), file=sys.stderr)


def interruptible(work: Callable[[], T]) -> T:
    """The result of work that does not see Ctrl-C itself: it goes on in a thread, and the command ends at once."""
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(work)
        try:
            while not result.done():
                wait([result], timeout=0.2)
        except KeyboardInterrupt:
            say("Stopped.")
            os._exit(130)
        return result.result()


def console() -> Console:
    """Standard output; wide enough for a whole table where it is no terminal."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # to `Commands.invoke`

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    terminal = Output(highlight=False)
    return terminal if terminal.is_terminal else Output(highlight=False, width=132)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"avss_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...
