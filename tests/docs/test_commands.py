"""Every command of the documentation runs, of a tiny model on small texts; those of the help are accepted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command_line import avss
from support.command_line import commands as registered
from support.documentation import PAGES, ROOT, commands, read

from avss_dist.cli.commands import EXAMPLES

ONLY_PARSED = {
    "jobs": "needs a cluster",
    "doctor": "starts processes for a minute; tests/system runs it",
    "--replicas": "starts Ray; tests/executors has it",
    "--address": "needs a cluster",
    "--ranks": "starts processes; tests/partition has it",
    "hf:": "needs the network",
    "hellaswag": "needs the network",
    "reviews.yaml": "needs lm_eval, which takes long to import; tests/tasks has it",
    "jobs/": "names models of the Hub; tests/runs reads every file of the folder",
}
"""Words of commands that are not run here, and why."""
HELP = "avss --help"
NOT_RUN = ("--help", "--version", "--install-completion")
PLACES = {"s3://bucket/warehouse": "warehouse", "RUN_ID": "name", "OTHER_RUN_ID": "model-a"}
PLACES |= {"12GB": "150kB", "smollm2": "name", "smollm2-*": "*", "MODEL": "org/name"}
SMALL = {"--max-sequences": "16", "--sequence-length": "32", "--batch-size": "8", "--executor": "local", "--count": "2"}
"""Options that are added where a command has them and says nothing of them."""


ANSWERS = (("It is.", "checked"), ("No.", "invented"), ("Yes.", "truthful"), ("Never.", "hallucinated"))


def documented() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every command once, with the page that has it first; those of a page in their order."""
    found = [(str(page.relative_to(ROOT)), tuple(words)) for page in PAGES for words in commands(read(page))]
    lines = "\n".join(line for of in EXAMPLES.values() for line in of)
    found += [(HELP, tuple(words)) for words in commands(f"```bash\n{lines}\n```")]
    first: dict[str, tuple[str, tuple[str, ...]]] = {}
    for page, words in found:
        first.setdefault(re.sub(r" (-w|--warehouse) warehouse\b", "", " ".join(words)), (page, words))
    yield from first.values()


def reason(words: tuple[str, ...]) -> str | None:
    """Why a command is not run."""
    begins = (why for part, why in ONLY_PARSED.items() if any(word.startswith(part) for word in words))
    return next(begins, None)


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """What the command makes of its words; a mistake is raised."""
    name, *rest = words
    if name == "jobs":
        name, *rest = f"{name} {rest[0]}", *rest[1:]
    values: dict[str, Any] = registered()[name].make_context(name, rest, resilient_parsing=False).params
    return values


def test_every_command_is_accepted() -> None:
    found = [words for _, words in documented() if words[0] not in NOT_RUN]
    assert len(found) > 90
    for words in found:
        parsed(words)
    unused = [part for part in ONLY_PARSED if not any(word.startswith(part) for words in found for word in words)]
    assert not unused


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_bert: Path) -> Path:
    """A folder with what the pages name: models, texts, a job, and a warehouse of two runs."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("documented")
    texts = [topics[name] for name in sorted(topics)]
    (folder / "your.txt").write_text("\n".join(texts[:6]))
    (folder / "heldout.txt").write_text("\n".join(texts[6:9]))
    for name in ("your.jsonl", "code.jsonl", "own.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": text[:2000]}) + "\n" for text in texts[9:12]))
    prompts = [f"It {i}" for i in range(6)]
    answers = {"best_answer": "It is.", "correct_answers": ["It is."], "incorrect_answers": ["No."]}
    (folder / "truthfulqa.jsonl").write_text(
        "".join(json.dumps({"question": prompt, **answers}) + "\n" for prompt in prompts)
    )
    (folder / "answers.jsonl").write_text(
        "".join(
            json.dumps({"prompt": prompt, "answer": answer, "kind": kind}) + "\n"
            for prompt in prompts
            for answer, kind in ANSWERS
        )
    )
    (folder / "org").mkdir()
    (folder / "org/name").symlink_to(tiny_llama)
    (folder / "model-a").symlink_to(tiny_bert)
    job = {"warehouse": "warehouse", "models": ["org/name"], "corpora": ["your.txt"]}
    settings = {name[2:].replace("-", "_"): int(SMALL[name]) for name in list(SMALL)[:3]}
    (folder / "JOB.yaml").write_text(json.dumps({**job, "settings": settings, "execution": {"executor": "local"}}))
    return folder


def small(words: tuple[str, ...]) -> list[str]:
    """A command with names that are here, and with little work."""
    kept = [PLACES.get(word, word) for word in words]
    if "--sublayers" in kept:  # no checkpoint can be pruned by that plan
        kept = ["sublayers.yaml" if word == "plan.yaml" else word for word in kept]
    options = {option for p in registered()[words[0]].params for option in p.opts}
    reads = words[0] not in ("plan", "sparsify", "prune") or {"--corpus", "--repair-corpus"}.intersection(words)
    for name, value in SMALL.items():
        if name in kept:
            kept[kept.index(name) + 1] = value
        elif name in options and reads and name != "--count":
            kept += [name, value]
    if words[0] == "compare":
        kept.append("--allow-mismatch")  # the warehouse has two texts
    if words[0] == "plan" and "--protect" not in words:
        kept += ["--protect", "first=1"]  # a cut before the first layer has nothing to repair
    return kept


@pytest.fixture(scope="module")
def measured(place: Path) -> Path:
    """The same, with a warehouse of two runs, the first with its ground truth, and one of paired text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for words in (
            ("score", "model-a", "--corpus", "your.txt"),
            ("score", "org/name", "--corpus", "heldout.txt"),
            ("score", "org/name", "--corpus", "your.txt"),
            ("ablate", "org/name", "--corpus", "your.txt", "--damage", "--shapley", "2"),
            ("plan", "--by", "damage", "--protect", "first=1", "-o", "plan.yaml"),
            ("score", "org/name", "--corpus", "truthfulqa:truthfulqa.jsonl", "-w", "paired"),
        ):
            done = avss(*small(words))
            assert done.exit_code == 0, done.output
    return place


RUN = {page for page, words in documented() if page != HELP and words[0] not in NOT_RUN and not reason(words)}


@pytest.mark.parametrize("page", sorted(RUN))
def test_every_command_runs(
    page: str, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark_in_this_process: None
) -> None:
    """In the order of the page, in a folder that has what the page supposes."""
    shutil.copytree(measured, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    for where, words in documented():
        if where != page or words[0] in NOT_RUN or reason(words):
            continue
        wanted = small(words)
        if "-o" in wanted:
            target = Path(wanted[wanted.index("-o") + 1])
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        done = avss(*wanted)
        assert done.exit_code == 0, f"{' '.join(wanted)}\n{done.stderr}"
