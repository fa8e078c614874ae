"""Checks of task files, because lm-evaluation-harness ignores mistakes or fails in the middle of a run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any

from jinja2 import TemplateSyntaxError, UndefinedError

from avss_dist.core.errors import TaskError, first_line, nearest
from avss_dist.tasks.harness_files import Function, TaskFile

MULTIPLE_CHOICE, GENERATE = "multiple_choice", "generate_until"
TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target", "description", "gen_prefix")
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_CODE = ("doc_to_text", "doc_to_choice", "doc_to_target", "process_docs")  # which may be functions
_METRIC_KEYS = ("metric", "aggregation", "higher_is_better", "hf_evaluate")
_GENERATION_KEYS = ("until", "max_gen_toks")  # the harness's own, beside those of transformers
_STRUCTURE = ("class", "group", "tag", "task_list")
_TEXT, _WHOLE, _LIST, _MAPPING = (str,), (int,), (list,), (dict,)
_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "dataset_path", "dataset_name", *SPLITS, "description", "gen_prefix"), _TEXT),
    **dict.fromkeys(("target_delimiter", "fewshot_delimiter", "output_type", "use_prompt"), _TEXT),
    **dict.fromkeys(("num_fewshot", "repeats"), _WHOLE),
    **dict.fromkeys(("metric_list", "filter_list"), _LIST),
    **dict.fromkeys(("dataset_kwargs", "generation_kwargs", "fewshot_config"), _MAPPING),
    **dict.fromkeys(("unsafe_code", "should_decontaminate"), (bool,)),
    "doc_to_text": (str, int),
    "doc_to_target": (str, int, list),
    "doc_to_choice": (str, list, dict),
}
_WORDS = {str: "a text", int: "a whole number", list: "a list", dict: "a mapping", bool: "true or false"}
_NEVER_NULL = ("target_delimiter", "fewshot_delimiter", "output_type", "repeats", "unsafe_code")


def require_valid(file: TaskFile) -> None:
    """Refuse a task file by its keys and their values alone.

    Raises:
        TaskError: a key is unknown or missing, a value has a wrong type or an unknown name, or a template is invalid.
    """
    _require_keys(file)
    _require_types(file)
    _require_output(file)
    _require_metrics(file)
    _require_filters(file)
    for key in TEMPLATES:
        _require_template(file, key, file.config.get(key))


def _require_keys(file: TaskFile) -> None:
    from lm_eval.api.task import TaskConfig

    config = file.config
    names = [field.name for field in fields(TaskConfig)]
    for key in config:
        if key not in (*names, *_STRUCTURE):
            raise file.mistake(key, "is unknown.", nearest(str(key), names))
    if "class" in config:  # a task that is Python code
        return
    needed = ["dataset_path"] if config.get("custom_dataset") is None else []
    needed += ["doc_to_text", "doc_to_target"] if config.get("use_prompt") is None else []
    if config.get("output_type") == MULTIPLE_CHOICE and config.get("use_prompt") is None:
        needed.append("doc_to_choice")
    for key in needed:
        if config.get(key) is None:
            raise file.mistake(key, "is missing.")
    if config.get("test_split") is None and config.get("validation_split") is None:
        raise file.mistake("test_split", "is missing, and so is 'validation_split': no questions are named.")


def _require_types(file: TaskFile) -> None:
    for key, value in file.config.items():
        types = _TYPES.get(key)
        if types is None or isinstance(value, Function) or (value is None and key not in _NEVER_NULL):
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise file.mistake(key, f"must be {' or '.join(_WORDS[kind] for kind in types)}, not {value!r}.")
    for key, minimum in (("num_fewshot", 0), ("repeats", 1)):
        if (value := file.config.get(key)) is not None and value < minimum:
            raise file.mistake(key, f"must be at least {minimum}, not {value}.")


def _require_output(file: TaskFile) -> None:
    from lm_eval.api.task import ALL_OUTPUT_TYPES
    from transformers import GenerationConfig

    output = file.config.get("output_type", GENERATE)
    if output not in ALL_OUTPUT_TYPES:
        raise file.mistake("output_type", f"is the unknown '{output}'.", nearest(output, ALL_OUTPUT_TYPES))
    options = file.config.get("generation_kwargs") or {}
    valid = [*_GENERATION_KEYS, *sorted(key for key in vars(GenerationConfig()) if not key.startswith("_"))]
    for key in options:
        if key not in valid:
            raise file.mistake("generation_kwargs", f"has the unknown key '{key}'.", nearest(str(key), valid))
    until = options.get("until", [])
    if not isinstance(until, str) and not (isinstance(until, list) and all(isinstance(text, str) for text in until)):
        raise file.mistake("generation_kwargs", f"has `until`, which must be a text or a list of texts, not {until!r}.")


def _require_metrics(file: TaskFile) -> None:
    """Refuse metrics that the harness would look for on a hub, and options that it would ignore."""
    from lm_eval.api import metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import aggregation_registry, metric_registry

    key = "metric_list"
    has_code = "process_results" in file.config  # code, whose metrics have any names
    seen = set()
    for metric in _mappings(file, key, file.config.get(key)):
        name, aggregation = metric.get("metric"), metric.get("aggregation")
        if not isinstance(name, Function) and not has_code:
            _require_name(file, key, "metric", name, sorted(metric_registry))
        if name in seen:
            raise file.mistake(key, f"has the metric '{name}' twice.", "Leave one of them.")
        seen.add(name)
        if "aggregation" in metric and not isinstance(aggregation, Function):
            _require_name(file, key, "aggregation", aggregation, sorted(aggregation_registry))
        if not isinstance(better := metric.get("higher_is_better", True), bool):
            raise file.mistake(key, f"has `higher_is_better`, which must be true or false, not {better!r}.")
        for option in metric:
            generates = file.config.get("output_type", GENERATE) == GENERATE  # whose metrics take options
            similar = difflib.get_close_matches(str(option), _METRIC_KEYS, n=1, cutoff=0.8)
            if option not in _METRIC_KEYS and (similar or not (generates or has_code)):
                raise file.mistake(key, f"has the unknown key '{option}'.", nearest(str(option), _METRIC_KEYS))


def _require_filters(file: TaskFile) -> None:
    from lm_eval.api.registry import filter_registry, get_filter

    key = "filter_list"
    seen = set()
    for pipeline in _mappings(file, key, file.config.get(key)):
        if not isinstance(name := pipeline.get("name"), str):
            raise file.mistake(key, f"has a pipeline whose `name` must be a text, not {name!r}.")
        if name in seen:
            raise file.mistake(key, f"has the name '{name}' twice.", "Give each pipeline a name of its own.")
        seen.add(name)
        for step in _mappings(file, key, pipeline.get("filter", [])):
            function = step.get("function")
            if isinstance(function, Function):
                continue
            _require_name(file, key, "filter", function, sorted(filter_registry))
            options = {option: value for option, value in step.items() if option != "function"}
            if any(isinstance(value, Function) for value in options.values()):
                continue
            try:
                get_filter(function)(**options)
            except Exception as error:
                raise file.mistake(key, f"has the filter '{function}', which refuses: {first_line(error)}.") from error


def _mappings(file: TaskFile, key: str, values: Any) -> Iterator[Mapping[Any, Any]]:
    """Yield the items of a list, each of which must be a mapping. Null is an empty list."""
    for value in values if isinstance(values, list) else [values] if values is not None else ():
        if value is values or not isinstance(value, dict):
            raise file.mistake(key, f"must have a list of mappings, not {value!r}.")
        yield value


def _require_name(file: TaskFile, key: str, kind: str, name: Any, valid: Sequence[str]) -> None:
    if not isinstance(name, str):
        raise file.mistake(key, f"has an entry whose `{kind}` must be a name, not {name!r}.", nearest("", valid))
    if name not in valid:
        raise file.mistake(key, f"has the unknown {kind} '{name}'.", nearest(name, valid))


def _require_template(file: TaskFile, key: str, value: Any) -> None:
    from lm_eval import utils

    if not isinstance(value, str) or isinstance(value, Function):
        return
    try:
        utils.env.parse(value)
    except TemplateSyntaxError as error:
        raise file.mistake(key, f"is not a valid template, in its line {error.lineno}: {error.message}") from error


def require_data(file: TaskFile, dataset: Any) -> None:
    """Refuse a task file whose splits or templates do not fit its data, judged by the first question.

    Args:
        dataset: rows by split, ``datasets.DatasetDict``.
    """
    from lm_eval import utils

    config = file.config
    for key in SPLITS:
        if (split := config.get(key)) is not None and split not in dataset:
            raise file.mistake(key, f"is '{split}', and the data have no such split.", nearest(split, list(dataset)))
    questions = dataset[config.get("test_split") or config["validation_split"]]
    if len(questions) == 0:
        raise TaskError(f"The data of task '{config['task']}' are empty: they have no row.")
    if config.get("use_prompt") is not None or any(isinstance(config.get(key), Function) for key in _CODE):
        return
    row, columns = questions[0], list(questions.features)
    for key in ("description", "gen_prefix"):
        if isinstance(template := config.get(key), str) and template not in columns:
            _render(file, key, partial(utils.apply_template, template), row, 1)
    question = _Question(file, _unconstructed_task(config, columns), row, 1)
    text = config["doc_to_text"]
    if question.text == text and (similar := difflib.get_close_matches(text, columns, n=1, cutoff=0.7)):
        raise file.mistake("doc_to_text", f"is '{text}', which is not a column.", f"Did you mean '{similar[0]}'?")
    question.require_valid()


def _unconstructed_task(config: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """Return a task that can fill its templates, before the harness constructs it with errors of its own."""
    from lm_eval.api.task import ConfigurableTask, TaskConfig

    task = object.__new__(ConfigurableTask)
    task._config = TaskConfig(**{key: deepcopy(value) for key, value in config.items() if key not in _STRUCTURE})
    task.prompt, task.features, task.OUTPUT_TYPE = None, list(columns), task._config.output_type
    return task


def _render(file: TaskFile, key: str, function: Callable[[Any], Any], row: Mapping[str, Any], number: int) -> Any:
    """Return the value of a template for a question.

    Raises:
        TaskError: the template fails.
    """
    try:
        return function(dict(row))
    except TaskError:
        raise
    except Exception as failure:
        error, missing = failure, str(file.config.get(key))
        if key == "doc_to_choice" and isinstance(error, ValueError | SyntaxError):  # it was no literal of Python
            error = ValueError("it gives no list.")
        elif isinstance(error, UndefinedError):
            missing = str(error).partition("'")[2].partition("'")[0]
        columns = nearest(missing, list(row)).replace("Valid:", "Columns:")
        what = f"fails for question {number}: {first_line(error)}"
        raise file.mistake(key, what, f"It is a template, or a column of the data. {columns}") from failure


def require_answerable(file: TaskFile, task: Any, limit: int | None) -> None:
    """Refuse a task if one of its questions cannot be asked or scored as its file says.

    Args:
        task: the task of the harness, with its data.
        limit: number of questions that are asked; None for all.

    Raises:
        TaskError: a template fails, choices are not a list of texts, or a label is not among the choices.
    """
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask):  # Python code, with rules of its own
        return
    first = None
    for number, row in enumerate(islice(task.eval_docs, limit), 1):
        question = _Question(file, task, row, number)
        question.require_valid()
        if first is None:
            first = question
            question.require_scored()
        question.require_like(first)


class _Question:
    """A question of a task: the values of its templates."""

    def __init__(self, file: TaskFile, task: Any, row: Mapping[str, Any], number: int) -> None:
        self.file, self.task, self.row, self.number = file, task, row, number
        self.text = _render(file, "doc_to_text", task.doc_to_text, row, number)
        self.target = _render(file, "doc_to_target", task.doc_to_target, row, number)
        has_choices = task.config.doc_to_choice is not None
        self.choices = _render(file, "doc_to_choice", task.doc_to_choice, row, number) if has_choices else None

    def _mistake(self, key: str, what: str, hint: str | None = None) -> TaskError:
        return self.file.mistake(key, f"gives {what} for question {self.number}.", hint)

    def require_valid(self) -> None:
        """Refuse values of wrong types, and labels outside of the choices."""
        if self.choices is not None:
            self._require_choices(self.choices)
        if isinstance(self.text, int) and not isinstance(self.text, bool) and self.choices is not None:
            self._require_label("doc_to_text", self.text, self.choices)
        elif not isinstance(self.text, str):
            raise self._mistake("doc_to_text", f"{self.text!r}, not a text,")
        output = self.task.OUTPUT_TYPE
        if output == MULTIPLE_CHOICE and not isinstance(self.text, int):
            self._require_labels(self.choices or [])
        elif output == GENERATE and self.choices is not None:
            if not isinstance(self.target, int):
                raise self._mistake("doc_to_target", f"{self.target!r}, not the index of a choice,")
            self._require_label("doc_to_target", self.target, self.choices)
        elif output in ("loglikelihood", "loglikelihood_rolling") and not isinstance(self.target, str):
            raise self._mistake("doc_to_target", f"{self.target!r}, not a text,")

    def _require_labels(self, choices: Sequence[str]) -> None:
        if not isinstance(self.target, list):
            self._require_label("doc_to_target", self.target, choices)
            return
        if not self.target:
            raise self._mistake("doc_to_target", "no label")
        for label in self.target:
            if not isinstance(label, int):
                raise self._mistake("doc_to_target", f"the list {self.target!r}, not one of indices of choices,")
            self._require_label("doc_to_target", label, choices)

    def require_like(self, first: _Question) -> None:
        """Refuse values of other types than the first question's, which the harness assumes for all of them."""
        if isinstance(self.text, int) != isinstance(first.text, int):
            raise self._mistake("doc_to_text", f"{self.text!r}, unlike {first.text!r} for question 1,")
        lists = isinstance(self.target, list), isinstance(first.target, list)
        if self.task.OUTPUT_TYPE == MULTIPLE_CHOICE and lists[0] != lists[1]:
            raise self._mistake("doc_to_target", f"{self.target!r}, unlike {first.target!r} for question 1,")

    def _require_choices(self, choices: Any) -> None:
        if not isinstance(choices, list) or not choices:
            raise self._mistake("doc_to_choice", f"{choices!r}, not a list of texts,")
        for choice in choices:
            if not isinstance(choice, str) or not choice:
                hint = "Quote words that YAML reads as numbers, or as true and false: 'yes', 'no'."
                raise self._mistake("doc_to_choice", f"the choice {choice!r}, not a text,", hint)

    def _require_label(self, key: str, label: Any, choices: Sequence[str]) -> None:
        if isinstance(label, str):
            if label not in choices:
                raise self._mistake(key, f"'{label}', which is not among the choices,", nearest(label, choices))
        elif not isinstance(label, int):
            raise self._mistake(key, f"{label!r}, not the index or the text of a choice,")
        elif not 0 <= label < len(choices):
            hint = f"There are {len(choices)} choices: 0 to {len(choices) - 1}."
            raise self._mistake(key, f"the label {label}, which is outside of the choices,", hint)

    def require_scored(self) -> None:
        """Refuse metrics that the output type does not produce."""
        task = self.task
        if task.OUTPUT_TYPE == GENERATE or task.config.process_results is not None:
            return
        context = self.choices if isinstance(self.text, int) else self.text
        requests = task.construct_requests(doc=self.row, ctx=context, metadata=(None, 0, 1))
        number = len(requests) if isinstance(requests, list) else 1
        alone = task.OUTPUT_TYPE == "loglikelihood_rolling"
        answers = [-1.0 - i if alone else (-1.0 - i, False) for i in range(number)]
        scored = task.process_results(self.row, answers)
        for metric in task.aggregation():
            if metric not in scored and metric != "bypass":
                valid = [name for name in task.aggregation() if name in scored]
                raise self.file.mistake(
                    "metric_list" if "metric_list" in self.file.config else "output_type",
                    f"has the metric '{metric}', which output_type {task.OUTPUT_TYPE} does not have.",
                    f"Of the others it has {', '.join(valid)}." if valid else "Leave the key out for the usual ones.",
                )
