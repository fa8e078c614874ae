"""Options of commands, made from the fields of their requests."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import cache, wraps
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from avss_dist.core.errors import ConfigError, named_fields, require_known, spell_fields
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.text import parse_threshold
from avss_dist.core.validation import Check, OneOf, descriptions
from avss_dist.options import SHARED, Option, ordered
from avss_dist.system.streams import QUIET, VERBOSE, set_verbosity

SPELLING = {
    "sites": "--site",
    "node_labels": "--node-label",
    "thresholds": "--threshold",
    "layers": "--layers-path",
    "attention": "--attn-implementation",
}
"""Options by field, if their names differ from the field's."""
RARE = ("layers", "attention", "threads", "gpus_per_replica", "placement_seconds", "hang_seconds")
"""Fields that only the helps of commands that score show. Others take them, too."""
PANELS = {Settings: "Measurement", Execution: "Execution"}
LONGEST = 22  # characters of a list of names beside an option
ENDS = ("first", "last")
M = TypeVar("M")


def format_option(*names: str) -> Any:
    """Return the option for the format of a command's result."""

    def check(parameter: typer.CallbackParam, value: str) -> str:
        return require_known(f"`{parameter.name}`", value, names)

    return typer.Option("--format", rich_help_panel="Output", callback=check, **_of_names(names, "Output format."))


def named_format(names: Sequence[str], help: str) -> Any:
    """Return the option for the format of a file. The command checks the value."""
    return typer.Option("--format", rich_help_panel="Output", **_of_names(names, help))


def _of_names(names: Sequence[str], help: str) -> dict[str, Any]:
    """Return the help of an option that takes one of these names, which the shell completes."""
    listed = _listed(names)
    if len(listed) > LONGEST:  # a column of the help would cut it inside of words
        listed, help = "<name>", f"{help} One of: {', '.join(names)}."
    return {
        "help": help,
        "metavar": listed,
        "autocompletion": lambda incomplete: [name for name in names if name.startswith(incomplete)],
    }


def _listed(names: Sequence[str]) -> str:
    return f"[{'|'.join(names)}]"


FORMATS = ("table", "csv", "json")  # the first is the default
TEXT_FORMATS = ("text", "json")  # of commands that report an action
TextFormatOption = Annotated[str, format_option(*TEXT_FORMATS)]


def takes(request: Any, formats: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with an option for every field of a request. It receives given values as keywords.

    The fields ``first`` and ``last`` are one option, `--protect`.

    Args:
        formats: formats of the result, the default first. The command receives the chosen one as ``format``.
    """
    names = ordered(request)
    parameters = [_parameter(request, name) for name in names if name not in ENDS]
    protects = set(ENDS) <= set(names)
    if protects:
        option = typer.Option("--protect", help="Layers to keep at both ends: first=1,last=1.")
        parameters.append(_keyword("protect", Annotated[str, option], ""))
    for name in request.shared:
        hidden = name in RARE and "sites" not in request.shared
        parameters.append(_parameter(SHARED[name], name, replaces=request.replaces, hidden=hidden))
    printed = [_keyword("format", Annotated[str, format_option(*formats)], formats[0])] if formats else []

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def run(**values: Any) -> Any:
            given = {parameter.name: values.pop(parameter.name) for parameter in parameters}
            if protects:
                given |= dict(zip(ENDS, protected(given.pop("protect")), strict=True))
            fields = _read(given, request.replaces)
            request(**fields)  # refuses mistakes before the command imports what works
            return command(**values, **fields)

        decorated = _with_parameters(command, run, before=parameters, after=printed)
        decorated.request = request  # type: ignore[attr-defined]
        return decorated

    return decorate


def takes_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with the common options: ``-q`` and ``-v``."""
    added = [_flag("quiet", "Print only the result and errors.", QUIET)]
    added += [_flag("verbose", "Show library messages, and the traceback of an error.", VERBOSE)]

    @wraps(command)
    def run(**values: Any) -> Any:
        values.pop("_quiet"), values.pop("_verbose")
        return command(**values)

    return _with_parameters(command, run, after=added)


def _flag(name: str, help: str, verbosity: int) -> inspect.Parameter:
    """Return a flag of all commands that sets the verbosity."""

    def act(wanted: bool) -> bool:
        if wanted:
            set_verbosity(verbosity)
        return wanted

    option = typer.Option(f"--{name}", f"-{name[0]}", help=help, callback=act, rich_help_panel="Output")
    return _keyword(f"_{name}", Annotated[bool, option], False)


def _with_parameters(
    command: Callable[..., Any],
    run: Callable[..., Any],
    *,
    before: Sequence[inspect.Parameter] = (),
    after: Sequence[inspect.Parameter] = (),
) -> Callable[..., Any]:
    """Give ``run`` the signature of the command that it wraps, with other parameters before and after its own."""
    signature = inspect.signature(command, eval_str=True)
    named = {parameter.name for parameter in (*before, *after)}
    inherited = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name not in named
    ]
    run.__signature__ = signature.replace(parameters=[*before, *inherited, *after])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


def _parameter(cls: Any, name: str, replaces: bool = False, hidden: bool = False) -> inspect.Parameter:
    """Return the parameter of a command for a field of a checked class.

    Args:
        replaces: the value replaces that of a file, so it has no default.
        hidden: the help does not show it.
    """
    hints, annotations = _hints(cls)
    option = next(iter(_metadata(annotations[name], Option)), Option())
    kind, several = _shell_type(hints[name], annotations[name])
    several = several or option.repeatable
    default = _default(cls, name)
    if default is not inspect.Parameter.empty and (several or (replaces and kind is not bool)):
        default = None
    help = _help(cls, name, " Repeatable." if several and not option.argument else "")
    names = next((meta.names for meta in _metadata(annotations[name], OneOf)), ())
    info = {"help": help, "metavar": option.metavar} | (_of_names(names, help) if names else {})
    if names and option.argument:
        info |= {"help": help, "metavar": _listed(names)}
    info |= {"rich_help_panel": option.panel or PANELS.get(cls), "envvar": option.environment, "hidden": hidden}
    annotation: Any = list[str] if several else kind
    annotation = annotation | None if default is None else annotation
    return _keyword(
        name, Annotated[annotation, _typer_parameter(option, option_name(name, is_on=default is True), info)], default
    )


def _typer_parameter(option: Option, spelling: str, info: Mapping[str, Any]) -> Any:
    """Return an argument or an option of typer."""
    return typer.Argument(**info) if option.argument else typer.Option(*(option.names or (spelling,)), **info)


def _help(cls: Any, name: str, more: str) -> str:
    """Return the description of a field, with the fields that it names spelled as options."""
    text = " ".join(descriptions(cls)[name].split()) + more
    return spell_fields(text, {field: option_name(field) for field in named_fields(text)})


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def option_name(name: str, *, is_on: bool = False) -> str:
    """Return the option of a field whose metadata does not name one; a flag that is on can be turned off."""
    option = SPELLING.get(name, f"--{name.replace('_', '-')}")
    return f"{option}/--no-{option.removeprefix('--')}" if is_on else option


def _default(cls: Any, name: str) -> Any:
    """Return the default of a field as an option has it."""
    field = cls.__dataclass_fields__[name]
    if field.default_factory is not MISSING:
        return None
    if field.default is MISSING:
        return inspect.Parameter.empty
    return str(field.default) if name == "threshold" else field.default


def _shell_type(hint: Any, annotation: Any) -> tuple[Any, bool]:
    """Return the type of an option's value, and whether the option can be repeated."""
    if get_origin(hint) in (tuple, Mapping):
        return str, True
    if any(check.before for check in _metadata(annotation, Check)):  # the check parses text
        return str, False
    kinds = [part for part in get_args(hint) or (hint,) if part is not NoneType]
    return (kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float) else str), False


@cache
def _hints(cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the types of a class's fields: without and with metadata."""
    return get_type_hints(cls), get_type_hints(cls, include_extras=True)


def _metadata(annotation: Any, kind: type[M]) -> list[M]:
    """Return the metadata of one kind in an annotation, the outermost first."""
    outer = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, kind)]
    parts = [*getattr(annotation, "__args__", ()), getattr(annotation, "__origin__", None)]
    inner = [meta for part in parts if part is not None and part is not annotation for meta in _metadata(part, kind)]
    return outer + inner


def _read(given: Mapping[str, Any], replaces: bool) -> dict[str, Any]:
    """Return the values of options as the settings classes take them."""
    options = {name: value for name, value in given.items() if value not in (None, [])}
    if replaces:  # a flag that is not given replaces nothing
        options = {name: value for name, value in options.items() if value is not False}
    if "thresholds" in options:
        options["thresholds"] = _absolute(options["thresholds"])
    if "max_memory" in options:
        options["max_memory"] = _by_device(options["max_memory"])
    return options


def _by_device(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (_, equals, _) in zip(texts, pairs, strict=True) if not equals]:
        raise ConfigError(f"`max_memory` {wrong[0]} names no device.", "Write cpu=20GB, or 0=40GiB for the first GPU.")
    return {device: size for device, _, size in pairs}


def _absolute(thresholds: Sequence[str]) -> tuple[float, ...]:
    parsed = {text: parse_threshold(text) for text in thresholds}
    if relative := [text for text, (_, kind) in parsed.items() if kind != "absolute"]:
        raise ConfigError(
            f"`thresholds` {relative[0]}: expected an absolute threshold. Multiples of the RMS are always scored.",
            "Write 1e-4, for example.",
        )
    return tuple(value for value, _ in parsed.values())


def output_option(help: str) -> Any:
    """Return the option for the file that a command writes."""
    return typer.Option("--output", "-o", help=help)


def protected(text: str) -> tuple[int, int]:
    """Parse the number of protected layers at both ends: ``first=1,last=2``."""
    ends = {"first": 0, "last": 0}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        require_known("end in --protect", name, ends)
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise ConfigError(f"--protect {part}: expected a number of layers.", "Write --protect first=1,last=1.")
        ends[name] = int(number)
    return ends["first"], ends["last"]
