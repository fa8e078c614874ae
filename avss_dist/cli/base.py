"""What every command shares: the app, errors as messages and exit codes, the console."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from avss_dist import __version__
from avss_dist.errors import AvssError, RunFailed, is_full, spell_fields, unwritable
from avss_dist.system.streams import complete_output, emit, prepare, say
from avss_dist.text import printable

T = TypeVar("T")

_UsageError: Any = typer.BadParameter.__base__

_spelling: ContextVar[Mapping[str, str] | None] = ContextVar("_spelling", default=None)  # of the command that runs
_at_end: ContextVar[list[Callable[[], None]] | None] = ContextVar("_at_end", default=None)  # of the command that runs


class Commands(TyperGroup):
    """The commands. One that returns a number ends with it as exit code; an error is a message and its exit code."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _printable_mistakes():
            return super().make_context(*args, **options)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        _spelling.set(spelling(command))
        return name, command, rest

    def invoke(self, ctx: Any) -> None:
        _at_end.set([])
        try:
            with complete_output(), _printable_mistakes():
                code = super().invoke(ctx)
        except AvssError as error:
            code = error.exit_code
            say(f"Error: {spelled(str(error))}")
        except OSError as error:
            if not is_full(error):
                raise
            code = RunFailed.exit_code
            say(f"Error: {unwritable(error.filename or 'A file', error, 'Free some space.')}")
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is short, and would end in a traceback
            code = 130
            resumes = "fresh" in (_spelling.get() or {})
            kept = " Everything measured so far is kept; run the same command again to finish."
            say(f"Stopped.{kept if resumes else ''}")
        for work in _at_end.get() or ():
            work()
        raise typer.Exit(code or 0)


@contextmanager
def _printable_mistakes() -> Iterator[None]:
    """What is wrong with a command line, which the framework prints, as a text that no terminal obeys."""
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


def at_end(work: Callable[[], None]) -> None:
    """Have something done when the running command has ended, however it did."""
    if (running := _at_end.get()) is not None:
        running.append(work)


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
    prepare()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    with complete_output():  # of --help and the like, which end before a command runs
        app()


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


def _version(wanted: bool) -> None:
    if wanted:
        emit(f"avss_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...
