"""Local files that a task needs, by the task's name."""

from __future__ import annotations

import os
from pathlib import Path

from avss_dist.core.names import PERPLEXITY, TRUTHFULQA
from avss_dist.corpus.sources import local_files
from avss_dist.tasks.harness_files import files_of, is_task_file


def task_files(name: str) -> list[str]:
    """Return the files that a task names by relative paths: texts, questions, or a task file with its data.

    A task that lm-evaluation-harness knows by its name needs none.

    Raises:
        CorpusError: a text has an unknown format, or does not exist.
        TaskError: a task file or its data cannot be read.
    """
    if name.startswith(PERPLEXITY):
        return local_files(name.removeprefix(PERPLEXITY))
    if name.startswith(TRUTHFULQA):
        return local_files(name)
    if not is_task_file(name) or _is_absolute(name):
        return []
    return [str(file) for file in files_of(Path(name)) if not _is_absolute(str(file))]


def _is_absolute(path: str) -> bool:
    return os.path.isabs(os.path.expanduser(path))
