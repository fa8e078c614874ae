"""Options of command lines, made from the fields of requests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from avss_dist.core.errors import named_fields, spell_fields
from avss_dist.core.settings import BatchOptions, ModelOptions, StatisticsOptions, TextOptions
from avss_dist.core.streams import QUIET, VERBOSE, emit, set_verbosity
from avss_dist.core.validation import OneOf, Option, default_of, descriptions, ordered
from avss_dist.partition.execution import ClusterOptions, Execution

SECTIONS: dict[type, str] = {
    TextOptions: "Text",
    ModelOptions: "Model",
    BatchOptions: "Model",
    StatisticsOptions: "Statistics",
    ClusterOptions: "Execution",
    Execution: "Execution",
}
"""Sections of the help by the class that has the field. """
OWN, OUTPUT, COMMON = "Options", "Output", "Every command"
TITLES = ("Arguments", OWN, *dict.fromkeys(SECTIONS.values()), OUTPUT, COMMON)
"""All sections, in order."""
MAX_LISTED = 16  # characters of a list of names beside an option
METAVARS = {int: "N", float: "X"}
_BOTH = re.compile(r"--([a-z-]+) / --no-\1")
M = TypeVar("M")


class CommandWithSections(TyperCommand):
    """A command whose help has a section for each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[Any]] = {}
        for parameter in self.params:
            if record := parameter.get_help_record(ctx):
                spelling = _BOTH.sub(r"--[no-]\1", re.sub(r" <[^<>]+>$", "", record[0]))  # without typer's "<str>"
                sections.setdefault(getattr(parameter, "rich_help_panel", ""), []).append((spelling, record[1]))
        for title in filter(sections.get, TITLES):
            with formatter.section(title):
                formatter.write_dl(sections[title])


def parameters(request: Any, formats: Sequence[str]) -> list[inspect.Parameter]:
    """Return the parameters of a command: the fields of its request, and what every command has.

    A value that is not given is None. Others are texts, flags, and lists of texts.

    Args:
        formats: formats of what the command prints, the default first.
    """
    hints, annotated = get_type_hints(request), get_type_hints(request, include_extras=True)
    fields = [(field.name, [*_metadata(annotated[field.name], Option)]) for field in ordered(request)]
    options = [
        _parameter(request, name, hints[name], annotated[name], next(iter(shown), Option()))
        for name, shown in fields
        if all(option.exists for option in shown)
    ]
    if formats:
        about = _of_names(formats, f"Output format. [default: {formats[0]}]")
        option = typer.Option("--format", show_default=False, rich_help_panel=OUTPUT, **about)
        options.append(_keyword("format", Annotated[str, option], formats[0]))
    return [
        *options,
        _flag("quiet", "Print only the result and errors.", lambda _: set_verbosity(QUIET)),
        _flag("verbose", "Show library messages, and the traceback of an error.", lambda _: set_verbosity(VERBOSE)),
        _flag("help_all", "Show all options and exit.", _show_all),
    ]


def _show_all(ctx: Any) -> None:
    """Print the help with the rare options."""
    for parameter in ctx.command.params:
        parameter.hidden = False
    emit(ctx.get_help())
    raise typer.Exit


def _flag(name: str, help: str, act: Callable[[Any], None]) -> inspect.Parameter:
    """Return a flag of every command that does something at once."""

    def callback(ctx: typer.Context, value: bool) -> None:
        if value:
            act(ctx)

    spellings = [option_name(name), *([f"-{name[0]}"] if name != "help_all" else [])]
    option = typer.Option(*spellings, help=help, callback=callback, is_eager=True, hidden=True, rich_help_panel=COMMON)
    return _keyword(f"_{name}", Annotated[bool, option], False)


def _parameter(request: Any, name: str, hint: Any, annotation: Any, option: Option) -> inspect.Parameter:
    """Return the parameter of a command for a field of its request."""
    several = get_origin(hint) in (tuple, Mapping)
    kinds = {*(get_args(hint) or [hint])} - {NoneType}
    kind: Any = list[str] if several else bool if bool in kinds else str
    help = option_help(request, name, " Repeatable." if several and not option.argument else "")
    metavar = option.metavar or METAVARS.get(kinds.pop() if len(kinds) == 1 and not several else str, "TEXT")
    names = next((meta.names for meta in _metadata(annotation, OneOf) if meta.names), ())
    about: dict[str, Any] = {"rich_help_panel": section_of(request, name), "hidden": option.rare, "show_default": False}
    about |= _of_names(names, help) if names else {"help": help, "metavar": None if kind is bool else metavar}
    if option.argument:
        parameter = typer.Argument(**about | {"rich_help_panel": TITLES[0]})
    else:
        parameter = typer.Option(
            option_name(name, is_on=request.__dataclass_fields__[name].default is True),
            *filter(None, [option.short]),
            envvar=option.environment or None,
            show_envvar=False,
            **about,
        )
    return _keyword(name, Annotated[kind | None, parameter], None)


def section_of(cls: Any, name: str) -> str:
    """Return the section of a help to which a field belongs, by the class that declares it."""
    return SECTIONS.get(next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {})), OWN)


def spelled_option(parameter: Any) -> str:
    """Return the spelling of an option, or the placeholder of an argument."""
    return str(parameter.metavar if parameter.param_type_name == "argument" else max(parameter.opts, key=len))


def _of_names(names: Sequence[str], help: str) -> dict[str, Any]:
    """Return the help of an option that takes one of these names, which the shell completes."""
    listed = f"[{'|'.join(names)}]"
    if len(listed) > MAX_LISTED:
        more = "" if all(name in help for name in names) else f" One of: {', '.join(names)}."
        listed, help = "NAME", help + more
    return {
        "help": help,
        "metavar": listed,
        "autocompletion": lambda incomplete: [name for name in names if name.startswith(incomplete)],
    }


def option_help(request: Any, name: str, more: str = "") -> str:
    """Return the description of a field with its default. Fields that it names are spelled as options."""
    default = default_of(request.__dataclass_fields__[name])
    if default is inspect.Parameter.empty:
        more += " [required]"
    elif isinstance(default, str | int | float) and not isinstance(default, bool):
        more += f" [default: {default}]"
    text = " ".join(descriptions(request)[name].split()) + more
    return spell_fields(text, {field: option_name(field) for field in named_fields(text)})


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def option_name(name: str, *, is_on: bool = False) -> str:
    """Return the option of a field, with its negation for a flag that is on."""
    words = name.replace("_", "-")
    return f"--{words}/--no-{words}" if is_on else f"--{words}"


def _metadata(annotation: Any, kind: type[M]) -> Iterator[M]:
    """Yield the metadata of one kind in an annotation, the outermost first."""
    yield from (meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, kind))
    for part in (*getattr(annotation, "__args__", ()), getattr(annotation, "__origin__", None)):
        if part is not None and part is not annotation:
            yield from _metadata(part, kind)
