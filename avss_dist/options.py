"""Base of requests: command-line options, Python keywords and reference are made from the fields of checked classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import wraps
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    ParamSpec,
    TypeVar,
    dataclass_transform,
    get_type_hints,
)

from avss_dist.core.errors import ConfigError, nearest
from avss_dist.core.settings import Execution, Settings, split_options
from avss_dist.core.validation import checked, descriptions

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Option:
    """Metadata of a field that says how the command line spells it: ``Annotated[str, Option(names=("--task",))]``.

    Args:
        names: spellings; by default the name of the field.
        panel: heading of the option in the help.
        metavar: placeholder of the value in the help.
        environment: environment variable that has the default.
        argument: the value is a positional argument.
        repeatable: the option may be given several times; always true for tuples.
    """

    names: tuple[str, ...] = ()
    panel: str | None = None
    metavar: str | None = None
    environment: str | None = None
    argument: bool = False
    repeatable: bool = False


SHARED: dict[str, type] = {f.name: cls for cls in (Settings, Execution) for f in fields(cls)}
"""Class of each field that many commands share, by the field's name."""

_DEFAULTS = Settings().as_dict() | asdict(Execution())


def refuse_unused(given: Mapping[str, Any], reason: str, hint: str) -> None:
    """Raise ConfigError if an option without effect has another value than its default.

    Args:
        given: values by option. An option that is not in `SHARED` has an empty default, such as 0 or None.
        reason: end of the message, such as "without a search".
    """
    for name, value in given.items():
        if value and value != _DEFAULTS.get(name):
            raise ConfigError(f"`{name}` has no effect {reason}.", hint)


if TYPE_CHECKING:

    @checked
    class Request(Settings, Execution):
        """Values of a command. Type checkers see all fields of `Settings` and `Execution` in every request."""

        shared: ClassVar[tuple[str, ...]]
        replaces: ClassVar[bool]
        on_event: Any = None

        @property
        def settings(self) -> Settings: ...
        @property
        def execution(self) -> Execution: ...
        @property
        def given(self) -> dict[str, Any]: ...

else:

    class Request:
        """Values of a command.

        Attributes:
            shared: names of the fields of `Settings` and `Execution` that the command takes as well.
            replaces: values of shared fields replace those of a file. Their options have no defaults.
            settings, execution: made from the values of the shared fields.
            given: values of the shared fields, as they were passed.
            on_event: receives the events of the work. It has no option.
        """

        shared: ClassVar[tuple[str, ...]] = ()
        replaces: ClassVar[bool] = False


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def request(cls: type[T]) -> type[T]:
    """Make a `Request` a checked class that also takes the shared fields of settings as keywords.

    All problems of its values, including those of settings, are reported at once.
    """
    checked_class: Any = checked(cls)
    initialize = checked_class.__init__
    known = {*checked_class.__dataclass_fields__, *checked_class.shared, "on_event"}

    def initialize_with_settings(self: Any, *positional: Any, on_event: Any = None, **values: Any) -> None:
        given = {name: values.pop(name) for name in [*values] if name in checked_class.shared}
        problems = [
            _not_taken(name, sorted(known)) for name, value in values.items() if _is_unknown(name, value, known)
        ]
        try:
            initialize(self, *positional, **{name: value for name, value in values.items() if name in known})
        except ConfigError as error:
            problems += error.problems
        try:
            settings, execution = split_options(given)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError.combine(problems)
        vars(self).update(settings=settings, execution=execution, given=given, on_event=on_event)

    checked_class.__init__ = initialize_with_settings
    checked_class.__getstate__ = lambda self: vars(self) | {"on_event": None}  # a callback stays in its process
    return checked_class


def _is_unknown(name: str, value: Any, known: set[str]) -> bool:
    """Whether a value belongs to no field. Defaults of settings that are not shared are allowed."""
    defaults = Settings() if SHARED.get(name) is Settings else Execution()
    return name not in known and not (name in SHARED and value == getattr(defaults, name))


def _not_taken(name: str, valid: Sequence[str]) -> ConfigError:
    """Return the error of a keyword that a request does not take."""
    if name in SHARED:
        return ConfigError(f"`{name}` has no effect on this command.", "Leave it out.")
    return ConfigError(f"Unknown option '{name}'.", nearest(name, valid))


def field_values(cls: Any, values: Any) -> dict[str, Any]:
    """Return the fields that a request has in common with another class, to make an instance of it."""
    return {f.name: getattr(values, f.name) for f in fields(cls) if f.name in values.__dataclass_fields__}


def request_values(values: Any) -> dict[str, Any]:
    """Return the fields of a request by name, without those of settings."""
    return {f.name: getattr(values, f.name) for f in fields(values)}


def keywords(cls: Callable[P, R]) -> Callable[[Callable[[R], T]], Callable[P, T]]:
    """Decorate a function of a request to take the request's fields as keywords, with signature and docstring."""

    def decorate(function: Callable[[R], T]) -> Callable[P, T]:
        @wraps(function)
        def run(*positional: P.args, **named: P.kwargs) -> T:
            return function(cls(*positional, **named))

        annotation = inspect.signature(function).return_annotation
        run.__signature__ = inspect.Signature(_request_parameters(cls), return_annotation=annotation)  # type: ignore[attr-defined]
        run.__doc__ = f"{function.__doc__}\n\n{_explained(cls)}"
        return run

    return decorate


def ordered(cls: Any) -> list[str]:
    """Return the fields of a request: positional ones, then other required ones, then its own before inherited."""

    def place(field: Field[Any]) -> tuple[bool, bool, bool]:
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        inherited = field.name not in vars(cls).get("__annotations__", {})
        return bool(field.kw_only), has_default, bool(field.kw_only) and inherited

    return [field.name for field in sorted(fields(cls), key=place)]


def _request_parameters(cls: Any) -> list[inspect.Parameter]:
    """Return the parameters of a request: positional ones, the others, a callback, and the shared settings."""
    hints = get_type_hints(cls)
    parameters = [_parameter(cls.__dataclass_fields__[name], hints[name]) for name in ordered(cls)]
    parameters.append(inspect.Parameter("on_event", inspect.Parameter.KEYWORD_ONLY, default=None))
    for name in cls.shared:
        parameters.append(_parameter(SHARED[name].__dataclass_fields__[name], get_type_hints(SHARED[name])[name]))  # type: ignore[attr-defined]
    return parameters


def _parameter(item: Field[Any], annotation: Any) -> inspect.Parameter:
    if item.default_factory is not MISSING:
        default = item.default_factory()
    else:
        default = inspect.Parameter.empty if item.default is MISSING else item.default
    kind = inspect.Parameter.KEYWORD_ONLY if item.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(item.name, kind, default=default, annotation=annotation)


def _explained(cls: Any) -> str:
    """Return the section ``Args`` of a docstring."""
    lines = [f"    {name}: {' '.join(text.split())}" for name, text in descriptions(cls).items()]
    if cls.shared:
        lines.append("    Fields of `settings.Settings` and `settings.Execution`: see there.")
    return "\n".join(["Args:", *lines, "", "Raises:", "    AvssError: a mistake, or work that failed."])
