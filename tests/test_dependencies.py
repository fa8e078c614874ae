"""What the package imports is declared, what is declared is imported, and the private names that it uses are there."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from private_names import PRIVATE_NAMES

from avss_dist.core.extras import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = [ast.parse(path.read_text(), str(path)) for path in sorted((ROOT / "avss_dist").rglob("*.py"))]
PUBLIC = {"_make", "_replace"}  # of named tuples: documented
WHERE_INSTALLED = {"polars"}  # imported for a caller who asks for a Polars table, and so has it
BROUGHT = {
    "fsspec": "torch",
    "grpc": "ray",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
    "requests": "ray",
    "safetensors": "transformers",
    "tqdm": "transformers",
    "vl_convert": "altair",  # by its extra `save`
}
"""Modules that are imported and not declared, and the declared package that requires them."""
BOUNDED = {"ray": "minor", "deepspeed": "minor", "transformers": "major", "accelerate": "major"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> dict[str, str]:
    """Return the requirements of the package, and of some of its extras, by name."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    parts = [re.match(r"([\w.-]+)(?:\[[\w,]+\])?(.*)", line) for line in lines]
    return {canonical(part[1]): part[2] for part in parts if part}


@cache
def imported() -> set[str]:
    """Return the top-level modules of other packages that are imported anywhere, also inside of functions."""
    modules = set()
    for tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module or "")
    roots = {module.partition(".")[0] for module in modules}
    return roots - {"avss_dist", *sys.stdlib_module_names}


_distributions_by_module = cache(packages_distributions)


def distributions(module: str) -> set[str]:
    return {canonical(name) for name in _distributions_by_module().get(module, [module])}


def test_every_import_is_declared() -> None:
    known = {*declared(*(set(PROJECT["optional-dependencies"]) - {"docs", "test"}))}
    missing = {module for module in imported() - WHERE_INSTALLED - {*BROUGHT} if not distributions(module) & known}
    assert not missing


@pytest.mark.parametrize(("module", "package"), BROUGHT.items())
def test_a_package_that_another_brings_is_required_by_it(module: str, package: str) -> None:
    brought = {canonical(re.match(r"[\w.-]+", line)[0]) for line in requires(package) or ()}  # type: ignore[index]
    assert module in imported() and distributions(module) & brought


def test_every_dependency_is_imported() -> None:
    used = {name for module in imported() for name in distributions(module)}
    assert set(declared("run")) <= used
    assert len(declared()) <= 10 and len(declared("run")) <= 18


def test_every_module_of_an_extra_is_known() -> None:
    """A command that lacks one says what to type."""
    reading = {name for module in imported() for name in distributions(module) & {*declared()}}
    assert reading == {*declared()}
    brought = {module for module, package in BROUGHT.items() if package in declared()}
    other = imported() - WHERE_INSTALLED - brought - {m for m in imported() if distributions(m) & {*declared()}}
    assert other <= {module for modules in EXTRAS.values() for module in modules}


@pytest.mark.parametrize(("package", "part"), BOUNDED.items())
def test_packages_whose_private_names_are_used_have_an_upper_bound(package: str, part: str) -> None:
    bound = re.search(r"<(\d+)(?:\.(\d+))?$", declared("run")[package])
    assert bound and (bound[2] is not None) == (part == "minor"), declared("run")[package]


def private_names() -> Iterator[tuple[str, str]]:
    """Yield the private attributes that no module of the package defines, each with its place."""
    own: set[str] = set()
    for tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                own.add(node.attr)
    for tree in SOURCES:
        for node in ast.walk(tree):
            if name := _private_name(node, own):
                yield name, ast.unparse(node)


def _private_name(node: ast.AST, own: set[str]) -> str | None:
    """Return the private name of another package that a node uses, as `PRIVATE_NAMES` has it."""
    if isinstance(node, ast.Attribute):
        if node.attr == "__compatible_ops__":
            return node.attr
        if node.attr.startswith("_") and not node.attr.endswith("__"):
            return node.attr if node.attr not in own or ast.unparse(node.value) == "super()" else None
        within = node.value
        if (
            isinstance(within, ast.Attribute)
            and within.attr == "state"
            and ast.unparse(within).endswith("._private.state")
        ):
            return f"_private.state.{node.attr}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
        if str(name).startswith("_") and not str(name).endswith("__") and name not in own:
            return str(name)
    return None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_the_table_of_private_names_is_that_of_the_code() -> None:
    found = {name: where for name, where in private_names() if name not in PUBLIC and name != "_exit"}
    found = {name: where for name, where in found.items() if not where.startswith("super()") or name in PRIVATE_NAMES}
    assert {name: where for name, where in found.items() if name not in PRIVATE_NAMES} == {}
    assert sorted(set(PRIVATE_NAMES) - set(found)) == []


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_private_name_is_there(name: str) -> None:
    package, check = PRIVATE_NAMES[name]
    try:
        check()
    except (ImportError, AttributeError, KeyError) as error:
        pytest.fail(f"{package} has no {name} any more ({error}): lower its upper bound, or use another name")
