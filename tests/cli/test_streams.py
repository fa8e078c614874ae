"""The command line and its streams: closed, full, of another encoding; Ctrl-C; text that a terminal would obey.

Every command runs on a warehouse, a model and a job with hostile names: no terminal and no spreadsheet obeys them.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.command_line import avss, commands
from support.processes import wait_until
from support.tiers import nightly
from support.warehouses import activations, stats_of, write_measured, write_scores

import avss_dist
from avss_dist.core.streams import complete_output
from avss_dist.core.text import printable
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

COMMAND = [sys.executable, "-m", "avss_dist"]
FULL = "Error: standard output cannot be written: No space left on device.\n"
CLOSED = "Error: standard output cannot be written: it is closed.\n"
NOT_UTF8 = "Error: --warehouse: the name is not UTF-8 text.\nRename the folder.\n"
UNKNOWN = "Error: Unknown run 'absent'.\nValid: a-0123456789.\n"
CROSS_JOIN = "SELECT count(*) FROM range(10000000) a, range(10000000) b, range(100) c WHERE a.range + b.range = c.range"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a warehouse. Streams are buffered, which some container images switch off."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path / "w", "a-0123456789", [1.0, 2.0, 3.0])
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "code", "errors"),
    [
        ("AVSS query --schema >/dev/full", 1, FULL),
        *nightly(("AVSS query --schema >&-", 1, CLOSED)),
        *nightly(("AVSS query --schema >&- 2>&- <&-", 1, ""), ("AVSS show -w '' >&- 2>&-", 2, "")),
        *nightly(("AVSS --help >/dev/full", 1, FULL), ("AVSS show -w '' 2>/dev/full", 2, "")),
        *nightly(
            ("AVSS show -w $'a\\xffb'", 2, NOT_UTF8),
            ("AVSS show -w w --run absent >out; code=$?; [ -s out ] || exit $code", 2, UNKNOWN),
        ),
        ("AVSS query -w w 'FROM scores, range(9999)' --format csv | head -1 >out; exit ${PIPESTATUS[0]}", 0, ""),
        *nightly(
            ("AVSS --help | true; exit ${PIPESTATUS[0]}", 0, ""),
            ("AVSS show -w w | true; exit ${PIPESTATUS[0]}", 0, ""),
        ),
        *nightly(("PYTHONIOENCODING=ascii AVSS show -w w | grep -q '?'", 0, "")),
    ],
)
def test_the_streams_of_a_process(line: str, code: int, errors: str) -> None:
    """Full, closed, of another encoding, or with a reader that has had enough."""
    words = line.replace("AVSS", shlex.join(COMMAND))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", words], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == errors


def test_ctrl_c_ends_a_query_at_once(folder: Path) -> None:
    """A command takes a second of a processor before the query begins, and uses more only while the query runs."""
    process = subprocess.Popen(
        [*COMMAND, "query", "-w", str(folder / "w"), CROSS_JOIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )

    def is_querying_or_over() -> bool:
        times = psutil.Process(process.pid).cpu_times()
        return times.user + times.system > 2 or process.poll() is not None

    try:
        wait_until(is_querying_or_over)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130
    assert output == ""
    assert errors == "Stopped.\n"


def test_one_place_writes_what_people_see() -> None:
    """No other file of the package prints, or has a stream or a console of its own."""
    package = Path(avss_dist.__file__).parent
    writes = re.compile(r"(?<![\w.])print\(|sys\.(stdout|stderr)(?!\.isatty\(\))|\bConsole\(|\.echo\(|sys\.__std")
    writers = set()
    for file in package.rglob("*.py"):
        for line in file.read_text().splitlines():
            if '"""' not in line and writes.search(line.partition("#")[0]):
                writers.add(str(file.relative_to(package)))
    # `group` sends what libraries log to standard error; `__main__` speaks while nothing is imported; `readme` has
    # examples for others.
    assert writers == {"core/streams.py", "partition/group.py", "__main__.py", "warehouse/readme.py"}


def test_a_terminal_obeys_no_text() -> None:
    shown = printable("m\x1b]0;owned\x07\x1b[31m\u202eabc\n, é漢\t")
    assert shown == "m\ufffd]0;owned\ufffd\ufffd[31m\ufffdabc\n, é漢\t"


EVIL = "\x1b]0;owned\x07\x1b[31m\u202eevil\u2066\x85\x7f\r"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
TEXT = "--corpus text.txt --max-sequences 4 --sequence-length 16 --executor local"
ROWS = "--max-sequences 4 --sequence-length 16 --executor local"
READS = {
    "show": """
        -w W --format table --threshold 0.2
        -w W --format csv --threshold 0.2
        -w W --format json --threshold 0.2
        -w W --run a
        -w W x EVIL
        -w W --EVIL
        -w W --site EVIL
        -w W -o O/x.svg
        -w W -o O/x.html --run '*'
        -w W --quantiles
        -w W --quantiles --format csv
    """,
    "query": """
        -w W 'FROM runs' --format table
        -w W 'FROM runs' --format csv
        -w W 'FROM runs' --format json
        -w W 'FROM runs' --format markdown
        -w W "SELECT 'EVIL' AS \\"EVIL\\", ['EVIL'] AS l, {'EVIL': 1} AS s"
        -w W "SELECT '=1' AS \\"=1+1\\", 'EVIL' AS \\"|\\"" --format markdown
        -w W 'SELECT EVIL'
    """,
    "compare": """
        -w W
        -w W --format csv
    """,
    "findings": """
        -w W --every
        -w W --format csv
        -w W --truth
        -w W --truth --format csv
    """,
    "ls": """
        -w W
        plans -w W
        evaluations -w W --format csv
    """,
    "publish": """
        O/x -w W
        O/EVIL -w W
        hf://EVIL -w W
    """,
    "compact": "-w W",
    "rm": """
        -w W --dry-run --format table '*'
        -w W --dry-run --format csv '*'
        -w W --dry-run --format json '*'
        -w W EVIL
        -w W --dry-run EVIL
        -w W --dry-run --unused
    """,
    "report": "-w W -o O/x.html",
    "plan": """
        -w W -o O/x.yaml --by avss
        -w W -o O/EVIL.yaml --by avss
    """,
    "sparsify": """
        0.5 -w W -o O/x.yaml
        0.5 -w W --run EVIL -o O/EVIL.yaml
    """,
    "quantize": """
        --bits 5 -w W -o O/x.yaml
        --bits 5 -w W --run EVIL -o O/EVIL.yaml
    """,
    "contrast": """
        -w W
        -w W --run EVIL
    """,
}
"""Arguments of commands that read, line by line. A warehouse is W, an empty folder O, and a hostile text EVIL."""
TRAINING = "--tokens 64 --self-texts 0 --held-out 2 --sequence-length 16 --max-sequences 8"
WORKS = {
    "score": f"""
        M {TEXT} -w O/w
        M {TEXT} --corpus EVIL.txt -w O/w
    """,
    "estimate": "EVIL --corpus text.txt",
    "evaluate": f"""
        M --tasks perplexity:text.txt {ROWS} --warehouse O/e
        M --tasks EVIL {ROWS} --warehouse O/e
    """,
    "ablate": f"M {TEXT} --warehouse O/e",
    "run": """
        J
        J --dry-run
        EVIL.yaml
    """,
    "prune": """
        M P -o O/pruned
        M EVIL.yaml -o O/p
    """,
    "shrink": f"""
        M {TEXT} -o O/s
        M {TEXT} -o O/s --tasks EVIL
    """,
    "distill": f"""
        M --teacher M --corpus text.txt {TRAINING} -o O/d
        M --teacher EVIL --corpus EVIL.txt {TRAINING} -o O/d2
    """,
    "jobs submit": "J --address http://127.0.0.1:9/EVIL",
    "jobs list": "--address http://127.0.0.1:9/EVIL",
    "jobs logs": "EVIL --address http://127.0.0.1:9",
    "jobs stop": "EVIL --address http://127.0.0.1:9",
    "verify": """
        M --server http://127.0.0.1:9/EVIL
        EVIL --server http://127.0.0.1:9
    """,
    "doctor": "--jsn EVIL",
}
"""Arguments of commands that work. A model is M, a job J, and a plan P."""


def arguments(lines: str) -> list[list[str]]:
    """Return the arguments of each line."""
    return [shlex.split(line) for line in lines.strip().splitlines()]


def test_every_command_is_here() -> None:
    assert sorted({**READS, **WORKS}) == sorted(commands())


@pytest.mark.parametrize("args", [[EVIL], [f"--{EVIL}"], ["show", f"--{EVIL}"]])
def test_no_mistake_of_a_command_line_steers(args: list[str]) -> None:
    done = avss(*args)
    assert done.exit_code == 2
    assert done.stderr
    assert not OBEYED.search(done.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with a warehouse W, a model M, a job J and a plan P, all with hostile names."""
    root = tmp_path_factory.mktemp("place")
    names = {name: f"{name}{EVIL}" for name in ("family", "revision", "dtype", "corpus", "device")}
    for seed, run_id in enumerate(("a-0123456789", "b-0123456789")):
        model = f"=HYPERLINK({EVIL})/{EVIL}{seed}"
        notes = [EVIL]
        versions = {EVIL: EVIL}
        shards = stats_of(activations(seed))
        write_measured(root / "w", run_id, shards, 8, model=model, notes=notes, versions=versions, **names)
    store = Store(root / "w")
    created_at = datetime(2026, 1, 1, tzinfo=UTC)
    store.write_run({"run_id": "c", "status": "failed", "error": EVIL, "model": f"m{EVIL}", "created_at": created_at})
    run = RunIdentity(run_id="a-0123456789", model=f"m{EVIL}", revision=names["revision"], family="f")
    about = {"task": f"ablation:{EVIL}", "metric": "loss", "drop": [], "drop_parts": [], "value": 2.0}
    about["created_at"] = created_at
    without_layer = [{**about, "layer": layer, "value": 2.0 + layer / 8} for layer in range(8)]
    store.write_rows("evaluations", run, [about, *without_layer])
    tried = {**about, "method": f"avss{EVIL}", "share": 0.25, "retention": 0.5, "drop": [1, 2]}
    whole = {**tried, "method": "whole model", "share": 0.0, "drop": []}
    store.write_rows("experiments", run, [tried, whole], "1" * 20)
    zero = {"sparsity_plan": EVIL, "method": EVIL, "rule": EVIL, "target": 0.5, "layer": 0, "map": EVIL, "by": EVIL}
    zero |= {"site": "neuron", "outputs": 1, "inputs": 2, "value": 0.5, "sparsity": 0.5, "created_at": created_at}
    store.write_rows("sparsity", run, [zero], "2" * 20)
    shutil.copytree(tiny_llama, root / f"model{EVIL}")
    (root / "text.txt").write_text("Some words that are long enough to be read. " * 200)
    plan = {"model": str(root / f"model{EVIL}"), "num_layers": 3, "layers": "model.layers", "drop": [1]}
    (root / "plan.yaml").write_text(yaml.safe_dump({**plan, "why": {"by": EVIL}, "findings": [EVIL]}))
    job = {"warehouse": str(root / f"j{EVIL}"), "models": [str(root / f"model{EVIL}")], "corpora": ["text.txt"]}
    job |= {"settings": {"max_sequences": 4, "sequence_length": 16}, "execution": {"executor": "local"}}
    job |= {"experiment": {"shares": [0.34], "scores": ["avss"], "random": 1, "tasks": ["perplexity:text.txt"]}}
    (root / f"job{EVIL}.yaml").write_text(yaml.safe_dump(job))
    return root


def run(command: str, args: list[str], place: Path, folder: Path) -> str:
    """Run a command, and return what it prints and says, which steers no terminal."""
    named = {"W": place / "w", "M": place / f"model{EVIL}", "J": place / f"job{EVIL}.yaml", "P": place / "plan.yaml"}
    words = []
    for arg in args:
        word = str(named.get(arg, arg))
        words.append(word.replace("EVIL", EVIL).replace("O/", f"{folder}/"))
    done = avss(*command.split(), *words)
    text = done.stdout + done.stderr
    assert done.exit_code in (0, 1, 2), text
    assert text, (args, text)
    assert not OBEYED.search(text), (args, text)
    for file in folder.iterdir():
        if file.suffix in (".svg", ".yaml", ".csv"):
            assert not OBEYED.search(file.read_text()), file
        elif file.suffix == ".html":
            without_scripts = re.sub(r"<script.*?</script>", "", file.read_text(), flags=re.DOTALL)
            assert not OBEYED.search(without_scripts), file
    if "csv" in args and done.exit_code == 0:
        for row in csv.reader(io.StringIO(done.stdout)):
            for cell in row:
                assert not cell.startswith(("=", "+", "@")), row
                assert not re.match(r"-[^\d.]", cell), row
    return text


def cases() -> Iterator[Any]:
    """Yield each command that reads with each of its lists of arguments, by default with the first one."""
    for command, lines in READS.items():
        first, *others = arguments(lines)
        yield command, first
        for args in others:
            yield pytest.param(command, args, marks=pytest.mark.nightly)


@pytest.mark.parametrize(("command", "args"), [*cases()])
def test_no_command_that_reads_steers(command: str, args: list[str], place: Path, tmp_path: Path) -> None:
    assert run(command, args, place, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("command", WORKS)
def test_no_command_that_works_steers(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    for args in arguments(WORKS[command]):
        run(command, args, place, tmp_path)
    for card in tmp_path.rglob("README.md"):
        assert not OBEYED.search(card.read_text())


@pytest.mark.parametrize("is_read", [True, False])
def test_a_broken_connection_is_no_closed_standard_output(is_read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are a BrokenPipeError: one of a server ended a command with exit code 0 and without a message."""
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    if not is_read:
        os.close(reader)
    with pytest.raises(BrokenPipeError if is_read else SystemExit) as caught, complete_output():
        raise BrokenPipeError("a server hung up")
    if is_read:
        os.close(reader)
    else:
        assert caught.value.code == 0
