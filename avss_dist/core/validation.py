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
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    ParamSpec,
    Protocol,
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

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema, ErrorDetails

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Fielded(Protocol):
    """A class of the standard library's ``dataclass``, such as a checked one."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]


Location = tuple[object, ...]
"""Keys and indices on the way to a value: ``("models", 0, "dtype")``."""
Share = Annotated[float, Range(gt=0, lt=1)]
Count = Annotated[int, Range(ge=0)]
Positive = Annotated[int, Range(ge=1)]


def check(function: Callable[[T], object], *, before: bool = False) -> AfterValidator | BeforeValidator:
    """Return metadata of a field that checks its values: ``Annotated[float, check(require_share)]``.

    Args:
        function: raises an `AvssError`, or returns the value.
        before: run before the type is checked; ``function`` may then return a value of another type.
    """

    def run(value: T) -> object:
        try:
            return function(value)
        except AvssError as error:  # pydantic collects its own errors only
            raise PydanticCustomError("problem", "{message}", {"message": error.message, "hint": error.hint}) from None

    if before:
        return BeforeValidator(run)
    return AfterValidator(run)


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

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._run, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = dict(handler(schema))
        if self.accepts is None:
            json_schema["enum"] = list(self.names)
        return json_schema


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
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        for meta in arguments[1:]:
            if isinstance(meta, Accepts):
                return meta.type
            if isinstance(meta, OneOf) and not meta.accepts:
                names = [repr(name) for name in meta.names]
                return f"Literal[{', '.join(names)}]"
        return accepted_type(arguments[0])
    if origin in (Union, UnionType):
        accepted = [accepted_type(argument) for argument in arguments]
        return " | ".join(dict.fromkeys(accepted))
    if origin is tuple:
        return f"Sequence[{accepted_type(arguments[0])}]"
    if origin is Mapping:
        key, value = arguments
        return f"Mapping[{accepted_type(key)}, {accepted_type(value)}]"
    if annotation is NoneType:
        return "None"
    return str(annotation.__name__)


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


RARE = Option(rare=True)
NO_OPTION = Option(exists=False)


def as_text(value: object) -> str:
    """Return a text that may be a path. It keeps its class, such as `RedactedURI`."""
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    return value


def _redacted(text: str) -> str:
    return str(without_secrets(text))  # not of a class that knows the secrets


def _as_bytes(size: object) -> object:
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
    def initialize(self: object, *positional: object, **values: object) -> None:
        complete = getattr(type(self), "complete", dict)
        _validate(type(self), ArgsKwargs(positional, complete(values)), self_instance=self)

    checks.__init__ = initialize
    checks.__doc__ = _Documentation(cls.__doc__ or "")
    return cls


class _Documentation(str):
    """Docstring of a checked class, followed by its fields when it is read."""

    def __get__(self, instance: object, cls: type[Fielded]) -> str:
        hints = get_type_hints(cls, include_extras=True)
        lines = [inspect.cleandoc(self), "", "Attributes:"]
        for name, text in descriptions(cls).items():
            line = f"    {name}: {text}"
            names = _names_of(hints[name])
            if names:
                line += f" One of: {', '.join(names)}."
            lines.append(line)
        return "\n".join(lines)


def _names_of(annotation: object) -> tuple[str, ...]:
    """Return the valid names of a field, if its values are names."""
    for meta in getattr(annotation, "__metadata__", ()):
        if isinstance(meta, OneOf):
            return meta.names
    return ()


def from_texts(cls: type[T], values: Mapping[str, object]) -> T:
    """Return an instance of a checked class from texts, such as those of a command line, which are converted."""
    return _validate(cls, ArgsKwargs((), dict(values)), strict=False)


def _validate(
    cls: Callable[..., T], values: ArgsKwargs, *, strict: bool | None = None, self_instance: object = None
) -> T:
    try:
        return adapter(cls).validator.validate_python(values, strict=strict, self_instance=self_instance)
    except ValidationError as error:
        problems = [problem for _, problem in located_problems(cls, error)]
        raise ConfigError.combine(problems) from None


@cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """Return pydantic's checks of a class."""
    try:
        return TypeAdapter(cls)
    except SchemaError as error:  # pydantic makes one of a signal that comes meanwhile
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from None
        raise


def _check_all_values(self: object) -> None:
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


def ordered(cls: Any) -> list[Field[object]]:
    """Return the fields of a checked class: positional ones, then its own before those of its bases."""
    by_name = {field.name: field for field in fields(cls)}
    names = [field.name for field in by_name.values() if not field.kw_only]
    for base in cls.__mro__:
        names += [name for name in vars(base).get("__annotations__", {}) if name in by_name]
    return [by_name[name] for name in dict.fromkeys(names)]


def default_of(field: Field[object]) -> object:
    """Return the default of a field, or `inspect.Parameter.empty` if it has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    if field.default is MISSING:
        return inspect.Parameter.empty
    return field.default


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
        for option in ordered(cls):
            accepted = accepted_type(hints[option.name])
            parameter = inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY if option.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default_of(option),
                annotation=accepted,
            )
            parameters.append(parameter)
        run.__signature__ = inspect.Signature(parameters, return_annotation=annotation)  # type: ignore[attr-defined]
        lines = [f"{function.__doc__}\n", "Args:"]
        for name, text in descriptions(cls).items():
            on_one_line = " ".join(text.split())
            lines.append(f"    {name}: {on_one_line}")
        lines += ["", "Raises:", "    AvssError: a mistake, or work that failed."]
        run.__doc__ = "\n".join(lines)
        return run

    return decorate


def _schema_that_accepts_mappings(cls: type, source: object, handler: GetCoreSchemaHandler) -> Mapping[str, object]:
    """Return pydantic's schema of a strict dataclass, whose fields stay strict."""
    return {**handler(source), "strict": False}


def _described_schema(cls: type[Fielded], schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    """Return the JSON schema of a class with the descriptions of its fields."""
    json_schema = handler(schema)
    properties = handler.resolve_ref_schema(json_schema)["properties"]
    for name, text in descriptions(cls).items():
        properties[name]["description"] = text
    return json_schema


@cache
def descriptions(cls: type[Fielded]) -> dict[str, str]:
    """Return the docstring of every field of a checked class, by name."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        texts.update(_docstrings(base.__module__).get(base.__name__, {}))
    return {field.name: texts[field.name] for field in fields(cls) if field.name in texts}


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings below the fields of the classes of a module, by class and field."""
    try:
        source = inspect.getsource(sys.modules[module])
    except OSError:  # an installation without sources
        return {}
    docstrings = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            docstrings[node.name] = _field_docstrings(node)
    return docstrings


def _field_docstrings(node: ast.ClassDef) -> dict[str, str]:
    """Return the docstring below each field of a class that has one."""
    docstrings = {}
    for statement, below in pairwise(node.body):
        if not isinstance(statement, ast.AnnAssign):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docstrings[ast.unparse(statement.target)] = inspect.cleandoc(str(below.value.value))
    return docstrings


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
            for inner in problem["ctx"]["problems"]:
                yield problem["loc"], inner
        elif problem["type"] != "too_short" or not problem["input"]:
            yield problem["loc"], _problem(cls, problem, noun)


def _problem(cls: type, error: ErrorDetails, noun: str) -> ConfigError:
    """Return one of pydantic's errors as ConfigError. See `located_problems`."""
    kind = error["type"]
    value = error["input"]
    context = error.get("ctx") or {}
    name, inner = _field_at(cls, _named(cls, error["loc"]))
    if kind in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        unknown = str(error["loc"][-1])
        return ConfigError(f"Unknown {noun} '{unknown}'.", nearest(unknown, sorted(_fields(inner))))
    if kind == "unexpected_positional_argument":
        names = [field.name for field in fields(cls) if field.kw_only]
        return ConfigError(f"{value!r} needs a name.", f"Write it as a keyword: {', '.join(names)}.")
    if kind == "unknown_name":
        return ConfigError(f"Unknown `{name}` '{value}'.", context["hint"])
    if kind == "problem":
        return ConfigError(f"`{name}`: {context['message']}", context["hint"])
    complaint = _complaint(kind, value, context)
    if complaint is None:
        complaint = f": {error['msg']}"
    return ConfigError(f"`{name}`{complaint}.")


def _named(cls: type, path: Location) -> Location:
    """Return a path whose first part is the name of a field, where it was the index of a positional argument."""
    if not path or not isinstance(path[0], int):
        return path
    positional = [field.name for field in ordered(cls) if not field.kw_only]
    if path[0] >= len(positional):
        return path
    return (positional[path[0]], *path[1:])


def _field_at(cls: type, path: Location) -> tuple[str, type]:
    """Return the last field of a path, and the class of its value or, if that is a plain value, of the field."""
    name = ""
    for part in path:
        if part in _fields(cls):
            name = str(part)
            cls = next(_classes_in(_fields(cls)[name]), cls)
    return name, cls


def _fields(cls: Any) -> dict[str, object]:
    """Return the types of the fields of a checked class or a pydantic model, by key."""
    if is_dataclass(cls):
        hints = get_type_hints(cls)
        return {name: hint for name, hint in hints.items() if name in cls.__dataclass_fields__}
    return {info.alias or name: info.annotation for name, info in cls.model_fields.items()}


def _classes_in(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type) and hasattr(annotation, "__get_pydantic_core_schema__"):
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)


def _complaint(kind: str, value: object, context: Mapping[str, object]) -> str | None:
    """Return the predicate of the message for a type of pydantic's errors, or None for an unexpected type."""
    if kind.startswith("missing"):
        return " is missing"
    if kind in ("too_short", "string_too_short"):
        return " must not be empty"
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        return f" must be {_BOUNDS[kind]} {bound:g}, not {value}"
    expected = _EXPECTED.get(kind.partition("_")[0])
    if not expected:
        return None
    if value is None:
        return f" must be {expected}, not nothing"
    return f" must be {expected}, not {shorten(repr(value), MAX_SHOWN)}"
