"""Prints the package graph and what breaks these rules: ``python tests/architecture.py``.

There must be no import circle among modules, imports under TYPE_CHECKING included; no function of a cyclomatic
complexity over 15; no six lines that stand twice. Exit code 1 if there is. Circles among packages break contracts in
pyproject.toml. Imports that the contracts ignore are left out here, too.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import grimp
from radon.complexity import cc_visit

MAX_COMPLEXITY = 15
MIN_REPEATED = 6
COMPLEX_FOR_A_REASON: dict[str, str] = {}  # "package/module.py:function" -> why it stays whole
SOURCES = (".py", ".sql", ".js", ".css")  # of these, only Python is made of modules and functions

Arrows = dict[str, Counter[str]]  # importer -> imported -> number of imports


def main(root: Path) -> int:
    """Check the project in a folder and return the exit code."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    package = contracts["root_package"]
    sys.path.insert(0, str(root))
    graph = grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    remove_ignored(graph, contracts["contracts"])
    layers = next(contract["layers"] for contract in contracts["contracts"] if contract["type"] == "layers")
    print("\n".join(picture(siblings(graph, package), layers)), flush=True)
    problems = [*circles(graph), *code_problems(root / package)]
    print("\n".join(problems or ["No problem."]), file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


def remove_ignored(graph: grimp.ImportGraph, contracts: Iterable[Mapping[str, Any]]) -> None:
    """Remove the imports that contracts ignore, each ``importer -> imported``; ``.**`` stands for all below."""
    for line in (line for contract in contracts for line in contract.get("ignore_imports", ())):
        importer, _, imported = line.partition(" -> ")
        below = imported.removesuffix("**")
        for module in graph.find_modules_directly_imported_by(importer):
            if module == imported or (below != imported and module.startswith(below)):
                graph.remove_import(importer=importer, imported=module)


def siblings(graph: grimp.ImportGraph, parent: str) -> Arrows:
    """Imports between the children of a package, each with all that is inside it."""
    arrows: Arrows = {child.rpartition(".")[2]: Counter() for child in graph.find_children(parent)}
    for module in graph.find_descendants(parent):
        for imported in graph.find_modules_directly_imported_by(module):
            if imported.startswith(f"{parent}."):
                names = [name.removeprefix(f"{parent}.").partition(".")[0] for name in (module, imported)]
                if names[0] != names[1]:
                    arrows[names[0]][names[1]] += 1
    return arrows


def picture(arrows: Arrows, layers: Iterable[str]) -> Iterator[str]:
    """A line for each package, from the top layer down, with the number of imports from each that it uses."""
    floors = [[name.strip() for name in layer.split("|")] for layer in layers]
    for number, floor in enumerate(floors):
        for name in floor:
            counts = sorted(arrows.get(name, Counter()).items(), key=lambda use: (-use[1], use[0]))
            uses = ", ".join(f"{used} {count}" for used, count in counts)
            yield f"{len(floors) - number:>3}  {name:<12} {f'-> {uses}' if uses else ''}".rstrip()
    total = sum(sum(uses.values()) for uses in arrows.values())
    yield (
        f"{sum(map(len, floors))} packages on {len(floors)} layers, {sum(map(len, arrows.values()))} arrows, "
        f"{total} imports between packages."
    )


def circles(graph: grimp.ImportGraph) -> Iterator[str]:
    """Yield a message for a circle among modules, if there is one."""
    try:
        TopologicalSorter(
            {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
        ).prepare()
    except CycleError as error:
        yield f"import circle: {' -> '.join(reversed(error.args[1]))}"


def code_problems(folder: Path) -> Iterator[str]:
    """Yield a message for each function that is too complex and each run of lines that stands twice."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in SOURCES)
    texts = {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in files}
    excused = set()
    for name, text in texts.items():
        for block in cc_visit(text) if name.endswith(".py") else ():
            key = f"{name}:{block.fullname}"
            if block.complexity > MAX_COMPLEXITY:
                excused.add(key)
                if key not in COMPLEX_FOR_A_REASON:
                    yield f"{name}:{block.lineno}: {block.fullname} has complexity {block.complexity}"
    for key in COMPLEX_FOR_A_REASON.keys() - excused:
        yield f"{key} is excused, and need not be"
    yield from repeated({name: list(lines_of_code(name, text)) for name, text in texts.items()})


def lines_of_code(name: str, text: str) -> Iterator[tuple[int, str]]:
    """(number, stripped line) of what is no blank line, comment, import or docstring."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_docstring(node):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and number not in left_out and not stripped.startswith(("#", "//", "--")):
            yield number, stripped


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def repeated(lines: Mapping[str, list[tuple[int, str]]]) -> Iterator[str]:
    """Runs of `MIN_REPEATED` lines or more that stand in two places, as long as they go."""
    places: defaultdict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, numbered in lines.items():
        texts = [text for _, text in numbered]
        for start in range(len(texts) - MIN_REPEATED + 1):
            places[tuple(texts[start : start + MIN_REPEATED])].append((name, start))
    pairs = {(one, other) for same in places.values() for i, one in enumerate(same) for other in same[i + 1 :]}
    for one, other in sorted(pairs):
        if (_moved(one, -1), _moved(other, -1)) in pairs:
            continue  # inside of a longer run
        length = MIN_REPEATED
        while (_moved(one, length - MIN_REPEATED + 1), _moved(other, length - MIN_REPEATED + 1)) in pairs:
            length += 1
        spots = [f"{name}:{lines[name][start][0]}" for name, start in (one, other)]
        yield f"{' and '.join(spots)}: the same {length} lines, of which the first is {lines[one[0]][one[1]][1]!r}"


def _moved(place: tuple[str, int], by: int) -> tuple[str, int]:
    return place[0], place[1] + by


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
