"""Job files: many checkpoints, some corpora, one warehouse; read whole, every problem reported with its line."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from avss_dist.errors import ConfigError, ModelError, named_fields, spell_fields
from avss_dist.models.series import matching_revisions
from avss_dist.pruning.methods import Experiment
from avss_dist.runs.corpora import corpus_problems
from avss_dist.runs.job_schema import (
    EXECUTION_FIELDS,
    MODEL_FIELDS,
    SETTINGS_FIELDS,
    ExecutionSection,
    ExperimentSection,
    Job,
    ModelEntry,
    ModelKeys,
    RevisionRange,
    SettingsSection,
)
from avss_dist.settings import Execution, Settings
from avss_dist.text import RedactedURI, docs_page
from avss_dist.validation import problems_by_field
from avss_dist.yaml_files import Document, Location, YamlKind, read_yaml

__all__ = ["JobError", "JobFile", "RunSpec", "job_schema", "read_job"]

MAX_RUNS = 10_000
DISTINGUISHING = tuple(name for name in MODEL_FIELDS if name in (*SETTINGS_FIELDS, "partition", "ranks"))
"""Fields that tell two runs of one model apart."""
OPTIONS_ONLY = {"address": "avss run --address takes it.", "fresh": "avss run --fresh takes it."}

T = TypeVar("T", bound=BaseModel)


class JobError(ConfigError):
    """A job file has problems; the message has a line for each."""


_PAGE = docs_page("reference/job-files")
_KIND = YamlKind(noun="job file", hint=f"{_PAGE} explains them.", error=JobError, typed=False)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run to make: one checkpoint, one corpus, how to measure, how to spread it.

    Attributes:
        title: the model, with the settings that it alone has.
        name: what people call it, unique in a job: the title, with the corpus where a job has several.
        line: where the job file says so.
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
        warehouse: where the runs go, as the file says it.
        models, corpora: as the file says them, and their lines.
        settings, execution: what holds for all models that say nothing else.
        specs: the runs, model by model.
        experiment: what `avss run` does with every run; None where the file has no such section.
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
        """Refuse (`ConfigError`) options of an experiment where the file has none."""
        if self.experiment is None and (given := [name for name, value in options.items() if value]):
            raise ConfigError(f"`{given[0]}` is for an experiment, and {self.path} has none.", "Leave it out.")


def job_schema() -> dict[str, Any]:
    """The JSON Schema of job files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}


def read_job(path: str | Path, *, expand: bool = True) -> JobFile:
    """Read a job file.

    Args:
        expand: replace globs of folders by what they match here; a job for another machine is read without.

    Raises:
        JobError: it has problems; all of them are reported.
    """
    return _Reader(read_yaml(Path(path), _KIND), expand=expand).job()


@dataclass
class _Reader:
    """Reads a document as a job, and collects problems, each with its line, instead of stopping at the first."""

    document: Document
    expand: bool
    problems: set[tuple[int, str]] = field(default_factory=set)

    def job(self) -> JobFile:
        """The job.

        Raises:
            JobError: there are problems.
        """
        raw = self.document.value
        if not isinstance(raw, dict):
            self.report((), f"a job file is a mapping with the keys {', '.join(Job.model_fields)}")
            raise self.error()
        self.check_fields(raw)
        corpora = _texts(raw.get("corpora"))
        seen: set[str] = set()
        for index, text in corpora:
            if text in seen:
                self.report(("corpora", index), f"'{text}' is there twice")
            seen.add(text)
        settings = self.section(SettingsSection, "settings")
        execution = self.section(ExecutionSection, "execution")
        defaults = None if settings is None or execution is None else {**settings, **execution}
        made = None if defaults is None else self.together(defaults, {}, ("settings",), ("execution",))
        experiment = self.experiment()
        specs = [*islice(self.specs(raw.get("models"), corpora, defaults if made else None), MAX_RUNS + 1)]
        self.reject_duplicates(specs)
        self.require_readable(corpora, specs)
        if len(specs) > MAX_RUNS:
            self.report((), f"these are more than {MAX_RUNS:,} runs; make several jobs of them")
        if self.problems or self.document.repeated or made is None:
            raise self.error()
        models: dict[str, int] = {}
        for index, entry in enumerate(raw["models"]):
            models.setdefault(str(_name(entry)), self.document.line(("models", index)))
        return JobFile(
            path=self.document.path,
            warehouse=RedactedURI(raw["warehouse"]),
            models=models,
            corpora={RedactedURI(text): self.document.line(("corpora", index)) for index, text in corpora},
            settings=made[0],
            execution=made[1],
            specs=tuple(specs),
            experiment=experiment,
        )

    def report(self, location: Location, problem: str) -> None:
        """Note a problem once, on one line, with keys in place of fields."""
        plain = spell_fields(problem, {name: name for name in named_fields(problem)}).replace("\n", " ")
        self.problems.add((self.document.line(location), plain))

    def error(self) -> JobError:
        """All problems, in the order of their lines."""
        path = self.document.path
        lines = [f"{path}:{line}: {what}" for line, what in sorted([*self.problems, *self.document.repeated])]
        count = f"{path} has {len(lines)} problem{'s' if len(lines) > 1 else ''}; nothing was run."
        return JobError("\n".join([count, *lines]), f"The keys are explained in {_PAGE}.")

    def check_fields(self, raw: dict[str, Any]) -> None:
        """Report every key and value that is wrong on its own."""
        try:
            Job.model_validate(raw)
        except ValidationError as error:
            found = problems_by_field(Job, error, noun="key")
            unknown = [str(location[-1]) for location, problem in found.items() if "Unknown key" in problem.message]
            for location, problem in found.items():
                missing = problem.message.endswith(" is missing.")
                if missing and difflib.get_close_matches(str(location[-1]), unknown, 1, 0.6):
                    continue  # the key is there, misspelled
                self.report(location, f"{problem.message} {_hint(location, problem)}".strip())

    def section(self, cls: type[BaseModel], name: str) -> dict[str, Any] | None:
        """The fields that a section sets; None where it has problems, which `check_fields` reports."""
        made = _valid(cls, self.document.value.get(name) or {})
        return None if made is None else _given(made)

    def together(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], *locations: Location
    ) -> tuple[Settings, Execution] | None:
        """Values that are right on their own as Settings and Execution; None, and a report, if they exclude each other.

        Args:
            defaults: whose own problems are reported already.
            locations: of the mappings that have the values.
        """
        merged = {**defaults, **values}
        made: list[Any] = []
        for cls, names in ((Settings, SETTINGS_FIELDS), (Execution, EXECUTION_FIELDS)):
            try:
                made.append(cls(**{name: merged[name] for name in names if name in merged}))
            except ConfigError as error:
                for problem in error.problems:
                    keys = [(*at, name) for name in named_fields(problem.message) for at in locations if name in values]
                    known = [key for key in keys if key in self.document.lines]
                    self.report([*known, *locations][0], str(problem))
        return (made[0], made[1]) if len(made) == 2 else None

    def experiment(self) -> Experiment | None:
        """The section ``experiment``; None where there is none, or one with problems."""
        raw = self.document.value.get("experiment")
        made = _valid(ExperimentSection, raw) if raw is not None else None
        if made is None:
            return None
        try:
            return Experiment(**_given(made))
        except ConfigError as error:
            for problem in error.problems:
                self.report(("experiment",), str(problem))
        return None

    def require_readable(self, corpora: Sequence[tuple[int, str]], specs: Iterable[RunSpec]) -> None:
        """A corpus that cannot be read concerns all runs; on another machine it may be another."""
        wanted = {spec.settings.chat_template for spec in specs}
        for index, error in corpus_problems([text for _, text in corpora], wanted) if self.expand else ():
            self.report(("corpora",) if index is None else ("corpora", corpora[index][0]), str(error))

    def specs(
        self, models: Any, corpora: Sequence[tuple[int, str]], defaults: dict[str, Any] | None
    ) -> Iterator[RunSpec]:
        """The runs of every entry of ``models`` that is right, with the defaults of the file.

        Args:
            defaults: the values of ``settings`` and ``execution``; None where they have problems.
        """
        for index, raw in enumerate(models if isinstance(models, list) else []):
            at: Location = ("models", index)
            entry = _valid(ModelEntry, {"model": raw} if isinstance(raw, str) else raw)
            names = self.checkpoints(raw, entry, at)
            if entry is None or defaults is None:
                continue
            own = {name: value for name, value in _given(entry).items() if name in MODEL_FIELDS}
            if made := self.together(own, defaults, at):
                alone = _describe({k: v for k, v in own.items() if k in DISTINGUISHING and v != defaults.get(k)})
                titles = {name: f"{name} ({alone})" if alone else name for name in names}
                yield from _each(titles, [text for _, text in corpora], *made, self.document.line(at))

    def checkpoints(self, raw: Any, entry: ModelKeys | None, at: Location) -> list[str]:
        """What an entry of ``models`` stands for: revisions, the folders that a glob matches here, or its name."""
        name = _name(raw)
        if name is None:
            return []
        if isinstance(raw, dict) and "revisions" in raw:
            if Path(name).expanduser().exists() or glob.has_magic(name):
                where: Location = (*at, "revisions")
                self.report(where, f"'{name}' is a folder or a file; only a hub id has revisions")
            return [f"{name}@{revision}" for revision in self.revisions(name, entry, at)]
        if not (self.expand and glob.has_magic(name)):
            return [name]
        matches = glob.glob(str(Path(name).expanduser()), recursive=True)
        folders = sorted(m for m in matches if Path(m).is_dir() or m.endswith(".gguf"))
        if not folders:
            self.report(at, f"no folder matches '{name}' (relative paths start in {Path.cwd()})")
        return folders

    def revisions(self, name: str, entry: ModelKeys | None, at: Location) -> Iterator[str]:
        """Those of a hub id that an entry lists; the hub knows which of them a pattern means."""
        for index, revision in enumerate((entry.revisions or ()) if entry else ()):
            if isinstance(revision, RevisionRange):
                yield from revision.names()
            elif self.expand and glob.has_magic(revision):
                try:
                    yield from matching_revisions(name, revision)
                except ModelError as error:
                    self.report((*at, "revisions", index), str(error))
            else:
                yield revision

    def reject_duplicates(self, specs: Iterable[RunSpec]) -> None:
        """The same run twice is a problem."""
        lines: dict[Any, int] = {}
        for spec in specs:
            ranks = (spec.execution.partition, spec.execution.ranks) if spec.execution.ranks else None
            first = lines.setdefault((spec.model, spec.corpus, spec.settings, ranks), spec.line)
            if first != spec.line:
                what = f"'{spec.model}' is there twice with the same settings, first in line {first}"
                self.problems.add((spec.line, what))


def _hint(location: Location, problem: ConfigError) -> str:
    if location[0] == "execution" and location[-1] in OPTIONS_ONLY:
        return OPTIONS_ONLY[str(location[-1])]
    hint = problem.hint or ""
    return hint.partition(" Valid:")[0] if "Unknown key" in problem.message else hint


def _each(
    titles: Mapping[str, str], corpora: Sequence[str], settings: Settings, execution: Execution, line: int
) -> Iterator[RunSpec]:
    """The runs of models, by name with their titles, on every corpus."""
    for model, title in titles.items():
        for corpus in corpora:
            yield RunSpec(
                model=model,
                corpus=corpus,
                settings=settings,
                execution=execution,
                title=title,
                name=f"{title} on {RedactedURI(corpus)}" if len(corpora) > 1 else title,
                line=line,
            )


def _valid(cls: type[T], raw: Any) -> T | None:
    try:
        return cls.model_validate(raw)
    except ValidationError:
        return None


def _given(made: BaseModel) -> dict[str, Any]:
    """The fields that were set, by name, in the order of the class."""
    return {name: getattr(made, name) for name in type(made).model_fields if name in made.model_fields_set}


def _texts(raw: Any) -> list[tuple[int, str]]:
    """The texts of a list, and their indices."""
    return [(index, text) for index, text in enumerate(raw if isinstance(raw, list) else []) if isinstance(text, str)]


def _name(raw: Any) -> str | None:
    name = raw.get("model") if isinstance(raw, dict) else raw
    return name if isinstance(name, str) else None


def _describe(options: Mapping[str, Any]) -> str:
    """Options for people: ``dtype float32, sites block mlp``."""
    words = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in options.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items())
