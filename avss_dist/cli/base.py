"""What every command shares: the app, errors as messages and exit codes, the console."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist import __version__
from avss_dist.errors import AvssError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Which layers of a language model matter: activation variance and sparsity (AVSS) by layer, kept as Parquet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script ``avss``."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()


def explained(command: Callable[..., int | None]) -> Callable[..., None]:
    """Turn errors into a message and an exit code; a command returns its exit code, None for 0."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
        except AvssError as error:
            code = error.exit_code
            say(f"Error: {error}")
        except KeyboardInterrupt:
            code = 130
            say("Stopped. Everything measured so far is kept; run the same command again to finish.")
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
            code = 0
        raise typer.Exit(code or 0)

    return run


def say(message: str) -> None:
    print(message, file=sys.stderr)


def console() -> Console:
    """Standard output; wide enough for a whole table where it is no terminal."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # to `explained`

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
