"""Tasks of lm-evaluation-harness: what is asked, sample by sample; layers left out; what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from support.causal_lm import open_whole
from support.checkpoints import llama
from support.command_line import avss
from support.documentation import DOCS, read
from support.json_files import write_json_lines
from support.rows import where
from transformers import AutoTokenizer

from avss_dist import evaluate
from avss_dist.core.errors import ConfigError, TaskError
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune
from avss_dist.tasks import harness
from avss_dist.tasks.harness import HarnessPart, harness_task
from avss_dist.tasks.task import MetricRow
from avss_dist.warehouse.reader import Warehouse

TASKS = Path(lm_eval.tasks.__file__).parent
DROP = (0,)  # of which transformers asks how long its cache is
DATA: dict[str, Any] = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
}
CHOICE = DATA | {
    "task": "capitals",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
    ],
}
GENERATE = DATA | {
    "task": "go_on",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "target",
    "generation_kwargs": {"until": [], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
SUBJECTS = list(product(("capital", "river", "coast"), ("France", "Peru", "Mali", "Chad")))


def question(number: int, what: str, country: str) -> dict[str, Any]:
    choices = [what, country, f"the {what} {country}", "nothing"]
    return {"question": f"What is the {what} of {country}?", "choices": choices, "answer": number % 4}


QUESTIONS = [question(number, *subject) for number, subject in enumerate(SUBJECTS)]


def write_task(folder: Path, config: dict[str, Any], documents: list[dict[str, Any]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_json_lines(folder / "questions.jsonl", documents)
    file = folder / f"{config['task']}.yaml"
    file.write_text(yaml.safe_dump(config | changes))
    return file


@pytest.fixture(scope="module", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable) -> Path:
    """A checkpoint whose layers all matter."""
    return save_checkpoint(llama(5, initializer_range=0.4), tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def whole(folder: Path) -> LanguageModel:
    return open_model(folder)


@pytest.fixture(scope="module")
def pruned(folder: Path) -> LanguageModel:
    plan = Plan(model=str(folder), revision=None, num_layers=3, layers="layers", drop=DROP, why={})
    out = folder.parent / "pruned"
    prune(str(folder), plan, out)
    return open_model(out)


def open_model(folder: Path) -> LanguageModel:
    return open_whole(resolve(str(folder)), Settings(batch_size=4, device="cpu"))


def ask(task: Path, model: LanguageModel, drop: tuple[int, ...] = (), **options: Any) -> dict[str, MetricRow]:
    (part,) = harness_task(str(task), **options).parts
    sent_to_worker = pickle.loads(pickle.dumps(part))
    rows = sent_to_worker(model, NO_INTERVENTION.without(*drop))
    return {row.metric: row for row in rows}


def correct_answers(task: Path, model: LanguageModel, drop: tuple[int, ...] = (), **options: Any) -> list[float]:
    """Return for each question whether it is answered correctly."""
    rows = ask(task, model, drop, **options)
    return rows["acc"].samples.tolist()


def exact_matches(task: Path, model: LanguageModel, drop: tuple[int, ...] = ()) -> list[float]:
    """Return for each question whether the text that is written is the one expected."""
    rows = ask(task, model, drop)
    return rows["exact_match"].samples.tolist()


def likelihoods(model: LanguageModel, document: dict[str, Any]) -> np.ndarray:
    """float64[choices]: the log-likelihood of each answer."""
    prompt = f"Question: {document['question']}\nAnswer:"
    return np.array([likelihood(model, prompt, f" {choice}") for choice in document["choices"]])


def likelihood(model: LanguageModel, prompt: str, answer: str) -> float:
    """That of an answer after a prompt, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model.checkpoint.folder)
    start = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([tokenizer(prompt + answer).input_ids])
    with torch.no_grad():
        logs = model.module(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    of_tokens = logs.gather(1, ids[0, 1:, None])
    return float(of_tokens[start - 1 :].double().sum())


def test_samples_of_multiple_choice_are_those_of_plain_transformers(whole: LanguageModel, tmp_path: Path) -> None:
    rows = ask(write_task(tmp_path, CHOICE, QUESTIONS), whole)
    right = []
    right_for_length = []
    chances = []
    squares = []
    for document in QUESTIONS:
        choices = document["choices"]
        answer = document["answer"]
        scores = likelihoods(whole, document)
        lengths = np.array([len(choice) for choice in choices])
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        right.append(float(np.argmax(scores) == answer))
        right_for_length.append(float(np.argmax(scores / lengths) == answer))
        chances.append(1 / len(choices))
        squares.append(np.square(np.eye(4)[answer] - shares).sum())
    assert list(rows) == ["acc", "acc_norm", "brier_score", "chance"]
    assert rows["chance"].samples.tolist() == chances
    assert rows["acc"].samples.tolist() == right
    assert 0 < sum(right) < len(right)
    assert rows["acc_norm"].samples.tolist() == right_for_length
    assert rows["acc"].weights.tolist() == [1.0] * len(QUESTIONS)
    # The Brier score is of all documents: one sample.
    assert rows["brier_score"].samples == pytest.approx([np.mean(squares)], rel=1e-5)


@pytest.mark.nightly
def test_layers_left_out_are_those_that_a_pruned_checkpoint_lacks(
    whole: LanguageModel, pruned: LanguageModel, tmp_path: Path
) -> None:
    task = write_task(tmp_path, CHOICE, QUESTIONS)
    before = ask(task, whole)
    skipped = ask(task, whole, DROP)
    cut = ask(task, pruned)
    assert abs(before["brier_score"].samples - skipped["brier_score"].samples) > 1e-3
    for metric, row in skipped.items():
        assert row.samples == pytest.approx(cut[metric].samples, abs=1e-6)


@pytest.mark.nightly
def test_generation_without_layers_is_that_of_a_pruned_checkpoint_with_its_cache(
    whole: LanguageModel, pruned: LanguageModel, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pruned.checkpoint.folder)
    documents = []
    for document in QUESTIONS:
        ids = tokenizer(document["question"], return_tensors="pt").input_ids
        written = pruned.module.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
        after = written[0, ids.shape[1] :]
        documents.append({**document, "target": tokenizer.decode(after, skip_special_tokens=True)})
    task = write_task(tmp_path, GENERATE, documents)
    assert exact_matches(task, whole, DROP) == [1.0] * len(QUESTIONS)
    assert exact_matches(task, pruned) == [1.0] * len(QUESTIONS)
    assert sum(exact_matches(task, whole)) < len(QUESTIONS) / 2


def test_a_limit_asks_the_first_questions(whole: LanguageModel, tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE, QUESTIONS)
    assert correct_answers(task, whole, limit=5) == correct_answers(task, whole)[:5]


def test_examples_are_the_same_each_time(whole: LanguageModel, tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE, QUESTIONS)
    without_examples = ask(task, whole)["brier_score"].samples
    with_two = ask(task, whole, num_fewshot=2)["brier_score"].samples
    again = ask(task, whole, num_fewshot=2)["brier_score"].samples
    assert without_examples != with_two
    assert with_two == again


def test_the_key_tells_what_is_asked(tmp_path: Path) -> None:
    def key(config: dict[str, Any] = CHOICE, documents: list = QUESTIONS, place: str = "a", **options: Any) -> str:
        task = write_task(tmp_path / place, config, documents)
        return harness_task(str(task), **options).key

    keys = [key(), key(limit=3), key(num_fewshot=2), key(template="0"), key(template="1")]
    keys.append(key(CHOICE | {"doc_to_text": "{{question}}"}))
    *others, last = QUESTIONS
    keys.append(key(documents=[*others, last | {"answer": 0}]))
    assert len(set(keys)) == 7
    assert key(place="b") == keys[0]


def test_a_group_has_rows_of_its_own_and_of_its_tasks(
    whole: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    def add(name: str, config: dict[str, Any], documents: list[dict[str, Any]], **changes: Any) -> None:
        data = write_task(tmp_path / name, config, documents).with_name("questions.jsonl")
        changes["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(config | {"task": name} | changes))

    (tmp_path / "tasks").mkdir()
    add("one", CHOICE, QUESTIONS[:6])
    add("two", CHOICE, QUESTIONS[6:])
    strict = {"name": "strict", "filter": [{"function": "take_first"}]}
    add("three", GENERATE, [{**document, "target": ""} for document in QUESTIONS], filter_list=[strict])
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "all", "task": ["one", "two", "three"], "aggregate_metric_list": metrics}
    (tmp_path / "tasks" / "all.yaml").write_text(yaml.safe_dump(group))
    catalogue = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(harness, "_catalogue", lambda: catalogue)
    rows = {metric: row.samples.tolist() for metric, row in ask(Path("all"), whole).items()}
    expected = {"three/exact_match,strict", "acc"}
    for metric in ("acc", "acc_norm", "brier_score", "chance"):
        expected |= {f"one/{metric}", f"two/{metric}"}
    assert rows.keys() == expected
    assert rows["acc"] == rows["one/acc"] + rows["two/acc"]
    assert rows["acc"] == correct_answers(write_task(tmp_path, CHOICE, QUESTIONS), whole)


def test_what_was_asked_is_not_asked_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = str(write_task(tmp_path, CHOICE, QUESTIONS))
    plan = tmp_path / "plan.yaml"
    Plan(model=str(folder), revision=None, num_layers=3, layers="layers", drop=DROP, why={}).write(plan)
    options: dict[str, Any] = {"tasks": [task], "warehouse": tmp_path / "w", "sequence_length": 64, "limit": 8}
    evaluations = evaluate([str(plan)], **options)
    evaluation_of = {evaluation.result.metric: evaluation for evaluation in evaluations}
    chance = evaluation_of["chance"].whole
    whole = evaluation_of["acc_norm"].whole
    assert chance is not None
    assert whole is not None
    (finding,) = evaluations.findings
    assert finding == f"{task}: a guess keeps {chance.value / whole.value:.1%} of the acc_norm of {folder}."
    worse = evaluation_of["brier_score"].retained
    before, after = brier_scores(tmp_path / "w")
    assert worse is not None
    assert worse.value == pytest.approx(before / after)  # less is better
    assert len(evaluation_of["acc"].result.samples) == 8

    def refuse(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(HarnessPart, "__call__", refuse)
    again = evaluate([str(plan)], **options)
    values = {metric: evaluation.result.value for metric, evaluation in evaluation_of.items()}
    assert {evaluation.result.metric: evaluation.result.value for evaluation in again} == values


def brier_scores(warehouse: Path) -> tuple[float, float]:
    """Return the scores of the whole model, and of the model without layers."""
    rows = Warehouse(warehouse).table("evaluations").to_pylist()
    for row in rows:
        assert json.loads(row["settings"])["limit"] == 8
    (whole,) = where(rows, metric="brier_score", drop=[])
    (pruned,) = where(rows, metric="brier_score", drop=list(DROP))
    return whole["value"], pruned["value"]


@pytest.mark.nightly
def test_the_command_says_nothing_but_results_and_needs_no_network(folder: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE, QUESTIONS)
    script = (
        "import sys\n"
        "def watch(event, args):\n"
        "    if event == 'socket.getaddrinfo' or event == 'socket.connect' and isinstance(args[1], tuple):\n"
        "        print('NETWORK', event, args[1:], file=sys.stderr)\n"
        "sys.addaudithook(watch)\n"
        "from avss_dist.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "evaluate", str(folder), "--tasks", str(task), "--format", "csv", "-q"]
    command += ["--warehouse", str(tmp_path / "w"), "--executor", "local", "--sequence-length", "64"]
    done = subprocess.run(
        command,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    metrics = [line.split(",")[3] for line in done.stdout.splitlines()]
    assert metrics == ["metric", "acc", "acc_norm", "brier_score", "chance"]


def test_the_example_of_the_documentation_can_be_asked(whole: LanguageModel, tmp_path: Path) -> None:
    text = read(DOCS / "guides/evaluate.md")
    (example,) = re.findall(r"```yaml\n(task: .*?)```", text, re.DOTALL)
    (tmp_path / "reviews.yaml").write_text(example)
    (tmp_path / "reviews.jsonl").write_text('{"text": "a gem", "label": 1}\n{"text": "a bore", "label": 0}\n')
    assert len(correct_answers(tmp_path / "reviews.yaml", whole)) == 2


# Refusals


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hellaswagg", "Did you mean 'hellaswag'"),
        ("perplexty:builtin:pydoc", "Did you mean 'perplexity:CORPUS'"),
        ("/nowhere/task.yaml", "There is no task file /nowhere/task.yaml"),
        ("arc_easy", r"The data of task 'arc_easy' could not be loaded.*\n.*HF_HOME"),
    ],
)
def test_tasks_that_cannot_be_had(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two folders of lm-eval's tasks: to list all of its thousands takes many seconds."""
    folders = [str(TASKS / folder) for folder in ("hellaswag", "arc")]
    few_tasks = TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(harness, "_catalogue", lambda: few_tasks)
    with pytest.raises(TaskError, match=told) as caught:
        harness_task(name)
    assert caught.value.exit_code == 2


@pytest.mark.nightly
def test_all_tasks_of_the_harness_are_known() -> None:
    with pytest.raises(TaskError, match="Did you mean 'winogrande'"):
        harness_task("winogrand")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "others.jsonl"}}}, r"task 'capitals' do not exist: .*others.jsonl"),
        ({"test_split": None}, "could not be made: .*must have valid or test docs"),
        ({"test_splitt": "test"}, "could not be made: .*unexpected keyword argument 'test_splitt'"),
        ({"doc_to_text": "{{quesion}}"}, "could not be made: 'quesion' is undefined"),
        ({"doc_to_text": "{{ range(10**7) | list }}"}, "could not be made: .*Range too big"),
        ({"output_type": "guess"}, "could not be made: .*invalid output_type 'guess'"),
        ({"dataset_kwargs": "questions.jsonl"}, "could not be made: AttributeError"),
        ({"doc_to_text": "quesion"}, "doc_to_text is 'quesion', which is not a column.*\nDid you mean 'question'"),
        ({"doc_to_target": -1}, "doc_to_target gives a negative label"),
        ({"task": ["a", "b"], "group": "both"}, "names no single task"),
        ({"include": "capitals.yaml"}, "includes itself"),
        ({"include": "nowhere.yaml"}, r"capitals.yaml:\d+: key 'include' names .*nowhere.yaml, which is not a file"),
        ({"include": 5}, "'include' must be the name of a file"),
        ({"unsafe_code": True}, "runs the code that a model writes"),
        ({"doc_to_text": "{{''.__class__.__mro__}}"}, "could not be made: access to attribute '__class__'"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "runs code: trust_remote_code: True.\n.*`trust_remote_code`"),
    ],
)
def test_task_files_with_mistakes(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    """The harness's own words, after the name of the file; ours where it would measure something else."""
    write_task(tmp_path, CHOICE, QUESTIONS)
    (tmp_path / "capitals.yaml").write_text(yaml.safe_dump(CHOICE | changes))
    with pytest.raises(TaskError, match=told) as caught:
        harness_task(str(tmp_path / "capitals.yaml"))
    assert "capitals" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.nightly
def test_a_key_of_a_task_file_is_not_repeated(tmp_path: Path) -> None:
    """Not in one file; a file may change what it includes."""
    task = write_task(tmp_path, CHOICE, QUESTIONS)
    whole = harness_task(str(task)).key
    lines = [*task.read_text().splitlines(), "doc_to_target: 0"]
    task.write_text("\n".join(lines))
    (first,) = [number for number, line in enumerate(lines[:-1], 1) if line.startswith("doc_to_target")]
    repeated = rf"yaml:{len(lines)}: the key 'doc_to_target' is repeated; .* line {first}\."
    with pytest.raises(TaskError, match=repeated):
        harness_task(str(task))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CHOICE | {"doc_to_target": 0}))
    task.write_text("include: base.yaml\ndoc_to_target: answer\n")
    assert harness_task(str(task)).key == whole


def test_what_the_harness_cannot_score_is_a_mistake_and_what_fails_in_the_model_is_none(
    whole: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path, CHOICE, QUESTIONS, metric_list=[{"metric": "f1", "aggregation": "mean"}])
    with pytest.raises(TaskError, match=r"could not be asked or scored: .*\n.*aggregations") as caught:
        ask(task, whole)
    assert caught.value.exit_code == 2
    (part,) = harness_task(str(write_task(tmp_path, CHOICE, QUESTIONS))).parts

    def fail(*_: object) -> None:
        raise ValueError("the model's own")

    monkeypatch.setattr(whole, "hidden_states", fail)
    with pytest.raises(ValueError, match="the model's own"):
        part(whole)


@pytest.mark.nightly
def test_what_is_no_task_file(tmp_path: Path) -> None:
    """A pipe would be read for ever, and a deep file ends in Python's own error."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml"):
        with pytest.raises(TaskError, match=f"{name} is not a file"):
            harness_task(str(tmp_path / name))
    (tmp_path / "deep.yaml").write_text("task: " + "[" * 5000)
    with pytest.raises(TaskError, match=r"deep\.yaml is nested too deeply"):
        harness_task(str(tmp_path / "deep.yaml"))
    (tmp_path / "date.yaml").write_text("task: 2026-99-99")
    with pytest.raises(TaskError, match=r"date\.yaml:1: this is not YAML: month must be in 1"):
        harness_task(str(tmp_path / "date.yaml"))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "The data of task 'capitals' are empty: .*questions.jsonl"),
        ("\n", "The data|could not be made"),
        ('{"question": "what?"}\n{"questi', "The data of task '.*' could not be loaded: .*JSON"),
        ('{"question": "what?"}\n', "could not be made: "),
    ],
)
def test_data_files_that_are_broken(text: str, told: str, tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE, QUESTIONS)
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(TaskError, match=told):
        harness_task(str(task))


@pytest.mark.parametrize("tag", ["!function", "!%66unction"])
def test_functions_run_only_where_they_are_trusted(tag: str, whole: LanguageModel, tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE, QUESTIONS)
    base = dict(CHOICE)
    for name in ("task", "metric_list", "dataset_kwargs"):
        del base[name]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base) + f"process_results: {tag} odd.long_answer\n")
    data = {"data_files": {"test": str(tmp_path / "questions.jsonl")}}
    metrics = [{"metric": "long", "aggregation": "mean", "higher_is_better": True}]
    config = {"task": "odd", "include": "base.yaml", "dataset_kwargs": data, "metric_list": metrics}
    task.write_text(yaml.safe_dump(config))
    (tmp_path / "odd.py").write_text(
        "from pathlib import Path\n"
        "Path(__file__).with_suffix('.ran').touch()\n"
        "def long_answer(document, results):\n"
        "    return {'long': len(document['choices'][2])}\n"
    )
    with pytest.raises(TaskError, match=r"runs code: !function odd.long_answer"):
        harness_task(str(task))
    assert not (tmp_path / "odd.ran").exists()
    rows = ask(task, whole, trust_remote_code=True)
    assert rows["long"].samples.tolist() == [len(document["choices"][2]) for document in QUESTIONS]


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"not installed.*\n.*pip install .*\[eval\]"):
        harness_task("hellaswag")


@pytest.mark.nightly
def test_questions_stand_in_the_chat_template(folder: Path, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    shutil.copytree(folder, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(chatty)
    model = open_model(chatty)
    task = write_task(tmp_path / "task", CHOICE, QUESTIONS[:4], fewshot_split="test")
    template = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    right = []
    for document in QUESTIONS[:4]:
        prompt = f"2024[user]Question: {document['question']}\nAnswer:[assistant]"
        scores = [likelihood(model, prompt, choice) for choice in document["choices"]]
        right.append(float(np.argmax(scores) == document["answer"]))
    assert correct_answers(task, model, template=template) == right
    out = tmp_path / "w"
    options = ["--chat-template", "--sequence-length", 64, "--executor", "local", "-w", out]
    done = avss("evaluate", chatty, "--tasks", task, *options)
    assert done.exit_code == 0, done.stderr
    (settings,) = set(Warehouse(out).table("evaluations")["settings"].to_pylist())
    assert json.loads(settings)["harness_chat_template"] == template
    plain = avss("evaluate", folder, "--tasks", task, *options)
    assert plain.exit_code == 2, plain.stderr
    assert "has no chat template of its own" in plain.stderr, plain.stderr
