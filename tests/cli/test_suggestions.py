"""What commands suggest, choose and list.

Every command that a command suggests runs, as it stands, in the state in which it was suggested. A plan is for the
newest run that it can be for. Every result that somebody asked for is listed, and none of the machine's own.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama, save_tokenizer
from support.command_line import avss, json_rows, succeed
from support.rows import columns
from support.tiers import nightly
from support.warehouses import run_row, write_scores

from avss_dist import ablate, plan, score, sparsify
from avss_dist.analysis.chosen import newest_run
from avss_dist.analysis.next_commands import ablate_command, repeated_command, repeated_options
from avss_dist.core.errors import QueryError
from avss_dist.requests import SparsifyRequest
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

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
    suggestions = []
    for command in SUGGESTED.findall(result.output):
        _, *words_of_command = shlex.split(command.replace("CORPUS", "other.txt"))
        suggestions.append(words_of_command)
    return suggestions


def follow(suggestions: list[list[str]], *verbs: str) -> str:
    """Run suggested commands, which are of these verbs, and return what they print."""
    assert [words[0] for words in suggestions] == list(verbs)
    outputs = [succeed(*words).output for words in suggestions]
    return "\n".join(outputs)


@pytest.mark.nightly
def test_after_a_score(desk: Path) -> None:
    """The scores are shown, of a site that was measured."""
    follow(suggested("score", "model", "--corpus", "text.txt", *ROWS), "show")
    of_maps = suggested("score", "model", "--corpus", "text.txt", *ROWS, "-w", "maps", "--sites", "inputs")
    assert "neuron" in follow(of_maps, "show")


@pytest.mark.nightly
def test_after_scores_of_two_models(desk: Path) -> None:
    """The runs are compared, and the comparison's own suggestion runs, too."""
    llama(seed=1).save_pretrained(desk / "second")
    save_tokenizer(desk / "second")
    suggestions = suggested("score", "model", "second", "--corpus", "text.txt", *ROWS)
    follow(suggestions, "show", "compare")
    of_comparison = suggested(*suggestions[1])
    follow(of_comparison, *["findings"] * len(of_comparison))


@pytest.mark.parametrize(
    ("choice", "measure"),
    [
        (["plan", "--by", "loss", "--count", 2], "ablate"),
        *nightly(
            (["sparsify", 0.4], "score"),
            (["plan", "--by", "damage", "--count", 1], "ablate"),
            (["quantize", "--bits", 6], "ablate"),  # in formats that maps of 48 inputs can take
        ),
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


def test_a_command_that_measures_more_opens_the_model_as_the_run_did(tmp_path: Path) -> None:
    given = {"layers": "model.my layers", "dequantize": True, "trust_remote_code": True, "device": "cpu"}
    row = run_row("run", model="my model", settings=json.dumps(given), architecture="LlamaForCausalLM")
    words = shlex.split(ablate_command(Warehouse(tmp_path / "my warehouse"), row, "damage"))
    expected = ["avss", "ablate", "my model", "--corpus", "text.txt", "--warehouse", str(tmp_path / "my warehouse")]
    expected += ["--layers", "model.my layers", "--device", "cpu", "--trust-remote-code", "--dequantize"]
    expected += ["--no-leave-one-out", "--damage"]
    assert words == expected


def test_a_command_that_scores_again_measures_the_same_tokens_from_the_same_files(tmp_path: Path) -> None:
    row = run_row("run", settings=json.dumps({"skip_first_tokens": 4, "allow_pickle": True}))
    words = shlex.split(repeated_command("score", Warehouse(tmp_path), row, {"sites": "inputs"}))
    assert words[-5:] == ["--skip-first-tokens", "4", "--allow-pickle", "--sites", "inputs"]


def test_options_of_the_request_replace_those_of_the_run() -> None:
    row = run_row("run", settings=json.dumps({"device": "cpu", "layers": "model.layers"}))
    options = repeated_options(row, SparsifyRequest(0.5, device="cuda", dequantize=True))
    assert options == {"layers": "model.layers", "device": "cuda", "dequantize": True}


def test_a_gpu_is_not_asked_for() -> None:
    """A run on a GPU may be planned for elsewhere; auto chooses a GPU where there is one."""
    row = run_row("run", settings=json.dumps({"device": "cuda"}))
    assert repeated_options(row) == {}


@pytest.mark.nightly
def test_paths_with_spaces_are_quoted(desk: Path) -> None:
    (command,) = suggested("score", "model", "--corpus", "text.txt", *ROWS, "-w", "my warehouse")
    (evaluation,) = suggested("plan", "--by", "avss", "-w", "my warehouse", "-o", "my plan.yaml")
    assert "my warehouse" in command
    assert "my warehouse" in evaluation
    assert "my plan.yaml" in evaluation


def test_where_a_text_is_missing(desk: Path) -> None:
    result = avss("evaluate", "model", "--tasks", "perplexity", *ROWS)
    assert result.exit_code == 2
    assert "perplexity:CORPUS" in result.output


def test_without_progress_nothing_is_suggested(desk: Path) -> None:
    assert suggested("score", "model", "--corpus", "text.txt", *ROWS, "--quiet") == []


@pytest.mark.nightly
def test_the_newest_run_that_can_be_planned_for_is_taken(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """Of a run whose layers are measured, and a newer one of an encoder, which has no loss."""
    warehouse = tmp_path / "w"
    common: dict[str, Any] = {"corpus": "builtin:pydoc", "warehouse": warehouse, "sequence_length": 32}
    common |= {"max_sequences": 2, "device": "cpu", "executor": "local"}
    older = score(str(tiny_llama), sites=("block",), **common).run_id
    ablate(str(tiny_llama), **common)
    newer = score(str(tiny_bert), sites=("block",), **common).run_id
    assert plan(warehouse=warehouse).run_id == older
    assert plan(warehouse=warehouse, by="loss").run_id == older
    printed = succeed("plan", "-w", warehouse, "-o", tmp_path / "plan.yaml").stdout
    told = " ".join(printed.split())
    assert "Of 2 runs, this is the newest that has what the command needs; --run names another." in told
    assert f"Run {newer} is newer and was passed over: No score was named" in told
    assert plan(warehouse=warehouse, by="block_influence").run_id == newer
    with pytest.raises(QueryError, match="No score was named"):
        plan(warehouse=warehouse, run=newer)
    with pytest.raises(QueryError, match=r"no measurement 'taylor' of the layers of .*tiny-bert"):
        plan(warehouse=warehouse, by="taylor")


@pytest.mark.nightly
def test_sparsity_is_planned_for_the_newest_run_of_a_model_that_measured_the_inputs(
    tiny_llama: Path, tmp_path: Path
) -> None:
    warehouse = tmp_path / "w"
    common: dict[str, Any] = {"corpus": "builtin:pydoc", "warehouse": warehouse, "sequence_length": 32}
    common |= {"max_sequences": 2, "device": "cpu", "executor": "local"}
    score(str(tiny_llama), sites=("inputs",), skip_sequences=2, **common)
    measured = score(str(tiny_llama), sites=("inputs",), **common).run_id
    newest = score(str(tiny_llama), sites=("block",), **common).run_id
    assert sparsify(0.5, run=tiny_llama.name, warehouse=warehouse).run_id == measured
    printed = " ".join(succeed("sparsify", 0.5, "-w", warehouse).stdout.split())
    assert f"Run {newest} is newer and was passed over: Run {newest} did not measure what linear maps read." in printed


class TestNewestRun:
    """Of runs a-1 and a-2 of a model, and the newest, b-1, of another."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Warehouse:
        for hour, run_id in enumerate(("a-1", "a-2", "b-1")):
            created = datetime(2026, 1, 1, hour, tzinfo=UTC)
            write_scores(tmp_path, run_id, [1.0, 2.0], model=f"org/{run_id[0]}", created_at=created)
        return Warehouse(tmp_path)

    @staticmethod
    def lacks(*run_ids: str) -> Callable[[Mapping[str, Any]], None]:
        def require(run: Mapping[str, Any]) -> None:
            if run["run_id"] in run_ids:
                raise QueryError(f"{run['run_id']} lacks it.")

        return require

    def test_all_runs_are_candidates_without_a_name(self, store: Warehouse) -> None:
        newest = newest_run(store, None, self.lacks())
        assert newest.describe() == ["This is the newest of 3 runs; `run` names another."]

    def test_runs_that_lack_what_is_needed_are_passed_over(self, store: Warehouse) -> None:
        newest = newest_run(store, None, self.lacks("b-1"))
        first, second = newest.describe()
        assert first == "Of 3 runs, this is the newest that has what the command needs; `run` names another."
        assert second == "Run b-1 is newer and was passed over: b-1 lacks it."

    def test_a_name_may_match_several_runs_of_a_model(self, store: Warehouse) -> None:
        assert newest_run(store, "org/a", self.lacks("a-2")).row["run_id"] == "a-1"

    def test_a_single_match_needs_no_words(self, store: Warehouse) -> None:
        assert newest_run(store, "org/b", self.lacks()).describe() == []

    def test_several_models_are_refused(self, store: Warehouse) -> None:
        with pytest.raises(QueryError, match="matches 3 runs of several models"):
            newest_run(store, "*", self.lacks())

    def test_without_such_a_run_the_error_is_that_of_the_newest(self, store: Warehouse) -> None:
        with pytest.raises(QueryError, match="a-2 lacks it"):
            newest_run(store, "a", self.lacks("a-1", "a-2"))


def test_results_by_layer_are_a_row_for_each_metric_and_internal_tasks_are_none(tmp_path: Path) -> None:
    write_scores(tmp_path, "run-1", [1.0, 2.0, 3.0])

    def write(task: str, rows: list[dict[str, Any]], hour: int) -> None:
        run = RunIdentity(run_id=task.split(":")[0], model="org/m", revision="main", family="llama")
        about = {
            "task": task,
            "drop": [],
            "drop_parts": [],
            "num_samples": 1,
            "created_at": datetime(2026, 1, 1, hour, tzinfo=UTC),
        }
        Store(tmp_path).write_rows("evaluations", run, [{**about, **row} for row in rows])

    damage = []
    rounded = []
    for layer in range(3):
        of_layer = {"layer": layer, "value": 1.0}
        damage += [{**of_layer, "metric": f"taylor_{lookahead}"} for lookahead in range(4)]
        for path in ("mlp.up", "mlp.down"):
            rounded.append({**of_layer, "metric": f"predicted:{path}", "rounding": f"int4@{layer}.{path}"})
    write("damage:a.txt", damage, 1)
    write("rounding:a.txt", rounded, 2)
    write("perplexity:a.txt", [{"metric": "loss", "value": 2.5}, {"metric": "loss", "drop": [1], "value": 3.0}], 3)
    write("row-start:a.txt", [{"metric": "loss_as_read", "value": 2.5}], 4)
    write("repair:refit:a.txt", [{"metric": "missing", "drop": [1], "value": 0.1}], 5)

    printed = succeed("ls", "evaluations", "-w", tmp_path, "--format", "json").stdout
    rows = columns(json_rows(printed), "task", "metric", "drop", "rounding", "layers", "value")
    assert rows == [
        ("perplexity:a.txt", "loss", [], None, None, 2.5),
        ("perplexity:a.txt", "loss", ["1"], None, None, 3.0),
        ("rounding:a.txt", "predicted", [], "int4", 3, None),
        ("damage:a.txt", "taylor", [], None, 3, None),
    ]
