"""Tasks of lm-evaluation-harness, run on a model that is open already."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jinja2.sandbox import SandboxedEnvironment

from avss_dist.errors import AvssError, ConfigError, TaskError, first_line
from avss_dist.intervention import NO_INTERVENTION, Intervention
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.loading import quiet
from avss_dist.names import CHANCE
from avss_dist.options import DEFAULT_PROMPT, PromptOptions
from avss_dist.settings import fingerprint
from avss_dist.system.out_of_memory import is_out_of_memory
from avss_dist.tasks.base import Row, Task
from avss_dist.tasks.harness_checks import require_answerable, require_data, require_valid
from avss_dist.tasks.harness_files import TaskFile, code_in, is_task_file, needs_no_hub, read_task_file, with_data
from avss_dist.tasks.harness_model import harness_model

SEED, OTHER_SEED = 0, 1234  # the harness's own: of `random`; of numpy, torch and the choice of examples


@dataclass(frozen=True, kw_only=True)
class HarnessPart:
    """A task of the harness, or a group of them: all questions of it, a sample for each.

    Attributes:
        name: as the user wrote it.
        config: the task file, its data by absolute paths; None of a task that the harness finds by its name, and of a
            file with functions, which is read where it runs.
        limit: questions of each task at most.
        prompting: what stands around them.
        key: see `tasks.base.Measure`.
    """

    name: str
    config: str | None = None
    limit: int | None = None
    prompting: PromptOptions = DEFAULT_PROMPT
    key: str = ""

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`. Likelihoods are float32."""
        loaded = _loaded(self)
        from lm_eval.evaluator import evaluate

        with _silence(), model.applying(intervention):
            failures: list[Exception] = []
            chat = self.prompting.apply_chat_template
            wrapped = harness_model(model, generate=bool(intervention.removed), chat=chat, failures=failures)
            _seed(loaded["tasks"].values())
            with _bad_scoring(self.name, failures):
                found = evaluate(
                    wrapped,
                    loaded,
                    limit=self.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                    system_instruction=self.prompting.system_instruction,
                    apply_chat_template=self.prompting.apply_chat_template,
                    fewshot_as_multiturn=self.prompting.fewshot_as_multiturn,
                )
                return list(_rows(found, loaded))


def harness_task(
    name: str,
    *,
    limit: int | None = None,
    prompting: PromptOptions = DEFAULT_PROMPT,
    template: str | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """A task of lm-evaluation-harness: by its name, or by its YAML file.

    Data files of a task file are looked for in the working directory, then beside it.

    Args:
        limit: questions of each task at most.
        prompting: what stands around each question.
        template: SHA-256, in hex, of the model's chat template, where questions are put in it.
        trust_remote_code: run Python code that a task file names.

    Raises:
        TaskError: there is no such task, it runs code, its data could not be loaded, or the harness is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise TaskError(
            f"Task '{name}' is for lm-evaluation-harness, which is not installed.",
            "pip install -e '.[eval]' in a clone",
        ) from error
    if limit is not None and limit < 1:
        raise ConfigError(f"`limit` must be at least 1, not {limit}.")
    with _silence(), _bad_task(name):
        found, config, file = _find(name, trust_remote_code=trust_remote_code)
        part = HarnessPart(name=found, config=config, limit=limit, prompting=prompting)
        loaded = _load(part)
        if file:
            for task in loaded["tasks"].values():
                require_answerable(file, task, limit)
        part = replace(part, key=_key(part, loaded, template))
    options = {**asdict(prompting), **({"harness_chat_template": template} if template else {})}
    return Task(name=name, parts=(part,), options={"limit": limit, **options})


def _find(name: str, *, trust_remote_code: bool) -> tuple[str, str | None, TaskFile | None]:
    """Return the first two fields of a `HarnessPart`, and the task file, which was checked."""
    if not is_task_file(name):
        if name not in _catalogue().task_index:
            raise TaskError(f"There is no task '{name}'.", _nearest(name))
        return name, None, None
    file = read_task_file(Path(name))
    named = code_in(file.config)
    if named and not trust_remote_code:
        raise TaskError(
            f"{name} runs code: {', '.join(named)}.", "Read that code, then set `trust_remote_code` to run it."
        )
    require_valid(file)
    path = Path(name).absolute()
    # With functions, the harness reads the file itself, and finds data where the process is.
    config = with_data(file.config, Path.cwd(), *([] if named else [path.parent]))
    if "class" not in config and config.get("custom_dataset") is None:
        require_data(file, _data(config))
    return (str(path), None, file) if named else (name, yaml.safe_dump(config, sort_keys=False), file)


def _data(config: Mapping[str, Any]) -> Any:
    """Return the rows of a task file by split, as the harness loads them."""
    import datasets

    options = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
    with _offline(config):
        return datasets.load_dataset(path=config["dataset_path"], name=config.get("dataset_name"), **options)


@contextmanager
def _offline(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, no hub is asked, if all data of a task file are files of this machine."""
    import datasets

    with ExitStack() as stack:
        if needs_no_hub(config):
            _change(stack, datasets.config, "HF_HUB_OFFLINE", True)
        yield


def _nearest(name: str) -> str:
    names = {task: task for task in _catalogue().all_tasks} | {"perplexity": "perplexity:CORPUS"}
    match = difflib.get_close_matches(name.partition(":")[0].lower(), names, n=1)
    return (f"Did you mean '{names[match[0]]}'? " if match else "") + "`lm-eval ls tasks` lists those of the harness."


@lru_cache(maxsize=1)
def _catalogue() -> Any:
    """The tasks that the harness ships; seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@lru_cache(maxsize=4)
def _loaded(part: HarnessPart) -> Any:
    """See `_load`; kept, for a part runs again and again."""
    with _silence(), _bad_task(part.name):
        return _load(part)


@contextmanager
def _bad_task(task: str) -> Iterator[None]:
    """Turn into a `TaskError` what the harness and `datasets` raise over a bad task or missing data."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        yield
    except (OSError, DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise TaskError(
            f"The data of task '{task}' could not be loaded: {first_line(reason or error)}",
            "Data of a hub need a network once, and stay in HF_HOME; files must be on every node.",
        ) from error
    except AvssError:
        raise
    except Exception as error:  # a task's own templates and code can raise anything
        raise TaskError(f"Task '{task}' could not be made: {_reason(error)}", _hint(task)) from error


@contextmanager
def _bad_scoring(task: str, failures: Sequence[Exception]) -> Iterator[None]:
    """Turn into a `TaskError` what the harness raises while it asks and scores, unless it comes from the model.

    Args:
        failures: errors of the model, which pass.
    """
    try:
        yield
    except AvssError:
        raise
    except Exception as error:
        if any(error is failure for failure in failures) or is_out_of_memory(error):
            raise
        raise TaskError(f"Task '{task}' could not be asked or scored: {_reason(error)}", _hint(task)) from error


def _reason(error: Exception) -> str:
    """Return what an exception says, with its type where that would be a riddle alone."""
    alone = isinstance(error, TypeError | AttributeError | LookupError | ArithmeticError | AssertionError)
    return f"{type(error).__name__}: {first_line(error)}" if alone and str(error) else first_line(error)


def _hint(task: str) -> str:
    if is_task_file(task):
        return "Do its fields name columns of its data? Do its metrics, aggregations and filters fit its output_type?"
    return "It is a task of lm-evaluation-harness: does it run there, with this version of it?"


def _load(part: HarnessPart) -> Any:
    """The tasks of a part and their data, ready to run: ``{"tasks": {name: ...}, "groups": {name: ...}}``."""
    from lm_eval.tasks import TaskManager

    spec: Any = part.name
    config: Mapping[str, Any] = {}
    if part.config is not None:
        spec = config = yaml.safe_load(part.config)
    elif is_task_file(part.name):
        config = read_task_file(Path(part.name)).config
    manager = TaskManager(include_defaults=False) if config else _catalogue()
    with _offline(config):
        loaded = manager.load([spec])
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"Task '{name}' runs the code that a model writes; that is not done here.")
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"Task '{name}' has images or sounds; only text is evaluated.")
        own = task.get_config("num_fewshot")
        wanted = part.prompting.num_fewshot
        if own is None or (wanted is not None and own != 0):
            task.set_config("num_fewshot", wanted or 0)
    return loaded


def _seed(tasks: Iterable[Any]) -> None:
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    for task in tasks:
        task.set_fewshot_seed(OTHER_SEED)


def _key(part: HarnessPart, loaded: Any, template: str | None) -> str:
    """SHA-256, in hex, of the tasks as they are made, of their documents, and of what stands around them."""
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
        **{name: value for name, value in part.prompting.changes().items() if name != "num_fewshot"},
        **({"template": template} if template else {}),
    )


def _text(value: Any) -> bytes:
    return json.dumps(value, default=_described).encode() + b"\n"


def _described(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _rows(found: Any, loaded: Any) -> Iterator[Row]:
    """A row for each metric of each task, and of each group that has one of its own; of multiple choice, `CHANCE` too.

    A metric that is a mean over documents has a sample for each, in their order; any other one sample, its value.
    """
    groups = loaded.get("groups") or {}
    inner = {child for group in groups.values() for child in group.child_names}
    outer = [name for name in (*groups, *loaded["tasks"]) if name not in inner]
    for name, results in found["results"].items():
        tasks = [task.task_name for task in groups[name].get_all_tasks()] if name in groups else [name]
        prefix = "" if [name] == outer else f"{name}/"
        documents = [document for task in tasks for document in found["samples"][task]]
        chosen = all(loaded["tasks"][task].OUTPUT_TYPE == "multiple_choice" for task in tasks)
        for metric, samples in (*_metrics(results, documents), *(_chance(documents) if chosen else ())):
            yield Row(metric=f"{prefix}{metric}", samples=samples, weights=np.ones(len(samples)))


def _metrics(results: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    """(metric, samples) of a task; a metric is named with its filter, unless that is ``none``."""
    for key, value in results.items():
        metric, comma, filtered = key.rpartition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric if filtered == "none" else key, _samples(documents, metric, filtered, float(value))


def _chance(documents: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    """(`CHANCE`, samples): the accuracy of a guess at each question."""
    first = documents[0]["filter"]
    yield CHANCE, 1 / np.array([_choices(one) for one in documents if one["filter"] == first])


def _choices(document: Mapping[str, Any]) -> int:
    """How many answers a question of multiple choice has; each stands twice for mutual information."""
    return len(document["arguments"]) // (2 if "acc_mutual_info" in document else 1)


def _samples(documents: Iterable[Mapping[str, Any]], metric: str, filtered: str, value: float) -> np.ndarray:
    found = [one[metric] for one in documents if one["filter"] == filtered and metric in one]
    try:
        samples = np.asarray(found, np.float64)
    except (TypeError, ValueError):  # pairs of a prediction and its target, texts
        samples = np.zeros(0)
    is_mean = samples.ndim == 1 and len(samples) > 0 and abs(samples.sum() / len(samples) - value) <= 1e-9
    return samples if is_mean else np.array([value])


@contextmanager
def _silence() -> Iterator[None]:
    """Without bars and messages of the libraries; templates of tasks cannot reach Python's inside. Undoes all."""
    from lm_eval import utils
    from tqdm import tqdm

    start = tqdm.__init__
    templates = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    templates.filters.update(utils.env.filters)

    def start_disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    with ExitStack() as stack, quiet():
        _change(stack, tqdm, "__init__", start_disabled)
        _change(stack, utils, "env", templates)
        for name in ("lm_eval", "datasets"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        yield


def _change(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
