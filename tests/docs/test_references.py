"""Names with dots in backticks, in docstrings and comments of strings, are those of things that exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import avss_dist

ROOT = Path(avss_dist.__file__).parent
QUOTED = re.compile(r"``([^`\n]+)``|`([^`\n]+)`")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
FILES = (".json", ".yaml", ".txt", ".cu", ".md")


@dataclass
class Names:
    """Names that the package defines.

    Attributes:
        modules: top-level names by dotted module; of a package, also its modules.
        attributes: attributes by class, over all classes of that name, with those of their bases in the package.
    """

    modules: Mapping[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    attributes: Mapping[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    @cache
    def of_package(cls) -> Names:
        """Read the names of every module."""
        names, bases = cls(), defaultdict(set)
        for module, tree in trees().items():
            parent, _, last = module.rpartition(".")
            names.modules[parent].add(last)
            names.modules[module].update(defined(tree.body))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    names.attributes[node.name].update(defined(node.body), assigned_to_self(node))
                    bases[node.name].update(ast.unparse(base).partition("[")[0] for base in node.bases)
        for _ in range(4):  # levels of inheritance
            for name, parents in bases.items():
                names.attributes[name].update(*(names.attributes[parent] for parent in parents))
        return names

    def has(self, parts: Sequence[str]) -> bool:
        """Return whether a name is one of this package's: ``module.name``, ``module.Class.name`` or ``Class.name``."""
        for size in range(len(parts), 0, -1):
            ending = "." + ".".join(parts[:size])
            for module in (m for m in self.modules if f".{m}".endswith(ending)):
                inside = parts[size:]
                if not inside or (inside[0] in self.modules[module] and self._has_attributes(inside)):
                    return True
        titled = parts[0].title().replace("_", "")  # ``placement.ranks``: of an argument that is a Placement
        return any(
            self._has_attributes([owner, *parts[1:]]) for owner in (parts[0], titled) if owner in self.attributes
        )

    def _has_attributes(self, parts: Sequence[str]) -> bool:
        return len(parts) < 2 or parts[1] in self.attributes.get(parts[0], ())


def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of every module, by its dotted name."""
    files = {path: path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.rglob("*.py")}
    return {
        ".".join(name.parts).removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8"))
        for path, name in files.items()
    }


def defined(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements define, import or assign."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from defined([*node.body, *getattr(node, "orelse", [])])
        else:
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def assigned_to_self(node: ast.ClassDef) -> Iterator[str]:
    """Yield the attributes that methods assign."""
    for target in ast.walk(node):
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
            yield target.attr


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
    names = Names.of_package()
    missing = [
        f"{module}:{line}: {name}"
        for module, tree in trees().items()
        for line, name in references(tree)
        if not names.has(name.split(".")) and not is_elsewhere(name)
    ]
    assert not missing, "\n".join(["These names do not exist:", *missing])


@pytest.mark.parametrize(
    ("name", "exists"),
    [
        ("avss_dist.partition.replica.Replica", True),
        ("base.Replica.forward", True),
        ("Placement.max_memory", True),
        ("placement.ranks", True),
        ("errors.AvssError", True),
        ("config.SCORES", False),
        ("partition.base.Replicas", False),
        ("base.Replica.forwards", False),
        ("ablation.LeaveOneOut", False),
    ],
)
def test_a_stale_name_is_noticed(name: str, exists: bool) -> None:
    assert Names.of_package().has(name.split(".")) is exists
