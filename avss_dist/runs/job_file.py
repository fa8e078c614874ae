"""Job files: many checkpoints, some corpora, one warehouse; read whole, every mistake told at once with its line."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from avss_dist.corpus.sources import documents
from avss_dist.errors import AvssError, ConfigError
from avss_dist.pruning.methods import Experiment
from avss_dist.runs.job_yaml import WRONG, JobError, NodeReader, line_of
from avss_dist.settings import Execution, Settings

KEYS = ("warehouse", "models", "corpora", "settings", "execution", "experiment")
EXPERIMENT = tuple(f.name for f in fields(Experiment))
RANGE_KEYS = ("prefix", "from", "to", "step")
SETTINGS = tuple(f.name for f in fields(Settings))
EXECUTION = tuple(f.name for f in fields(Execution) if f.name not in ("address", "fresh"))
OF_A_MODEL = (
    *(name for name in SETTINGS if name != "device"),
    *("partition", "ranks", "gpus_per_replica", "max_memory", "offload_folder"),
)
TELLING = tuple(name for name in OF_A_MODEL if name in (*SETTINGS, "partition", "ranks"))
MODEL_KEYS = ("model", "revisions", *OF_A_MODEL)
MOST_RUNS = 10_000
_PLAIN = {"Positive": "int", "Seconds": "float", "Sites": "tuple[str, ...]", "Thresholds": "tuple[float, ...]"}
_PLAIN |= {"Sizes": "Mapping[str, int]"}


def _plain(annotation: str) -> str:
    bare, _, optional = re.sub(r"Annotated\[(\w+), .*\]", r"\1", annotation).partition(" | ")
    return _PLAIN.get(bare, bare) + (optional and f" | {optional}")


_TYPES = {f.name: _plain(str(f.type)) for f in (*fields(Settings), *fields(Execution), *fields(Experiment))}
_ELSEWHERE = {"address": "Pass --address to avss run.", "fresh": "Pass --fresh to avss run."}


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run that is asked for: one checkpoint, one corpus, how to measure, how to spread it.

    Attributes:
        title: the model, with the settings that it alone has.
        name: what people call it, each another: the title, with the corpus where a job has several.
        line: where the job file says so.
    """

    model: str
    corpus: str
    settings: Settings
    execution: Execution
    title: str
    name: str
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A job: the runs of every model on every corpus.

    Attributes:
        path: the file.
        warehouse: where the runs go, as the file says it.
        models, corpora: as the file says them, and their lines.
        settings, execution: what holds for all models that say nothing else.
        specs: the runs, model by model.
        experiment: what `avss experiment` asks of every run; None where the file has no such section.
    """

    path: Path
    warehouse: str
    models: Mapping[str, int]
    corpora: Mapping[str, int]
    settings: Settings
    execution: Execution
    specs: tuple[RunSpec, ...]
    experiment: Experiment | None = None


def read_job(path: str | Path, *, expand: bool = True) -> JobFile:
    """Read a job file.

    Args:
        expand: replace globs of folders by what they match here; a job for another machine is read without.

    Raises:
        JobError: it has mistakes; all of them are told.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise JobError(f"The job file {path} cannot be read: {reason}.", "jobs/README.md shows one.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise JobError(f"{where}: this is not YAML: {getattr(error, 'problem', None) or error}.") from None
    reader = _Reader(path, _ELSEWHERE, expand=expand)
    job = reader.job(root)
    reader.refuse_mistakes()
    assert job is not None
    return job


@dataclass
class _Reader(NodeReader):
    """Reads what a job file has. ``expand``: see `read_job`."""

    expand: bool = True

    def job(self, root: Any) -> JobFile | None:
        """The whole file; None, or a part of it, where there are mistakes."""
        if not isinstance(root, yaml.MappingNode):
            self.mistakes.append((1, f"a job file has the keys {', '.join(KEYS)}"))
            return None
        parts = self.mapping(root, KEYS)
        for name in ("warehouse", "models", "corpora"):
            if name not in parts:
                near = [key.value for key, _ in root.value if key.value not in KEYS]
                if not difflib.get_close_matches(name, near, 1, 0.6):  # else that is the mistake
                    self.wrong(root, f"the key '{name}' is missing")
        warehouse = self.text(parts["warehouse"]) if "warehouse" in parts else None
        corpora = {text: line_of(node) for node, text in self.texts(parts.get("corpora"), "corpora")}
        settings = self.options(parts.get("settings"), SETTINGS, {})
        execution = self.options(parts.get("execution"), EXECUTION, {})
        experiment = self.experiment(parts["experiment"]) if "experiment" in parts else None
        models: dict[str, int] = {}
        specs: list[RunSpec] = []
        for node in self.items(parts.get("models"), "models"):
            specs += self.model(node, corpora, {**settings, **execution}, models)
        self.refuse_twins(specs)
        if self.expand:
            self.require_readable(corpora)
        if len(specs) > MOST_RUNS:
            self.wrong(root, f"{len(specs):,} runs are more than {MOST_RUNS:,}; make several jobs of them")
        if self.mistakes or warehouse is None:
            return None
        return JobFile(
            path=self.path,
            warehouse=warehouse,
            models=models,
            corpora=corpora,
            settings=Settings(**settings),
            execution=Execution(**execution),
            specs=tuple(specs),
            experiment=experiment,
        )

    def experiment(self, node: Any) -> Experiment | None:
        """The section ``experiment``; None where it has mistakes."""
        parts = self.mapping(node, EXPERIMENT)
        if isinstance(node, yaml.MappingNode) and "tasks" not in parts:
            self.wrong(node, "the key 'tasks' is missing")
        values = {name: self.value(part, _TYPES[name], name) for name, part in parts.items()}
        if "tasks" not in parts or WRONG in values.values():
            return None
        try:
            return Experiment(**values)
        except ConfigError as error:
            self.wrong(node, str(error).replace("\n", " "))
        return None

    def refuse_twins(self, specs: Iterable[RunSpec]) -> None:
        """The same run twice is a mistake."""
        lines: dict[Any, int] = {}
        for spec in specs:
            cut = (spec.execution.partition, spec.execution.ranks) if spec.execution.ranks else None
            first = lines.setdefault((spec.model, spec.corpus, spec.settings, cut), spec.line)
            if first != spec.line:
                what = f"'{spec.model}' is there twice with the same settings, first in line {first}"
                if (spec.line, what) not in self.mistakes:
                    self.mistakes.append((spec.line, what))

    def require_readable(self, corpora: Mapping[str, int]) -> None:
        """A corpus that cannot be read concerns all runs."""
        for corpus, line in corpora.items():
            try:
                next(iter(documents(corpus)), None)
            except AvssError as error:
                self.mistakes.append((line, str(error).replace("\n", " ")))

    def model(
        self, node: Any, corpora: Iterable[str], defaults: dict[str, Any], models: dict[str, int]
    ) -> Iterator[RunSpec]:
        """The runs of one entry of ``models``."""
        own: dict[str, Any] = {}
        parts: dict[str, Any] = {"model": node}
        if isinstance(node, yaml.MappingNode):
            parts = self.mapping(node, MODEL_KEYS)
            own = self.options(node, OF_A_MODEL, defaults, others=("model", "revisions"))
        name = self.text(parts["model"]) if "model" in parts else None
        if name is None:
            if "model" not in parts:
                self.wrong(node, "the key 'model' is missing")
            return
        models.setdefault(name, line_of(node))
        found = self.found(node, name)
        if "revisions" in parts:
            if Path(name).expanduser().exists() or glob.has_magic(name):
                self.wrong(parts["revisions"], f"'{name}' is a folder or a file; only a hub id has revisions")
            found = [f"{name}@{revision}" for revision in self.revisions(parts["revisions"])]
        try:
            values = {**defaults, **own}
            settings = Settings(**{k: v for k, v in values.items() if k in SETTINGS})
            execution = Execution(**{k: v for k, v in values.items() if k in EXECUTION})
        except AvssError:  # told already
            return
        several = len(list(corpora)) > 1
        alone = _told({k: v for k, v in own.items() if k in TELLING and v != defaults.get(k)})
        for model in found:
            title = f"{model} ({alone})" if alone else model
            for corpus in corpora:
                yield RunSpec(
                    model=model,
                    corpus=corpus,
                    settings=settings,
                    execution=execution,
                    title=title,
                    name=f"{title} on {corpus}" if several else title,
                    line=line_of(node),
                )

    def found(self, node: Any, name: str) -> list[str]:
        """The checkpoints that a name stands for: those that a glob matches here, sorted; or itself."""
        if not (self.expand and glob.has_magic(name)):
            return [name]
        matches = glob.glob(str(Path(name).expanduser()), recursive=True)
        folders = sorted(m for m in matches if Path(m).is_dir() or m.endswith(".gguf"))
        if not folders:
            self.wrong(node, f"no folder matches '{name}' (relative paths are those of {Path.cwd()})")
        return folders

    def revisions(self, node: Any) -> Iterator[str]:
        """Names of revisions: a list of names and ranges, or one range."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not parts:
            self.wrong(node, "revisions: there are none")
        for part in parts:
            if isinstance(part, yaml.MappingNode):
                yield from self.range(part)
            elif (text := self.text(part)) is not None:
                yield text

    def range(self, node: Any) -> list[str]:
        """``{prefix: step, from: 0, to: 3000, step: 1000}`` is step0, step1000, step2000, step3000."""
        parts = self.mapping(node, RANGE_KEYS)
        if missing := [key for key in ("from", "to") if key not in parts]:
            self.wrong(node, f"a range of revisions needs '{missing[0]}'")
            return []
        numbers = {key: self.value(parts[key], "int", key) for key in ("from", "to", "step") if key in parts}
        if WRONG in numbers.values():
            return []
        first, last, step = numbers["from"], numbers["to"], numbers.get("step", 1)
        if step < 1 or last < first or (last - first) // step >= MOST_RUNS:
            self.wrong(node, f"a range goes up from 'from' to 'to' in at most {MOST_RUNS:,} steps of 1 or more")
            return []
        prefix = (self.text(parts["prefix"]) or "") if "prefix" in parts else ""
        return [f"{prefix}{number}" for number in range(first, last + 1, step)]

    def options(
        self, node: Any, names: Sequence[str], defaults: dict[str, Any], others: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Fields of Settings and Execution with their values; those that are wrong are noted and left out.

        Args:
            defaults: what else is set; values are checked together.
            others: keys that are no options.
        """
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, "this must be a mapping: key: value")
            return {}
        nodes = {key.value: (key, value) for key, value in node.value if key.value in names}
        if not others:
            self.mapping(node, names)
        values = {name: self.value(value, _TYPES[name], name) for name, (_, value) in nodes.items()}
        values = {name: value for name, value in values.items() if value is not WRONG}
        for options in (Settings, Execution):
            own = [name for name in values if name in options.__dataclass_fields__]
            base = {k: v for k, v in defaults.items() if k in options.__dataclass_fields__}
            while error := _error(options, base | {name: values[name] for name in own}):
                culprit = _culprit(options, base, {name: values[name] for name in own})
                self.wrong(nodes[culprit][0], f"{error}".replace("\n", " "))
                own.remove(culprit)
                del values[culprit]
        return values


def _told(options: Mapping[str, Any]) -> str:
    """Options for people: ``dtype float32, sites block mlp``."""
    words = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in options.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items())


def _error(options: type[Settings] | type[Execution], values: Mapping[str, Any]) -> ConfigError | None:
    try:
        options(**values)
    except ConfigError as error:
        return error
    return None


def _culprit(options: type[Settings] | type[Execution], base: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The option that is wrong: the last without which all is well, or without which another error comes first."""
    told = str(_error(options, {**base, **own}))
    without = {name: _error(options, {**base, **{k: v for k, v in own.items() if k != name}}) for name in own}
    well = [name for name, error in without.items() if error is None]
    return (well or [name for name, error in without.items() if str(error) != told] or list(own))[-1]
