"""Every documented command, also of a help text, is accepted; nightly, it runs on a tiny model and small texts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import LAYERS, VOCABULARY, llama
from support.command_line import avss
from support.command_line import commands as registered
from support.documentation import PAGES, ROOT, commands, read
from support.families import tiny_model

from avss_dist.cli.declarations import COMMANDS

ONLY_PARSED = {
    "jobs": "needs a cluster",
    "verify": "needs an inference server; tests/serving has it",
    "doctor": "starts processes for a minute; tests/core runs it",
    "--replicas": "starts Ray; tests/runs has it",
    "--address": "needs a cluster",
    "--ranks": "starts processes; tests/partition has it",
    "--along": "needs several checkpoints of a training; tests/analysis has it",
    "hf:": "needs the network",
    "hellaswag": "needs the network",
    "reviews.yaml": "needs lm_eval, which takes long to import; tests/tasks has it",
    "jobs/": "names models of the Hub; tests/runs reads every file of the folder",
}
"""Reasons not to run a command here, by the start of a word in it."""
HELP = "avss --help"
NOT_RUN = ("--help", "--version", "--install-completion")
PLACES = {"s3://bucket/warehouse": "warehouse", "RUN_ID": "name", "OTHER_RUN_ID": "model-a"}
PLACES |= {"HuggingFaceTB/SmolLM2-135M-Instruct": "org/name", "SmolLM2-135M-Instruct": "org/name"}
PLACES |= {"12GB": "180kB", "smollm2": "name", "smollm2-*": "*", "MODEL": "org/name"}
PLACES |= {"int2-g64": "int4-g32", "int3-g64": "q4_0", "int4-g64": "nvfp4"}
SMALL = {"--max-sequences": "16", "--sequence-length": "32", "--batch-size": "8", "--executor": "local"}
SMALL |= {"--tokens": "4e3", "--held-out": "4", "--self-texts": "0"}
"""Options added to commands that take them and do not set them."""
SMALLER = SMALL | {"--count": "2", "--distill-tokens": "4e3", "--bits": "6"}
"""Values of options that commands set."""


ANSWERS = (("It is.", "checked"), ("No.", "invented"), ("Yes.", "truthful"), ("Never.", "hallucinated"))


def documented() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every command once, with the first page that has it, in the order of the page."""
    everything = [(str(page.relative_to(ROOT)), tuple(words)) for page in PAGES for words in commands(read(page))]
    lines = "\n".join(line for command in COMMANDS.values() for line in command.examples)
    everything += [(HELP, tuple(words)) for words in commands(f"```bash\n{lines}\n```")]
    first: dict[str, tuple[str, tuple[str, ...]]] = {}
    for page, words in everything:
        first.setdefault(re.sub(r" (-w|--warehouse) warehouse\b", "", " ".join(words)), (page, words))
    yield from first.values()


def reason(words: tuple[str, ...]) -> str | None:
    """Return the reason not to run a command, if there is one."""
    begins = (why for part, why in ONLY_PARSED.items() if any(word.startswith(part) for word in words))
    return next(begins, None)


def parse(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse a command and return its parameters."""
    name, *rest = words
    if name == "jobs":
        name, *rest = f"{name} {rest[0]}", *rest[1:]
    values: dict[str, Any] = registered()[name].make_context(name, rest, resilient_parsing=False).params
    return values


def test_every_command_is_accepted() -> None:
    accepted = [words for _, words in documented() if words[0] not in NOT_RUN]
    assert len(accepted) > 80
    for words in accepted:
        parse(words)
    unused = [part for part in ONLY_PARSED if not any(word.startswith(part) for words in accepted for word in words)]
    assert not unused


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bert: Path,
    save_checkpoint: Callable[[Any, Path], Path],
) -> Path:
    """Folder with the models, texts and job file that the pages name. Groups of 32 inputs fit the first model."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("documented")
    texts = [topics[name] for name in sorted(topics)]
    (folder / "your.txt").write_text("\n".join(texts[:6]))
    (folder / "heldout.txt").write_text("\n".join(texts[6:9]))
    for name in ("your.jsonl", "code.jsonl", "own.jsonl", "rows.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": text[:2000]}) + "\n" for text in texts[9:12]))
    prompts = [f"It {i}" for i in range(6)]
    answers = {"best_answer": "It is.", "correct_answers": ["It is."], "incorrect_answers": ["No."]}
    questions = [{"question": prompt, **answers} for prompt in prompts]
    labelled = [{"prompt": prompt, "answer": answer, "kind": kind} for prompt in prompts for answer, kind in ANSWERS]
    for name, rows in (("truthfulqa.jsonl", questions), ("answers.jsonl", labelled)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.csv").write_text("layer,mine\n" + "".join(f"{layer},{layer}\n" for layer in range(LAYERS)))
    (folder / "org").mkdir()
    save_checkpoint(llama(intermediate_size=64), folder / "org/name")
    mixture = tiny_model("causal", "qwen3_moe")
    mixture.resize_token_embeddings(VOCABULARY)
    save_checkpoint(mixture, folder / "org/mixture")
    (folder / "model-a").symlink_to(tiny_bert)
    job = {"warehouse": "warehouse", "models": ["org/name"], "corpora": ["your.txt"]}
    settings = {name[2:].replace("-", "_"): int(SMALL[name]) for name in list(SMALL)[:3]}
    (folder / "JOB.yaml").write_text(json.dumps({**job, "settings": settings, "execution": {"executor": "local"}}))
    return folder


def small(words: tuple[str, ...]) -> list[str]:
    """Return a command with names that exist in the folder, and with little work."""
    kept = [PLACES.get(word, word) for word in words]
    options = {option for p in registered()[words[0]].params for option in p.opts}
    reads = words[0] not in ("plan", "sparsify", "prune") or {"--corpus", "--repair-corpora", "--method"}.intersection(
        words
    )
    for name, value in SMALLER.items():
        if name in kept:
            kept[kept.index(name) + 1] = value
        elif name in SMALL and name in options and reads:
            kept += [name, value]
    if words[0] == "compare":
        kept.append("--allow-mismatch")  # the warehouse has two texts
    if words[0] == "plan" and not {"--first", "--experts"}.intersection(words):
        kept += ["--first", "1"]  # a cut before the first layer has nothing to repair
    return kept


@pytest.fixture(scope="module")
def measured(place: Path) -> Path:
    """The folder with a warehouse of three runs, one with its ground truth, and a warehouse of paired text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for words in (
            ("score", "model-a", "--corpus", "your.txt"),
            ("score", "org/name", "--corpus", "heldout.txt"),
            ("score", "org/name", "--corpus", "your.txt"),
            ("ablate", "org/name", "--corpus", "your.txt", "--damage", "--shapley", "2"),
            ("plan", "--by", "damage", "--first", "1", "-o", "plan.yaml"),
            ("score", "org/name", "--corpus", "truthfulqa:truthfulqa.jsonl", "-w", "paired"),
        ):
            done = avss(*small(words))
            assert done.exit_code == 0, done.output
    return place


RUN = {page for page, words in documented() if page != HELP and words[0] not in NOT_RUN and not reason(words)}


@pytest.mark.nightly
@pytest.mark.parametrize("page", sorted(RUN))
def test_every_command_runs(page: str, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the commands of a page in their order, in a copy of the folder."""
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
