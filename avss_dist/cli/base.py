"""What every command shares: the app, errors as messages and exit codes, the console."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from avss_dist import __version__
from avss_dist.errors import AvssError, RunFailed, is_full, nearest, spell_fields, unwritable
from avss_dist.system.signals import arm, exit_code, stop_signal
from avss_dist.system.streams import USUAL, VERBOSE, complain, complete_output, emit, prepare, say, set_verbosity
from avss_dist.text import printable

T = TypeVar("T")

_UsageError: Any = typer.BadParameter.__base__

_spelling: ContextVar[Mapping[str, str] | None] = ContextVar("_spelling", default=None)  # of the command that runs
_at_end: ContextVar[list[Callable[[], None]] | None] = ContextVar("_at_end", default=None)  # of the command that runs

OLD_COMMANDS = {
    "experiment": "avss run JOB.yaml: a job file with a section experiment is one",
    "export": "avss show --format latex -o FILE",
    "logs": "avss jobs logs",
    "scores": "avss show --threshold 0.05rms, or any other threshold",
    "status": "avss jobs list",
    "stop": "avss jobs stop",
    "submit": "avss jobs submit",
}
"""Names that commands had, and what they are now."""
OLD_OPTIONS = {
    "--out": ("--warehouse", "--output"),
    "--to": ("--format",),
    "--anyway": ("--allow-mismatch",),
    "--attention": ("--attn-implementation",),
    "--layers": ("--layers-path",),
    "--experiment": (),
}
"""Names that options had, and what they may be now."""


class Group(TyperGroup):
    """Commands under a name. Errors name fields as the command that runs spells them; an old name says the new one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            wanted = args[0]
            new = OLD_COMMANDS.get(wanted) if ctx.parent is None else None
            hint = f"It is {new}." if new else nearest(wanted, self.commands)
            ctx.fail(f"There is no command '{wanted}'{' any more' if new else ''}. {hint}")
        name, command, rest = super().resolve_command(ctx, args)
        _spelling.set(spelling(command))
        _refuse_old_options(ctx, command, rest)
        return name, command, rest


def _refuse_old_options(ctx: Any, command: Any, args: list[str]) -> None:
    known = {name for parameter in command.params for name in parameter.opts}
    for arg in args[: args.index("--") if "--" in args else None]:
        old = arg.partition("=")[0]
        if old in OLD_OPTIONS and old not in known:
            new = " or ".join(name for name in OLD_OPTIONS[old] if name in known)
            ctx.fail(f"There is no option {old} any more. {f'Use {new}.' if new else 'Leave it out.'}")


class Commands(Group):
    """All commands. One that returns a number ends with it as exit code; an error is a message and its exit code."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _printable_mistakes():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> None:
        _at_end.set([])
        set_verbosity(USUAL)
        try:
            with complete_output(), _printable_mistakes():
                code = super().invoke(ctx)
        except AvssError as error:
            code = error.exit_code
            _complain(spelled(str(error)), error)
        except OSError as error:
            if not is_full(error):
                raise
            code = RunFailed.exit_code
            _complain(unwritable(error.filename or "A file", error, "Free some space."), error)
        except KeyboardInterrupt as stop:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # what is left is short, and would end in a traceback
            code = exit_code(stop)
            complain(_stopped(getattr(stop, "__notes__", [])))
        for work in _at_end.get() or ():
            work()
        raise typer.Exit(code or 0)


def _stopped(notes: Sequence[str]) -> str:
    """Return what a stopped command says.

    Args:
        notes: what is known of the results that are kept.
    """
    if "fresh" not in (_spelling.get() or {}):
        return "Stopped."
    kept = f"Stopped, {' '.join(notes)}" if notes else "Stopped. Everything measured so far is kept"
    return f"{kept}; run the same command again to finish."


def _complain(text: object, error: Exception) -> None:
    say("".join(traceback.format_exception(error)), least=VERBOSE)
    complain(f"Error: {text}")


@contextmanager
def _printable_mistakes() -> Iterator[None]:
    """What is wrong with a command line, which the framework prints, as a text that no terminal obeys."""
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        if "unexpected extra argument" in error.message and "warehouse" in (_spelling.get() or {}):
            error.message += ". The warehouse is an option: -w."
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


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=Commands,
    help="Which layers of a language model matter: activation variance and sparsity (AVSS) by layer, kept as Parquet.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)


jobs_app = typer.Typer(
    cls=Group, help="Jobs on a Ray cluster.", no_args_is_help=True, rich_markup_mode=None, context_settings=HELP
)


def interrupt_again(unraisable: Any) -> None:
    """Send Ctrl-C or SIGTERM again, a moment later, where nothing can be raised: in a library's ``__del__``."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    if stop_signal(unraisable.exc_type) == signal.SIGTERM:
        arm()
    again = threading.Timer(0.05, os.kill, (os.getpid(), stop_signal(unraisable.exc_type)))
    again.daemon = True
    again.start()


def main() -> None:
    """The console script ``avss``."""
    sys.unraisablehook = interrupt_again
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
        except KeyboardInterrupt as stop:
            say("Stopped.")
            os._exit(exit_code(stop))
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
