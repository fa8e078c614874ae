"""Pages of the documentation, and the code and commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
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
