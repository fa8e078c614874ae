"""Tables of options for the documentation: of groups of options, of each command, and the names of everything.

To write them into the page, and the stub file of the package: ``PYTHONPATH=tests python tests/support/reference.py``
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from avss_dist.analysis.experiment_choices import Experiment
from avss_dist.cli.options import COMMON, SECTIONS, option_help, option_name, section_of, spelled_option
from avss_dist.core.settings import Settings
from avss_dist.core.text import escape_markdown
from avss_dist.partition.execution import Execution
from avss_dist.reports.terminal.schema import shared_rows
from avss_dist.runs.job_file import OPTIONS_ONLY
from avss_dist.warehouse.schema import SCHEMAS
from support.command_line import commands
from support.documentation import DOCS, read
from support.stubs import STUB, stub

_SECTIONS: tuple[tuple[Any, str], ...] = ((Settings, "settings"), (Execution, "execution"), (Experiment, "experiment"))
JOB_KEYS = (
    *("warehouse", "models", "corpora"),
    *(f"{section}.{f.name}" for cls, section in _SECTIONS for f in fields(cls) if f.name not in OPTIONS_ONLY),
)
"""Keys of job files, below the sections that hold them."""


def reference_markdown() -> str:
    """Return the tables of options: of groups, of several commands, and of each command, and the table of names."""
    own = {name: _own_rows(command) for name, command in commands().items()}
    shared = shared_rows(own.values())
    lines = ["### Groups of options", "", *_table("option", "group", "key in a job file", "meaning"), *_groups(), ""]
    lines += ["### Options of several commands", "", *_table("option", "meaning"), *sorted(shared.values()), ""]
    for name, command in commands().items():
        rows = [row for option, row in own[name].items() if shared.get(option) != row]
        also = [f"`{option}`" for option, row in own[name].items() if shared.get(option) == row]
        lines += [f"### avss {name}", "", escape_markdown(command.help), ""]
        lines += [*_table("option", "meaning"), *rows, ""] if rows else []
        titles = {parameter.rich_help_panel for parameter in command.params}
        groups = [title for title in dict.fromkeys(SECTIONS.values()) if title in titles]
        sentences = [f"Also {', '.join(also)}."] if also else []
        sentences += [f"Groups: {', '.join(groups)}."] if groups else []
        lines += [" ".join(sentences), ""] if sentences else []
    return "\n".join([*lines, *names_markdown()]).rstrip()


def _own_rows(command: Any) -> dict[str, str]:
    """Return the row of each option of a command that is in no group, by its spelling."""
    parameters = [p for p in command.params if p.rich_help_panel not in (*SECTIONS.values(), COMMON)]
    return {spelled_option(p): _row(f"`{spelled_option(p)}`", escape_markdown(p.help)) for p in parameters}


def names_markdown() -> Iterator[str]:
    """Yield the table of names that options, keywords, keys of job files and columns share."""
    yield from ("### Names", "", "What means one thing has one name everywhere.", "")
    yield from _table("name", "commands", "option", "keys in a job file", "columns")
    taking: dict[tuple[str, str], list[str]] = {}
    for command, built in commands().items():
        for parameter in built.params:
            taking.setdefault((parameter.name, spelled_option(parameter)), []).append(command)
    for (name, option), takers in sorted(taking.items()):
        columns = [f"`{table}.{name}`" for table, schema in SCHEMAS.items() if name in schema.names]
        keys = [f"`{key}`" for key in JOB_KEYS if key.rpartition(".")[2] == name]
        if keys or columns:
            named = ", ".join(takers) if len(takers) < 5 else f"{len(takers)} commands"
            yield _row(f"`{name}`", named, f"`{option}`", ", ".join(keys), ", ".join(columns))


def _groups() -> Iterator[str]:
    for cls, section in _SECTIONS[:2]:
        for field in fields(cls):
            key = f"`{section}.{field.name}`" if f"{section}.{field.name}" in JOB_KEYS else ""
            help = escape_markdown(option_help(cls, field.name))
            yield _row(f"`{option_name(field.name)}`", section_of(cls, field.name), key, help)


def _table(*names: str) -> Iterator[str]:
    yield from (_row(*names), _row(*["---"] * len(names)))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    page = DOCS / "reference" / "commands.md"
    head, mark, rest = read(page).partition("<!-- generated from the commands -->\n\n")
    STUB.write_text(stub())
    page.write_text(f"{head}{mark}{reference_markdown()}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}")
