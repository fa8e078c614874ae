"""Options of command lines, made from the fields of requests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from avss_dist.core.errors import named_fields, spell_fields
from avss_dist.core.request import Request
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
METAVARS: Mapping[object, str] = {int: "N", float: "X"}
_BOTH = re.compile(r"--([a-z-]+) / --no-\1")
M = TypeVar("M")


class CommandWithSections(TyperCommand):
    """A command whose help has a section for each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.params:
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            spelling, text = record
            spelling = re.sub(r" <[^<>]+>$", "", spelling)  # without typer's "<str>"
            spelling = _BOTH.sub(r"--[no-]\1", spelling)
            title = getattr(parameter, "rich_help_panel", "")
            sections.setdefault(title, []).append((spelling, text))
        for title in TITLES:
            if title in sections:
                with formatter.section(title):
                    formatter.write_dl(sections[title])


def parameters(request: type[Request], formats: Sequence[str]) -> list[inspect.Parameter]:
    """Return the parameters of a command: the fields of its request, and what every command has.

    A value that is not given is None. Others are texts, flags, and lists of texts.

    Args:
        formats: formats of what the command prints, the default first.
    """
    hints = get_type_hints(request)
    annotations = get_type_hints(request, include_extras=True)
    made = []
    for field in ordered(request):
        annotation = annotations[field.name]
        options = list(_metadata(annotation, Option))
        if all(option.exists for option in options):
            option = options[0] if options else Option()
            made.append(_parameter(request, field.name, hints[field.name], annotation, option))
    if formats:
        made.append(_format_parameter(formats))
    made.append(_flag("quiet", "Print only the result and errors.", lambda _: set_verbosity(QUIET)))
    made.append(
        _flag("verbose", "Show library messages, and the traceback of an error.", lambda _: set_verbosity(VERBOSE))
    )
    made.append(_flag("help_all", "Show all options and exit.", _show_all))
    return made


def _format_parameter(formats: Sequence[str]) -> inspect.Parameter:
    """Return the parameter of ``--format``."""
    settings = _name_settings(formats, f"Output format. [default: {formats[0]}]")
    option = typer.Option("--format", show_default=False, rich_help_panel=OUTPUT, **settings)
    return _keyword("format", Annotated[str, option], formats[0])


def _show_all(ctx: Any) -> None:
    """Print the help with the rare options."""
    for parameter in ctx.command.params:
        parameter.hidden = False
    emit(ctx.get_help())
    raise typer.Exit


def _flag(name: str, help: str, act: Callable[[typer.Context], None]) -> inspect.Parameter:
    """Return a flag of every command that does something at once."""

    def callback(ctx: typer.Context, value: bool) -> None:
        if value:
            act(ctx)

    spellings = [option_name(name)]
    if name != "help_all":
        spellings.append(f"-{name[0]}")
    option = typer.Option(*spellings, help=help, callback=callback, is_eager=True, hidden=True, rich_help_panel=COMMON)
    return _keyword(f"_{name}", Annotated[bool, option], False)


def _parameter(
    request: type[Request], name: str, hint: object, annotation: object, option: Option
) -> inspect.Parameter:
    """Return the parameter of a command for a field of its request."""
    kinds = {*(get_args(hint) or [hint])} - {NoneType}
    is_list = get_origin(hint) in (tuple, Mapping)
    is_flag = bool in kinds and not is_list
    help = option_help(request, name, " Repeatable." if is_list and not option.argument else "")
    names = next((one_of.names for one_of in _metadata(annotation, OneOf) if one_of.names), ())
    settings: dict[str, Any] = {"hidden": option.rare, "show_default": False}
    if names:
        settings |= _name_settings(names, help)
    elif is_flag:
        settings |= {"help": help, "metavar": None}
    else:
        settings |= {"help": help, "metavar": option.metavar or _usual_metavar(kinds, is_list=is_list)}

    if option.argument:
        parameter = typer.Argument(rich_help_panel=TITLES[0], **settings)
    else:
        spellings = [option_name(name, is_on=request.__dataclass_fields__[name].default is True)]
        if option.short:
            spellings.append(option.short)
        parameter = typer.Option(
            *spellings,
            envvar=option.environment or None,
            show_envvar=False,
            rich_help_panel=section_of(request, name),
            **settings,
        )
    kind: Any = str
    if is_list:
        kind = list[str]
    elif is_flag:
        kind = bool
    return _keyword(name, Annotated[kind | None, parameter], None)


def _usual_metavar(kinds: Set[object], *, is_list: bool) -> str:
    """Return the placeholder of a value of one of these types."""
    if len(kinds) == 1 and not is_list:
        (kind,) = kinds
        return METAVARS.get(kind, "TEXT")
    return "TEXT"


def section_of(cls: type, name: str) -> str:
    """Return the section of a help to which a field belongs, by the class that declares it."""
    for base in cls.__mro__:
        if name in vars(base).get("__annotations__", {}):
            return SECTIONS.get(base, OWN)
    raise AttributeError(f"{cls.__name__} has no field {name!r}")


def spelled_option(parameter: Any) -> str:
    """Return the spelling of an option, or the placeholder of an argument."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    return str(max(parameter.opts, key=len))


def _name_settings(names: Sequence[str], help: str) -> dict[str, Any]:
    """Return the settings of an option that takes one of these names, which the shell completes.

    A long list of names stands in the help, unless its text has all of them.
    """
    metavar = f"[{'|'.join(names)}]"
    if len(metavar) > MAX_LISTED:
        metavar = "NAME"
        if not all(name in help for name in names):
            help += f" One of: {', '.join(names)}."
    return {
        "help": help,
        "metavar": metavar,
        "autocompletion": lambda incomplete: [name for name in names if name.startswith(incomplete)],
    }


def option_help(request: Any, name: str, more: str = "") -> str:
    """Return the description of a field with its default. Fields that it names are spelled as options."""
    default = default_of(request.__dataclass_fields__[name])
    if default is inspect.Parameter.empty:
        more += " [required]"
    elif isinstance(default, str | int | float) and not isinstance(default, bool):
        more += f" [default: {default}]"
    description = descriptions(request)[name]
    text = " ".join(description.split()) + more
    return spell_fields(text, {field: option_name(field) for field in named_fields(text)})


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def option_name(name: str, *, is_on: bool = False) -> str:
    """Return the option of a field, with its negation for a flag that is on."""
    words = name.replace("_", "-")
    return f"--{words}/--no-{words}" if is_on else f"--{words}"


def _metadata(annotation: object, kind: type[M]) -> Iterator[M]:
    """Yield the metadata of one kind in an annotation, the outermost first."""
    for metadata in getattr(annotation, "__metadata__", ()):
        if isinstance(metadata, kind):
            yield metadata
    parts = [*getattr(annotation, "__args__", ()), getattr(annotation, "__origin__", None)]
    for part in parts:
        if part is not None and part is not annotation:
            yield from _metadata(part, kind)
