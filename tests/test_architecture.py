"""No ten lines of code stand twice in the package: a plain loop may. Tools check contracts (pyproject.toml)."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "avss_dist"
MIN_REPEATED = 10


def lines_of_code(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield number and stripped text of each line that is no blank line, comment, import or docstring."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or (is_docstring and isinstance(node.value.value, str)):
            left_out.update(range(node.lineno, node.end_lineno + 1))
    for number, line in enumerate(text.splitlines(), 1):
        if (stripped := line.strip()) and number not in left_out and not stripped.startswith(("#", "//", "--")):
            yield number, stripped


def repeated(texts: dict[str, str]) -> list[list[str]]:
    """Return the places of every run of `MIN_REPEATED` lines that stands in several places."""
    places: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, text in texts.items():
        lines = list(lines_of_code(name, text))
        for start in range(len(lines) - MIN_REPEATED + 1):
            run = lines[start : start + MIN_REPEATED]
            places[tuple(line for _, line in run)].append(f"{name}:{run[0][0]}")
    return [same for same in places.values() if len(same) > 1]


def test_no_ten_lines_stand_twice() -> None:
    files = [file for file in sorted(PACKAGE.rglob("*")) if file.suffix in (".py", ".sql", ".js", ".css")]
    assert repeated({str(file): file.read_text(encoding="utf-8") for file in files}) == []


def test_repeated_lines_are_found_without_imports_and_comments() -> None:
    ten = [f"value_{number} = {number} + 1\n" for number in range(MIN_REPEATED)]
    indented = "import os\ndef f():\n" + "    # words\n".join(f"    {line}" for line in ten)
    assert repeated({"a.py": "".join(ten), "b.py": indented}) == [["a.py:1", "b.py:3"]]
    assert repeated({"a.py": "".join(ten[:-1]), "b.py": "".join(ten)}) == []
    imports = "".join(f"import module_{number}\n" for number in range(MIN_REPEATED))
    assert repeated({"a.py": imports, "b.py": imports}) == []
