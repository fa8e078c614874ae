"""Reference tables of options: by command, with default, and of settings with the key in a job file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from avss_dist.cli.base import app
from avss_dist.cli.options import option_name
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.text import escape_markdown
from avss_dist.report.terminal.schema import shared_rows

COMMON = ("--quiet", "--verbose")  # of every command
NOT_IN_JOBS = ("address", "fresh")  # options of the command line only
_SECTIONS: tuple[tuple[Any, str], ...] = ((Settings, "settings"), (Execution, "execution"))


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
    """Return the tables of options: of settings, of several commands, and of each command."""
    by_command = {
        name: {option_of(p): _row_of(p, name) for p in _own_parameters(command)} for name, command in commands().items()
    }
    shared = shared_rows(by_command.values())
    lines = ["### Settings", "", *_settings(), "", "### Options of several commands", ""]
    lines += [*_table("option", "default", "meaning"), *sorted(shared.values()), ""]
    for name, command in commands().items():
        rows = by_command[name]
        own = [row for option, row in rows.items() if shared.get(option) != row]
        also = [f"`{option}`" for option, row in rows.items() if shared.get(option) == row]
        lines += [f"### avss {name}", "", escape_markdown(command.help), ""]
        lines += [*_table("option", "default", "meaning"), *own, ""] if own else []
        sentences = [f"Also {', '.join(also)}."] if also else []
        sentences += _settings_of(command)
        lines += [" ".join(sentences), ""] if sentences else []
    return "\n".join(lines).rstrip()


def _settings() -> Iterator[str]:
    yield from _table("option", "key", "default", "meaning")
    for cls, section in _SECTIONS:
        fields: Mapping[str, Any] = cls.__pydantic_fields__
        for name, field in fields.items():
            default = _format_default(getattr(cls(), name))
            key = f"`{name}`" if name in NOT_IN_JOBS else f"`{section}.{name}`"
            yield _row(f"`{option_name(name)}`", key, default, escape_markdown(field.description))


def _settings_of(command: Any) -> Iterator[str]:
    """Yield a sentence with the settings that a command takes, or with those that it does not take."""
    shared = command.callback.request.shared
    taken = [f"`{option_of(p)}`" for p in command.params if p.name in shared]
    every = [f"`{option_name(name)}`" for cls, _ in _SECTIONS for name in cls.__pydantic_fields__]
    missing = [option for option in every if option not in taken]
    if taken and len(missing) < len(taken):
        yield f"All settings but {', '.join(missing)}." if missing else "All settings."
    elif taken:
        yield f"Settings: {', '.join(taken)}."


def _own_parameters(command: Any) -> Iterator[Any]:
    """Yield the parameters of a command that are neither settings nor of every command."""
    shared = command.callback.request.shared
    yield from (p for p in command.params if p.name not in shared and option_of(p) not in (*COMMON, "--help"))


def _row_of(parameter: Any, command: str) -> str:
    """Return the row of an option, with the Python keyword where that is spelled differently."""
    option = option_of(parameter)
    function = functions().get(command)
    keywords = inspect.signature(function).parameters if function else {}
    differs = parameter.name in keywords and parameter.name != option.lstrip("-").replace("-", "_")
    spelled = f"`{option}` (`{parameter.name}`)" if differs else f"`{option}`"
    return _row(spelled, _format_default(parameter.default), escape_markdown(parameter.help))


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*["---"] * len(names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _format_default(default: Any) -> str:
    if default in (None, "", (), [], {}) or callable(default):
        return ""
    if isinstance(default, tuple):
        return f"`{' '.join(map(str, default))}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
