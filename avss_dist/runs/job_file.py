"""Job files: many checkpoints, some corpora, one warehouse. Every problem is reported with its line."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, create_model, model_validator
from pydantic_core import PydanticCustomError

from avss_dist.analysis.experiment_choices import Experiment
from avss_dist.core.errors import AvssError, ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI, basename, docs_page
from avss_dist.core.validation import Location, check
from avss_dist.core.values import NewObject
from avss_dist.core.yaml_files import Document, YamlKind, read_yaml
from avss_dist.corpus.seen import SELF
from avss_dist.corpus.sources import corpus_problems, require_files
from avss_dist.models.checkpoint.locate import list_revisions, matching_revisions
from avss_dist.models.checkpoint.training import TrainingPoint, explain_no_step
from avss_dist.partition.execution import Execution
from avss_dist.pruning.repair.registry import split_weight
from avss_dist.runs.job_series import (
    RevisionRange,
    Section,
    SeedGroup,
    describe_notes,
    has_pattern,
    is_same_place,
    missing_points,
    nearest_revisions,
    place_in_training,
    require_names,
    require_range,
    seed_pattern,
)
from avss_dist.tasks.harness_files import require_task

OVERRIDES: dict[str, type[Settings] | type[Execution]] = {
    **dict.fromkeys([field.name for field in fields(Settings) if field.name != "device"], Settings),
    **dict.fromkeys(["partition", "ranks", "gpus_per_replica", "max_memory"], Execution),
}
"""Class of each field that an entry of ``models`` can override, by the field's name."""
OPTIONS_ONLY = {"address": "Use avss run --address.", "fresh": "Use avss run --fresh."}
"""Hints for fields of `Execution` that are no keys of job files."""

Text = Annotated[str, Field(min_length=1)]


Revision = Annotated[
    Annotated[Text, Tag("text")] | Annotated[RevisionRange, check(require_range), Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, (dict, RevisionRange)) else "text"),
]


def _as_list(value: object) -> object:
    """Return a single range as a list."""
    return [value] if isinstance(value, dict) else value


Revisions = Annotated[list[Revision], Field(min_length=1)]
RevisionsOrRange = Annotated[Revisions, BeforeValidator(_as_list, json_schema_input_type=RevisionRange | Revisions)]


def _problem(message: str, hint: str) -> PydanticCustomError:
    """Return an error of an entry that pydantic collects with those of others."""
    return PydanticCustomError("problems", "{problems}", {"problems": [ConfigError(message, hint)]})


class ModelKeys(Section):
    """Entry of ``models`` without the settings that it overrides."""

    model: Text = ""
    """Hub id (org/name@revision), folder, .gguf file, or a glob of folders."""
    seeds: SeedGroup | None = None
    """Instead of model: trainings that differ in the seed alone, {model: "org/name-seed{}", values: 1..9}."""
    revisions: RevisionsOrRange | None = None
    """Revisions of a hub id: names, patterns (stage1-step*), ranges {prefix: step, from: 0, to: 3000, step: 1000}.

    A range with ``factor: 2`` or ``per_decade: 4`` in place of ``step`` is evenly spaced on a log scale. Each of its
    points is the nearest revision that exists.
    """
    names: Annotated[Text, check(require_names)] = ""
    """Pattern of names that are not understood: run-{seed}/at-{step}-*, with {step}, {tokens} and {seed}."""

    @model_validator(mode="after")
    def _require_model(self) -> ModelKeys:
        """Refuse an entry without a name, or with a name and seeds."""
        if self.model and self.seeds is not None:
            raise _problem("`model` and `seeds` exclude each other.", "Give one of them.")
        if not self.model and self.seeds is None:
            raise _problem("`model` or `seeds` must be given.", "Name a model, or a group of seeds.")
        return self

    def named_models(self) -> list[str]:
        """Return the name of the model, or of the model of each seed."""
        if self.seeds is not None:
            return self.seeds.models()
        return [self.model]

    def patterns(self) -> tuple[str, ...]:
        """Return the patterns of names that tell step, tokens and seed."""
        patterns = []
        if self.seeds is not None:
            patterns.append(seed_pattern(self.seeds.model))
        if self.names:
            patterns.append(self.names)
        return tuple(patterns)


_OVERRIDDEN: dict[str, Any] = dict.fromkeys(OVERRIDES, (Any, None))  # checked together with the settings of the job
ModelEntry: type[ModelKeys] = create_model("ModelEntry", __base__=ModelKeys, **_OVERRIDDEN)


def _as_entry(value: object) -> object:
    """Return the long form of an entry of ``models``."""
    return {"model": value} if isinstance(value, str) else value


Model: Any = Annotated[ModelEntry, BeforeValidator(_as_entry, json_schema_input_type=str | ModelEntry)]


class Job(Section):
    """A job: the runs of every model on every corpus."""

    warehouse: Text
    """A folder, or an s3://, gs://, hdfs:// URI."""
    models: Annotated[list[Model], Field(min_length=1)]
    """Names, or mappings of a model and the settings that it overrides."""
    corpora: Annotated[list[Text], Field(min_length=1)]
    """Corpora, as for --corpus: file.txt, file.jsonl[:field], hf:NAME, wikitext2, builtin:pydoc."""
    settings: Settings | None = None
    """Settings of the measurement."""
    execution: Execution | None = None
    """Execution: workers, devices and placement."""
    experiment: Experiment | None = None
    """Experiment with every run: choices of layers that are evaluated."""


def job_schema() -> NewObject:
    """Return the JSON Schema of job files, for editors."""
    schema = Job.model_json_schema()
    classes = schema["$defs"]
    for name in OPTIONS_ONLY:
        del classes[Execution.__name__]["properties"][name]
    entry = classes[ModelEntry.__name__]
    entry["oneOf"] = [{"required": ["model"]}, {"required": ["seeds"]}]
    for name, overridden in OVERRIDES.items():
        entry["properties"][name] = classes[overridden.__name__]["properties"][name]
    for section in (Settings, Execution, Experiment):
        del classes[section.__name__]["description"]  # it is about Python
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


MAX_RUNS = 10_000
NAMES_AN_EPOCH = "this name has an epoch, which is not a step: it is on no curve along steps. names may tell its step."
T = TypeVar("T", dict[str, object], list[object])
DISTINGUISHING = tuple(name for name, cls in OVERRIDES.items() if cls is Settings or name in ("partition", "ranks"))
"""Fields that tell two runs of one model apart."""


_KIND = YamlKind(
    noun="job file",
    hint=f"The keys are explained in {docs_page('reference/commands')}.",
    error=ConfigError,
    typed=False,
)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Specification of a run: one checkpoint, one corpus, settings and execution.

    Attributes:
        title: the model, with the settings that differ from the defaults of the job.
        name: unique name in a job: the title, with the corpus if the job has several.
        line: line of the job file.
        names: patterns of names that tell step, tokens and seed (`training.compile_names`).
    """

    model: str
    corpus: str
    settings: Settings
    execution: Execution
    title: str
    name: str
    line: int = 0
    names: tuple[str, ...] = ()

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
        notes: sentences about checkpoints that are not those that the file asks for.
        watched: runs whose model is a glob of folders, if the file was read for a watch.
    """

    path: Path
    warehouse: str
    models: Mapping[str, int]
    corpora: Mapping[str, int]
    settings: Settings
    execution: Execution
    specs: tuple[RunSpec, ...]
    experiment: Experiment | None = None
    notes: tuple[str, ...] = ()
    watched: tuple[RunSpec, ...] = ()

    def require_watched(self) -> None:
        """Raise ConfigError if the file was not read for a watch."""
        if not self.watched:
            raise ConfigError(
                f"{self.path} was not read for a watch.", "Name the file, or use read_job(..., watch=True)."
            )

    def refuse_unused(self, **options: bool) -> None:
        """Raise ConfigError for options of an experiment if the file has none."""
        names = [name for name, value in options.items() if value]
        if names and self.experiment is None:
            raise ConfigError(f"`{names[0]}` applies to an experiment; {self.path} has none.", "Leave it out.")


def read_job(path: str | Path, *, expand: bool = True, watch: bool = False) -> JobFile:
    """Read a job file.

    Args:
        expand: replace globs of folders by their matches on this machine. Set it to False for a job of another machine.
        watch: keep globs of folders for a watch; require one, and no experiment.

    Raises:
        ConfigError: the file has problems. All of them are reported, each with its line.
    """
    return _Reader(read_yaml(Path(path), _KIND), expand=expand, watch=watch).job()


@dataclass
class _Reader:
    """Reader of a document as a job. It adds problems to the document instead of stopping at the first.

    Attributes:
        watch: whether globs of folders are kept for a watch.
        notes: models that a note is about, by the note.
    """

    document: Document
    expand: bool
    watch: bool = False
    notes: dict[str, list[str]] = field(default_factory=dict)

    def job(self) -> JobFile:
        """Return the job.

        Raises:
            ConfigError: there are problems.
        """
        document = self.document
        job = document.parse(Job, document.value)
        for name in OPTIONS_ONLY.keys() & self.unchecked("execution", dict):
            document.report(("execution", name), f"Unknown key '{name}'. {OPTIONS_ONLY[name]}")
        corpora = self.corpora()
        specs = [*islice(self.specs([*corpora]), MAX_RUNS + 1)]
        if len(specs) > MAX_RUNS:
            document.report((), f"more than {MAX_RUNS:,} runs; split them into several jobs")
        self.check_repeated(specs)
        watched: list[RunSpec] = []
        if self.watch:
            watched = [spec for spec in specs if glob.has_magic(spec.model)]
            specs = [spec for spec in specs if not glob.has_magic(spec.model)]
            self.check_watch(watched)
        if self.expand:
            self.check_trainings(specs)
            self.check_corpora(corpora, [*specs, *watched])
            if job and job.experiment:
                self.check_experiment(job.experiment)
        job = document.require_valid(job)
        models: dict[str, int] = {}
        for index, entry in enumerate(job.models):
            for name in entry.named_models():
                models.setdefault(name, document.line(("models", index)))
        return JobFile(
            path=document.path,
            warehouse=RedactedURI(job.warehouse),
            models=models,
            corpora={RedactedURI(text): document.line(("corpora", index)) for text, index in corpora.items()},
            settings=job.settings or Settings(),
            execution=job.execution or Execution(),
            specs=tuple(specs),
            experiment=job.experiment,
            notes=tuple(describe_notes(self.notes)),
            watched=tuple(watched),
        )

    def check_watch(self, watched: Sequence[RunSpec]) -> None:
        """Report a job that cannot be watched: one with an experiment, or without a glob of folders."""
        if not watched and not self.document.problems:
            self.document.report(("models",), "no glob of folders to watch, such as /data/run7/checkpoint-*")
        for spec in watched:
            if spec.model.endswith(".gguf"):
                self.document.problems.add((spec.line, "folders are watched, and no .gguf files"))
        if "experiment" in self.document.value:
            problem = (
                "an experiment needs all of its models; leave it out while a training is watched, and run it after"
            )
            self.document.report(("experiment",), problem)

    def corpora(self) -> dict[str, int]:
        """Return the place of each text in the list of corpora. Report those that are named twice."""
        corpora: dict[str, int] = {}
        for index, text in enumerate(self.unchecked("corpora", list)):
            if not isinstance(text, str):
                continue
            if text in corpora:
                self.document.report(("corpora", index), f"'{text}' is named twice")
            else:
                corpora[text] = index
        return corpora

    def check_repeated(self, specs: Sequence[RunSpec]) -> None:
        """Report runs that are in the file twice."""
        lines: dict[tuple[object, ...], int] = {}
        for spec in specs:
            ranks = None
            if spec.execution.ranks:
                ranks = (spec.execution.partition, spec.execution.ranks)
            first_line = lines.setdefault((spec.model, spec.corpus, spec.settings, ranks), spec.line)
            if first_line != spec.line:
                repeated = f"'{spec.model}' is named twice with the same settings, first in line {first_line}"
                self.document.problems.add((spec.line, repeated))

    def check_trainings(self, specs: Sequence[RunSpec]) -> None:
        """Report checkpoints that are at the same point of a training. Note those whose point is not known."""
        points: dict[str, TrainingPoint] = {}
        model_of_point: dict[tuple[object, ...], str] = {}
        spec_of_model = {spec.model: spec for spec in specs}
        for model, spec in spec_of_model.items():
            point = place_in_training(model, spec.names)
            points[model] = point
            if point.step is None and point.tokens is None:
                if explain_no_step(basename(model).rpartition("@")[2]):
                    self.note(NAMES_AN_EPOCH, model)
                continue
            training = point.seed_group or point.series
            other = model_of_point.setdefault((training, point.seed, point.step, point.tokens), model)
            if not is_same_place(other, model):
                problem = f"'{other}' and '{model}' are at the same point of the training '{training}'"
                self.document.problems.add((spec.line, f"{problem}; leave one out, or tell them apart by names"))
        for group, sentence in missing_points([*points.values()]):
            self.note(sentence, group)
        self.check_patterns(spec_of_model)

    def check_patterns(self, specs: Mapping[str, RunSpec]) -> None:
        """Report patterns that no name has. Note the names that lack the pattern of their entry."""
        with_pattern: dict[tuple[int, str], list[bool]] = {}
        for model, spec in specs.items():
            for pattern in spec.names:
                has_it = has_pattern(model, pattern)
                with_pattern.setdefault((spec.line, pattern), []).append(has_it)
                if not has_it:
                    self.note(f"its name does not have the pattern '{pattern}', which tells its place.", model)
        for (line, pattern), have_it in with_pattern.items():
            if not any(have_it):
                self.document.problems.add((line, f"no name of this entry has the pattern '{pattern}'"))

    def note(self, sentence: str, model: str) -> None:
        """Keep a note on a model."""
        self.notes.setdefault(sentence, []).append(model)

    def check_corpora(self, corpora: Mapping[str, int], specs: Sequence[RunSpec]) -> None:
        """Report texts that cannot be read as the runs read them."""
        places = [*corpora.values()]
        for number, error in corpus_problems([*corpora], {spec.settings.chat_template for spec in specs}):
            location: Location = ("corpora",)
            if number is not None:
                location = ("corpora", places[number])
            self.document.report(location, str(error))

    def check_experiment(self, experiment: Experiment) -> None:
        """Report tasks and texts of an experiment that do not exist."""
        for index, task in enumerate(experiment.tasks):
            try:
                require_task(task)
            except AvssError as error:
                self.document.report(("experiment", "tasks", index), str(error))
        for index, corpus in enumerate(experiment.repair_corpora):
            try:
                name = split_weight(corpus)[0]
                if name != SELF:
                    require_files(name.full)
            except AvssError as error:
                self.document.report(("experiment", "repair_corpora", index), str(error))

    def unchecked(self, key: str, kind: type[T]) -> T:
        """Return a mapping or a list of the file, unchecked, or an empty one for another kind of value."""
        values = self.document.value.get(key)
        return values if isinstance(values, kind) else kind()

    def specs(self, corpora: Sequence[str]) -> Iterator[RunSpec]:
        """Yield the runs of every valid model on every corpus, if the settings of the job are valid."""
        defaults = self.settings({})
        for index, value in enumerate(map(_as_entry, self.unchecked("models", list))):
            if not isinstance(value, dict):
                continue
            location = ("models", index)
            entry = self.document.parse(ModelEntry, value, location)
            own = self.settings(value, location)
            if entry is None:
                continue
            checkpoints = self.checkpoints(entry, location)
            if defaults is None or own is None:
                continue
            settings, execution = own
            difference = _difference(own, defaults)
            for name, corpus in product(checkpoints, corpora):
                title = f"{name} ({difference})" if difference else name
                yield RunSpec(
                    model=name,
                    corpus=corpus,
                    settings=settings,
                    execution=execution,
                    title=title,
                    name=f"{title} on {RedactedURI(corpus)}" if len(corpora) > 1 else title,
                    line=self.document.line(location),
                    names=entry.patterns(),
                )

    def settings(self, entry: Mapping[str, object], *location: Location) -> tuple[Settings, Execution] | None:
        """Return the settings of the job with those that an entry of ``models`` overrides, or None if they are invalid.

        Args:
            entry: keys and values of the entry; empty for the settings of the job alone.
            location: location of the entry, if there is one.
        """
        settings_values = dict(self.unchecked("settings", dict))
        execution_values = dict(self.unchecked("execution", dict))
        for name, value in entry.items():
            if OVERRIDES.get(name) is Settings:
                settings_values[name] = value
            if OVERRIDES.get(name) is Execution:
                execution_values[name] = value
        settings = self.document.parse(Settings, settings_values, *location, ("settings",))
        execution = self.document.parse(Execution, execution_values, *location, ("execution",))
        if settings is None or execution is None:
            return None
        return settings, execution

    def checkpoints(self, entry: ModelKeys, location: Location) -> list[str]:
        """Return the checkpoints of an entry of ``models``, seed by seed."""
        checkpoints: list[str] = []
        for name in entry.named_models():
            if entry.revisions:
                checkpoints += self.at_revisions(name, entry.revisions, location)
            else:
                checkpoints += self.folders(name, location)
        return checkpoints

    def at_revisions(self, name: str, revisions: Sequence[str | RevisionRange], location: Location) -> list[str]:
        """Return a hub id at its revisions."""
        if os.path.exists(os.path.expanduser(name)) or glob.has_magic(name):
            problem = f"'{name}' is a folder or a file; only a hub id has revisions"
            self.document.report((*location, "revisions"), problem)
        names: list[str] = []
        for index, revision in enumerate(revisions):
            names += self.revisions(name, revision, (*location, "revisions", index))
        return [f"{name}@{revision}" for revision in names]

    def folders(self, name: str, location: Location) -> list[str]:
        """Return the folders of a glob, or a name that is none."""
        if self.watch or not self.expand or not glob.has_magic(name):
            return [name]
        matches = glob.glob(str(Path(os.path.expanduser(name))), recursive=True)
        models = sorted(match for match in matches if Path(match).is_dir() or match.endswith(".gguf"))
        if not models:
            self.document.report(location, f"no folder matches '{name}' (relative paths start in {Path.cwd()})")
        return models

    def revisions(self, model: str, revision: str | RevisionRange, location: Location) -> list[str]:
        """Return the revisions that an item of ``revisions`` names.

        The hub is asked for those that match a pattern, or are nearest to points on a log scale.
        """
        if isinstance(revision, RevisionRange) and not (self.expand and revision.is_logarithmic):
            return [f"{revision.prefix}{number}" for number in revision.points()]
        if isinstance(revision, str) and not (self.expand and glob.has_magic(revision)):
            return [revision]
        try:
            if isinstance(revision, str):
                return matching_revisions(model, revision)
            nearest = nearest_revisions(revision, list_revisions(model))
            if nearest.note:
                self.note(nearest.note, model)
            return nearest.names
        except (ConfigError, ModelError) as error:
            self.document.report(location, str(error))
            return []


def _difference(own: tuple[Settings, Execution], defaults: tuple[Settings, Execution]) -> str:
    """Return the settings of a model that differ from those of the job and tell its runs apart: ``dtype float32``."""
    texts = []
    for own_values, default_values in zip(own, defaults, strict=True):
        for name in DISTINGUISHING:
            value = getattr(own_values, name, None)
            if value == getattr(default_values, name, None):
                continue
            if isinstance(value, tuple):
                value = " ".join(str(part) for part in value)
            texts.append(f"{name} {value}")
    return ", ".join(texts)
