"""Reader of users' YAML files: plain values, the line of each, and every problem in one message; and their writer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from avss_dist.core.errors import AvssError, ConfigError, named_fields, spell_fields
from avss_dist.core.text import printable
from avss_dist.core.validation import Location, adapter, located_problems
from avss_dist.core.values import JsonObject

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
    tags: Mapping[str, Callable[[str], object]] = field(default_factory=dict)


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
    value: dict[object, object] = field(default_factory=dict)
    lines: dict[Location, int] = field(default_factory=lambda: {(): 1})
    problems: set[tuple[int, str]] = field(default_factory=set)
    count: int = 0
    _loader: yaml.SafeLoader = field(default_factory=lambda: yaml.SafeLoader(""), repr=False)

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
        as_they_are = {name: name for name in named_fields(text)}
        plain = spell_fields(text, as_they_are)
        self.problems.add((self.line(location), plain.replace("\n", " ")))

    def parse(self, cls: Callable[..., T], values: object, *at: Location) -> T | None:
        """Return values of the file as an instance of a class. If they are invalid, add the problems and return None.

        Args:
            cls: a checked class or a pydantic model.
            at: locations of the mappings that the values come from, the one that counts first. The root by default.
        """
        try:
            return adapter(cls).validate_python(values, strict=None if self.kind.typed else False)
        except ValidationError as error:
            problems = list(located_problems(cls, error, noun="key"))
        misspelled = [str(location[-1]) for location, problem in problems if problem.message.startswith("Unknown key")]
        for location, problem in problems:
            if problem.message.endswith(" is missing.") and get_close_matches(str(location[-1]), misspelled, 1, 0.6):
                continue  # the key is there, misspelled
            self.report(self._place(location, named_fields(problem.message), at or ((),)), problem)
        return None

    def _place(self, location: Location, names: Sequence[str], at: Sequence[Location]) -> Location:
        """Return the place in the file that a problem is shown at: a field that it names, or the value itself.

        Args:
            location: location of the value below a mapping.
            names: fields that the problem names, which are below the value.
            at: locations of the mappings that the value may come from.
        """
        having_the_field = []
        others = []
        for mapping in at:
            if (*mapping, *location[:1]) in self.lines:
                having_the_field.append((*mapping, *location))
            else:
                others.append((*mapping, *location))
        values = having_the_field + others
        for value in values:
            for name in names:
                if (*value, name) in self.lines:
                    return (*value, name)
        for value in values:
            if value in self.lines:
                return value
        return values[0]

    def require_valid(self, parsed: T | None) -> T:
        """Return a parsed value.

        Raises:
            AvssError: the file has problems. The message has a line for each. The type is that of the kind.
        """
        if self.problems or parsed is None:
            lines = [f"{self.path}:{line}: {text}" for line, text in sorted(self.problems)]
            if len(lines) > 1:
                lines.insert(0, f"{self.path} has {len(lines)} problems:")
            raise self.kind.error("\n".join(lines), self.kind.hint)
        return parsed

    def read(self, node: yaml.Node, location: Location) -> object:
        """Return the value of a node of the file, and note its line."""
        self._require_plain(node, location)
        self.lines.setdefault(location, _line(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*location, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, location)
        return self._scalar(node)

    def _scalar(self, node: yaml.Node) -> object:
        if node.tag in self.kind.tags:
            return self.kind.tags[node.tag](node.value)
        if not self.kind.typed:
            if node.tag == f"{_PREFIX}null":
                return None
            return str(node.value)
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # `!!bool 7`: a KeyError
            reason = f"'{node.value[:40]}' is not a {_name(node.tag)}"
            if type(error) is ValueError:
                reason = str(error)
            raise self._error(node, f"this is not YAML: {reason}.") from None

    def _mapping(self, node: yaml.Node, location: Location) -> dict[object, object]:
        lines = self.lines
        values: dict[object, object] = {}
        for key, value in node.value:
            self._require_plain(key, location)
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, f"a key must be a text, not a {_name(key.tag)}.")
            name = self._scalar(key) if self.kind.typed else str(key.value)
            if name in values:
                first = lines[(*location, name)]
                self.problems.add((_line(key), f"the key '{key.value}' is repeated; the first is in line {first}."))
                continue
            lines[(*location, name)] = _line(key)
            values[name] = self.read(value, (*location, name))
        return values

    def _require_plain(self, node: yaml.Node, location: Location) -> None:
        self.count += 1
        if len(location) > MAX_DEPTH:
            raise self._error(node, "nested too deeply.", f"A {self.kind.noun} has at most {MAX_DEPTH} levels.")
        if self.count > MAX_VALUES:
            raise self._error(node, f"more than {MAX_VALUES:,} values.", "Split the file, or use fewer aliases.")
        if isinstance(node.value, str) and _HALF.search(node.value):
            raise self._error(node, "a text has half of a surrogate pair.", "Write the character in UTF-8.")
        is_of_kind = node.id == "scalar" and node.tag in self.kind.tags
        if not is_of_kind and node.tag.removeprefix(_PREFIX) not in TAGS[node.id]:
            raise self._error(node, f"the tag {_name(node.tag)} is not plain YAML.", "Leave it out.")

    def _error(self, node: yaml.Node, problem: str, hint: str | None = None) -> AvssError:
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
        where = str(path)
        mark = getattr(error, "problem_mark", None)
        if mark:
            where = f"{path}:{mark.line + 1}"
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise kind.error(f"{where}: this is not YAML: {reason}.", kind.hint) from None
    except RecursionError:
        raise kind.error(f"{path} is nested too deeply: expected at most {MAX_DEPTH} levels.", kind.hint) from None
    if not isinstance(root, yaml.MappingNode):
        raise kind.error(f"{path} is not a {kind.noun}: expected a mapping with keys.", kind.hint)
    document = Document(path, kind)
    value = document.read(root, ())
    assert isinstance(value, dict)
    document.value = value
    return document


def to_yaml(values: JsonObject, *, flow: bool = False) -> str:
    """Return values as YAML that any terminal can show."""
    flow_style = None if flow else False  # None: lists of plain values alone
    dump = partial(yaml.safe_dump, values, sort_keys=False, default_flow_style=flow_style, width=120)
    text = str(dump(allow_unicode=True))
    if printable(text) == text:
        return text
    return str(dump())  # control characters are escaped


def _name(tag: str) -> str:
    return tag.replace(_PREFIX, "!!")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
