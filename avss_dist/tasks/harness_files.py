"""Task files of lm-evaluation-harness: YAML, read without running any code that it names."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from avss_dist.core.errors import TaskError
from avss_dist.core.yaml_files import YamlKind, read_yaml

BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # builders of `datasets` that read local files


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
    config = _read(path, ())
    if not isinstance(config.get("task"), str):
        raise TaskError(f"{path} names no single task.", "Write `task: NAME`; give the tasks of a group one by one.")
    return config


def _read(path: Path, including: tuple[Path, ...]) -> dict[Any, Any]:
    if path.exists() and not path.is_file():
        raise TaskError(f"{path} is not a file.", "Name a task file, which ends in .yaml.")
    if not path.exists():
        raise TaskError(f"There is no task file {path}.", "A relative path starts in the working directory.")
    document = read_yaml(path, _KIND)
    values = document.require_valid(document.value)
    config: dict[Any, Any] = {}
    for name in _included(values, path):
        included = path.parent / name
        if not included.is_file():
            where = f"{path}:{document.line(('include',))}"
            raise TaskError(
                f"{where}: key 'include' names {included}, which is not a file.",
                "A relative path starts beside the file that includes it.",
            )
        if included.resolve() in including:
            raise TaskError(f"{included} includes itself.", f"Take it out of the key 'include' of {path}.")
        config |= _read(included, (*including, path.resolve()))
    return config | {key: value for key, value in values.items() if key != "include"}


def files_of(path: Path) -> list[Path]:
    """Return a task file, the files it includes, the modules of its functions, and its data files and folders.

    Each path is spelled so that it is found from the working directory. Data at a URI or on the hub are left out.

    Raises:
        TaskError: as `read_task_file` and `resolve_data_files`.
    """
    config = resolve_data_files(read_task_file(path), Path(), path.parent)
    data = config.get("dataset_kwargs") or {}
    names = [name for _, name in _walk(data.get("data_files")) if isinstance(name, str) and "://" not in name]
    files = [Path(match) for name in names for match in sorted(glob.glob(glob.escape(name)) or glob.glob(name))]
    for folder in (config.get("dataset_path"), data.get("data_dir")):
        if isinstance(folder, str) and folder not in BUILDERS:
            files += [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    return [*_with_included(path), *files]


def _with_included(path: Path) -> Iterator[Path]:
    """Yield a task file, the modules of its functions, and the same of the files it includes."""
    yield path
    values = read_yaml(path, _KIND).value
    for module in {value.rpartition(".")[0] for _, value in _walk(values) if isinstance(value, Function)}:
        if (code := path.parent / f"{module}.py").is_file():
            yield code
    for file in _included(values, path):
        yield from _with_included(path.parent / file)


def _included(values: Mapping[Any, Any], path: Path) -> list[str]:
    files = values.get("include", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise TaskError(f"{path}: key 'include' must be the name of a file, or a list of them, not {files!r}.")
    return files


def code_entries(config: Mapping[str, Any]) -> list[str]:
    """Return the entries of a task file that run Python code of its author or of a hub."""
    named = []
    for key, value in _walk(config):
        if isinstance(value, Function):
            named.append(f"!function {value}")
        elif key in ("trust_remote_code", "hf_evaluate") and value:
            named.append(f"{key}: {value}")
    return named


def _walk(value: Any, key: str | None = None) -> Iterator[tuple[str | None, Any]]:
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, key)


def resolve_data_files(config: Mapping[str, Any], *folders: Path) -> dict[str, Any]:
    """Return a configuration whose data files have absolute paths, each in the first of these folders that has it.

    Raises:
        TaskError: a data file is in none of the folders, or is empty.
    """
    options = config.get("dataset_kwargs") or {}
    if not isinstance(options, Mapping):
        return dict(config)  # which the harness refuses
    options = dict(options)
    if "data_files" in options:
        options["data_files"] = _resolve_paths(options["data_files"], folders, str(config["task"]))
    return {**config, "dataset_kwargs": options} if options else dict(config)


def _resolve_paths(files: Any, folders: tuple[Path, ...], task: str) -> Any:
    if isinstance(files, Mapping):
        return {split: _resolve_paths(file, folders, task) for split, file in files.items()}
    if isinstance(files, list):
        return [_resolve_paths(file, folders, task) for file in files]
    if "://" in str(files):
        return files
    for file in (folder / files for folder in folders):
        if file.is_file() and not file.stat().st_size:
            raise TaskError(f"The data of task '{task}' are empty: {file}.")
        if file.exists() or glob.glob(str(file)):
            return str(file)
    raise TaskError(
        f"The data of task '{task}' do not exist: {folders[-1] / files}.",
        "Put the file there, or name it by an absolute path under dataset_kwargs: data_files.",
    )


def has_local_data(config: Mapping[str, Any]) -> bool:
    """Whether all data of a task file are local files."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return config.get("dataset_path") in BUILDERS and not any("://" in str(file) for _, file in _walk(files))
