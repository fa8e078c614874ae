"""Every command that a command suggests runs, as it stands, in the state in which it was suggested."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama, save_tokenizer
from support.command_line import avss

ROWS = ["--max-sequences", 16, "--sequence-length", 32, "--sequences-per-shard", 2, "--executor", "local"]
ROWS += ["--dtype", "float32"]
SUGGESTED = re.compile(r"(avss [a-z]+ .*?)(?=`|\.?$| lists | draws )", re.MULTILINE)


@pytest.fixture
def desk(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and two texts. Lines are not wrapped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "model").symlink_to(tiny_llama)
    sentence = "the cat sat on the mat and the dog ran far away from the house of blue bricks\n"
    (tmp_path / "text.txt").write_text(sentence * 200)
    (tmp_path / "other.txt").write_text(sentence.replace("cat", "cow") * 200)
    return tmp_path


def suggested(*words: object, code: int = 0) -> list[list[str]]:
    """Run a command, and return the commands that its output suggests, as words after ``avss``."""
    result = avss(*words)
    assert result.exit_code == code, result.output
    return [shlex.split(match.replace("CORPUS", "other.txt"))[1:] for match in SUGGESTED.findall(result.output)]


def follow(suggestions: list[list[str]], *verbs: str) -> str:
    """Run suggested commands, which are of these verbs, and return what they print."""
    assert [words[0] for words in suggestions] == [*verbs]
    outputs = []
    for words in suggestions:
        result = avss(*words)
        assert result.exit_code == 0, (words, result.output)
        outputs.append(result.output)
    return "\n".join(outputs)


def test_after_a_score(desk: Path) -> None:
    """The scores are shown, of a site that was measured."""
    follow(suggested("score", "model", "--corpus", "text.txt", *ROWS), "show")
    of_maps = suggested("score", "model", "--corpus", "text.txt", *ROWS, "-w", "maps", "--sites", "inputs")
    assert "neuron" in follow(of_maps, "show")


def test_after_scores_of_two_models(desk: Path) -> None:
    """The runs are compared, and the comparison's own suggestion runs, too."""
    llama(seed=1).save_pretrained(desk / "second")
    save_tokenizer(desk / "second")
    suggestions = suggested("score", "model", "second", "--corpus", "text.txt", *ROWS)
    follow(suggestions, "show", "compare")
    follow(suggested(*suggestions[1]), *["findings"] * len(suggested(*suggestions[1])))


@pytest.mark.parametrize(
    ("choice", "measure"),
    [
        (["plan", "--by", "loss", "--count", 2], "ablate"),
        (["plan", "--by", "damage", "--count", 1], "ablate"),
        (["quantize", "--bits", 6, "--quantize", "int4", "--quantize", "int8"], "ablate"),
        (["sparsify", 0.4], "score"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_from_a_choice_that_lacks_its_measurement(desk: Path, choice: list[Any], measure: str) -> None:
    """What is missing is measured with the run's rows and dtype; then the choice is made, and evaluated."""
    suggested("score", "model", "--corpus", "text.txt", *ROWS)
    (command,) = suggested(*choice, "-o", "plan.yaml", code=2)
    assert {"--max-sequences", "16", "--dtype", "float32"} <= {*command}
    follow([command], measure)
    assert "Retention" in follow(suggested(*choice, "-o", "plan.yaml"), "evaluate")


def test_where_a_text_is_missing(desk: Path) -> None:
    result = avss("evaluate", "model", "--tasks", "perplexity", *ROWS)
    assert result.exit_code == 2
    assert "perplexity:CORPUS" in result.output


def test_without_progress_nothing_is_suggested(desk: Path) -> None:
    assert suggested("score", "model", "--corpus", "text.txt", *ROWS, "--quiet") == []
