"""How much the statements of Python code hold: nodes of expressions, and rates of what is hard to read.

python tests/support/density.py avss_dist    # a line for each package
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_NODES = 60  # of a statement that is no table of constants

Measured = ast.expr | ast.comprehension | ast.keyword
Declaration = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
COMPUTED = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda)
ORDERINGS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


@dataclass
class Density:
    """Density of some code.

    Attributes:
        sizes: number of nodes of each statement that is no declaration or docstring.
        comprehensions: number of comprehensions.
        conditionals: number of conditional expressions.
        tuple_assignments: number of assignments of several values to several names.
    """

    sizes: list[int] = field(default_factory=list)
    comprehensions: int = 0
    conditionals: int = 0
    tuple_assignments: int = 0

    def add(self, tree: ast.Module) -> None:
        """Count the statements of a module."""
        for statement in statements(tree):
            nodes = nodes_of(statement)
            self.sizes.append(len(nodes))
            self.comprehensions += sum(isinstance(node, ast.comprehension) for node in nodes)
            self.conditionals += sum(isinstance(node, ast.IfExp) for node in nodes)
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Tuple):
                self.tuple_assignments += isinstance(statement.targets[0], ast.Tuple)

    def row(self) -> str:
        """Return mean, 90th and 99th percentile of the nodes of a statement, and rates per 1,000 statements."""
        per_thousand = 1000 / len(self.sizes)
        p90, p99 = np.percentile(self.sizes, [90, 99], method="higher")
        return (
            f"{len(self.sizes):6} statements, nodes {np.mean(self.sizes):5.2f} {p90:4} {p99:4}; per 1,000: "
            f"comprehensions {self.comprehensions * per_thousand:5.1f}, conditional expressions "
            f"{self.conditionals * per_thousand:5.1f}, tuple assignments {self.tuple_assignments * per_thousand:5.1f}"
        )


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements of a module at every depth, without declarations and docstrings."""
    for node in ast.walk(tree):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not isinstance(node, Declaration) and not is_docstring:
            yield node


def expressions_of(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield the outermost expressions of a statement, without those of statements inside it."""
    for _, value in ast.iter_fields(statement):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.expr | ast.keyword | ast.withitem):
                yield part


def nodes_of(statement: ast.stmt) -> list[ast.AST]:
    """Return the nodes of the expressions of a statement."""
    nodes: list[ast.AST] = []
    for expression in expressions_of(statement):
        nodes += [node for node in ast.walk(expression) if isinstance(node, Measured)]
    return nodes


def is_table(statement: ast.stmt, tree: ast.Module) -> bool:
    """Whether a statement is a table of constants of a module, in which nothing is computed."""
    return statement in tree.body and not any(isinstance(node, COMPUTED) for node in nodes_of(statement))


def large_statements(tree: ast.Module) -> Iterator[int]:
    """Yield the lines of statements of more than `MAX_NODES` nodes that are no tables of constants."""
    for statement in statements(tree):
        if len(nodes_of(statement)) > MAX_NODES and not is_table(statement, tree):
            yield statement.lineno


def nested_walruses(tree: ast.Module) -> Iterator[int]:
    """Yield the lines of assignment expressions inside other expressions: alone after ``if`` or ``while`` is plain."""
    tested = {node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.While)}
    for node in ast.walk(tree):
        if isinstance(node, ast.NamedExpr) and node not in tested:
            yield node.lineno


def compared_truths(tree: ast.Module) -> Iterator[int]:
    """Yield the lines on which the order of truth values is asked, such as ``a <= (b > c)`` for "a implies b > c"."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare) or not any(isinstance(operator, ORDERINGS) for operator in node.ops):
            continue
        for operand in (node.left, *node.comparators):
            is_not = isinstance(operand, ast.UnaryOp) and isinstance(operand.op, ast.Not)
            if is_not or isinstance(operand, ast.Compare):
                yield node.lineno


def by_package(folder: Path) -> dict[str, Density]:
    """Return the density of each package in a folder, and of the files beside them under the name of the folder."""
    packages: dict[str, Density] = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).parts
        name = parts[0] if len(parts) > 1 else folder.name
        packages.setdefault(name, Density()).add(ast.parse(file.read_text("utf-8")))
    return {name: density for name, density in packages.items() if density.sizes}


if __name__ == "__main__":
    for name, density in by_package(Path(sys.argv[1])).items():
        print(f"{name:14}{density.row()}")
