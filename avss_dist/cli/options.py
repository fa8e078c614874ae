"""Options that several commands take. Those of settings are made from the fields of the settings classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import cache, wraps
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from avss_dist.core.errors import ConfigError, named_fields, require_known, spell_fields
from avss_dist.core.registry import RECIPES
from avss_dist.core.settings import EVERY_SITE, PUBLISHED_THRESHOLD, Execution, Settings
from avss_dist.core.text import parse_threshold
from avss_dist.core.validation import Check, OneOf, descriptions
from avss_dist.options import SHARED, Option, ordered
from avss_dist.requests import require_warehouse
from avss_dist.system.streams import QUIET, VERBOSE, set_verbosity

PUBLISHED = f"{PUBLISHED_THRESHOLD:g}"
SPELLING = {
    "sites": "--site",
    "thresholds": "--threshold",
    "layers": "--layers-path",
    "attention": "--attn-implementation",
}
"""Options by field, if their names differ from the field's."""
PANELS = {Settings: "Measurement", Execution: "Execution"}
LONGEST = 22  # characters of a list of names beside an option
WORKERS = ("executor", "replicas", "address", "fresh")
ENDS = ("first", "last")
M = TypeVar("M")


def choice(names: Sequence[str], help: str, *spelling: str) -> Any:
    """Return an option with a fixed set of values, which the help and the shell completion list."""
    return typer.Option(*spelling, **_of_names(names, help))


def choice_argument(names: Sequence[str], help: str) -> Any:
    """Return an argument with a fixed set of values."""
    return typer.Argument(**_of_names(names, help) | {"help": help, "metavar": _listed(names)})


def _of_names(names: Sequence[str], help: str, checked: bool = True) -> dict[str, Any]:
    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if name is not None:
                require_known(f"`{parameter.name}`", name, names)
        return value

    listed = _listed(names)
    if len(listed) > LONGEST:  # a column of the help would cut it inside of words
        listed, help = "<name>", f"{help} One of: {', '.join(names)}."
    return {
        "help": help,
        "metavar": listed,
        "autocompletion": lambda incomplete: [name for name in names if name.startswith(incomplete)],
        "callback": check if checked else None,
    }


def _listed(names: Sequence[str]) -> str:
    return f"[{'|'.join(names)}]"


def format_option(*names: str) -> Any:
    """Return the option for the format of a command's result."""
    option = choice(names, "Output format.", "--format")
    option.rich_help_panel = "Output"
    return option


def named_format(names: Sequence[str], help: str) -> Any:
    """Return the option for the format of a file. The command checks the value."""
    return typer.Option("--format", rich_help_panel="Output", **_of_names(names, help, checked=False))


FORMATS = ("table", "csv", "json")  # the first is the default
FormatOption = Annotated[str, format_option(*FORMATS)]
TEXT_FORMATS = ("text", "json")  # of commands that report an action
TextFormatOption = Annotated[str, format_option(*TEXT_FORMATS)]


def takes(request: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with an option for every field of a request. It receives given values as keywords.

    The fields ``first`` and ``last`` are one option, `--protect`.
    """
    names = ordered(request)
    parameters = [_parameter(request, name) for name in names if name not in ENDS]
    protects = set(ENDS) <= set(names)
    if protects:
        option = typer.Option("--protect", help="Layers to keep at both ends: first=1,last=1.")
        parameters.append(_keyword("protect", Annotated[str, option], ""))
    parameters += [_parameter(SHARED[name], name) for name in request.shared]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def run(**values: Any) -> Any:
            given = {parameter.name: values.pop(parameter.name) for parameter in parameters}
            if protects:
                given |= dict(zip(ENDS, protected(given.pop("protect")), strict=True))
            return command(**values, **_read(given, overrides=False))

        return _with_parameters(command, run, parameters, first=True)

    return decorate


def takes_settings(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with options for fields of settings, without defaults. Given values override others."""
    parameters = [_parameter(SHARED[name], name, overrides=True) for name in names]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def run(**values: Any) -> Any:
            given = {name: values.pop(name) for name in names}
            return command(**values, **_read(given, overrides=True))

        return _with_parameters(command, run, parameters)

    return decorate


def takes_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with the common options: ``-q``, ``-v``, and ``--json`` if its ``--format`` has it."""
    formats = inspect.signature(command, eval_str=True).parameters.get("format")
    names = get_args(formats.annotation)[1].autocompletion("") if formats else ()
    added = [_flag("_quiet", "-q", "Print only the result and errors.", QUIET)]
    added += [_flag("_verbose", "-v", "Show library messages, and the traceback of an error.", VERBOSE)]
    has_json = "json" in names
    if has_json:
        added.insert(0, _flag("as_json", None, "Short for --format json."))

    @wraps(command)
    def run(**values: Any) -> Any:
        if has_json and values.pop("as_json"):
            values["format"] = "json"
        values.pop("_quiet"), values.pop("_verbose")
        return command(**values)

    return _with_parameters(command, run, added)


def _flag(name: str, short: str | None, help: str, verbosity: int | None = None) -> inspect.Parameter:
    """Return a flag of all commands, which may set the verbosity."""

    def act(wanted: bool) -> bool:
        if wanted and verbosity is not None:
            set_verbosity(verbosity)
        return wanted

    long = f"--{name.removeprefix('as').removeprefix('_')}"
    spelling = (long, short) if short else (long,)
    option = typer.Option(*spelling, help=help, callback=act, rich_help_panel="Output")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def _with_parameters(
    command: Callable[..., Any], run: Callable[..., Any], added: Sequence[inspect.Parameter], *, first: bool = False
) -> Callable[..., Any]:
    """Give ``run`` the signature of the command that it wraps, with other parameters after or before its own."""
    signature = inspect.signature(command, eval_str=True)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    inherited = [p.replace(kind=keyword_only) for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    run.__signature__ = signature.replace(parameters=[*added, *inherited] if first else [*inherited, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


def _parameter(cls: Any, name: str, overrides: bool = False) -> inspect.Parameter:
    """Return the parameter of a command for a field of a checked class."""
    hints, annotations = _hints(cls)
    option = next(iter(_metadata(annotations[name], Option)), Option())
    kind, several = _shell_type(hints[name], annotations[name])
    several = several or option.repeatable
    default = _default(cls, name)
    if default is not inspect.Parameter.empty and (several or (overrides and kind is not bool)):
        default = None
    help = _help(cls, name, " Repeatable." if several and not option.argument else "")
    names = next((meta.names for meta in _metadata(annotations[name], OneOf)), option.choices)
    info = {"help": help, "metavar": option.metavar} | (_of_names(names, help, checked=False) if names else {})
    info |= {"rich_help_panel": option.panel or PANELS.get(cls), "envvar": option.environment}
    annotation: Any = list[str] if several else kind
    annotation = annotation | None if default is None else annotation
    return _keyword(
        name, Annotated[annotation, _typer_parameter(option, _spelling(name, is_on=default is True), info)], default
    )


def _typer_parameter(option: Option, spelling: str, info: Mapping[str, Any]) -> Any:
    """Return an argument or an option of typer."""
    return typer.Argument(**info) if option.argument else typer.Option(*(option.names or (spelling,)), **info)


def _help(cls: Any, name: str, more: str) -> str:
    """Return the description of a field, with the fields that it names spelled as options."""
    text = " ".join(descriptions(cls)[name].split()) + more
    return spell_fields(text, {field: _spelling(field) for field in named_fields(text)})


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _spelling(name: str, *, is_on: bool = False) -> str:
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


def _read(given: Mapping[str, Any], overrides: bool) -> dict[str, Any]:
    """Return the values of options as the settings classes take them."""
    options = {name: value for name, value in given.items() if value not in (None, [])}
    if overrides:  # a flag that is not given replaces nothing
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


def _require_named(parameter: typer.CallbackParam, value: str | None) -> str | None:
    try:
        return value if value is None else str(require_warehouse(value))
    except ConfigError as error:
        raise ConfigError(f"`{parameter.name}`: {error.message}", error.hint) from None


def output_option(help: str) -> Any:
    """Return the option for the file that a command writes."""
    return typer.Option("--output", "-o", help=help)


WarehouseOption = Annotated[
    str,
    typer.Option(
        "--warehouse",
        "-w",
        help="Folder of results, or an s3://, gs:// or hdfs:// URI.",
        envvar="AVSS_WAREHOUSE",
        callback=_require_named,
    ),
]
OverlapOption = Annotated[
    bool, typer.Option("--allow-overlap", help="Allow evaluation on text that scores or repairs were made on.")
]
ManyOption = Annotated[bool, typer.Option("--yes", help="Continue even if it is a great deal of work.")]
_RUN = "A run: its id, a unique part of it, its model, or a glob such as 'smollm2-*'"
RunsOption = Annotated[list[str] | None, typer.Option("--run", help=f"{_RUN}; repeatable. The newest by default.")]
EveryRunOption = Annotated[list[str] | None, typer.Option("--run", help=f"{_RUN}; repeatable. All by default.")]
RecipeOption = Annotated[str, choice(RECIPES, "Definition of AVSS.")]
SiteOption = Annotated[str, choice(EVERY_SITE, "Site in a layer whose activations are read.")]
ThresholdOption = Annotated[str, typer.Option(help="Near zero means below this: 1e-5 (absolute) or 0.1rms (relative).")]


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
