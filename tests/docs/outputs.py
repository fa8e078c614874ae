"""Run the commands of the guides whose output a page shows, keep what they print, and write it into the pages.

    PYTHONPATH=tests:. python tests/docs/outputs.py --text wikitext2_valid.txt [--check]

All guides share one folder, as for a reader who follows them in this order. The model is the one that
``jobs/fetch_smollm2.py`` gets through pip. The text is divided in the middle into ``your.txt`` and ``heldout.txt``. It
takes a quarter of an hour on two cores. The outputs are kept whole in ``outputs.json``, of which a page shows a part.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

from support.documentation import DOCS, ROOT, Example, abridged, commands, examples, read

GUIDES = ("first-score", "choose-layers", "shrink", "many-models", "sparsify", "quantize")
"""Guides that show outputs, in the order in which one needs the files of another."""
RECORD = Path(__file__).with_name("outputs.json")
MODEL = "SmolLM2-135M-Instruct"
JOB = "JOB.yaml"
PICTURE = "layers.svg"  # which the first page shows
WIDTH = 100  # columns of the terminal
_PROGRESS = re.compile(r"^(\d\d:\d\d:\d\d |Planning |Needs about ).*\n", re.MULTILINE)
"""Lines of a log, which is no output: its times and the memory that is free are never the same."""
_DURATION = re.compile(r"[\d.]+ (h|min|s)\b( \d+ (min|s)\b)?")
_FILLING = re.compile(r" +|[━─]+")  # its length depends on the width of a column of durations


def prepare(folder: Path, text: Path) -> None:
    """Put the model and the texts of the guides into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "jobs" / "fetch_smollm2.py", "--to", folder / MODEL], check=True)
    lines = read(text).splitlines(keepends=True)
    middle = len(lines) // 2
    (folder / "your.txt").write_text("".join(lines[:middle]), encoding="utf-8")
    (folder / "heldout.txt").write_text("".join(lines[middle:]), encoding="utf-8")


def guide(name: str) -> Path:
    """Return the page of a guide."""
    return DOCS / "guides" / f"{name}.md"


def printed_by(words: list[str], folder: Path) -> str:
    """Return what a command prints, standard error included, without lines of its log.

    Raises:
        SystemExit: the command has failed.
    """
    print("avss", *words, file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "avss_dist", *words],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": str(WIDTH)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\navss {' '.join(words)} has failed.")
    lines: list[str] = []
    for line in _PROGRESS.sub("", done.stdout).splitlines():
        lines += wrapped(line.rstrip())
    return with_line_ends(lines)


def with_line_ends(lines: list[str]) -> str:
    """Return a text of lines."""
    return "".join(f"{line}\n" for line in lines)


def wrapped(line: str) -> list[str]:
    """Return a line as a terminal shows it, but for one that ends with a command."""
    if len(line) <= WIDTH or ": avss " in line:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line.strip(), WIDTH, initial_indent=indent, subsequent_indent=indent)


def run(example: Example, folder: Path) -> str:
    """Return what the commands of an example print."""
    for job in example.jobs:
        (folder / JOB).write_text(job, encoding="utf-8")
    outputs = [printed_by(words, folder) for words in commands(f"```bash\n{example.block}```")]
    return "".join(outputs)


def shown(example: Example, output: str) -> str:
    """Return the part of an output that a page shows: everything, if the lines beside a gap are no longer there."""
    try:
        return abridged(example.output, output)
    except ValueError as error:
        print(f"Shorten this output on the page again, {error}:\n{example.block}", file=sys.stderr)
        return output


def record() -> dict[str, str]:
    """Return the outputs that are kept, by the commands that print them."""
    lines_of_blocks = json.loads(read(RECORD))
    return {block: with_line_ends(lines) for block, lines in lines_of_blocks.items()}


def write(outputs: dict[str, str]) -> None:
    """Keep the outputs, and show them in the guides."""
    lines = {block: output.splitlines() for block, output in outputs.items()}
    RECORD.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in GUIDES:
        page = guide(name)
        for example in examples(read(page)):
            before = f"{example.block}```\n\n```text\n{example.output}```"
            after = f"{example.block}```\n\n```text\n{shown(example, outputs[example.block])}```"
            page.write_text(read(page).replace(before, after), encoding="utf-8")


def differences(before: dict[str, str], after: dict[str, str]) -> Iterable[str]:
    """Yield the lines in which outputs differ, durations apart."""
    for block, output in after.items():
        kept = _without_durations(before.get(block, ""))
        printed = _without_durations(output)
        yield from difflib.unified_diff(kept, printed, "kept", block, lineterm="", n=0)


def _without_durations(output: str) -> list[str]:
    """Return the lines of an output that are the same in a run of another speed."""
    return _FILLING.sub(" ", _DURATION.sub("TIME", output)).splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the validation split of WikiText-2")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if an output differs")
    arguments = parser.parse_args()
    outputs: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, arguments.text)
        for name in GUIDES:
            for example in examples(read(guide(name))):
                outputs[example.block] = run(example, folder)
        if not arguments.check:
            shutil.copy(folder / PICTURE, DOCS / "images")
    if not arguments.check:
        write(outputs)
    elif lines := [*differences(record(), outputs)]:
        raise SystemExit("\n".join(lines))


if __name__ == "__main__":
    main()
