"""No thread of Arrow holds an object of Python: it would release it while the process ends, which aborts then.

An Arrow column that was made of a numpy array keeps the array, and takes the GIL to release it. Arrow's own threads,
which scan datasets, hold columns of tables in memory until a moment after the result is there. If the interpreter has
begun to end by then, whoever takes the GIL is ended, and with it the process: "terminate called without an active
exception". So the package scans only files, and filters and groups tables in the thread that asks for it.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from support.warehouses import activations, stats_of, write_measured

from avss_dist.warehouse.reader import Warehouse

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
TIMES = 20  # that each command is run
COMMANDS = (
    "ls",
    "show",
    "show --threshold 0.02",
    "show --quantiles",
    "compare --allow-mismatch",
    "compare --allow-mismatch --threshold 0.5",
    "compare --allow-mismatch -o map.svg",
    "findings --every",
    "report",
    "publish",
    "compact",
    "plan --by avss",
)
ALLOWED = {
    ("reader.py", "runs.filter(~pc.field('run_id').isin(list(damaged)))"),  # a dataset of files
    ("reader.py", "ds.dataset(pa.concat_tables(readable.converted))"),  # columns that Arrow read or computed
}


def _is_mask(node: ast.expr) -> bool:
    """Whether the argument of ``filter`` is an array of booleans, and not a condition on columns by name."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    text = ast.unparse(node)
    if "pc.field(" in text or "pc.scalar(" in text:
        return False
    return node.func.attr in ("is_null", "is_valid") or text.startswith(("pc.", "pa."))


def _scans_memory(call: ast.Call, name: str) -> bool:
    """Whether a call of a method of this name may let Arrow's threads scan a table in memory."""
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    match name:
        case "InMemoryDataset" | "join_asof":
            return True
        case "dataset":  # files are opened with a schema
            return len(call.args) < 2
        case "filter":
            return not call.args or not _is_mask(call.args[0])
        case "group_by":
            return options.get("use_threads") != "False"
        case "join":  # that of texts has one argument
            return len(call.args) + len(options) > 1 and not ast.unparse(call.func).startswith("os.path.")
    return False


def scans_of_memory(tree: ast.AST) -> Iterator[str]:
    """Yield every expression that may let Arrow's threads scan a table in memory."""
    called: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called.add(id(node.func))
            if _scans_memory(node, node.func.attr):
                yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and id(node) not in called and ast.unparse(node) == "ds.dataset":
            yield "ds.dataset"
        elif isinstance(node, ast.ImportFrom | ast.Import) and "pyarrow.acero" in ast.unparse(node):
            yield ast.unparse(node)


@pytest.mark.nightly
def test_only_files_are_scanned() -> None:
    scans = {
        (file.name, scan)
        for file in (ROOT / "avss_dist").rglob("*.py")
        for scan in scans_of_memory(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert scans == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "table.filter(pc.field('a') == 1)",
        "table.filter(pc.starts_with(pc.field('a'), 'x'))",
        "table.filter(condition)",
        "table.filter(a & b)",
        "table.filter(expression=pc.field('a'))",
        "table.group_by('a').aggregate([])",
        "table.join(other, 'a')",
        "table.join(other, keys='a')",
        "ds.dataset(table)",
        "map(ds.dataset, tables)",
        "ds.InMemoryDataset(table)",
        "from pyarrow.acero import Declaration",
    ],
)
def test_scans_of_tables_are_noticed(code: str) -> None:
    assert list(scans_of_memory(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "table.filter(pc.equal(table['a'], 1))",
        "table.filter(table['a'].is_valid())",
        "table.filter(pa.array(mask))",
        "table.group_by('a', use_threads=False).aggregate([])",
        "', '.join(names)",
        "ds.dataset(paths, schema)",
        "warehouse.table('runs', where=pc.field('a') == 1)",
    ],
)
def test_masks_and_files_are_allowed(code: str) -> None:
    assert not list(scans_of_memory(ast.parse(code)))


@pytest.fixture(scope="module")
def late_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library in which threads that Python did not start wait before they take the GIL."""
    if not COMPILER or not sysconfig.get_config_var("Py_ENABLE_SHARED") or sys.platform != "linux":
        pytest.skip("needs a C compiler, Linux, and a Python with a shared library")
    library = tmp_path_factory.mktemp("late") / "late_threads.so"
    source = ROOT / "tests" / "support" / "late_threads.c"
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse of six runs of two models. Not to be changed, but by `avss compact`."""
    root = tmp_path_factory.mktemp("measured") / "w"
    for seed in range(6):
        write_measured(root, f"run-{seed}", stats_of(activations(seed)), 8, model=f"org/model-{seed % 2}")
    return root


@dataclass(frozen=True)
class Commands:
    """Runs a command many times, several at once, on one warehouse, with threads that are late.

    Attributes:
        library: of `late_threads`.
        warehouse: of `measured`.
        folder: for what the commands write.
    """

    library: Path
    warehouse: Path
    folder: Path

    def ends(self, words: Sequence[str]) -> set[tuple[int, bool]]:
        """Return the exit codes, each with whether a thread that Python did not start took the GIL."""
        with ThreadPoolExecutor(4) as pool:  # more than most machines have cores, so that threads wait for one
            return set(pool.map(partial(self._end, words), range(TIMES)))

    def _end(self, words: Sequence[str], number: int) -> tuple[int, bool]:
        folder = self.folder / str(number)
        folder.mkdir()
        environment = {**os.environ, "LD_PRELOAD": str(self.library), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "avss_dist", *words, "-w", str(self.warehouse)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, "foreign thread" in done.stderr


@pytest.fixture
def commands(late_threads: Path, measured: Path, tmp_path: Path) -> Commands:
    return Commands(late_threads, measured, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_aborts_at_its_end(command: str, commands: Commands) -> None:
    words = command.split()
    match words[0]:
        case "publish":
            words.append("page")
        case "report":
            words += ["-o", "file.html"]
        case "plan":
            words += ["-o", "plan.yaml"]
    assert commands.ends(words) == {(0, False)}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("query", "code"),
    [("@stability", 0), ("FROM layers", 0), ("SELECT error(model) FROM scores", 2)],
)
def test_no_query_aborts_at_its_end(query: str, code: int, commands: Commands) -> None:
    """DuckDB's threads ask Python for the rows of a table, and have ended before the command writes its result."""
    assert {ended for ended, _ in commands.ends(["query", query])} == {code}


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_query_leaves_no_thread_of_its_own(measured: Path) -> None:
    warehouse = Warehouse(measured)
    threads_of_arrow = pa.cpu_count() + pa.io_thread_count()  # begin when they are needed, and stay
    before = len(os.listdir("/proc/self/task"))
    for _ in range(threads_of_arrow + 1):
        warehouse.sql("FROM layers")
    assert len(os.listdir("/proc/self/task")) - before <= threads_of_arrow
