"""Reader of users' YAML files: plain values, the line of each, and every problem in one message; and their writer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from avss_dist.core.errors import AvssError, ConfigError, named_fields, spell_fields
from avss_dist.core.text import printable
from avss_dist.core.validation import Location, adapter, located_problems

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 100_000  # with aliases, a few lines can stand for any number of values
TAGS = {
    "scalar": ("null", "bool", "int", "float", "str", "timestamp", "value"),
    "sequence": ("seq",),
    "mapping": ("map",),
}
"""Tags of plain YAML by the kind of node that has them."""
_PREFIX = "tag:yaml.org,2002:"
_HALF = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class YamlKind:
    """A kind of YAML file: its name in messages, and what it may contain.

    Attributes:
        noun: the kind, for messages: ``job file``.
        hint: hint of errors.
        error: the type of errors.
        typed: scalars become values by the rules of YAML 1.1, as ``yaml.safe_load`` has them. Otherwise they are
            the texts of the file. There are no merge keys.
        tags: constructors, by tag, from the text of a scalar that has the tag.
    """

    noun: str
    hint: str
    error: type[AvssError]
    typed: bool = True
    tags: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)


@dataclass
class Document:
    """A YAML file whose value is a mapping.

    Attributes:
        path: the file.
        kind: the kind of file that it was read as.
        value: mapping of keys to mappings, lists, scalars, and None for null.
        lines: line of every key and list item, from 1.
        problems: line and text of everything that is wrong with the file. A repeated key is a problem.
        count: number of values that were read.
    """

    path: Path
    kind: YamlKind
    value: dict[Any, Any] = field(default_factory=dict)
    lines: dict[Location, int] = field(default_factory=lambda: {(): 1})
    problems: set[tuple[int, str]] = field(default_factory=set)
    count: int = 0
    _loader: Any = field(default_factory=lambda: yaml.SafeLoader(""), repr=False)

    def line(self, location: Location) -> int:
        """Return the line of a value or, if the file does not have the value, of the nearest mapping or list around."""
        nearest: Location = ()
        for part in location:
            if (*nearest, part) in self.lines:
                nearest = (*nearest, part)
        return self.lines[nearest]

    def report(self, location: Location, problem: str | ConfigError) -> None:
        """Add a problem, with the keys of the file in place of fields."""
        text = str(problem)
        if text.startswith("Unknown key"):  # files have many keys
            text = text.partition(" Valid:")[0]
        plain = spell_fields(text, {name: name for name in named_fields(text)})
        self.problems.add((self.line(location), plain.replace("\n", " ")))

    def parse(self, cls: Callable[..., T], values: Any, *at: Location) -> T | None:
        """Return values of the file as an instance of a class. If they are invalid, add the problems and return None.

        Args:
            cls: a checked class or a pydantic model.
            at: locations of the mappings that the values come from, the one that counts first. The root by default.
        """
        try:
            return adapter(cls).validate_python(values, strict=None if self.kind.typed else False)
        except ValidationError as error:
            problems = [*located_problems(cls, error, noun="key")]
        misspelled = [str(location[-1]) for location, problem in problems if problem.message.startswith("Unknown key")]
        for location, problem in problems:
            if problem.message.endswith(" is missing.") and get_close_matches(str(location[-1]), misspelled, 1, 0.6):
                continue  # the key is there, misspelled
            around = [(*place, *location) for place in at or ((),)]
            around.sort(key=lambda key: key[: len(key) - len(location) + 1] not in self.lines)  # with the field first
            places = [*((*key, name) for key in around for name in named_fields(problem.message)), *around]
            self.report(next((place for place in places if place in self.lines), around[0]), problem)
        return None

    def require_valid(self, parsed: T | None) -> T:
        """Return a parsed value.

        Raises:
            AvssError: the file has problems. The message has a line for each. The type is that of the kind.
        """
        if self.problems or parsed is None:
            lines = [f"{self.path}:{line}: {text}" for line, text in sorted(self.problems)]
            count = [f"{self.path} has {len(lines)} problems:"] if len(lines) > 1 else []
            raise self.kind.error("\n".join([*count, *lines]), self.kind.hint)
        return parsed

    def read(self, node: Any, location: Location) -> Any:
        """Return the value of a node of the file, and note its line."""
        self._require_plain(node, location)
        self.lines.setdefault(location, _line(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*location, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, location)
        return self._scalar(node)

    def _scalar(self, node: Any) -> Any:
        if node.tag in self.kind.tags:
            return self.kind.tags[node.tag](node.value)
        if not self.kind.typed:
            return None if node.tag == f"{_PREFIX}null" else str(node.value)
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # `!!bool 7`: a KeyError
            reason = str(error) if type(error) is ValueError else f"'{node.value[:40]}' is not a {_name(node.tag)}"
            raise self._error(node, f"this is not YAML: {reason}.") from None

    def _mapping(self, node: Any, location: Location) -> dict[Any, Any]:
        lines, values = self.lines, dict[Any, Any]()
        for key, value in node.value:
            self._require_plain(key, location)
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, f"a key must be a text, not a {_name(key.tag)}.")
            name = self._scalar(key) if self.kind.typed else str(key.value)
            if name in values:
                self.problems.add(
                    (_line(key), f"the key '{key.value}' is repeated; the first is in line {lines[(*location, name)]}.")
                )
                continue
            lines[(*location, name)] = _line(key)
            values[name] = self.read(value, (*location, name))
        return values

    def _require_plain(self, node: Any, location: Location) -> None:
        self.count += 1
        if len(location) > MAX_DEPTH:
            raise self._error(node, "nested too deeply.", f"A {self.kind.noun} has at most {MAX_DEPTH} levels.")
        if self.count > MAX_VALUES:
            raise self._error(node, f"more than {MAX_VALUES:,} values.", "Split the file, or use fewer aliases.")
        if isinstance(node.value, str) and _HALF.search(node.value):
            raise self._error(node, "a text has half of a surrogate pair.", "Write the character in UTF-8.")
        of_kind = node.id == "scalar" and node.tag in self.kind.tags
        if not of_kind and node.tag.removeprefix(_PREFIX) not in TAGS[node.id]:
            raise self._error(node, f"the tag {_name(node.tag)} is not plain YAML.", "Leave it out.")

    def _error(self, node: Any, problem: str, hint: str | None = None) -> AvssError:
        return self.kind.error(f"{self.path}:{_line(node)}: {problem}", hint or self.kind.hint)


def read_yaml(path: Path, kind: YamlKind) -> Document:
    """Read a YAML file.

    Raises:
        AvssError: the file cannot be read, is too large or nested too deeply, is more than plain YAML, or its value is
            not a mapping. The type is that of the kind.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null
        reason = getattr(error, "strerror", None) or "its name has a null"
        raise kind.error(f"The {kind.noun} {path} cannot be read: {reason}.", kind.hint) from None
    if len(data) > MAX_BYTES:
        raise kind.error(f"{path} is too large for a {kind.noun}: expected at most {MAX_BYTES:,} bytes.", kind.hint)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise kind.error(f"The {kind.noun} {path} cannot be read: it is not UTF-8 text.", kind.hint) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise kind.error(f"{where}: this is not YAML: {reason}.", kind.hint) from None
    except RecursionError:
        raise kind.error(f"{path} is nested too deeply: expected at most {MAX_DEPTH} levels.", kind.hint) from None
    if not isinstance(root, yaml.MappingNode):
        raise kind.error(f"{path} is not a {kind.noun}: expected a mapping with keys.", kind.hint)
    document = Document(path, kind)
    document.value = document.read(root, ())
    return document


def to_yaml(values: Mapping[str, Any], *, flow: bool = False) -> str:
    """Return values as YAML that any terminal can show."""
    dump = partial(yaml.safe_dump, values, sort_keys=False, default_flow_style=None if flow else False, width=120)
    text = str(dump(allow_unicode=True))
    return text if printable(text) == text else str(dump())  # escaped: it has control characters


def _name(tag: str) -> str:
    return tag.replace(_PREFIX, "!!")


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1
