"""Parsing and formatting of sizes, numbers and paths for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from avss_dist.core.errors import ConfigError, without_secrets


class RedactedURI(str):
    """A text without the keys of its URIs. ``full`` is the text with keys, to open the URIs.

    Texts that are made from it (slices, f-strings, JSON) have no keys either.
    """

    full: str

    def __new__(cls, text: object) -> RedactedURI:
        full = getattr(text, "full", None) or str(text)
        redacted = super().__new__(cls, without_secrets(full))
        redacted.full = full
        return redacted

    def __getnewargs__(self) -> tuple[str]:
        return (self.full,)


_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufffe\uffff"
    r"\ud800-\udc7f\udd00-\udfff]"  # halves of characters; those between are bytes of paths that are not UTF-8
)


def parse_bytes(text: str) -> int:
    """Parse a size in bytes: ``200MB``, ``1.5GiB`` or ``1000000``.

    Raises:
        ConfigError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(?:([kmgt])(i?))?b?\s*", text.lower())
    if not match or not float(match[1]):
        raise ConfigError(f"'{text}' is not a size.", "Write 200MB (10^6 bytes), or 20GiB (2^30 bytes).")
    power = 0
    if match[2]:
        power = "kmgt".index(match[2]) + 1
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base**power)


def docs_page(name: str) -> str:
    """Return the path of a page of the packaged documentation: ``docs_page("reference/commands")``."""
    return str(Path(__file__).parents[1] / "docs" / f"{name}.md")


def basename(path: object) -> str:
    """Return the last part of a path."""
    return str(path).rstrip("/").rpartition("/")[2]


def printable(text: str) -> str:
    """Return a text without control characters and characters that reverse the direction of a line."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def escape_markdown(text: object) -> str:
    """Return a text escaped for Markdown and HTML, on one line."""
    on_one_line = " ".join(printable(str(text)).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", on_one_line)


def describe_bytes(size: float) -> str:
    """Return a size as text: ``269 MB``."""
    if int(size) == 1:
        return "1 Byte"
    if size < 1000:
        return f"{int(size)} Bytes"
    power = 1
    while size >= 999.5 * 1000**power and power < 6:
        power += 1
    prefix = " kMGTPE"[power]
    return f"{size / 1000**power:.3g} {prefix}B"


def describe_count(number: int | None) -> str:
    """Return a number as text, such as ``1,234``, or a question mark for None."""
    return "?" if number is None else f"{number:,}"


def count_of(number: int, noun: str) -> str:
    """Return a number and a noun: ``1 run``, ``1,234 runs``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}s"


def describe_rows(skipped: int, number: int) -> str:
    """Return rows of a text in words: ``the first 8 rows``, or ``8 rows after the first 24``."""
    rows = count_of(number, "row")
    if skipped:
        return f"{rows} after the first {skipped:,}"
    return f"the first {rows}"


def describe_layers(layers: Sequence[int]) -> str:
    """Return ascending numbers as text: ``0-3, 7``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    texts = []
    for span in spans:
        if len(span) == 1:
            texts.append(str(span[0]))
        else:
            texts.append(f"{span[0]}-{span[-1]}")
    return ", ".join(texts)


def describe_seconds(seconds: float) -> str:
    """Return a duration as text: ``12 s``, ``3 min 20 s`` or ``5 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"
