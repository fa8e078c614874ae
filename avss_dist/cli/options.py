"""Options that several commands take; those of settings are made from the fields of the settings classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from avss_dist.errors import ConfigError, require_known
from avss_dist.settings import (
    EVERY_SITE,
    PUBLISHED_THRESHOLD,
    RECIPES,
    Execution,
    Replicas,
    Settings,
)
from avss_dist.system.streams import QUIET, VERBOSE, set_verbosity
from avss_dist.text import parse_threshold
from avss_dist.validation import OneOf

MODEL = "Hub id (org/name@revision), folder, or .gguf file."
PUBLISHED = f"{PUBLISHED_THRESHOLD:g}"
SPELLING = {
    "sites": "--site",
    "thresholds": "--threshold",
    "layers": "--layers-path",
    "attention": "--attn-implementation",
}
"""Options whose names are not those of their fields."""
PANELS = {Settings: "What is measured", Execution: "Where it runs"}
LONGEST = 22  # characters of a list of names beside an option
WORKERS = ("executor", "replicas", "address", "fresh")


def choice(
    names: Sequence[str],
    help: str,
    *spelling: str,
    checked: bool = True,
    panel: str | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> Any:
    """An option whose value is one of some names, or several: help lists them, completion too.

    Args:
        checked: refuse other names here; else what takes the value does.
        panel: of the help.
        elsewhere: names that another option takes, with the hint that says so.
    """

    return typer.Option(*spelling, rich_help_panel=panel, **_of_names(names, help, checked, elsewhere or {}))


def choice_argument(names: Sequence[str], help: str) -> Any:
    """An argument whose value is one of some names."""
    return typer.Argument(**_of_names(names, help) | {"help": help, "metavar": _listed(names)})


def _of_names(
    names: Sequence[str], help: str, checked: bool = True, elsewhere: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if name in elsewhere and name not in names:
                raise ConfigError(f"Unknown `{parameter.name}` '{name}'.", elsewhere[name])
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
    """How a command prints its result."""
    option = choice(names, "Output format.", "--format")
    option.rich_help_panel = "Output"
    return option


FORMATS = ("table", "csv", "json")  # the first is the default
FormatOption = Annotated[str, format_option(*FORMATS)]
TEXT_FORMATS = ("text", "json")  # of commands that say what they did
TextFormatOption = Annotated[str, format_option(*TEXT_FORMATS)]


def takes_settings(*names: str, overrides: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command options for fields of Settings and Execution; it gets those with a value as keywords.

    Args:
        overrides: no option has a default: the values that are given replace others.
    """
    parameters = {name: _parameter(name, overrides) for name in names}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def run(**values: Any) -> Any:
            given = {name: values.pop(name) for name in names}
            return command(**values, **_read(given, overrides))

        return _with_parameters(command, run, parameters.values())

    return decorate


def takes_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command what all have: ``-q``, ``-v``, and ``--json`` where its ``--format`` has that."""
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
    """A flag that all commands have; it may say how much is said."""

    def act(wanted: bool) -> bool:
        if wanted and verbosity is not None:
            set_verbosity(verbosity)
        return wanted

    long = f"--{name.removeprefix('as').removeprefix('_')}"
    spelling = (long, short) if short else (long,)
    option = typer.Option(*spelling, help=help, callback=act, rich_help_panel="Output")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def _with_parameters(
    command: Callable[..., Any], run: Callable[..., Any], added: Iterable[inspect.Parameter]
) -> Callable[..., Any]:
    """``run`` with the parameters of the command that it stands for, and others."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


def _parameter(name: str, overrides: bool) -> inspect.Parameter:
    cls: Any = Settings if name in Settings.__dataclass_fields__ else Execution
    info, field = cls.__pydantic_fields__[name], cls.__dataclass_fields__[name]
    hints, annotations = _hints(cls)
    kind = hints[name]
    spelling = SPELLING.get(name, f"--{name.replace('_', '-')}")
    if Replicas in get_args(kind):  # it reads texts itself
        kind = str
    several = get_origin(kind) in (tuple, Mapping)
    default = None if several or (overrides and kind is not bool) else field.default
    help = info.description + (" Repeatable." if several else "")
    names = next((meta.names for meta in _metadata(annotations[name])), ())
    option = choice(names, help, spelling, checked=False) if names else typer.Option(spelling, help=help)
    option.rich_help_panel = PANELS[cls]
    annotation = list[str] | None if several else kind | None if default is None else kind
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


@cache
def _hints(cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a class's fields: bare, and with their metadata."""
    return get_type_hints(cls), get_type_hints(cls, include_extras=True)


def _metadata(annotation: Any) -> list[OneOf]:
    """Every `OneOf` in an annotation."""
    own = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, OneOf)]
    parts = [*getattr(annotation, "__args__", ()), getattr(annotation, "__origin__", None)]
    return own + [meta for part in parts if part is not None and part is not annotation for meta in _metadata(part)]


def _read(given: Mapping[str, Any], overrides: bool) -> dict[str, Any]:
    """Values of options as the settings classes take them."""
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
            f"`thresholds` {relative[0]} is a multiple of the RMS, which is always scored.", "Write 1e-4, for example."
        )
    return tuple(value for value, _ in parsed.values())


def _require_named(parameter: typer.CallbackParam, value: str | None) -> str | None:
    if value == "":
        raise ConfigError(f"`{parameter.name}` is empty.", "Name a folder, or an s3://, gs://, hdfs:// URI.")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ConfigError(f"`{parameter.name}` is not UTF-8 text.", "Rename the folder.") from None
    return value


def warehouse_option(help: str = "Folder of results, or an s3://, gs:// or hdfs:// URI.") -> Any:
    """The warehouse of a command."""
    return typer.Option("--warehouse", "-w", help=help, envvar="AVSS_WAREHOUSE", callback=_require_named)


def output_option(help: str) -> Any:
    """What a command writes, beside what it prints."""
    return typer.Option("--output", "-o", help=help)


WarehouseOption = Annotated[str, warehouse_option()]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
CorpusOption = Annotated[
    str,
    typer.Option(
        help="file.txt, file.jsonl[:field], file.csv[:column], file.parquet[:column], hf:NAME..., wikitext2, c4, ..., "
        "builtin:pydoc; of paired text file.jsonl:prompt+answer[:label], truthfulqa:file.jsonl[:seed]."
    ),
]
SkipSequencesOption = Annotated[int, typer.Option(help="Skip this many rows at the start of the corpus.", min=0)]
CodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the checkpoint.")
]
OverlapOption = Annotated[
    bool, typer.Option("--allow-overlap", help="Allow evaluation on text that scores or repairs were made on.")
]
ManyOption = Annotated[bool, typer.Option("--yes", help="Go on even if it is a great deal of work.")]
ProtectOption = Annotated[str, typer.Option(help="Layers to keep at both ends: first=1,last=1.")]
_RUN = "A run: its id, a unique part of it, its model, or a glob such as 'smollm2-*'"
RunOption = Annotated[str | None, typer.Option("--run", help=f"{_RUN}; the newest by default.")]
RunsOption = Annotated[list[str] | None, typer.Option("--run", help=f"{_RUN}; repeatable. The newest by default.")]
EveryRunOption = Annotated[list[str] | None, typer.Option("--run", help=f"{_RUN}; repeatable. All by default.")]
RecipeOption = Annotated[str, choice(RECIPES, "Definition of AVSS.")]
SiteOption = Annotated[str, choice(EVERY_SITE, "Where in a layer.")]
ThresholdOption = Annotated[str, typer.Option(help="Near zero means below this: 1e-5 (absolute) or 0.1rms (relative).")]


def protected(text: str) -> tuple[int, int]:
    """Layers at both ends that stay: ``first=1,last=2``."""
    found = {"first": 0, "last": 0}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        require_known("end in --protect", name, found)
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise ConfigError(f"--protect {part} names no number of layers.", "Write --protect first=1,last=1.")
        found[name] = int(number)
    return found["first"], found["last"]
