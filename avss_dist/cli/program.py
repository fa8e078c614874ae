"""Parts that all commands share: the app, and errors as messages and exit codes."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from avss_dist import __version__
from avss_dist.cli.declarations import CHANGE, COMMANDS, ELSEWHERE, JOBS, MEASURE, READ
from avss_dist.cli.removed import REMOVED
from avss_dist.core.errors import AvssError, is_full, nearest, require_known, spell_fields, unwritable
from avss_dist.core.extras import not_installed
from avss_dist.core.process import UMASK, arm, exit_code, stop_signal
from avss_dist.core.streams import USUAL, VERBOSE, complain, complete_output, emit, prepare, say, set_verbosity
from avss_dist.core.text import printable

T = TypeVar("T")

_UsageError: Any = typer.BadParameter.__base__

_spelling: ContextVar[Mapping[str, str] | None] = ContextVar("_spelling", default=None)  # of the command that runs
_running: ContextVar[typer.Context] = ContextVar("_running")  # context of the command line


class Group(TyperGroup):
    """Group of commands, which are imported when they are used. The help lists summaries and imports nothing.

    Errors spell fields as options of the running command, and suggest the nearest name.
    """

    def __init__(self, *, prefix: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.prefix = prefix  # words before the names of its commands
        for declared in COMMANDS.values():
            words, _, last = declared.name.rpartition(" ")
            if words == self.prefix:
                self.commands[last] = TyperCommand(last, rich_help_panel=declared.panel.title)

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return a command for a list of commands, with its summary."""
        command = super().get_command(ctx, name)
        declared = COMMANDS.get(self._full_name(name))
        if command is not None and declared is not None:
            command.help = declared.summary
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            advice = nearest(args[0], self.commands)
            if args[0] in REMOVED:
                advice = f"It was removed: {REMOVED[args[0]]}"
            ctx.fail(f"There is no command '{args[0]}'. {advice}")
        full_name = self._full_name(args[0]) if args else ""
        if full_name not in COMMANDS:
            return super().resolve_command(ctx, args)
        from avss_dist.cli.options import spelled_option

        command = load_command(full_name)
        _spelling.set({parameter.name: spelled_option(parameter) for parameter in command.params})
        return args[0], command, args[1:]

    def _full_name(self, name: str) -> str:
        return f"{self.prefix} {name}".strip()


class Commands(Group):
    """All commands. The number that a command returns is its exit code. An error is printed, and has its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands["jobs"] = Group(
            prefix="jobs",
            name="jobs",
            no_args_is_help=True,
            help=JOBS,
            rich_help_panel=ELSEWHERE.title,
            context_settings=HELP,
        )

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _printable_mistakes():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> None:
        _running.set(ctx)
        set_verbosity(USUAL)
        try:
            with complete_output(), _printable_mistakes():
                code = super().invoke(ctx)
        except (AvssError, ModuleNotFoundError, OSError) as error:
            mistake = _as_mistake(error)
            if mistake is None:
                raise
            code = mistake.exit_code
            say("".join(traceback.format_exception(error)), least=VERBOSE)
            complain(f"Error: {spelled(str(mistake))}")
        except KeyboardInterrupt as stop:
            # The remaining work is short, and would end in a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            code = exit_code()
            complain(_describe_stop(stop))
        raise typer.Exit(code or 0)


def _as_mistake(error: AvssError | ModuleNotFoundError | OSError) -> AvssError | None:
    """Return the error to show for an exception, or None if it is a mistake of this program."""
    if isinstance(error, AvssError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return not_installed(error, "The command")
    if is_full(error):
        return unwritable(error.filename or "A file", error, "Free some space.")
    return None


def _describe_stop(stop: KeyboardInterrupt) -> str:
    """Return a line about a stopped command, with the notes of the interrupt, which are about stored results."""
    notes = " ".join(getattr(stop, "__notes__", []))
    if notes:
        return f"Stopped, {notes}; run the same command again to finish."
    if "fresh" in (_spelling.get() or {}):
        return "Stopped. Everything measured so far is kept; run the same command again to finish."
    return "Stopped."


@contextmanager
def _printable_mistakes() -> Iterator[None]:
    """Make the framework's messages on invalid command lines printable, and add hints."""
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        if "unexpected extra argument" in error.message and "warehouse" in (_spelling.get() or {}):
            error.message += ". The warehouse is an option: -w."
        command = getattr(error.ctx, "command_path", "").partition(" ")[2]
        instead = _removed_option(command, getattr(error, "option_name", ""))
        if instead:
            error.message += f". It was removed: {instead}"
            error.possibilities = []
        raise


def _removed_option(command: str, option: str) -> str:
    """Return what to write instead of a removed option of a command, or an empty text.

    What is written for an option of every command must be an option of this one.
    """
    of_command = REMOVED.get(f"{command} {option}", "")
    if of_command:
        return of_command
    of_every_command = REMOVED.get(option, "")
    for spelling in (_spelling.get() or {}).values():
        if spelling in of_every_command:
            return of_every_command
    return ""


def at_end(work: Callable[[], None]) -> None:
    """Register work to be done when the running command has ended, with or without an error."""
    _running.get().call_on_close(work)


def spelled(text: str) -> str:
    """Return a text with its fields spelled as options of the running command."""
    return spell_fields(text, _spelling.get() or {})


HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
app = typer.Typer(
    cls=Commands,
    help="Which layers of a language model matter: activation variance and sparsity (AVSS) by layer, kept as Parquet.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)


@cache
def load_command(name: str) -> TyperCommand:
    """Return a command with its options. What it does is imported after its values were checked."""
    from avss_dist.cli.options import CommandWithSections, parameters  # pydantic with it, which --help does not need
    from avss_dist.core.validation import from_texts

    declared = COMMANDS[name]
    request_class = declared.load_request()

    def run(**values: Any) -> int | None:
        arguments = []
        if declared.formats:
            arguments.append(require_known("`format`", values.pop("format"), declared.formats))
        typed = {}
        for field, value in values.items():
            is_given = value is not None and value != []
            is_field = not field.startswith("_")
            if is_given and is_field:
                typed[field] = value
        request = from_texts(request_class, typed)
        if declared.panel in (MEASURE, CHANGE):
            from avss_dist.cli.inputs import require_inputs

            request = require_inputs(request)
        function = declared.load_function()
        return function(request, *arguments)

    options = parameters(request_class, declared.formats)
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(
        name,
        cls=CommandWithSections,
        help=declared.help,
        epilog=declared.epilog,
        context_settings=HELP,
    )(run)
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    return command


def interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C or SIGTERM again a moment later, if it came where nothing can be raised, as in ``__del__``."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    if stop_signal() == signal.SIGTERM:
        arm()
    again = threading.Timer(0.05, os.kill, (os.getpid(), stop_signal()))
    again.daemon = True
    again.start()


def main() -> None:
    """Run the console script ``avss``."""
    sys.unraisablehook = interrupt_again
    prepare()
    if umask := os.environ.get(UMASK):
        os.umask(int(umask, 8))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    first_word = sys.argv[1] if len(sys.argv) > 1 else ""
    if first_word in COMMANDS and COMMANDS[first_word].panel == READ:
        _hide_pandas_from_pyarrow()
    with complete_output():  # of --help and the like, which end before a command runs
        app()


def _hide_pandas_from_pyarrow() -> None:
    """Make pyarrow work without pandas, which it would import with its first array. That takes as long as a listing."""

    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)

    finder: Any = SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, finder)
    import pyarrow

    pyarrow.array([])  # pyarrow tries the import once
    sys.meta_path.remove(finder)


def interruptible(work: Callable[[], T]) -> T:
    """Return the result of work that ignores Ctrl-C. It runs in a thread, so that the command can end at once."""
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(work)
        try:
            while not result.done():
                wait([result], timeout=0.2)
        except KeyboardInterrupt:
            say("Stopped.")
            os._exit(exit_code())
        return result.result()


def _version(value: bool) -> None:
    if value:
        emit(f"avss_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...
