"""Tasks of lm-evaluation-harness, run on an open model, and the adapter of the model to the harness."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import yaml
from jinja2.sandbox import SandboxedEnvironment
from torch.nn.functional import cross_entropy

from avss_dist.core.errors import AvssError, TaskError, first_line
from avss_dist.core.extras import require_package
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.memory import is_out_of_memory
from avss_dist.core.values import JsonObject, NewObject
from avss_dist.corpus.documents import without_today
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import load_tokenizer, quiet
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import CHANCE
from avss_dist.tasks.harness_files import (
    code_entries,
    has_local_data,
    is_task_file,
    read_task_file,
    resolve_data_files,
)
from avss_dist.tasks.task import Measure, MetricRow, Task

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task as HarnessTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

_SAME_MEAN = 1e-9  # difference of a metric and the mean of its samples that rounding may make
MODEL_NOTE = "The model raised it, not the task."
# The harness's own seeds.
SEED = 0  # of `random`
OTHER_SEED = 1234  # of numpy, torch and the choice of examples

_UNCLEAR_ERRORS = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""Errors whose messages say little without their class."""


@dataclass(frozen=True, kw_only=True)
class HarnessPart(Measure):
    """A task of the harness or a group of tasks, with all questions and a sample for each.

    Attributes:
        name: name of the task, or path of its file.
        config: the task file as YAML, with absolute paths of its data. None for a task that the harness knows by its
            name, and for a file with functions, which the worker reads.
        limit: maximum number of questions of each task.
        num_fewshot: number of examples before each question; None leaves it to the task.
        template: SHA-256, in hex, of the chat template that questions are put in; None for plain text.
        key: see `tasks.task.Measure`.
    """

    name: str
    config: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    template: str | None = None
    key: str = ""

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return a row for each metric of the task or group, and for chance.

        Likelihoods are computed in float32.
        """
        with _silence(), _explained(self.name, "made"):
            loaded = _load_cached(self)
        from lm_eval.evaluator import evaluate

        with _silence(), model.applying(intervention):
            chat = self.template is not None
            wrapped = harness_model(model, chat=chat)
            random.seed(SEED)
            np.random.seed(OTHER_SEED)
            torch.manual_seed(OTHER_SEED)
            for task in loaded.tasks.values():
                task.set_fewshot_seed(OTHER_SEED)
            with _explained(self.name, "asked or scored"):
                results = evaluate(
                    wrapped,
                    {"tasks": loaded.tasks, "groups": loaded.groups},
                    limit=self.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=chat,
                )
                return list(_rows(results, loaded))


def harness_task(
    name: str,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    template: str | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """Return a task of lm-evaluation-harness, by its name or by its YAML file.

    Data files of a task file are looked for in the working directory, then beside the task file.

    Args:
        limit: maximum number of questions of each task.
        num_fewshot: number of examples before each question; None leaves it to the task.
        template: SHA-256, in hex, of the model's chat template, if questions are formatted with it.
        trust_remote_code: run Python code that a task file names.

    Raises:
        TaskError: the task does not exist, runs code, or has no data, or the ConfigError: the harness is not installed.
    """
    require_package("lm_eval", f"Task '{name}' is for lm-evaluation-harness and")
    with _silence(), _explained(name, "made"):
        part = HarnessPart(name=name, limit=limit, num_fewshot=num_fewshot, template=template)
        if is_task_file(name):
            part = _with_task_file(part, trust_remote_code=trust_remote_code)
        elif name not in _catalogue().task_index:
            raise _unknown_task(name)
        loaded = _load(part)
        if is_task_file(name):
            for task in loaded.tasks.values():
                _require_meaning(name, task, limit)
        part = replace(part, key=_key(part, loaded))
    options: NewObject = {"limit": limit, "num_fewshot": num_fewshot}
    if template:
        options["harness_chat_template"] = template
    return Task(name=name, parts=(part,), options=options)


def _with_task_file(part: HarnessPart, *, trust_remote_code: bool) -> HarnessPart:
    """Return a part with what workers need of its task file.

    Raises:
        TaskError: the file cannot be read, or runs code and is not trusted, or has no data.
    """
    path = Path(part.name)
    config = read_task_file(path)
    code = code_entries(config)
    if not code:
        config = resolve_data_files(config, Path.cwd(), path.absolute().parent)
        return replace(part, config=yaml.safe_dump(config, sort_keys=False))
    if not trust_remote_code:
        raise TaskError(
            f"{part.name} runs code: {', '.join(code)}.", "Read that code, then set `trust_remote_code` to run it."
        )
    # With functions, the harness reads the file itself, and finds data where the process is.
    resolve_data_files(config, Path.cwd())
    return replace(part, name=str(path.absolute()))


def _unknown_task(name: str) -> TaskError:
    """Return the error for a task that the harness does not have, with the most similar one."""
    suggestions = {task: task for task in _catalogue().all_tasks}
    suggestions["perplexity"] = "perplexity:CORPUS"
    similar = difflib.get_close_matches(name.partition(":")[0].lower(), suggestions, n=1)
    hint = f"Did you mean '{suggestions[similar[0]]}'? " if similar else ""
    return TaskError(f"There is no task '{name}'.", f"{hint}`lm-eval ls tasks` lists those of the harness.")


def _require_meaning(name: str, task: HarnessTask, limit: int | None) -> None:
    """Refuse mistakes of a task file with which the harness would measure something else without a word.

    Args:
        task: the task of the harness, with its data.
        limit: number of questions that are asked; None for all.
    """
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask):  # Python code, with rules of its own
        return
    text = task.config.doc_to_text
    columns = list(task.features)
    if isinstance(text, str) and text not in columns and "{" not in text:
        # A text that is similar to no column may be meant as it is.
        similar = difflib.get_close_matches(text, columns, n=1, cutoff=0.7)
        if similar:
            raise TaskError(f"{name}: doc_to_text is '{text}', which is not a column.", f"Did you mean '{similar[0]}'?")
    if task.OUTPUT_TYPE == "multiple_choice":
        labels = (task.doc_to_target(dict(row)) for row in islice(task.eval_docs, limit))
        if any(isinstance(label, int) and label < 0 for label in labels):
            raise TaskError(f"{name}: doc_to_target gives a negative label.", "Labels are counted from 0.")


@lru_cache(maxsize=1)
def _catalogue() -> TaskManager:
    """Return the tasks that the harness ships. Building them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _explained(task: str, what: str) -> Iterator[None]:
    """Convert exceptions of the harness, of `datasets` and of a task's own templates and code to `TaskError`.

    Exceptions of `_from_model` pass through.

    Args:
        what: participle for what the context does with the task.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        yield
    except AvssError:
        raise
    except Exception as error:
        if MODEL_NOTE in getattr(error, "__notes__", ()) or is_out_of_memory(error):
            raise
        if isinstance(error, OSError | DatasetsError):
            reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            raise TaskError(
                f"The data of task '{task}' could not be loaded: {first_line(reason or error)}",
                "Data of a hub need a network once, and stay in HF_HOME; files must be on every node.",
            ) from error
        message = first_line(error)
        if isinstance(error, _UNCLEAR_ERRORS) and str(error):
            message = f"{type(error).__name__}: {message}"
        hint = "It is a task of lm-evaluation-harness: does it run there, with this version of it?"
        if is_task_file(task):
            hint = (
                "Do its fields name columns of its data? Do its metrics, aggregations and filters fit its output_type?"
            )
        raise TaskError(f"Task '{task}' could not be {what}: {message}", hint) from error


@dataclass(frozen=True, eq=False)
class _Loaded:
    """Tasks of the harness with their data.

    Attributes:
        tasks: the tasks by name.
        groups: groups of tasks by name.
    """

    tasks: Mapping[str, HarnessTask]
    groups: Mapping[str, Group]


def _load(part: HarnessPart) -> _Loaded:
    """Load the tasks of a part and their data."""
    import datasets
    from lm_eval.tasks import TaskManager

    config: JsonObject = {}
    if part.config is not None:
        config = yaml.safe_load(part.config)
    elif is_task_file(part.name):
        config = read_task_file(Path(part.name))
    manager = TaskManager(include_defaults=False) if config else _catalogue()
    is_offline = datasets.config.HF_HUB_OFFLINE or has_local_data(config)
    with patch.object(datasets.config, "HF_HUB_OFFLINE", is_offline):
        loaded = manager.load([part.name if part.config is None else config])
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"Task '{name}' runs the code that a model writes, which is not supported.")
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"Task '{name}' has images or sounds; only text is evaluated.")
        task_shots = task.get_config("num_fewshot")
        if task_shots is None or (part.num_fewshot is not None and task_shots != 0):
            task.set_config("num_fewshot", part.num_fewshot or 0)
    return _Loaded(loaded["tasks"], loaded.get("groups") or {})


_load_cached = lru_cache(maxsize=4)(_load)  # because a part runs many times


def _key(part: HarnessPart, loaded: _Loaded) -> str:
    """Return the SHA-256, in hex, of the loaded tasks, their documents and their prompt options."""
    identity: NewObject = {
        "measure": "lm-evaluation-harness",
        "version": version("lm_eval"),
        "seeds": [SEED, OTHER_SEED],
        "limit": part.limit,
        "tasks": {name: _task_identity(task, part.limit) for name, task in loaded.tasks.items()},
    }
    if part.template:
        identity["apply_chat_template"] = True
        identity["template"] = part.template
    return fingerprint(**identity)


def _task_identity(task: HarnessTask, limit: int | None) -> list[str]:
    """Return the configuration of a task, its version, and the hash of its questions and examples."""
    config = task.dump_config()
    examples = task.fewshot_docs() if config.get("num_fewshot") else ()
    documents = hashlib.sha256()
    for document in islice(task.eval_docs, limit):
        documents.update(_text(document))
    documents.update(_text(None))
    for document in examples:
        documents.update(_text(document))
    # Where files lie is no part of a task.
    metadata = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
    described = {key: value for key, value in config.items() if key != "dataset_kwargs"}
    described["metadata"] = metadata
    return [_text(described).decode(), str(task.VERSION), documents.hexdigest()]


def _text(value: object) -> bytes:
    """Return a value as a line of JSON, with functions as their source."""
    return json.dumps(value, default=_source).encode() + b"\n"


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _rows(evaluated: JsonObject, loaded: _Loaded) -> Iterator[MetricRow]:
    """Yield a row for each metric of each task and group, and `CHANCE` for multiple choice.

    A metric that is a mean over documents has a sample for each, in their order. Other metrics have their value as the
    only sample.
    """
    outer = _outer_names(loaded)
    for name, results in evaluated["results"].items():
        tasks = [name]
        if name in loaded.groups:
            tasks = [task.task_name for task in loaded.groups[name].get_all_tasks()]
        documents = list(chain.from_iterable(evaluated["samples"][task] for task in tasks))
        metrics = _samples_by_metric(results, documents)
        if all(loaded.tasks[task].OUTPUT_TYPE == "multiple_choice" for task in tasks):
            metrics[CHANCE] = _chances(documents)
        prefix = "" if outer == [name] else f"{name}/"
        for metric, samples in metrics.items():
            yield MetricRow(metric=f"{prefix}{metric}", samples=samples, weights=np.ones(len(samples)))


def _outer_names(loaded: _Loaded) -> list[str]:
    """Return the names of the groups and tasks that are in no group."""
    inner: set[str] = set()
    for group in loaded.groups.values():
        inner.update(group.child_names)
    return [name for name in (*loaded.groups, *loaded.tasks) if name not in inner]


def _samples_by_metric(results: JsonObject, documents: Sequence[JsonObject]) -> dict[str, Float64]:
    """Return the samples of the metrics of a task or group. A metric is named with its filter, unless that is none.

    Args:
        results: values by the names of the harness, such as ``acc,none`` and ``acc_stderr,none``.
    """
    metrics = {}
    for key, value in results.items():
        metric, comma, filter_name = key.rpartition(",")
        if comma and not metric.endswith("_stderr"):
            name = metric if filter_name == "none" else key
            metrics[name] = _samples(documents, metric, filter_name, float(value))
    return metrics


def _chances(documents: Sequence[JsonObject]) -> Float64:
    """Return the accuracy of a guess for each question of multiple choice."""
    num_choices = []
    for document in documents:
        if document["filter"] == documents[0]["filter"]:
            # Mutual information requests each answer twice.
            requests_per_choice = 2 if "acc_mutual_info" in document else 1
            num_choices.append(len(document["arguments"]) // requests_per_choice)
    return 1 / np.array(num_choices)


def _samples(documents: Sequence[JsonObject], metric: str, filter_name: str, value: float) -> Float64:
    """Return a metric of each document, or its value alone if that is not their mean."""
    values = [document[metric] for document in documents if document["filter"] == filter_name and metric in document]
    try:
        samples = np.asarray(values, np.float64)
    except (TypeError, ValueError):  # pairs of a prediction and its target, texts
        return np.array([value])
    if samples.ndim == 1 and len(samples) and abs(samples.mean() - value) <= _SAME_MEAN:
        return samples
    return np.array([value])


class Question(NamedTuple):
    """A continuation whose likelihood after a context is asked for.

    Attributes:
        row: input of the model, the context and the continuation without its last token.
        continuation: its tokens.
    """

    row: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def of_tokens(cls, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Question:
        """Return a question, with as much of the context as ``max_length`` tokens in a row leave."""
        tokens = (*context, *continuation)
        shortened = tokens[-(max_length + 1) :]
        return cls(shortened[:-1], tuple(continuation))


class Likelihood(NamedTuple):
    """Likelihood of a continuation.

    Attributes:
        log_likelihood: in nats.
        is_greedy: whether greedy decoding gives the continuation.
    """

    log_likelihood: float
    is_greedy: bool


def harness_model(model: LanguageModel, *, chat: bool = False) -> HFLM:
    """Return a language model as a model of the harness.

    Args:
        chat: apply the model's chat template.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """The harness's model with another way to batch log-likelihoods: all batches of a task run together."""

        def _loglikelihood_tokens(
            self,
            requests: Sequence[tuple[object, list[int], list[int]]],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[Likelihood]:
            questions = [Question.of_tokens(before, after, self.max_length) for _, before, after in requests]
            batches = _batches(questions, self.batch_size)
            measurements = []
            for batch in batches:
                measurements.append(partial(_likelihoods, model, [questions[index] for index in batch]))
            with _from_model():
                likelihoods = model.together(measurements)
            answers = dict(zip(chain(*batches), chain(*likelihoods), strict=True))
            return [answers[index] for index in range(len(requests))]

    settings = model.settings
    tokenizer = load_tokenizer(model.checkpoint)
    if chat:
        tokenizer.chat_template = without_today(tokenizer.get_chat_template())
    module = model.module  # the harness takes its configuration and device, and has it generate
    return Model(
        pretrained=SimpleNamespace(config=module.config, device=module.device, generate=_from_model()(model.generate)),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=settings.batch_size,
        softmax_dtype="float32",
    )


def _batches(questions: Sequence[Question], rows: int) -> list[list[int]]:
    """Return the indices of questions in batches of ``rows`` distinct rows, the longest rows first."""
    indices_by_row: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(questions)), key=lambda index: _order_of_row(questions[index].row)):
        indices_by_row.setdefault(questions[index].row, []).append(index)
    groups = list(indices_by_row.values())
    batches = []
    for start in range(0, len(groups), rows):
        batches.append(sorted(chain(*groups[start : start + rows])))
    return batches


def _order_of_row(row: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Return the sort key of a row of tokens: the longest first, then by tokens."""
    return -len(row), row


@torch.no_grad()
def _likelihoods(model: LanguageModel, questions: Sequence[Question]) -> list[Likelihood]:
    """Return the likelihood of each question of a batch.

    The head runs at tokens of continuations alone. Padding comes after them, where causal models do not look.
    """
    rows = list(dict.fromkeys(question.row for question in questions))
    ids = np.zeros((len(rows), max(len(row) for row in rows)), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    is_real = np.ones(ids.shape, np.bool_)
    hidden = model.hidden_states(Batch(input_ids=ids, attention_mask=is_real, observed=is_real))
    number_of_row = {row: number for number, row in enumerate(rows)}
    numbers: list[int] = []
    positions: list[int] = []
    tokens: list[int] = []
    for question in questions:
        length = len(question.continuation)
        end = len(question.row)
        numbers += [number_of_row[question.row]] * length
        positions += range(end - length, end)
        tokens += question.continuation
    labels = torch.tensor(tokens, device=model.device)
    losses = torch.empty(len(labels), dtype=torch.float64)
    is_best = torch.empty(len(labels), dtype=torch.bool)
    at_labels = hidden[torch.tensor(numbers, device=model.device), torch.tensor(positions, device=model.device)]
    for piece, logits in model.logits(at_labels):
        losses[piece] = cross_entropy(logits, labels[piece], reduction="none").double().cpu()
        is_best[piece] = (logits.argmax(dim=-1) == labels[piece]).cpu()
    lengths = [len(question.continuation) for question in questions]
    likelihoods = []
    for losses_of_question, are_best in zip(losses.split(lengths), is_best.split(lengths), strict=True):
        likelihoods.append(Likelihood(-float(losses_of_question.sum()), bool(are_best.all())))
    return likelihoods


@contextmanager
def _from_model() -> Iterator[None]:
    """Add a note to an exception that is raised inside the context: the task is not the cause."""
    try:
        yield
    except Exception as error:
        error.add_note(MODEL_NOTE)
        raise


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the libraries and sandbox the templates of tasks inside the context."""
    from lm_eval import utils
    from tqdm import tqdm

    start = tqdm.__init__
    templates = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    templates.filters.update(utils.env.filters)

    def start_disabled(self: tqdm, *args: object, **kwargs: object) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    with (
        quiet("lm_eval", "datasets"),
        patch.object(tqdm, "__init__", start_disabled),
        patch.object(utils, "env", templates),
    ):
        yield
