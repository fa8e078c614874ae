"""YAML as plain values, and the line of each: small files only, no tags, and aliases that stay small."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from avss_dist.errors import ConfigError
from avss_dist.text import docs_page

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 100_000  # with aliases, a few lines can stand for any number of values
TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")
_PREFIX = "tag:yaml.org,2002:"
_HALF = re.compile("[\ud800-\udfff]")

Location = tuple[int | str, ...]
"""The keys and indices on the way to a value: ``("models", 0, "dtype")``."""


class JobError(ConfigError):
    """A job file has problems; the message has a line for each."""


@dataclass
class Document:
    """A YAML file.

    Attributes:
        path: the file.
        value: mappings, lists, and scalars as the file writes them (texts); None for null.
        lines: of every key and list item, from 1.
        repeated: keys that a mapping has twice, with the line of the second.
    """

    path: Path
    value: Any = None
    lines: dict[Location, int] = field(default_factory=lambda: {(): 1})
    repeated: list[tuple[int, str]] = field(default_factory=list)

    def line(self, location: Location) -> int:
        """The line of a value or, where the file does not have it, of the nearest one that it would be in."""
        known: Location = ()
        for part in location:
            if (*known, part) in self.lines:
                known = (*known, part)
        return self.lines[known]


def read_yaml(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        JobError: it cannot be read, is too large or nested too deeply, or is more than plain YAML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise JobError(
            f"The job file {path} cannot be read: {reason}.", f"{docs_page('job-files')} explains them."
        ) from None
    if len(data) > MAX_BYTES:
        raise JobError(
            f"{path} is no job file: it has more than {MAX_BYTES:,} bytes.", f"{docs_page('job-files')} explains them."
        )
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise JobError(f"{where}: this is not YAML: {getattr(error, 'problem', None) or error}.") from None
    except RecursionError:
        raise JobError(f"{path} is nested too deeply.", f"A job file has at most {MAX_DEPTH} levels.") from None
    document = Document(path)
    document.value = _Values(document).plain(root, ()) if root else None
    return document


@dataclass
class _Values:
    """Turns the nodes of a document into values, and notes their lines."""

    document: Document
    count: int = 0

    def plain(self, node: Any, location: Location) -> Any:
        self._require_plain(node, location)
        self.document.lines.setdefault(location, _line(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*location, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, location)
        return None if node.tag == f"{_PREFIX}null" else str(node.value)

    def _mapping(self, node: Any, location: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            self._require_plain(key, location)
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            if name in values:
                self.document.repeated.append((_line(key), f"the key '{name}' is there twice"))
                continue
            self.document.lines[(*location, name)] = _line(key)
            values[name] = self.plain(value, (*location, name))
        return values

    def _require_plain(self, node: Any, location: Location) -> None:
        self.count += 1
        where = f"{self.document.path}:{_line(node)}"
        if len(location) > MAX_DEPTH:
            raise JobError(f"{where}: nested too deeply.", f"A job file has at most {MAX_DEPTH} levels.")
        if self.count > MAX_VALUES:
            raise JobError(f"{where}: more than {MAX_VALUES:,} values.", "Make several jobs; use fewer aliases.")
        if isinstance(node.value, str) and _HALF.search(node.value):
            raise JobError(f"{where}: a text with half of a character.", "Write it in UTF-8.")
        if node.tag.removeprefix(_PREFIX) not in TAGS:
            raise JobError(f"{where}: the tag {node.tag.replace(_PREFIX, '!!')} is not plain YAML.", "Leave it out.")


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1
