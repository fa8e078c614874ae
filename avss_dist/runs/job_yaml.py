"""The nodes of a YAML file, which know their lines: values by the type that they must have, and mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from avss_dist.errors import ConfigError, nearest
from avss_dist.text import parse_bytes

WRONG = object()  # in place of a value that was a mistake


class JobError(ConfigError):
    """A job file has mistakes; the message has a line for each."""


def line_of(node: Any) -> int:
    """The line that a node begins in, from 1."""
    return int(node.start_mark.line) + 1


def say_value(node: Any) -> str:
    """What stands there, for people."""
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"


def _scalar(node: Any) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError
    return str(node.value)


def _text(node: Any) -> str:
    if not (text := _scalar(node)) or node.tag.endswith(":null"):
        raise ValueError
    return text


def _bool(node: Any) -> bool:
    if _scalar(node) not in ("true", "false"):
        raise ValueError
    return _scalar(node) == "true"


def _number(node: Any) -> float:
    return float(_scalar(node))


def _integer(node: Any) -> int:
    return int(_scalar(node))


def _list(node: Any) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError
    return list(node.value)


def _sizes(node: Any) -> dict[str, int]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError
    return {str(key.value): parse_bytes(_scalar(value)) for key, value in node.value}


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda node: None if node.tag.endswith(":null") else read(node)


# By the type of a field: how it is read, and what to call it.
READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (_integer, "a whole number"),
    "int | None": (_optional(_integer), "a whole number"),
    "float": (_number, "a number"),
    "str": (_text, "a name"),
    "str | None": (_optional(_text), "a name"),
    "bool": (_bool, "true or false"),
    "tuple[str, ...]": (lambda node: tuple(_text(item) for item in _list(node)), "a list of names"),
    "tuple[float, ...]": (lambda node: tuple(_number(item) for item in _list(node)), "a list of numbers"),
    "Mapping[str, int]": (_sizes, "sizes by device, such as {cpu: 20GB}"),
}


@dataclass
class NodeReader:
    """Reads nodes and collects mistakes, each with its line, instead of stopping at the first.

    Attributes:
        path: the file.
        elsewhere: keys that people look for in it, and where they are.
        mistakes: line and text.
    """

    path: Path
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    mistakes: list[tuple[int, str]] = field(default_factory=list)

    def refuse_mistakes(self) -> None:
        """Raise what was collected, in the order of the lines.

        Raises:
            JobError: there is something.
        """
        if not self.mistakes:
            return
        lines = [f"{self.path}:{line}: {what}" for line, what in sorted(self.mistakes)]
        count = f"{self.path} has {len(lines)} mistake{'s' if len(lines) > 1 else ''}; nothing was run."
        raise JobError("\n".join([count, *lines]), "The keys are explained in jobs/README.md.")

    def wrong(self, node: Any, what: str) -> None:
        """Note a mistake."""
        self.mistakes.append((line_of(node), what))

    def mapping(self, node: Any, names: Sequence[str]) -> dict[str, Any]:
        """The known keys of a mapping and the nodes of their values; others, and repeated ones, are mistakes."""
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, f"this must be a mapping with the keys {', '.join(names)}")
            return {}
        parts: dict[str, Any] = {}
        for key, value in node.value:
            if key.value not in names:
                self.wrong(key, f"unknown key {say_value(key)}. {self.nearest_key(str(key.value), names)}")
            elif key.value in parts:
                self.wrong(key, f"the key '{key.value}' is there twice")
            else:
                parts[key.value] = value
        return parts

    def items(self, node: Any, name: str) -> list[Any]:
        """The nodes of a list that must not be empty."""
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.wrong(node, f"{name} must be a list with at least one entry: - one")
            return []
        return list(node.value)

    def texts(self, node: Any, name: str) -> Iterator[tuple[Any, str]]:
        """The texts of a list, each once."""
        seen: set[str] = set()
        for item in self.items(node, name):
            text = self.text(item)
            if text in seen:
                self.wrong(item, f"'{text}' is there twice")
            elif text is not None:
                seen.add(text)
                yield item, text

    def text(self, node: Any) -> str | None:
        """A scalar as the file writes it; None, and a mistake, where it is none."""
        if isinstance(node, yaml.ScalarNode) and node.value and not node.tag.endswith(":null"):
            return str(node.value)
        self.wrong(node, "this must be one name")
        return None

    def value(self, node: Any, kind: str, name: str) -> Any:
        """A value of the type that an option has; `WRONG`, and a mistake, where it is another."""
        read, what = READERS[kind]
        try:
            return read(node)
        except ConfigError as error:
            self.wrong(node, f"{name} must be {what}: {error.message}")
        except ValueError:
            self.wrong(node, f"{name} must be {what}, not {say_value(node)}")
        return WRONG

    def nearest_key(self, key: str, names: Sequence[str]) -> str:
        """The nearest valid key; where none is near, all of them."""
        return self.elsewhere.get(key) or nearest(key, names).partition(" Valid:")[0]
