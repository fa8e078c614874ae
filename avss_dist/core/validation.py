"""Checked classes: frozen dataclasses that report every problem with their values at once."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache, wraps
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ParamSpec,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic import Field as Range
from pydantic_core import ArgsKwargs, PydanticCustomError, PydanticKnownError, SchemaError, core_schema

from avss_dist.core.errors import AvssError, ConfigError, nearest, without_secrets
from avss_dist.core.text import parse_bytes

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Location = tuple[int | str, ...]
"""Keys and indices on the way to a value: ``("models", 0, "dtype")``."""
Share = Annotated[float, Range(gt=0, lt=1)]
Count = Annotated[int, Range(ge=0)]
Positive = Annotated[int, Range(ge=1)]


def check(function: Callable[[Any], Any], *, before: bool = False) -> AfterValidator | BeforeValidator:
    """Return metadata of a field that checks its values: ``Annotated[float, check(require_share)]``.

    Args:
        function: raises an `AvssError`, or returns the value.
        before: run before the type is checked; ``function`` may then return a value of another type.
    """

    def run(value: Any) -> Any:
        try:
            return function(value)
        except AvssError as error:  # pydantic collects its own errors only
            raise PydanticCustomError("problem", "{message}", {"message": error.message, "hint": error.hint}) from None

    return BeforeValidator(run) if before else AfterValidator(run)


@dataclass(frozen=True)
class OneOf:
    """Metadata of a field whose values are names: ``Annotated[str, OneOf(DTYPES)]``. Front ends list the names.

    Args:
        names: the valid values.
        elsewhere: hints by name, for names that are valid for another option.
        accepts: whether another name is valid, too.
    """

    names: tuple[str, ...]
    elsewhere: Mapping[str, str] = field(default_factory=dict, hash=False)
    accepts: Callable[[str], bool] | None = None

    def _run(self, value: str) -> str:
        if value not in self.names and not (self.accepts and self.accepts(value)):
            hint = self.elsewhere.get(value) or nearest(value, self.names)
            raise PydanticCustomError("unknown_name", "{value}", {"value": value, "hint": hint})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._run, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {**handler(schema), **({} if self.accepts else {"enum": list(self.names)})}


@dataclass(frozen=True)
class Accepts:
    """Metadata of a field: the type of values that callers may pass, where its checks return values of another type.

    Args:
        type: the type as text, for signatures: ``int | str``.
    """

    type: str


def accepted_type(annotation: Any) -> str:
    """Return the type of the values that a checked field accepts, as text for signatures.

    Names are a ``Literal``, and a list or tuple of any length is a ``Sequence``.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for meta in annotation.__metadata__:
            if isinstance(meta, Accepts):
                return meta.type
            if isinstance(meta, OneOf) and not meta.accepts:
                return f"Literal[{', '.join(map(repr, meta.names))}]"
        return accepted_type(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(accepted_type, arguments)))
    if origin is tuple:
        return f"Sequence[{accepted_type(arguments[0])}]"
    if origin is Mapping:
        return f"Mapping[{', '.join(map(accepted_type, arguments))}]"
    return "None" if annotation is NoneType else str(annotation.__name__)


@dataclass(frozen=True, kw_only=True)
class Option:
    """Metadata of a field that says how the command line shows it. The option has the name of the field.

    Args:
        short: short spelling, such as ``-o``.
        metavar: placeholder of the value in the help.
        environment: environment variable that has the default.
        argument: the value is a positional argument.
        rare: only ``--help-all`` shows the option.
        exists: there is such an option.
    """

    short: str = ""
    metavar: str = ""
    environment: str = ""
    argument: bool = False
    rare: bool = False
    exists: bool = True


RARE, NO_OPTION = Option(rare=True), Option(exists=False)


def as_text(value: Any) -> str:
    """Return a text that may be a path. It keeps its class, such as `RedactedURI`."""
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    return value


def _redacted(text: str) -> str:
    return str(without_secrets(text))  # not of a class that knows the secrets


def _as_bytes(size: Any) -> Any:
    """Return a size that is given as text, such as ``20GB``, as a number of bytes."""
    if isinstance(size, str):
        return parse_bytes(size)
    return size


Text = Annotated[str, PlainValidator(as_text), Accepts("str | Path")]
Texts = Annotated[tuple[Text, ...], Range(strict=False)]
PathOrText = Annotated[str | Path, PlainValidator(as_text)]
RedactedText = Annotated[str, check(_redacted)]
"""A text that is kept without the secrets of its URIs."""
Bytes = Annotated[
    int,
    check(_as_bytes, before=True),
    Range(ge=1),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["20GB"]}),
    Accepts("int | str"),
]
Seconds = Annotated[float, Range(gt=0, allow_inf_nan=False)]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def checked(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that checks its values: all fields, then ``__post_init__``.

    It is checked by pydantic: ``Annotated`` types have ranges, `OneOf` and `check`. The docstring below a field is its
    description in front ends. An invalid value, an unknown or a missing field is a `ConfigError` that lists every
    problem, each with its field in backticks. As a field of another class, an instance may be given as a mapping.
    A classmethod ``complete`` may return the keywords of a new instance with more of them.
    The checks are prepared when the first instance is made, which takes milliseconds for many fields.
    """
    checks: Any = cls
    checks.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")
    checks.__get_pydantic_core_schema__ = classmethod(_schema_that_accepts_mappings)
    checks.__get_pydantic_json_schema__ = classmethod(_described_schema)
    if "__post_init__" in vars(cls):
        checks.check_values = checks.__post_init__
    checks.__post_init__ = _check_all_values
    dataclass(frozen=True, kw_only=True)(cls)

    @wraps(checks.__init__)
    def initialize(self: Any, *positional: Any, **values: Any) -> None:
        complete = getattr(type(self), "complete", dict)
        _validate(type(self), ArgsKwargs(positional, complete(values)), self_instance=self)

    checks.__init__, checks.__doc__ = initialize, _Documentation(cls.__doc__ or "")
    return cls


class _Documentation(str):
    """Docstring of a checked class, followed by its fields when it is read."""

    def __get__(self, instance: object, cls: Any) -> str:
        hints, lines = get_type_hints(cls, include_extras=True), [inspect.cleandoc(self), "", "Attributes:"]
        for name, text in descriptions(cls).items():
            names = next(
                (meta.names for meta in getattr(hints[name], "__metadata__", ()) if isinstance(meta, OneOf)), ()
            )
            valid = f" One of: {', '.join(names)}." if names else ""
            lines.append(f"    {name}: {text}{valid}")
        return "\n".join(lines)


def from_texts(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return an instance of a checked class from texts, such as those of a command line, which are converted."""
    return _validate(cls, ArgsKwargs((), dict(values)), strict=False)


def _validate(cls: Any, values: ArgsKwargs, **options: Any) -> Any:
    try:
        return adapter(cls).validator.validate_python(values, **options)
    except ValidationError as error:
        raise ConfigError.combine([problem for _, problem in located_problems(cls, error)]) from None


@cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """Return pydantic's checks of a class."""
    try:
        return TypeAdapter(cls)
    except SchemaError as error:  # pydantic makes one of a signal that comes meanwhile
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from None
        raise


def _check_all_values(self: Any) -> None:
    """Run the check of each base class, and make pydantic collect their problems together with those of other values.

    Raises:
        PydanticCustomError: there are problems.
    """
    problems: list[ConfigError] = []
    for check in dict.fromkeys(vars(base).get("check_values") for base in reversed(type(self).__mro__)):
        try:
            if check:
                check(self)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise PydanticCustomError("problems", "{problems}", {"problems": problems})


def ordered(cls: Any) -> list[Field[Any]]:
    """Return the fields of a checked class: positional ones, then its own before those of its bases."""
    by_name = {f.name: f for f in fields(cls)}
    names = [name for name, f in by_name.items() if not f.kw_only]
    names += [name for base in cls.__mro__ for name in vars(base).get("__annotations__", {}) if name in by_name]
    return [by_name[name] for name in dict.fromkeys(names)]


def default_of(field: Field[Any]) -> Any:
    """Return the default of a field, or `inspect.Parameter.empty` if it has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


_KEYWORD, _ANY = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


def keywords(cls: Callable[P, R]) -> Callable[[Callable[[R], T]], Callable[P, T]]:
    """Decorate a function of a request to take the request's fields as keywords, with signature and docstring.

    Type checkers read the same signatures in ``avss_dist/__init__.pyi``, which is made of them. `inspect.unwrap`
    returns the function of the request.
    """

    def decorate(function: Callable[[R], T]) -> Callable[P, T]:
        @wraps(function)
        def run(*positional: P.args, **values: P.kwargs) -> T:
            return function(cls(*positional, **values))

        annotation = inspect.signature(function).return_annotation
        hints = get_type_hints(cls, include_extras=True)
        parameters = []
        for f in ordered(cls):
            kind = _KEYWORD if f.kw_only else _ANY
            accepted = accepted_type(hints[f.name])
            parameters.append(inspect.Parameter(f.name, kind, default=default_of(f), annotation=accepted))
        run.__signature__ = inspect.Signature(parameters, return_annotation=annotation)  # type: ignore[attr-defined]
        lines = [f"    {name}: {' '.join(text.split())}" for name, text in descriptions(cls).items()]
        run.__doc__ = "\n".join(
            [f"{function.__doc__}\n", "Args:", *lines, "", "Raises:", "    AvssError: a mistake, or work that failed."]
        )
        return run

    return decorate


def _schema_that_accepts_mappings(cls: Any, source: Any, handler: Any) -> Any:
    """Return pydantic's schema of a strict dataclass, whose fields stay strict."""
    return {**handler(source), "strict": False}


def _described_schema(cls: Any, schema: Any, handler: Any) -> Any:
    """Return the JSON schema of a class with the descriptions of its fields."""
    json_schema = handler(schema)
    properties = handler.resolve_ref_schema(json_schema)["properties"]
    for name, text in descriptions(cls).items():
        properties[name]["description"] = text
    return json_schema


@cache
def descriptions(cls: Any) -> dict[str, str]:
    """Return the docstring of every field of a checked class, by name."""
    bases = [_docstrings(base.__module__).get(base.__name__, {}) for base in reversed(cls.__mro__[:-1])]
    texts = {name: text for docstrings in bases for name, text in docstrings.items()}
    return {f.name: texts[f.name] for f in fields(cls) if f.name in texts}


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings below the fields of the classes of a module, by class and field."""
    try:
        nodes = ast.walk(ast.parse(inspect.getsource(sys.modules[module])))
    except OSError:  # an installation without sources
        return {}
    return {
        node.name: {
            ast.unparse(field.target): inspect.cleandoc(str(text.value.value))
            for field, text in pairwise(node.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        }
        for node in nodes
        if isinstance(node, ast.ClassDef)
    }


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dataclass": "a mapping",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
}
"""Expected kind of value, by the first word of the type of pydantic's error."""
MAX_SHOWN = 80  # characters of a value in a message
_BOUNDS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def located_problems(
    cls: Any, error: ValidationError, *, noun: str = "option"
) -> Iterator[tuple[Location, ConfigError]]:
    """Yield pydantic's errors as ConfigError, each with the path of the value.

    Args:
        cls: a checked class or a pydantic model. Its fields may be such classes too.
        noun: noun for a field in messages: ``option`` or ``key``.
    """
    for problem in error.errors(include_url=False):
        if problem["type"] == "problems":
            yield from ((problem["loc"], inner) for inner in problem["ctx"]["problems"])
        elif problem["type"] != "too_short" or not problem["input"]:
            yield problem["loc"], _problem(cls, problem, noun)


def _problem(cls: Any, error: Any, noun: str) -> ConfigError:
    kind, value, context = error["type"], error["input"], error.get("ctx") or {}
    name, inner = _field_at(cls, _named(cls, error["loc"]))
    if kind in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        return ConfigError(
            f"Unknown {noun} '{error['loc'][-1]}'.", nearest(str(error["loc"][-1]), sorted(_fields(inner)))
        )
    if kind == "unexpected_positional_argument":
        names = [field.name for field in fields(cls) if field.kw_only]
        return ConfigError(f"{value!r} needs a name.", f"Write it as a keyword: {', '.join(names)}.")
    if kind == "unknown_name":
        return ConfigError(f"Unknown `{name}` '{value}'.", context["hint"])
    if kind == "problem":
        return ConfigError(f"`{name}`: {context['message']}", context["hint"])
    return ConfigError(f"`{name}`{_complaint(kind, value, context) or ': ' + error['msg']}.")


def _named(cls: Any, path: Location) -> Location:
    """Return a path whose first part is the name of a field, where it was the index of a positional argument."""
    if not path or not isinstance(path[0], int):
        return path
    positional = [field.name for field in ordered(cls) if not field.kw_only]
    return (positional[path[0]], *path[1:]) if path[0] < len(positional) else path


def _field_at(cls: Any, path: Location) -> tuple[str, Any]:
    """Return the last field of a path, and the class of its value or, if that is a plain value, of the field."""
    name = ""
    for part in path:
        if part in _fields(cls):
            name = str(part)
            cls = next(_classes_in(_fields(cls)[name]), cls)
    return name, cls


def _fields(cls: Any) -> dict[str, Any]:
    """Return the types of the fields of a checked class or a pydantic model, by key."""
    if is_dataclass(cls):
        return {name: hint for name, hint in get_type_hints(cls).items() if name in cls.__dataclass_fields__}
    return {info.alias or name: info.annotation for name, info in cls.model_fields.items()}


def _classes_in(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and hasattr(annotation, "__get_pydantic_core_schema__"):
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)


def _complaint(kind: str, value: Any, context: dict[str, Any]) -> str | None:
    """Return the predicate of the message for a type of pydantic's errors, or None for an unexpected type."""
    if kind.startswith("missing"):
        return " is missing"
    if kind in ("too_short", "string_too_short"):
        return " must not be empty"
    if kind in _BOUNDS:
        return f" must be {_BOUNDS[kind]} {next(iter(context.values())):g}, not {value}"
    if expected := _EXPECTED.get(kind.partition("_")[0]):
        return f" must be {expected}, not {'nothing' if value is None else shorten(repr(value), MAX_SHOWN)}"
    return None
