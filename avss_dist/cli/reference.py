"""Reference page of options: by command, with Python keyword, key in a job file, and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from avss_dist.cli.base import app
from avss_dist.cli.options import SPELLING
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.text import escape_markdown

COMMON = ("--quiet", "--verbose")  # of every command
NOT_IN_JOBS = ("address", "fresh")  # options of the command line only


def functions() -> dict[str, Callable[..., Any]]:
    """Return the Python function of each command that has one, by command."""
    import avss_dist

    names = (
        *("score", "ablate", "evaluate", "shrink", "estimate", "compare", "findings"),
        *("plan", "sparsify", "quantize", "prune"),
    )
    return {name: getattr(avss_dist, name) for name in names} | {"run": avss_dist.run_job}


def commands() -> dict[str, Any]:
    """Return every command by the words that call it: ``score``, ``jobs submit``."""
    group: Any = typer.main.get_command(app)
    by_name: dict[str, Any] = {}
    for name in group.commands:
        command = group.get_command(None, name)
        inner = getattr(command, "commands", {})
        by_name |= {f"{name} {subname}": subcommand for subname, subcommand in inner.items()} or {name: command}
    return by_name


def option_of(parameter: Any) -> str:
    """Return the spelling of an option, or the name of an argument."""
    return str(max(parameter.opts, key=len))


def reference_markdown() -> str:
    """Return the page: the options of settings, which many commands share, then those of each command."""
    lines = ["### Settings, which commands share", "", *_settings(), ""]
    for name, command in commands().items():
        lines += [f"### avss {name}", "", escape_markdown(command.help), "", *_options_of(name, command), ""]
    return "\n".join(lines).rstrip()


def _settings() -> Iterator[str]:
    yield from _table("option", "Python keyword", "job-file key", "default", "what")
    classes: tuple[tuple[Any, str], ...] = ((Settings, "settings"), (Execution, "execution"))
    for cls, section in classes:
        fields: Mapping[str, Any] = cls.__pydantic_fields__
        for name, field in fields.items():
            option = SPELLING.get(name, f"--{name.replace('_', '-')}")
            default = getattr(cls(), name)
            key = "" if name in NOT_IN_JOBS else f"`{section}.{name}`"
            yield _row(f"`{option}`", f"`{name}`", key, _format_default(default), escape_markdown(field.description))


def _options_of(name: str, command: Any) -> Iterator[str]:
    """Yield a table of the parameters of a command that are not settings."""
    function = functions().get(name)
    keywords = inspect.signature(function).parameters if function else {}
    shared = command.callback.request.shared
    taken = [f"`{option_of(p)}`" for p in command.params if p.name in shared]
    yield from _table("option", "Python keyword", "default", "what")
    for parameter in command.params:
        if parameter.name not in shared and option_of(parameter) not in (*COMMON, "--help"):
            known = f"`{parameter.name}`" if parameter.name in keywords else ""
            row = (
                f"`{option_of(parameter)}`",
                known,
                _format_default(parameter.default),
                escape_markdown(parameter.help),
            )
            yield _row(*row)
    if taken:
        yield ""
        yield f"And of the settings: {', '.join(taken)}."


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*["---"] * len(names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _format_default(default: Any) -> str:
    if default in (None, (), [], {}) or callable(default):
        return ""
    if isinstance(default, tuple):
        return f"`{' '.join(map(str, default))}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
