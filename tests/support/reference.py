"""Tables of options for the documentation: of groups of options, of each command, and the names of everything.

To write them into the page, and the stub file of the package: ``PYTHONPATH=tests python tests/support/reference.py``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

MOST_NAMED = 4  # commands that take an option; of more, the number is told
_SECTIONS: tuple[tuple[Any, str], ...] = ((Settings, "settings"), (Execution, "execution"), (Experiment, "experiment"))


def _job_keys() -> list[str]:
    """Return the keys of job files, below the sections that hold them."""
    keys = ["warehouse", "models", "corpora"]
    for cls, section in _SECTIONS:
        for field in fields(cls):
            if field.name not in OPTIONS_ONLY:
                keys.append(f"{section}.{field.name}")
    return keys


JOB_KEYS = _job_keys()


def reference_markdown() -> str:
    """Return the tables of options: of groups, of several commands, and of each command, and the table of names."""
    own = {name: _own_rows(command) for name, command in commands().items()}
    shared = shared_rows(own.values())
    lines = ["### Groups of options", ""]
    lines += [*_table("option", "group", "key in a job file", "meaning"), *_groups(), ""]
    lines += ["### Options of several commands", ""]
    lines += [*_table("option", "meaning"), *sorted(shared.values()), ""]
    for name, command in commands().items():
        lines += _command(name, command, own[name], shared)
    lines += names_markdown()
    return "\n".join(lines).rstrip()


def _command(name: str, command: Any, own: Mapping[str, str], shared: Mapping[str, str]) -> list[str]:
    """Return the section of a command: its own options, and the names of shared ones and of groups."""
    lines = [f"### avss {name}", "", escape_markdown(command.help), ""]
    rows = []
    also = []
    for option, row in own.items():
        if shared.get(option) == row:
            also.append(f"`{option}`")
        else:
            rows.append(row)
    if rows:
        lines += [*_table("option", "meaning"), *rows, ""]
    titles = {parameter.rich_help_panel for parameter in command.params}
    groups = [title for title in dict.fromkeys(SECTIONS.values()) if title in titles]
    sentences = []
    if also:
        sentences.append(f"Also {', '.join(also)}.")
    if groups:
        sentences.append(f"Groups: {', '.join(groups)}.")
    if sentences:
        lines += [" ".join(sentences), ""]
    return lines


def _own_rows(command: Any) -> dict[str, str]:
    """Return the row of each option of a command that is in no group, by its spelling."""
    rows = {}
    for parameter in command.params:
        if parameter.rich_help_panel in (*SECTIONS.values(), COMMON):
            continue
        option = spelled_option(parameter)
        rows[option] = _row(f"`{option}`", escape_markdown(parameter.help))
    return rows


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
            named = ", ".join(takers)
            if len(takers) > MOST_NAMED:
                named = f"{len(takers)} commands"
            yield _row(f"`{name}`", named, f"`{option}`", ", ".join(keys), ", ".join(columns))


def _groups() -> Iterator[str]:
    for cls, section in _SECTIONS[:2]:
        for field in fields(cls):
            name = field.name
            key = f"{section}.{name}"
            shown_key = f"`{key}`" if key in JOB_KEYS else ""
            help = escape_markdown(option_help(cls, name))
            yield _row(f"`{option_name(name)}`", section_of(cls, name), shown_key, help)


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*["---"] * len(names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    page = DOCS / "reference" / "commands.md"
    head, mark, rest = read(page).partition("<!-- generated from the commands -->\n\n")
    _, end, after = rest.partition("<!-- end -->")
    STUB.write_text(stub())
    page.write_text(f"{head}{mark}{reference_markdown()}\n\n{end}{after}")
