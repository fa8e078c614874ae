"""Tasks of lm-evaluation-harness, run on an open model, and the adapter of the model to the harness."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
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
from avss_dist.core.values import JsonObject
from avss_dist.corpus.documents import without_today
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import load_tokenizer, quiet
from avss_dist.stats.metrics import CHANCE
from avss_dist.tasks.harness_files import (
    code_entries,
    has_local_data,
    is_task_file,
    read_task_file,
    resolve_data_files,
)
from avss_dist.tasks.task import Measure, MetricRow, Task

MODEL_NOTE = "The model raised it, not the task."
SEED, OTHER_SEED = 0, 1234  # the harness's own: of `random`; of numpy, torch and the choice of examples


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
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(OTHER_SEED)
            with _explained(self.name, "asked or scored"):
                results = evaluate(
                    wrapped,
                    loaded,
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
            config = read_task_file(Path(name))
            code, path = code_entries(config), Path(name).absolute()
            if code and not trust_remote_code:
                raise TaskError(
                    f"{name} runs code: {', '.join(code)}.", "Read that code, then set `trust_remote_code` to run it."
                )
            # With functions, the harness reads the file itself, and finds data where the process is.
            config = resolve_data_files(config, Path.cwd(), *([] if code else [path.parent]))
            part = replace(
                part,
                name=str(path) if code else name,
                config=None if code else yaml.safe_dump(config, sort_keys=False),
            )
        elif name not in _catalogue().task_index:
            names = {task: task for task in _catalogue().all_tasks} | {"perplexity": "perplexity:CORPUS"}
            match = difflib.get_close_matches(name.partition(":")[0].lower(), names, n=1)
            hint = f"Did you mean '{names[match[0]]}'? " if match else ""
            raise TaskError(f"There is no task '{name}'.", f"{hint}`lm-eval ls tasks` lists those of the harness.")
        loaded = _load(part)
        for task in loaded["tasks"].values() if is_task_file(name) else ():
            _require_meaning(name, task, limit)
        part = replace(part, key=_key(part, loaded))
    chat = {"harness_chat_template": template} if template else {}
    return Task(name=name, parts=(part,), options={"limit": limit, "num_fewshot": num_fewshot, **chat})


def _require_meaning(name: str, task: Any, limit: int | None) -> None:
    """Refuse mistakes of a task file with which the harness would measure something else without a word.

    Args:
        task: the task of the harness, with its data.
        limit: number of questions that are asked; None for all.
    """
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask):  # Python code, with rules of its own
        return
    text, columns = task.config.doc_to_text, list(task.features)
    match = difflib.get_close_matches(text, columns, n=1, cutoff=0.7) if isinstance(text, str) else ()
    if match and text not in columns and "{" not in text:
        raise TaskError(f"{name}: doc_to_text is '{text}', which is not a column.", f"Did you mean '{match[0]}'?")
    if task.OUTPUT_TYPE == "multiple_choice":
        labels = (task.doc_to_target(dict(row)) for row in islice(task.eval_docs, limit))
        if any(isinstance(label, int) and label < 0 for label in labels):
            raise TaskError(f"{name}: doc_to_target gives a negative label.", "Labels are counted from 0.")


@lru_cache(maxsize=1)
def _catalogue() -> Any:
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
        unclear = isinstance(error, TypeError | AttributeError | LookupError | ArithmeticError | AssertionError)
        kind = f"{type(error).__name__}: " if unclear and str(error) else ""
        raise TaskError(
            f"Task '{task}' could not be {what}: {kind}{first_line(error)}",
            "Do its fields name columns of its data? Do its metrics, aggregations and filters fit its output_type?"
            if is_task_file(task)
            else "It is a task of lm-evaluation-harness: does it run there, with this version of it?",
        ) from error


def _load(part: HarnessPart) -> Any:
    """Load the tasks of a part and their data: ``{"tasks": {name: ...}, "groups": {name: ...}}``."""
    import datasets
    from lm_eval.tasks import TaskManager

    if part.config is None:
        config = read_task_file(Path(part.name)) if is_task_file(part.name) else {}
    else:
        config = yaml.safe_load(part.config)
    manager = TaskManager(include_defaults=False) if config else _catalogue()
    with patch.object(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE or has_local_data(config)):
        loaded = manager.load([part.name if part.config is None else config])
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"Task '{name}' runs the code that a model writes, which is not supported.")
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"Task '{name}' has images or sounds; only text is evaluated.")
        task_shots = task.get_config("num_fewshot")
        if task_shots is None or (part.num_fewshot is not None and task_shots != 0):
            task.set_config("num_fewshot", part.num_fewshot or 0)
    return loaded


_load_cached = lru_cache(maxsize=4)(_load)  # because a part runs many times


def _key(part: HarnessPart, loaded: Any) -> str:
    """Return the SHA-256, in hex, of the loaded tasks, their documents and their prompt options."""
    described = {}
    for name, task in loaded["tasks"].items():
        config = task.dump_config()
        metadata = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
        shots = task.fewshot_docs() if config.get("num_fewshot") else ()
        documents = hashlib.sha256()
        for document in (*islice(task.eval_docs, part.limit), None, *shots):
            documents.update(_text(document))
        config = {key: value for key, value in config.items() if key != "dataset_kwargs"} | {"metadata": metadata}
        described[name] = [_text(config).decode(), str(task.VERSION), documents.hexdigest()]
    return fingerprint(
        measure="lm-evaluation-harness",
        version=version("lm_eval"),
        seeds=[SEED, OTHER_SEED],
        limit=part.limit,
        tasks=described,
        **({"apply_chat_template": True, "template": part.template} if part.template else {}),
    )


def _text(value: Any) -> bytes:
    return json.dumps(value, default=_described).encode() + b"\n"


def _described(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _rows(evaluated: Any, loaded: Any) -> Iterator[MetricRow]:
    """Yield a row for each metric of each task and group, and `CHANCE` for multiple choice.

    A metric that is a mean over documents has a sample for each, in their order. Other metrics have their value as the
    only sample.
    """
    groups = loaded.get("groups") or {}
    inner = {child for group in groups.values() for child in group.child_names}
    outer = [name for name in (*groups, *loaded["tasks"]) if name not in inner]
    for name, results in evaluated["results"].items():
        tasks = [task.task_name for task in groups[name].get_all_tasks()] if name in groups else [name]
        prefix = "" if [name] == outer else f"{name}/"
        documents = [document for task in tasks for document in evaluated["samples"][task]]
        metrics = {}
        for key, value in results.items():  # the name of a metric has its filter, unless that is ``none``
            metric, comma, filtered = key.rpartition(",")
            if comma and not metric.endswith("_stderr"):
                metrics[metric if filtered == "none" else key] = _samples(documents, metric, filtered, float(value))
        if all(loaded["tasks"][task].OUTPUT_TYPE == "multiple_choice" for task in tasks):
            asked = [document for document in documents if document["filter"] == documents[0]["filter"]]
            # Mutual information requests each answer twice.
            choices = [len(document["arguments"]) // (1 + ("acc_mutual_info" in document)) for document in asked]
            metrics[CHANCE] = 1 / np.array(choices)
        for metric, samples in metrics.items():
            yield MetricRow(metric=f"{prefix}{metric}", samples=samples, weights=np.ones(len(samples)))


def _samples(documents: Iterable[JsonObject], metric: str, filtered: str, value: float) -> np.ndarray:
    values = [document[metric] for document in documents if document["filter"] == filtered and metric in document]
    try:
        samples = np.asarray(values, np.float64)
    except (TypeError, ValueError):  # pairs of a prediction and its target, texts
        samples = np.zeros(0)
    is_mean = samples.ndim == 1 and len(samples) > 0 and abs(samples.sum() / len(samples) - value) <= 1e-9
    return samples if is_mean else np.array([value])


Question = tuple[tuple[int, ...], tuple[int, ...]]
"""Input of the model (context and continuation without the last token), and the continuation that is asked for."""


def harness_model(model: LanguageModel, *, chat: bool = False) -> Any:
    """Return a language model as a model of the harness.

    Args:
        chat: apply the model's chat template.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """The harness's model with another way to batch log-likelihoods: all batches of a task run together."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            questions = [
                (tuple((*before, *after)[-(self.max_length + 1) :][:-1]), tuple(after)) for _, before, after in requests
            ]
            groups = _batches(questions, self.batch_size)
            with _from_model():
                likelihoods = model.together(
                    [partial(_likelihoods, model, [questions[i] for i in group]) for group in groups]
                )
            answers = dict(zip(chain(*groups), chain(*likelihoods), strict=True))
            return [answers[i] for i in range(len(requests))]

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
    shared: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(questions)), key=lambda i: (-len(questions[i][0]), questions[i][0])):
        shared.setdefault(questions[i][0], []).append(i)
    groups = [*shared.values()]
    return [sorted(i for group in groups[at : at + rows] for i in group) for at in range(0, len(groups), rows)]


@torch.no_grad()
def _likelihoods(model: LanguageModel, questions: Sequence[Question]) -> list[tuple[float, bool]]:
    """Return (log-likelihood in nats, whether greedy decoding gives the continuation) of each question of a batch.

    The head runs at tokens of continuations alone. Padding comes after them, where causal models do not look.
    """
    rows = {row: number for number, row in enumerate(dict.fromkeys(row for row, _ in questions))}
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, number in rows.items():
        ids[number, : len(row)] = row
    real = np.ones(ids.shape, np.bool_)
    hidden = model.hidden_states(Batch(input_ids=ids, attention_mask=real, observed=real))
    positions = [(rows[row], at) for row, after in questions for at in range(len(row) - len(after), len(row))]
    at, after = torch.tensor(positions, device=model.device).T
    labels = torch.tensor([token for _, continuation in questions for token in continuation], device=model.device)
    losses, best = torch.empty(len(labels), dtype=torch.float64), torch.empty(len(labels), dtype=torch.bool)
    for piece, logits in model.logits(hidden[at, after]):
        losses[piece] = cross_entropy(logits, labels[piece], reduction="none").double().cpu()
        best[piece] = (logits.argmax(dim=-1) == labels[piece]).cpu()
    lengths = [len(continuation) for _, continuation in questions]
    parts = zip(losses.split(lengths), best.split(lengths), strict=True)
    return [(-float(loss.sum()), bool(greedy.all())) for loss, greedy in parts]


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

    def start_disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    with (
        quiet("lm_eval", "datasets"),
        patch.object(tqdm, "__init__", start_disabled),
        patch.object(utils, "env", templates),
    ):
        yield
