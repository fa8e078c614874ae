"""Names with dots in backticks, in docstrings and comments of strings, are those of things that exist."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import avss_dist

ROOT = Path(avss_dist.__file__).parent
QUOTED = re.compile(r"``([^`\n]+)``|`([^`\n]+)`")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
FILES = (".json", ".yaml", ".txt", ".cu", ".md")
TREES = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}


def inside(node: ast.AST) -> set[str]:
    """Return the names that a module or class defines, imports or assigns, also to attributes."""
    names: set[str] = set()
    for child in ast.walk(node):
        match child:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.alias(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return names


@cache
def names_by_owner() -> dict[str, set[str]]:
    """Return the names inside of each module, package and class, by its own name. Classes have those of their bases."""
    owners: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        parts = ("avss_dist", *path.with_suffix("").parts)
        for parent, child in itertools.pairwise(parts):
            owners.setdefault(parent, set()).add(child)
        owners.setdefault(parts[-2 if parts[-1] == "__init__" else -1], set()).update(inside(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, set()).update(inside(node))
                bases.setdefault(node.name, set()).update(ast.unparse(base).partition("[")[0] for base in node.bases)
    for _ in range(4):  # levels of inheritance
        for name, parents in bases.items():
            owners[name].update(*(owners.get(parent, ()) for parent in parents))
    return owners


def exists(name: str) -> bool:
    """Return whether each part of a name is inside of the part before it. An argument may stand for its class."""
    parts, owners = name.split("."), names_by_owner()
    titled = [parts[0].title().replace("_", ""), *parts[1:]]
    return any(all(b in owners.get(a, ()) for a, b in itertools.pairwise(x)) for x in (parts, titled))


def references(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of every dotted name in backticks, in strings that are statements."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for double, single in QUOTED.findall(node.value.value):
                if DOTTED.fullmatch(name := double or single) and not name.endswith(FILES):
                    yield node.lineno, name


def is_elsewhere(name: str) -> bool:
    """Return whether a name may be another package's, installed or an extra, such as ``torch.Tensor``."""
    root = name.partition(".")[0]
    return root in (*sys.stdlib_module_names, "datasets", "lm_eval") or importlib.util.find_spec(root) is not None


def test_every_dotted_name_in_a_docstring_exists() -> None:
    missing = [
        f"{path}:{line}: {name}"
        for path, tree in TREES.items()
        for line, name in references(tree)
        if not exists(name) and not (is_elsewhere(name) and not name.startswith("avss_dist."))
    ]
    assert not missing, "\n".join(["These names do not exist:", *missing])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("avss_dist.partition.replica.Replica", True),
        ("replica.Replica.forward", True),
        ("placement.ranks", True),
        ("errors.AvssError", True),
        ("config.SCORES", False),
        ("partition.replica.Replicas", False),
        ("replica.Replica.forwards", False),
    ],
)
def test_a_stale_name_is_noticed(name: str, expected: bool) -> None:
    assert exists(name) is expected
