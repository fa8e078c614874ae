"""Error classes. A message says what is wrong and where, a hint what to do next."""

from __future__ import annotations

import copy
import difflib
import errno
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_USERINFO = re.compile(  # a bucket has no port, so that digits before a slash are a secret
    r"(?<=s3://)[^\s/?#@:]*:(?=\S)[^@'\"\n]*@|(?<=://)[^\s/?#@:]*:(?=\S)(?!\d+[/?#])[^@'\"\n]*@"
)
_PARAMETER = re.compile(r"([?&][\w.-]*(?:key|secret|token|password|credential|sig)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE)
_URI = re.compile(r"[A-Za-z][\w+.-]*:/\S+")
_FIELD = re.compile(r"`([a-z][a-z0-9_]*)`")


def without_secrets(text: str) -> str:
    """Return a text without the secrets of its URIs: ``s3://KEY:SECRET@bucket`` becomes ``s3://bucket``."""
    return _URI.sub(lambda uri: _PARAMETER.sub(r"\1***", uri[0]), _USERINFO.sub("", text))


def spell_fields(text: str, spelling: Mapping[str, str]) -> str:
    """Return a text whose fields in backticks (```ranks```) are spelled as by a front end (``--ranks``).

    Args:
        spelling: spelling by field. Other fields stay unchanged.
    """
    return _FIELD.sub(lambda match: spelling.get(match[1], match[0]), text)


def named_fields(text: str) -> list[str]:
    """Return the fields that a text names in backticks, in order."""
    return _FIELD.findall(text)


class AvssError(Exception):
    """An error that the user can fix. It is shown without a traceback.

    Names of fields and arguments are in backticks (```ranks```). Front ends replace them by their spelling.

    Args:
        message: what is wrong, and where.
        hint: what to do next.
    """

    exit_code = 2
    run_id: str | None = None  # id of the run that it ended, if known

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = without_secrets(message)
        self.hint = hint
        if hint:
            self.hint = without_secrets(hint)
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        return f"{self.message}\n{self.hint}"


class ConfigError(AvssError):
    """A setting has an invalid value."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self._combined: tuple[ConfigError, ...] = ()

    @property
    def problems(self) -> tuple[ConfigError, ...]:
        """The combined errors, or the error itself."""
        return self._combined or (self,)

    @classmethod
    def combine(cls, problems: Sequence[ConfigError]) -> ConfigError:
        """Return one error for several problems, with a line for each. A single problem is returned unchanged."""
        if len(problems) == 1:
            return problems[0]
        lines = [f"{len(problems)} problems:"]
        for problem in problems:
            parts = [text for text in (problem.message, problem.hint) if text]
            lines.append(" ".join(parts))
        combined = cls("\n".join(lines))
        combined._combined = tuple(problems)
        return combined

    @classmethod
    def refuse(cls, *checks: tuple[object, str, str | None]) -> None:
        """Raise one error for all checks that apply.

        Args:
            checks: a condition that is true of invalid values, a message and a hint each.
        """
        problems = [cls(message, hint) for applies, message, hint in checks if applies]
        if problems:
            raise cls.combine(problems)


class CorpusError(AvssError):
    """The calibration text cannot be read, or is too short."""


class NoRows(CorpusError):
    """The calibration text can be read, and is too short for a row."""


class ModelError(AvssError):
    """The checkpoint cannot be opened or observed."""


class WarehouseError(AvssError):
    """The Parquet warehouse cannot be read or written."""


class NoRuns(WarehouseError):
    """The warehouse has no run that can be read."""


class DamagedFile(WarehouseError):
    """A file of the warehouse is damaged."""


class QueryError(AvssError):
    """A query is invalid, or accesses more than the warehouse."""


class TaskError(AvssError):
    """A task is unknown, its data cannot be loaded, or it runs code."""


class RunFailed(AvssError):
    """The request was valid. The work failed while it ran."""

    exit_code = 1


class BatchTooLarge(RunFailed):
    """A batch does not fit in memory."""


class StorageFull(RunFailed):
    """There is no space left on a disk, or for this user."""


def is_full(error: OSError) -> bool:
    """Whether a file could not be written because there is no space left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def unwritable(path: object, error: OSError, hint: str, kind: type[AvssError] = AvssError) -> AvssError:
    """Return the error for a file or folder that cannot be written. A full disk is a failure, all else a mistake.

    Args:
        path: path for the message.
        error: error of the operating system.
        hint: hint of the error, such as another place to write to.
        kind: type of the error, unless the disk is full.
    """
    if is_full(error):
        kind = StorageFull
    return kind(f"{path} cannot be written: {error.strerror}.", hint)


@contextmanager
def explain_unwritable(path: object, hint: str, kind: type[AvssError] = AvssError) -> Iterator[None]:
    """Convert OSError inside the block to the error of `unwritable`, with the same arguments."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error, hint, kind) from error


def as_failure(error: BaseException) -> AvssError:
    """Convert any exception to an AvssError that ends one run. A model's code can raise anything.

    Only transient failures and full disks have the hint to run the command again.
    """
    if isinstance(error, AvssError):
        return error
    hint = None
    if isinstance(error, (ConnectionError, TimeoutError, MemoryError)):
        hint = "Run the same command again."
    if isinstance(error, OSError) and is_full(error):
        hint = "Free some space and run the same command again."
    failure = RunFailed(f"{type(error).__name__}: {error}", hint)
    failure.__cause__ = error
    return failure


@contextmanager
def explain_damaged_record(file: Path, problem: str, hint: str) -> Iterator[None]:
    """Raise ModelError in place of an error by which a JSON record beside a checkpoint's weights cannot be read.

    Args:
        problem: clause of the message: ``is not a valid record of a repair``.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        why = error.message if isinstance(error, ConfigError) else str(error)
        raise ModelError(f"{file} {problem}: {why}", hint) from error


def own_copy(error: AvssError) -> AvssError:
    """Return a copy of an error that ends several runs, for one of them: its notes and attributes are its own."""
    copied = copy.copy(error).with_traceback(error.__traceback__)
    copied.__cause__ = error.__cause__
    copied.__context__ = error.__context__
    copied.__suppress_context__ = error.__suppress_context__
    notes = getattr(error, "__notes__", None)
    if notes:
        copied.__notes__ = list(notes)
    return copied


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name without a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_names(names: Sequence[str], maximum: int = 3, separator: str = ", ") -> str:
    """Return the first names of a list and the number of all others, for a message: ``a, b, c and 4 more``."""
    text = separator.join(names[:maximum])
    if len(names) > maximum:
        text += f" and {len(names) - maximum:,} more"
    return text


# Of more names than 40, an error lists 10.
MAX_SUGGESTED = 10
SHORTEN_ABOVE = 40


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint with the valid names and the most similar one: ``Did you mean 'block'? Valid: block, mlp.``

    It is empty without valid names.
    """
    names = [str(valid_name) for valid_name in valid]
    if not names:
        return ""
    maximum = len(names)
    if len(names) > SHORTEN_ABOVE:
        maximum = MAX_SUGGESTED
    hint = f"Valid: {first_names(names, maximum)}."
    matches = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    if matches:
        hint = f"Did you mean '{matches[0]}'? {hint}"
    return hint


def require_known(kind: str, name: str, valid: Collection[str], error: type[AvssError] = ConfigError) -> str:
    """Return ``name`` if it is valid.

    Args:
        kind: kind of the name for the message: a field in backticks, or a noun.

    Raises:
        AvssError: the name is not valid. The type is ``error``, and the hint names the nearest valid name.
    """
    if name not in valid:
        raise error(f"Unknown {kind} '{name}'.", nearest(name, valid))
    return name
