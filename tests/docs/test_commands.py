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
from support.command_line import avss, succeed
from support.command_line import commands as registered
from support.documentation import PAGES, ROOT, commands, read
from support.families import tiny_model
from support.json_files import write_json_lines

from avss_dist.cli.declarations import COMMANDS

ONLY_PARSED = {
    "jobs": "needs a cluster",
    "verify": "needs an inference server; tests/serving has it",
    "doctor": "starts processes for a minute; tests/core runs it",
    "--replicas": "starts Ray; tests/runs has it",
    "--address": "needs a cluster",
    "--ranks": "starts processes; tests/partition has it",
    "--along": "needs several checkpoints of a training; tests/analysis has it",
    "--watch": "waits for checkpoints of a training; tests/runs has it",
    "seed": "needs several seeds of a training; tests/analysis has it",
    "--allow-pickle": "needs a checkpoint of a training; tests/models has it",
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
    seen = set()
    for page, text in texts_with_commands():
        for words in commands(text):
            command = re.sub(r" (-w|--warehouse) warehouse\b", "", " ".join(words))
            if command not in seen:
                seen.add(command)
                yield page, tuple(words)


def texts_with_commands() -> Iterator[tuple[str, str]]:
    """Yield name and text of each page, and then the examples of the help texts."""
    for page in PAGES:
        yield str(page.relative_to(ROOT)), read(page)
    for command in COMMANDS.values():
        lines = "\n".join(command.examples)
        yield HELP, f"```bash\n{lines}\n```"


def has_start(words: tuple[str, ...], start: str) -> bool:
    """Return whether a word of a command begins so."""
    return any(word.startswith(start) for word in words)


def reason(words: tuple[str, ...]) -> str | None:
    """Return the reason not to run a command, if there is one."""
    for start, why in ONLY_PARSED.items():
        if has_start(words, start):
            return why
    return None


def parse(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse a command and return its parameters."""
    name, *rest = words
    if name == "jobs":
        name = f"jobs {rest.pop(0)}"
    values: dict[str, Any] = registered()[name].make_context(name, rest, resilient_parsing=False).params
    return values


def test_every_command_is_accepted() -> None:
    accepted = [words for _, words in documented() if words[0] not in NOT_RUN]
    assert len(accepted) > 80
    for words in accepted:
        parse(words)


def test_every_reason_not_to_run_a_command_is_of_a_command() -> None:
    every_word = [word for _, words in documented() for word in words]
    for start in ONLY_PARSED:
        assert has_start(tuple(every_word), start), start


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
    documents = [{"text": text[:2000]} for text in texts[9:12]]
    for name in ("your.jsonl", "code.jsonl", "own.jsonl", "rows.jsonl"):
        write_json_lines(folder / name, documents)
    write_questions(folder)
    scores = [f"{layer},{layer}\n" for layer in range(LAYERS)]
    (folder / "scores.csv").write_text("layer,mine\n" + "".join(scores))
    (folder / "org").mkdir()
    save_checkpoint(llama(intermediate_size=64), folder / "org/name")
    mixture = tiny_model("causal", "qwen3_moe")
    mixture.resize_token_embeddings(VOCABULARY)
    save_checkpoint(mixture, folder / "org/mixture")
    (folder / "model-a").symlink_to(tiny_bert)
    job: dict[str, Any] = {"warehouse": "warehouse", "models": ["org/name"], "corpora": ["your.txt"]}
    job["settings"] = {"max_sequences": 16, "sequence_length": 32, "batch_size": 8}
    job["execution"] = {"executor": "local"}
    (folder / "JOB.yaml").write_text(json.dumps(job))
    return folder


def write_questions(folder: Path) -> None:
    """Write questions with answers, and answers with labels, in the forms that the pages name."""
    answers = {"best_answer": "It is.", "correct_answers": ["It is."], "incorrect_answers": ["No."]}
    questions: list[dict[str, Any]] = []
    labelled: list[dict[str, Any]] = []
    for number in range(6):
        prompt = f"It {number}"
        questions.append({"question": prompt, **answers})
        for answer, kind in ANSWERS:
            labelled.append({"prompt": prompt, "answer": answer, "kind": kind})
    write_json_lines(folder / "truthfulqa.jsonl", questions)
    write_json_lines(folder / "answers.jsonl", labelled)


def small(words: tuple[str, ...]) -> list[str]:
    """Return a command with names that exist in the folder, and with little work."""
    command = [PLACES.get(word, word) for word in words]
    added = set()
    if reads_text(words):
        for parameter in registered()[words[0]].params:
            added.update(SMALL.keys() & parameter.opts)
    for name, value in SMALLER.items():
        if name in command:
            command[command.index(name) + 1] = value
        elif name in added:
            command += [name, value]
    if words[0] == "compare":
        command.append("--allow-mismatch")  # the warehouse has two texts
    if words[0] == "plan" and not {"--first", "--experts"}.intersection(words):
        command += ["--first", "1"]  # a cut before the first layer has nothing to repair
    return command


def reads_text(words: tuple[str, ...]) -> bool:
    """Return whether a command takes options of the text that it reads."""
    if words[0] in ("plan", "sparsify", "prune"):
        return bool({"--corpus", "--repair-corpora", "--method"}.intersection(words))
    return True


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
            succeed(*small(words))
    return place


def is_run(words: tuple[str, ...]) -> bool:
    """Return whether a command is run here."""
    return words[0] not in NOT_RUN and reason(words) is None


RUN = {page for page, words in documented() if page != HELP and is_run(words)}


@pytest.mark.nightly
@pytest.mark.parametrize("page", sorted(RUN))
def test_every_command_runs(page: str, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the commands of a page in their order, in a copy of the folder."""
    shutil.copytree(measured, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    for page_of_command, words in documented():
        if page_of_command != page or not is_run(words):
            continue
        command = small(words)
        if "-o" in command:
            remove(Path(command[command.index("-o") + 1]))
        done = avss(*command)
        assert done.exit_code == 0, f"{' '.join(command)}\n{done.stderr}"


def remove(target: Path) -> None:
    """Remove what an earlier command wrote."""
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
