"""Job files: many checkpoints, some corpora, one warehouse. Every problem is reported with its line."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from avss_dist.core.errors import ConfigError, ModelError, named_fields, spell_fields
from avss_dist.core.settings import Execution, Settings, split_options
from avss_dist.core.text import RedactedURI, docs_page
from avss_dist.core.validation import problems_by_field
from avss_dist.core.yaml_files import Document, Location, YamlKind, read_yaml
from avss_dist.models.series import matching_revisions
from avss_dist.pruning.methods import Experiment
from avss_dist.runs.corpora import corpus_problems
from avss_dist.runs.job_schema import MODEL_FIELDS, SETTINGS_FIELDS, Job, ModelKeys, RevisionRange, given

__all__ = ["JobError", "JobFile", "RunSpec", "job_schema", "read_job"]

MAX_RUNS = 10_000
DISTINGUISHING = tuple(name for name in MODEL_FIELDS if name in (*SETTINGS_FIELDS, "partition", "ranks"))
"""Fields that tell two runs of one model apart."""
T = TypeVar("T")
OPTIONS_ONLY = {"address": "Use avss run --address.", "fresh": "Use avss run --fresh."}


class JobError(ConfigError):
    """A job file has problems. The message has a line for each."""


_PAGE = docs_page("reference/job-files")
_KIND = YamlKind(noun="job file", hint=f"See {_PAGE}.", error=JobError, typed=False)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Specification of a run: one checkpoint, one corpus, settings and execution.

    Attributes:
        title: the model, with the settings that differ from the defaults of the job.
        name: unique name in a job: the title, with the corpus if the job has several.
        line: line of the job file.
    """

    model: str
    corpus: str
    settings: Settings
    execution: Execution
    title: str
    name: str
    line: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpus", RedactedURI(self.corpus))


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A job: the runs of every model on every corpus.

    Attributes:
        path: the file.
        warehouse: warehouse of the runs, as the file has it.
        models, corpora: names in the file, and their lines.
        settings, execution: defaults for all models.
        specs: the runs, model by model.
        experiment: experiment with every run; None without such a section.
    """

    path: Path
    warehouse: str
    models: Mapping[str, int]
    corpora: Mapping[str, int]
    settings: Settings
    execution: Execution
    specs: tuple[RunSpec, ...]
    experiment: Experiment | None = None

    def refuse_unused(self, **options: bool) -> None:
        """Raise ConfigError for options of an experiment if the file has none."""
        if self.experiment is None and (named := [name for name, value in options.items() if value]):
            raise ConfigError(f"`{named[0]}` applies to an experiment; {self.path} has none.", "Leave it out.")


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema of job files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}


def read_job(path: str | Path, *, expand: bool = True) -> JobFile:
    """Read a job file.

    Args:
        expand: replace globs of folders by their matches on this machine. Set it to False for a job of another machine.

    Raises:
        JobError: the file has problems. All of them are reported.
    """
    return _Reader(read_yaml(Path(path), _KIND), expand=expand).job()


@dataclass
class _Reader:
    """Reader of a document as a job. It collects problems, each with its line, instead of stopping at the first."""

    document: Document
    expand: bool
    problems: set[tuple[int, str]] = field(default_factory=set)

    def job(self) -> JobFile:
        """Return the job.

        Raises:
            JobError: there are problems.
        """
        job, corpora = self.validated(), self.corpora()
        names = [self.checkpoints(entry, ("models", index)) for index, entry in enumerate(self.listed("models"))]
        defaults = {**given(job.settings), **given(job.execution)} if job else {}
        common = self.attempt(_settings, defaults, defaults, ("settings",), ("execution",)) if job else None
        specs = [*islice(self.specs(job, defaults, names), MAX_RUNS + 1)] if common else []
        self.reject_duplicates(specs)
        self.require_readable(corpora, {spec.settings.chat_template for spec in specs})
        wanted = given(job.experiment) if job else {}
        experiment = self.attempt(Experiment, wanted, wanted, ("experiment",)) if wanted else None
        if self.problems or self.document.repeated or job is None or common is None:
            raise self.error()
        models: dict[str, int] = {}
        for index, entry in enumerate(job.models):
            models.setdefault(entry.model, self.document.line(("models", index)))
        return JobFile(
            path=self.document.path,
            warehouse=RedactedURI(job.warehouse),
            models=models,
            corpora={RedactedURI(text): self.document.line(("corpora", index)) for text, index in corpora.items()},
            settings=common[0],
            execution=common[1],
            specs=tuple(specs),
            experiment=experiment,
        )

    def corpora(self) -> dict[str, int]:
        """Return the index of each text of ``corpora``. A text that is named twice is a problem."""
        texts: dict[str, int] = {}
        for index, text in enumerate(self.listed("corpora")):
            if isinstance(text, str) and texts.setdefault(text, index) != index:
                self.report(("corpora", index), f"'{text}' is named twice")
        return texts

    def require_readable(self, corpora: Mapping[str, int], chat_templates: set[bool]) -> None:
        """Report the corpora that cannot be read. Those of a job for another machine are not checked."""
        for number, error in corpus_problems([*corpora], chat_templates) if self.expand else ():
            self.report(("corpora",) if number is None else ("corpora", [*corpora.values()][number]), str(error))

    def listed(self, key: str) -> list[Any]:
        """Return the values of a list of the file, unchecked."""
        raw = self.document.value
        values = raw.get(key) if isinstance(raw, dict) else None
        return values if isinstance(values, list) else []

    def report(self, location: Location, problem: str) -> None:
        """Note a problem once, on one line, with keys in place of fields."""
        plain = spell_fields(problem, {name: name for name in named_fields(problem)}).replace("\n", " ")
        self.problems.add((self.document.line(location), plain))

    def error(self) -> JobError:
        """Return all problems as one error, in the order of their lines."""
        path = self.document.path
        lines = [f"{path}:{line}: {what}" for line, what in sorted([*self.problems, *self.document.repeated])]
        count = f"{path} has {len(lines)} problem{'s' if len(lines) > 1 else ''}; nothing was run."
        return JobError("\n".join([count, *lines]), f"The keys are explained in {_PAGE}.")

    def validated(self) -> Any:
        """Return the file as a `Job`; report invalid keys and values, and return None, if there are any."""
        try:
            return Job.model_validate(self.document.value)
        except ValidationError as error:
            problems = problems_by_field(Job, error, noun="key")
        if () in problems:
            self.report((), f"a job file is a mapping with the keys {', '.join(Job.model_fields)}")
            return None
        unknown = [str(location[-1]) for location, problem in problems.items() if "Unknown key" in problem.message]
        for location, problem in problems.items():
            missing = problem.message.endswith(" is missing.")
            if missing and difflib.get_close_matches(str(location[-1]), unknown, 1, 0.6):
                continue  # the key is there, misspelled
            self.report(location, f"{problem.message} {_hint(location, problem)}".strip())
        return None

    def attempt(
        self, make: Callable[..., T], values: Mapping[str, Any], explicit: Mapping[str, Any], *locations: Location
    ) -> T | None:
        """Call ``make`` with valid values; report, and return None, if they are mutually exclusive.

        Args:
            values: all values, with defaults. Problems of single values are reported already.
            explicit: values that the mappings at the locations have.
        """
        try:
            return make(**values)
        except ConfigError as error:
            for problem in error.problems:
                keys = [(*at, name) for name in named_fields(problem.message) for at in locations if name in explicit]
                known = [key for key in keys if key in self.document.lines]
                self.report([*known, *locations][0], str(problem))
        return None

    def specs(self, job: Any, defaults: Mapping[str, Any], names: Sequence[Sequence[str]]) -> Iterator[RunSpec]:
        """Yield the runs of every model on every corpus.

        Args:
            defaults: the values of ``settings`` and ``execution``.
            names: the checkpoints of each entry of ``models``.
        """
        for index, entry in enumerate(job.models):
            at = ("models", index)
            overrides = {name: value for name, value in given(entry).items() if name in MODEL_FIELDS}
            if (pair := self.attempt(_settings, {**defaults, **overrides}, overrides, at)) is None:
                continue
            settings, execution = pair
            difference = _describe({k: v for k, v in overrides.items() if k in DISTINGUISHING and v != defaults.get(k)})
            for name, corpus in product(names[index], job.corpora):
                title = f"{name} ({difference})" if difference else name
                yield RunSpec(
                    model=name,
                    corpus=corpus,
                    settings=settings,
                    execution=execution,
                    title=title,
                    name=f"{title} on {RedactedURI(corpus)}" if len(job.corpora) > 1 else title,
                    line=self.document.line(at),
                )

    def checkpoints(self, raw: Any, at: Location) -> list[str]:
        """Return the checkpoints of an entry of ``models``: its revisions, the folders of a glob, or its name."""
        name = raw.get("model") if isinstance(raw, dict) else raw
        if not isinstance(name, str):
            return []
        if isinstance(raw, dict) and "revisions" in raw:
            if Path(name).expanduser().exists() or glob.has_magic(name):
                where: Location = (*at, "revisions")
                self.report(where, f"'{name}' is a folder or a file; only a hub id has revisions")
            return [f"{name}@{revision}" for revision in self.revisions(name, raw, at)]
        if not (self.expand and glob.has_magic(name)):
            return [name]
        matches = glob.glob(str(Path(name).expanduser()), recursive=True)
        folders = sorted(m for m in matches if Path(m).is_dir() or m.endswith(".gguf"))
        if not folders:
            self.report(at, f"no folder matches '{name}' (relative paths start in {Path.cwd()})")
        return folders

    def revisions(self, name: str, raw: dict[str, Any], at: Location) -> Iterator[str]:
        """Yield the revisions of a hub id that an entry lists. The hub is queried for patterns."""
        try:
            listed = ModelKeys(model=name, revisions=raw["revisions"]).revisions or ()
        except ValidationError:  # which is reported of the whole file
            return
        for index, revision in enumerate(listed):
            if isinstance(revision, RevisionRange):
                yield from revision.names()
            elif self.expand and glob.has_magic(revision):
                try:
                    yield from matching_revisions(name, revision)
                except ModelError as error:
                    self.report((*at, "revisions", index), str(error))
            else:
                yield revision

    def reject_duplicates(self, specs: Sequence[RunSpec]) -> None:
        """Report repeated runs, and too many runs."""
        if len(specs) > MAX_RUNS:
            self.report((), f"more than {MAX_RUNS:,} runs; split them into several jobs")
        lines: dict[Any, int] = {}
        for spec in specs:
            ranks = (spec.execution.partition, spec.execution.ranks) if spec.execution.ranks else None
            first = lines.setdefault((spec.model, spec.corpus, spec.settings, ranks), spec.line)
            if first != spec.line:
                what = f"'{spec.model}' is named twice with the same settings, first in line {first}"
                self.problems.add((spec.line, what))


def _settings(**values: Any) -> tuple[Settings, Execution]:
    return split_options(values)


def _hint(location: Location, problem: ConfigError) -> str:
    if location[0] == "execution" and location[-1] in OPTIONS_ONLY:
        return OPTIONS_ONLY[str(location[-1])]
    hint = problem.hint or ""
    return hint.partition(" Valid:")[0] if "Unknown key" in problem.message else hint


def _describe(options: Mapping[str, Any]) -> str:
    """Return options as text: ``dtype float32, sites block mlp``."""
    words = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in options.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items())
