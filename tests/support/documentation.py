"""Pages of the documentation, and the code and commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import avss_dist

ROOT = Path(__file__).parents[2]
DOCS = Path(avss_dist.__file__).parent / "docs"
OWN = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "jobs" / "README.md"])
PAGES = sorted(
    [*DOCS.rglob("*.md"), ROOT / "README.md", *(ROOT / "jobs").glob("*.md"), *(ROOT / "cluster").rglob("*.md")]
)


def read(path: Path) -> str:
    """Return the text of a page."""
    return path.read_text(encoding="utf-8")


def code_blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks of a page in these languages, and its indented blocks if they include a shell."""
    fenced = [code for language, code in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if language in languages]
    indented = re.findall(r"(?:^|\n\n)((?:    .*\n)+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return fenced + (indented if "bash" in languages else [])


@dataclass(frozen=True)
class Example:
    """A shell block whose output a page shows.

    Attributes:
        block: the commands.
        output: the output, without the lines that the page leaves out.
        jobs: the job files that the page shows before, since the last example.
    """

    block: str
    output: str
    jobs: tuple[str, ...] = ()


def examples(text: str) -> Iterator[Example]:
    """Yield the shell blocks of a page that a block of the language ``text`` follows."""
    block = ""
    jobs: list[str] = []
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language == "text":
            yield Example(block, code, tuple(jobs))
            jobs = []
        elif language == "yaml" and code.startswith("warehouse:"):
            jobs.append(code)
        block = code if language == "bash" else ""


LEFT_OUT = "..."  # a line in place of the lines that a page leaves out


def abridged(shown: str, printed: str) -> str:
    """Return an output without the lines that a page leaves out.

    The lines before and after each ``...`` on the page are looked for in the output, and what is between them is left
    out. Rows of tables are known by their first cells, other lines by their first words.

    Args:
        shown: the output on the page.
        printed: the whole output.

    Raises:
        ValueError: the output lacks a line beside a ``...``.
    """
    parts = [part.splitlines() for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    rest = printed.splitlines()
    lines: list[str] = []
    for number, part in enumerate(parts):
        if number > 0:
            lines.append(LEFT_OUT)
            rest = rest[_position(part[0], rest) :] if part else []
        if number < len(parts) - 1 and part:
            end = _position(part[-1], rest) + 1
            lines += rest[:end]
            rest = rest[end:]
    lines += rest
    return "".join(f"{line}\n" for line in lines)


def _position(line: str, lines: list[str]) -> int:
    """Return the index of the first line that is known by the same words."""
    words = _known_by(line)
    for index, other in enumerate(lines):
        if _known_by(other) == words:
            return index
    raise ValueError(f"no line like {line!r}")


def _known_by(line: str) -> str:
    """Return the first cell of a row, without the star of the lowest rows, or the first words of another line."""
    if line.startswith("│"):
        return line.strip("│").partition("│")[0].strip(" *")
    if line[:1] in BORDERS:
        return line[:1]
    words = re.sub(r"\d[\d.,]*", "0", line).split()
    return " ".join(words[:3])


BORDERS = ("┏", "┃", "┡", "└")  # first characters of the lines around a table and its headings


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every ``avss`` command in the shell blocks of a page."""
    for block in code_blocks(text, "bash", "sh", ""):
        for words in _lines(block):
            starts = [i for i, word in enumerate(words) if word == "avss"]
            if starts and (starts[0] == 0 or words[starts[0] - 1] == "--" or "=" in words[starts[0] - 1]):
                yield words[starts[0] + 1 :]


def _lines(block: str) -> Iterator[list[str]]:
    line = ""
    for part in block.splitlines():
        line += part.rstrip("\\") + "\n"
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an open quotation goes on in the next line
            continue
        if not part.endswith("\\"):
            yield words
            line = ""
