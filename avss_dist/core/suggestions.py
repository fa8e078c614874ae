"""Commands that messages suggest, written so that a shell runs them as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping


def command_line(*words: object) -> str:
    """Return a command of `avss` for a shell: ``avss ls -w 'my warehouse'``."""
    return shlex.join(["avss", *map(str, words)])


def option_words(values: Mapping[str, object]) -> list[str]:
    """Return the words of options by field: ``--NAME`` or ``--no-NAME`` of a flag, else ``--NAME VALUE``.

    Args:
        values: a list has an option for each of its values.
    """
    words: list[str] = []
    for field, value in values.items():
        name = field.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            words += [f"--{name}", str(item)]
    return words
