"""What every command shares: the app, errors as messages and exit codes, the console."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from avss_dist import __version__
from avss_dist.errors import AvssError, spell_fields

if TYPE_CHECKING:
    from rich.console import Console


_spelling: ContextVar[Mapping[str, str] | None] = ContextVar("_spelling", default=None)  # of the command that runs


class Commands(TyperGroup):
    """The commands. One that returns a number ends with it as exit code; an error is a message and its exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        _spelling.set(spelling(command))
        return name, command, rest

    def invoke(self, ctx: Any) -> None:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except AvssError as error:
            code = error.exit_code
            say(f"Error: {spelled(str(error))}")
        except KeyboardInterrupt:
            code = 130
            say("Stopped. Everything measured so far is kept; run the same command again to finish.")
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
            code = 0
        raise typer.Exit(code or 0)


def spelling(command: Any) -> Mapping[str, str]:
    """How a command spells the fields that it sets: ``{"thresholds": "--threshold", "ranks": "--ranks", ...}``.

    A command's parameters have the names of the fields; their options may have others.
    """
    options = [p for p in getattr(command, "params", ()) if p.param_type_name == "option"]
    return {p.name: max(p.opts, key=len) for p in options}


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
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()


def say(message: str) -> None:
    """Print to standard error."""
    print(message, file=sys.stderr)


def console() -> Console:
    """Standard output; wide enough for a whole table where it is no terminal."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # to `Commands.invoke`

    terminal = Piped(highlight=False)
    return terminal if terminal.is_terminal else Piped(highlight=False, width=132)


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
