"""Errors for people: what is wrong, where, and what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_USERINFO = re.compile(r"(?<=://)[^\s/?#@:]*:(?=\S)(?!\d+[/?#])[^@'\"\n]*@")
_PARAMETER = re.compile(r"([?&][\w.-]*(?:key|secret|token|password|credential|sig)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """A text whose URIs name no secret: ``s3://KEY:SECRET@bucket`` becomes ``s3://bucket``."""
    return _PARAMETER.sub(r"\1***", _USERINFO.sub("", text))


class AvssError(Exception):
    """A mistake that the user can mend; shown without a traceback.

    Args:
        message: what is wrong, and where.
        hint: what to do next.
    """

    exit_code = 2
    run_id: str | None = None  # the run that it ended, if it got so far

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = without_secrets(message)
        self.hint = hint and without_secrets(hint)
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(AvssError):
    """A setting has a value that it cannot have."""


class CorpusError(AvssError):
    """The calibration text cannot be read, or is too short."""


class ModelError(AvssError):
    """The checkpoint cannot be opened or observed."""


class WarehouseError(AvssError):
    """The Parquet warehouse cannot be read or written."""


class StorageFull(WarehouseError):
    """There is no space left for the warehouse."""


class QueryError(AvssError):
    """A query is wrong, or reaches beyond the warehouse."""


class TaskError(AvssError):
    """A task is unknown, or cannot be asked: its data are not to be had, or it runs code."""


class RunFailed(AvssError):
    """The work was asked for correctly and failed while it ran."""

    exit_code = 1


class BatchTooLarge(RunFailed):
    """A batch does not fit in memory."""


def as_failure(error: Exception) -> AvssError:
    """An error as a run's end: a model's own code can raise anything, and must not stop the other models."""
    if isinstance(error, AvssError):
        return error
    failure = RunFailed(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


FEW, MANY = 10, 40  # names that are told where there are many


def nearest(name: str, valid: Iterable[str]) -> str:
    """Say which names are valid, the most similar one first: ``did you mean 'block'?``."""
    names = [str(v) for v in valid]
    match = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    more = f" and {len(names) - FEW:,} more" if len(names) > MANY else ""
    told = f"Valid: {', '.join(names[:FEW] if more else names)}{more}."
    return f"Did you mean '{match[0]}'? {told}" if match else told


def require_known(kind: str, name: str, valid: Iterable[str], error: type[AvssError] = ConfigError) -> str:
    """Return ``name`` if it is valid.

    Raises:
        AvssError: of the type ``error``, naming the nearest valid one.
    """
    names = list(valid)
    if name not in names:
        raise error(f"Unknown {kind} '{name}'.", nearest(name, names))
    return name
