"""Statements hold one fact: none is large, and none assigns or compares truth values inside another expression."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.density import by_package, compared_truths, large_statements, nested_walruses

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "avss_dist"
TREES = {file.relative_to(PACKAGE): ast.parse(file.read_text("utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}
LARGE: dict[str, int] = {}
"""Number of large statements of a package that are still to be divided. It only falls."""

Rule = Callable[[ast.Module], Iterator[int]]


def places(rule: Rule) -> list[str]:
    """The lines of the package that a rule names."""
    return [f"{file}:{line}" for file, tree in TREES.items() for line in rule(tree)]


def test_every_package_has_a_row() -> None:
    packages = by_package(PACKAGE)
    assert {"analysis", "runs", "avss_dist"} <= packages.keys()
    assert all("nodes" in density.row() for density in packages.values())


def test_no_assignment_is_inside_another_expression() -> None:
    assert places(nested_walruses) == []


def test_truth_values_are_not_ordered() -> None:
    assert places(compared_truths) == []


def test_large_statements_become_fewer() -> None:
    large = Counter(place.split("/")[0] for place in places(large_statements))
    assert large == LARGE, places(large_statements)


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("y = [x for x in (a := b)]", nested_walruses),
        ("if (a := b) is None: pass", nested_walruses),
        ("ok = a <= (b > c)", compared_truths),
        ("ok = a < (not b)", compared_truths),
        ("def f():\n    return [" + "1, " * 61 + "]", large_statements),
        ("TABLE = [" + "1, " * 61 + "2 if a else 3]", large_statements),
    ],
)
def test_what_is_hard_to_read_is_noticed(code: str, rule: Rule) -> None:
    assert list(rule(ast.parse(code)))


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("if a := b: pass", nested_walruses),
        ("while a := b(): pass", nested_walruses),
        ("ok = a < b < c", compared_truths),
        ("ok = not a < b", compared_truths),
        ("TABLE = [" + "1, " * 61 + "]", large_statements),
    ],
)
def test_what_is_plain_is_allowed(code: str, rule: Rule) -> None:
    assert not list(rule(ast.parse(code)))
