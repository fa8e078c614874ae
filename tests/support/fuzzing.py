"""Fuzzing: what must hold of every command whatever it is given, how much is tried, and mutations of real files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from support.command_line import avss

TIMES = int(os.environ.get("AVSS_FUZZ", "0"))
"""Examples of each test, in hundreds, new ones each time; by default a few, and the same ones."""
CODES = {0, 1, 2, 130}
HOSTILE = (
    "",
    " ",
    "\x1b]0;owned\x07\x1b[31m",
    "\u202eabc\u2066",
    "=HYPERLINK(0)",
    "-1+1",
    "<script>alert(1)</script>",
    "a'b\"c`d${x}",
    "[red]x[/red]",
    "../../x",
    "\x00",
    "\ud800",
    "x" * 5000,
    "𝔸é漢",
    "nan",
    "{{ 7 * 7 }}",
    "%s%n{0}",
    "a\nb\tc\rd",
)
NUMBERS = (0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0.0, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"))
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def fuzzed(few: int) -> Callable[[Any], Any]:
    """Settings of a test: ``few`` examples, or as many as the environment variable ``AVSS_FUZZ`` says."""
    return settings(
        max_examples=100 * TIMES or few,
        derandomize=not TIMES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def hold(*args: object) -> tuple[int, str]:
    """Run a command in this process: it ends with one of `CODES`, without a traceback and control characters."""
    result = avss(*args)
    text = result.stdout + result.stderr
    assert result.exit_code in CODES, (args, result.exit_code, text)
    assert "Traceback" not in text, (args, text)
    assert not _OBEYED.search(text), (args, text)
    return result.exit_code, text


def hold_with_one_error(*args: object) -> None:
    """As `hold`, of a command that nobody interrupts: it says one error at most."""
    code, text = hold(*args)
    assert code in (0, 1, 2), text
    assert sum(line.startswith("Error: ") for line in text.splitlines()) <= 1, text


def texts() -> st.SearchStrategy[str]:
    """Texts, hostile ones among them."""
    return st.sampled_from(HOSTILE) | st.text(max_size=20)


def values() -> st.SearchStrategy[Any]:
    """Whatever a YAML or JSON file can hold."""
    leaves = st.none() | st.booleans() | st.sampled_from(NUMBERS) | texts() | st.integers(-10, 10) | st.dates()
    return st.recursive(
        leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts(), v, max_size=3), max_leaves=5
    )


def mutated(value: Any) -> st.SearchStrategy[Any]:
    """A value of dicts and lists with a part of it changed, left out, or another beside it."""

    @st.composite
    def change(draw: Any) -> Any:
        return _changed(draw, value)

    return change()


def _changed(draw: Any, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value, key=str)))
        kind = draw(st.sampled_from(["deeper", "drop", "add", "rename"]))
        if kind == "drop":
            return {k: v for k, v in value.items() if k != key}
        if kind == "add":
            return value | {draw(texts()): draw(values())}
        if kind == "rename":
            renamed = {}
            for name, content in value.items():
                if name == key:
                    renamed[draw(texts())] = content
                else:
                    renamed[name] = content
            return renamed
        return value | {key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        i = draw(st.integers(0, len(value) - 1))
        kind = draw(st.sampled_from(["deeper", "drop", "twice"]))
        if kind == "drop":
            return value[:i] + value[i + 1 :]
        return [*value[:i], _changed(draw, value[i]), *value[i + (kind == "deeper") :]]
    return draw(values())


def damaged_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes with a few flipped, cut off, repeated or inserted, most often near the beginning."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        last = max(0, len(changed) - 1)
        at = draw(st.integers(0, last) | st.integers(0, min(400, last)))
        kind = draw(st.sampled_from(["flip", "byte", "cut", "insert", "number"]))
        if kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(max_size=16))
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64 - 1]))
            changed[at : at + 8] = number.to_bytes(8, "little")
        elif changed[at:] and kind == "flip":
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif changed[at:]:
            changed[at] = draw(st.integers(0, 255))
    return bytes(changed)
