"""Mutation score of modules: change one operator, number or condition at a time, and count what tests notice.

    python tests/benchmarks/mutation.py avss_dist/stats/power_law.py [MODULE ...] [--tests tests/stats ...]
        [--sample 50] [--lines 20-40] [--slowest 5] [--nightly] [--survivors FILE] [--only FILE] [-k EXPRESSION]

Tests of a module are by default those of the folder in `tests/` that is named after its package. They are collected
once, and run once as the code is: this tells which test calls which function. Each mutant then runs in a forked
process, in which the code of one function is exchanged, against the tests that call the function, the quickest first,
until one fails. This takes milliseconds a mutant, and reaches properties, decorated functions and plain conditions,
which mutmut leaves alone.

Mutants: a comparison with or without its boundary or reversed, an arithmetic or bitwise operator exchanged, a number
plus 1, a boolean reversed, `and` for `or`, a removed `not`, `-` or `~`, a condition that always or never holds, a
filter left out, `None` returned, a call left out whose result is not used, `break` for `continue`, `min` for `max` and
their like. Not changed: texts, errors, annotations, defaults, and what runs on import.

Prints each survivor, then a line for each module. A survivor has no test, or is equivalent: no input tells it from the
original. Tests that start processes see no mutant there. Tests of the nightly tier, and those that take more CPU time
than `--slowest` seconds, are left out. A mutant that takes 10 times as long as its tests did counts as killed.

`--survivors FILE` writes the survivors into a file, one a line, and `--only FILE` tries just those of such a file: the
quick tests on all mutants first, then more tests (`--nightly`) on what the quick ones leave.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import os
import random
import resource
import select
import signal
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
for path in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(path))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

PYTEST = (
    *("-qq", "-s", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler"),
    *("-o", "timeout=0", "-m", "not gpu"),
)
TIMES_AS_LONG, AT_LEAST_SECONDS = 10, 5
REVERSED: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
PAIRS = (("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("nanmin", "nanmax"), ("any", "all"))
RENAMED = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
UNCHANGED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments)
FIELDS_UNCHANGED = {"annotation", "returns", "decorator_list", "type_params"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Mutant:
    """A change of one syntax node inside a function.

    Attributes:
        function: the outermost function that holds the node.
        parent, name, index: where the node stands: a field of its parent, and the place in it if that is a list.
        node, changed: the node as it is, and what takes its place.
    """

    function: Function
    parent: ast.AST
    name: str
    index: int | None
    node: ast.AST
    changed: ast.AST

    def put(self, node: ast.AST) -> None:
        """Set the node in the tree."""
        if self.index is None:
            setattr(self.parent, self.name, node)
        else:
            getattr(self.parent, self.name)[self.index] = node

    def __str__(self) -> str:
        if isinstance(self.parent, ast.comprehension) and isinstance(self.changed, ast.Constant):
            return f"filter `if {ast.unparse(self.node)}` left out"
        before, after = (ast.unparse(node).splitlines()[0] for node in (self.node, self.changed))
        return f"`{before}` -> `{after}`"

    @property
    def line(self) -> int:
        """The line of the node."""
        return int(getattr(self.node, "lineno", self.function.lineno))


def replaced(node: ast.AST, **fields: Any) -> ast.AST:
    """Return a shallow copy of a node with other fields."""
    copy = type(node)(**{**dict(ast.iter_fields(node)), **fields})
    return ast.copy_location(copy, node)


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what can take the place of a node."""
    match node:
        case ast.Compare(ops=operators):
            for i, operator in enumerate(operators):
                for other in REVERSED.get(type(operator), ()):
                    yield replaced(node, ops=[*operators[:i], other(), *operators[i + 1 :]])
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) | ast.BoolOp(op=operator):
            for other in REVERSED.get(type(operator), ()):
                yield replaced(node, op=other())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield replaced(node, value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield replaced(node, value=value + 1)
        case ast.If() | ast.IfExp():
            for value in (True, False):
                yield replaced(node, test=ast.copy_location(ast.Constant(value), node.test))
        case ast.While():
            yield replaced(node, test=ast.copy_location(ast.Constant(False), node.test))
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield replaced(node, value=ast.copy_location(ast.Constant(None), node))
        case ast.Expr(value=ast.Call()):
            yield ast.copy_location(ast.Pass(), node)
        case ast.Break():
            yield ast.copy_location(ast.Continue(), node)
        case ast.Continue():
            yield ast.copy_location(ast.Break(), node)
        case ast.Name(id=name) if name in RENAMED:
            yield replaced(node, id=RENAMED[name])
        case ast.Attribute(attr=name) if name in RENAMED:
            yield replaced(node, attr=RENAMED[name])


def mutants_below(node: ast.AST, function: Function | None = None) -> Iterator[Mutant]:
    """Yield the mutants of the functions below a node."""
    for name, value in ast.iter_fields(node):
        if name in FIELDS_UNCHANGED or (isinstance(node, ast.keyword) and node.arg == "strict"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, UNCHANGED):
                continue
            at = index if isinstance(value, list) else None
            if function is not None:
                filters = isinstance(node, ast.comprehension) and name == "ifs"
                kept = [ast.copy_location(ast.Constant(True), child)] if filters else []
                for changed in (*kept, *changes(child)):
                    yield Mutant(function, node, name, at, child, changed)
            inside = function or (child if isinstance(child, Function) else None)
            yield from mutants_below(child, inside)


def codes_below(code: CodeType) -> Iterator[CodeType]:
    """Yield the code objects inside a code object."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_below(constant)


@dataclass
class Module:
    """A module whose functions are changed in place.

    Attributes:
        path, tree: its file, and the syntax tree.
        module: as it is imported.
        hits: the lines of the functions that were called.
        callers: by line of a function, the tests that call it.
    """

    path: Path
    hits: set[int] = field(default_factory=set)
    callers: dict[int, list[pytest.Item]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.path.read_text())
        name = ".".join(self.path.resolve().relative_to(ROOT).with_suffix("").parts)
        self.module: ModuleType = importlib.import_module(name)
        self.functions: dict[int, list[FunctionType]] = {}
        for function in gc.get_objects():
            if isinstance(function, FunctionType) and function.__globals__ is vars(self.module):
                code = function.__code__
                if code.co_filename == self.module.__file__ and not code.co_name.startswith("<"):
                    self.functions.setdefault(code.co_firstlineno, []).append(function)

    def exchange(self) -> None:
        """Give all functions the code of the tree as it stands."""
        tree = ast.fix_missing_locations(self.tree)
        compiled = compile(tree, str(self.module.__file__), "exec", dont_inherit=True)
        by_line = {code.co_firstlineno: code for code in codes_below(compiled) if not code.co_name.startswith("<")}
        for line, functions in self.functions.items():
            for function in functions:
                function.__code__ = by_line[line]
        for value in vars(self.module).values():
            if hasattr(value, "cache_clear"):  # what a cached function returned before
                value.cache_clear()

    def note_calls(self) -> None:
        """Have every function note that it is called, in `hits`."""
        vars(self.module)["_mutation_hits"] = self.hits
        for line, function in self.outermost().items():
            call = ast.parse(f"_mutation_hits.add({line})").body[0]
            function.body.insert(int(ast.get_docstring(function) is not None), call)
        self.exchange()

    def forget_calls(self) -> None:
        """Undo `note_calls`."""
        self.tree = ast.parse(self.path.read_text())
        self.exchange()

    def outermost(self) -> dict[int, Function]:
        """Return the functions of the module and of its classes, by the line that their code begins at."""
        bodies: list[ast.AST] = [self.tree]
        found: dict[int, Function] = {}
        while bodies:
            for node in ast.iter_child_nodes(bodies.pop()):
                if isinstance(node, Function):
                    found[first_line(node)] = node
                else:
                    bodies.append(node)
        return found


def place(module: Module, mutant: Mutant) -> str:
    """Return where a mutant is and what it changes, as a line."""
    return f"{module.path}:{mutant.line}: {mutant.function.name}: {mutant}"


def first_line(function: Function) -> int:
    """Return the line that the code of a function begins at: that of its first decorator."""
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


class Mutation:
    """Plugin of pytest that runs the collected tests against mutants.

    Attributes:
        killed, survived, uncalled: the number of mutants of each module; no test calls the function of an uncalled one.
    """

    def __init__(self, paths: list[Path], options: argparse.Namespace) -> None:
        self.paths, self.options = paths, options
        self.failed: list[str] = []
        self.seconds: dict[pytest.Item, float] = {}  # with its fixtures
        self.call_seconds: dict[pytest.Item, float] = {}
        self.scores: dict[Path, list[int]] = {}

    def pytest_collection(self) -> None:
        """Have hypothesis look for a failure, and not for the simplest one."""
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutation", hypothesis.settings(), phases=phases, database=None)
        hypothesis.settings.load_profile("mutation")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Have properties tried on fewer examples."""
        for item in items:
            test = getattr(item, "obj", None)
            if own := getattr(test, "_hypothesis_internal_use_settings", None):
                fewer = min(own.max_examples, self.options.examples)
                test._hypothesis_internal_use_settings = hypothesis.settings(own, max_examples=fewer)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the tests that fail."""
        if report.failed:
            self.failed.append(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Note how long a test takes without its fixtures, which other tests may have made."""
        start = time.process_time()
        try:
            return (yield)
        finally:
            self.call_seconds[item] = time.process_time() - start

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run every test once, then the mutants."""
        if session.testsfailed:
            return None  # pytest reports the tests that cannot be collected
        session.config.pluginmanager.unregister(name="terminalreporter")
        gc.unfreeze()
        modules = [Module(path) for path in self.paths]
        self._run_unchanged(session, modules)
        for module in modules:
            self._run_mutants(session, module)
        return True

    def _run_unchanged(self, session: pytest.Session, modules: list[Module]) -> None:
        for module in modules:
            module.note_calls()
        for item in session.items:
            start = time.process_time()
            self._run(item, session)
            self.seconds[item] = time.process_time() - start
            for module in modules:
                for line in module.hits:
                    module.callers.setdefault(line, []).append(item)
                module.hits.clear()
        if self.failed:
            raise pytest.UsageError(f"tests fail without any change: {', '.join(sorted(set(self.failed)))}")
        for module in modules:
            module.forget_calls()
            for tests in module.callers.values():
                quick = [test for test in tests if self.call_seconds.get(test, 0) <= self.options.slowest]
                tests[:] = sorted(quick, key=lambda test: self.call_seconds.get(test, 0))
        gc.collect()
        gc.freeze()  # what is there is the same in every fork

    def _run(self, item: pytest.Item, session: pytest.Session) -> None:
        """Run a test; fixtures of the session stay for the next one."""
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=session)

    def _run_mutants(self, session: pytest.Session, module: Module) -> None:
        low, _, high = self.options.lines.partition("-")
        mutants = [m for m in mutants_below(module.tree) if int(low) <= m.line <= int(high or low)]
        if self.options.only:
            chosen = self.options.only.read_text().splitlines()
            mutants = [mutant for mutant in mutants if place(module, mutant) in chosen]
        if self.options.sample and self.options.sample < len(mutants):
            mutants = random.Random(self.options.seed).sample(mutants, self.options.sample)
        killed = survived = uncalled = 0
        for mutant in sorted(mutants, key=lambda mutant: mutant.line):
            tests = module.callers.get(first_line(mutant.function), [])
            killer = self._killer(session, module, mutant, tests) if tests else None
            killed, survived = killed + (killer is not None), survived + (killer is None)
            uncalled += not tests
            if killer is None:
                print(f"{place(module, mutant)}{'' if tests else ' (no test calls this function)'}", flush=True)
                if self.options.survivors:
                    with self.options.survivors.open("a") as file:
                        print(place(module, mutant), file=file)
            elif self.options.verbose:
                print(f"{place(module, mutant)}: killed by {killer}", flush=True)
        self.scores[module.path] = [len(mutants), killed, survived, uncalled]

    def _killer(self, session: pytest.Session, module: Module, mutant: Mutant, tests: list[pytest.Item]) -> str | None:
        """Return the test that fails with a mutant, or None."""
        seconds = AT_LEAST_SECONDS + TIMES_AS_LONG * sum(self.seconds[test] for test in tests)
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
            os.write(writer, self._first_failure(session, module, mutant, tests).encode())
            os._exit(0)
        os.close(writer)
        if not select.select([reader], [], [], 3 * seconds)[0]:
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        status = os.waitpid(child, 0)[1]
        return answer or None if os.waitstatus_to_exitcode(status) == 0 else "a limit of time, or a crash"

    def _first_failure(self, session: pytest.Session, module: Module, mutant: Mutant, tests: list[pytest.Item]) -> str:
        try:
            mutant.put(mutant.changed)
            module.exchange()
            for test in tests:
                self._run(test, session)
                if self.failed:
                    return self.failed[0]
        except BaseException as error:
            return repr(error)
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", type=Path, help="files of modules")
    parser.add_argument("--tests", nargs="+", help="files or folders; by default tests/PACKAGE")
    parser.add_argument("--sample", type=int, help="so many mutants of each module, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--lines", default="0-1000000", help="mutants of these lines only, such as 20-40")
    parser.add_argument("--slowest", type=float, default=5, help="seconds of CPU time that a test may take")
    parser.add_argument("--examples", type=int, default=10, help="of each property, at most")
    parser.add_argument("--nightly", action="store_true", help="run the nightly tier, too")
    parser.add_argument("--survivors", type=Path, metavar="FILE", help="append the survivors to a file, one a line")
    parser.add_argument("--only", type=Path, metavar="FILE", help="try only the mutants that a file of survivors lists")
    parser.add_argument("-k", default="", help="pytest's selection of tests by name")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the killed mutants as well")
    options = parser.parse_args()

    os.chdir(ROOT)
    paths = [path.resolve().relative_to(ROOT) for path in options.modules]
    tests = options.tests or sorted({f"tests/{path.parts[1]}" for path in paths})
    mutation = Mutation(paths, options)
    nightly = ["--nightly"] if options.nightly else []
    code = pytest.main([*PYTEST, *nightly, "-k", options.k, *tests], [mutation])
    print(f"{'module':40} {'mutants':>8} {'killed':>8} {'survived':>8} {'uncalled':>8} {'score':>6}")
    for module, (number, killed, survived, uncalled) in mutation.scores.items():
        print(f"{module!s:40} {number:8} {killed:8} {survived:8} {uncalled:8} {killed / max(number, 1):6.1%}")
    sys.exit(code)


if __name__ == "__main__":
    main()
