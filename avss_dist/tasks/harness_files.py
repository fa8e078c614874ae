"""Task files of lm-evaluation-harness: YAML, read without running any code that it names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from avss_dist.core.errors import TaskError, nearest
from avss_dist.core.values import JsonObject, NewObject
from avss_dist.core.yaml_files import YamlKind, read_yaml
from avss_dist.corpus.sources import local_files, require_files
from avss_dist.warehouse.names import PERPLEXITY, TRUTHFULQA

DataFiles: TypeAlias = "str | list[DataFiles] | Mapping[str, DataFiles]"
"""Paths of the data of a task: one, several, or those of each split."""
BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # builders of `datasets` that read local files

KINDS = (PERPLEXITY.removesuffix(":"), TRUTHFULQA.removesuffix(":"))
TEXTS = (".txt", ".jsonl", ".csv", ".parquet")  # ends of paths that no name of a task has
FORMS = f"Tasks are {PERPLEXITY}CORPUS, {TRUTHFULQA}FILE.jsonl, FILE.yaml, and the names of lm-evaluation-harness."


class Function(str):
    """Dotted name of Python code, from the YAML tag ``!function``."""


_KIND = YamlKind(
    noun="task file",
    hint="A task file is a mapping: task, dataset_path, output_type, ...",
    error=TaskError,
    tags={"!function": Function},
)


def is_task_file(name: str) -> bool:
    """Whether a task is given by its file."""
    return name.endswith((".yaml", ".yml"))


def read_task_file(path: Path) -> dict[Any, Any]:
    """Return the keys and values of a task file, merged with those of the files that it includes.

    Raises:
        TaskError: a file cannot be read or repeats a key, or the task file is a group.
    """
    config = {}
    for _, values in _read(path):
        config.update(values)
    if not isinstance(config.get("task"), str):
        raise TaskError(f"{path} names no single task.", "Write `task: NAME`; give the tasks of a group one by one.")
    return config


def _read(path: Path, including: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """Yield the files that a task file includes and then itself, each with its keys and values."""
    if not path.is_file():
        wrong = f"{path} is not a file" if path.exists() else f"There is no task file {path}"
        raise TaskError(f"{wrong}.", "A relative path to a task file starts in the working directory.")
    document = read_yaml(path, _KIND)
    values = document.require_valid(document.value)
    files = values.pop("include", [])
    if isinstance(files, str):
        files = [files]
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise TaskError(f"{path}: key 'include' must be the name of a file, or a list of them, not {files!r}.")
    for name in files:
        included = path.parent / name
        if not included.is_file():
            raise TaskError(
                f"{path}:{document.line(('include',))}: key 'include' names {included}, which is not a file.",
                "A relative path starts beside the file that includes it.",
            )
        if included.resolve() in including:
            raise TaskError(f"{included} includes itself.", f"Take it out of the key 'include' of {path}.")
        yield from _read(included, (*including, path.resolve()))
    yield path, values


def require_task(name: str) -> None:
    """Refuse a task of an unknown kind, or whose text or file is not on this machine.

    The names of tasks that lm-evaluation-harness has are not compared.

    Raises:
        AvssError: there is no such task.
    """
    kind, colon, path = name.partition(":")
    if name.startswith(PERPLEXITY):
        require_files(path)
    elif name.startswith(TRUTHFULQA):
        require_files(name)
    elif is_task_file(name):
        read_task_file(Path(name))
    elif name == PERPLEXITY.removesuffix(":"):
        raise TaskError(f"The task '{name}' needs a text.", FORMS)
    elif colon:
        raise TaskError(f"There is no task '{name}'.", f"{nearest(kind, KINDS)} {FORMS}")
    elif "/" in name or name.endswith(TEXTS):
        raise TaskError(f"There is no task '{name}'.", f"Did you mean '{PERPLEXITY}{name}'? {FORMS}")


def task_files(name: str) -> list[str]:
    """Return the files that a task names by relative paths: texts, questions, or a task file with its data.

    A task that lm-evaluation-harness knows by its name needs none. Each path is spelled so that it is found from the
    working directory. Data at a URI or on the hub are left out.

    Raises:
        CorpusError: a text has an unknown format, or does not exist.
        TaskError: a task file or its data cannot be read.
    """
    if name.startswith((PERPLEXITY, TRUTHFULQA)):
        return local_files(name.removeprefix(PERPLEXITY))
    if not is_task_file(name) or os.path.isabs(os.path.expanduser(name)):
        return []
    path = Path(name)
    files: list[Path] = []
    for file, values in _read(path):
        files.append(file)
        files += _code_files(file, values)
    config = resolve_data_files(read_task_file(path), Path(), path.parent)
    data = config.get("dataset_kwargs") or {}
    for _, place in _walk(data.get("data_files")):
        if isinstance(place, str) and "://" not in place:
            # A file may be called as a pattern is written.
            matches = glob.glob(glob.escape(place)) or glob.glob(place)
            files += [Path(match) for match in sorted(matches)]
    for folder in (config.get("dataset_path"), data.get("data_dir")):
        if isinstance(folder, str) and folder not in BUILDERS:
            files += [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    return [str(file) for file in files if not os.path.isabs(os.path.expanduser(file))]


def _code_files(file: Path, values: JsonObject) -> list[Path]:
    """Return the files beside a task file in which its functions are."""
    modules: set[str] = set()
    for _, value in _walk(values):
        if isinstance(value, Function):
            modules.add(value.rpartition(".")[0])
    sources = [file.parent / f"{module}.py" for module in modules]
    return [source for source in sources if source.is_file()]


def code_entries(config: JsonObject) -> list[str]:
    """Return the entries of a task file that run Python code of its author or of a hub."""
    functions: list[str] = []
    options: list[str] = []
    for key, value in _walk(config):
        if isinstance(value, Function):
            functions.append(f"!function {value}")
        if key in ("trust_remote_code", "hf_evaluate") and value:
            options.append(f"{key}: {value}")
    return functions + options


def _walk(value: object, key: str | None = None) -> Iterator[tuple[str | None, object]]:
    """Yield a value and all values inside it, each with the key that it is under."""
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, key)


def resolve_data_files(config: JsonObject, *folders: Path) -> NewObject:
    """Return a configuration whose data files have absolute paths, each in the first of these folders that has it.

    Raises:
        TaskError: a data file is in none of the folders, or is empty.
    """
    options = config.get("dataset_kwargs")
    if not isinstance(options, Mapping) or "data_files" not in options:
        return dict(config)
    files = _resolve_paths(options["data_files"], folders, str(config["task"]))
    return {**config, "dataset_kwargs": {**options, "data_files": files}}


def _resolve_paths(files: DataFiles, folders: tuple[Path, ...], task: str) -> DataFiles:
    if isinstance(files, Mapping):
        return {split: _resolve_paths(file, folders, task) for split, file in files.items()}
    if isinstance(files, list):
        return [_resolve_paths(file, folders, task) for file in files]
    if "://" in str(files):
        return files
    for folder in folders:
        file = folder / files
        if file.is_file() and not file.stat().st_size:
            raise TaskError(f"The data of task '{task}' are empty: {file}.")
        if file.exists() or glob.glob(str(file)):
            return str(file)
    raise TaskError(
        f"The data of task '{task}' do not exist: {folders[-1] / files}.",
        "Put the file there, or name it by an absolute path under dataset_kwargs: data_files.",
    )


def has_local_data(config: JsonObject) -> bool:
    """Whether all data of a task file are local files."""
    if config.get("dataset_path") not in BUILDERS:
        return False
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return all("://" not in str(file) for _, file in _walk(files))
