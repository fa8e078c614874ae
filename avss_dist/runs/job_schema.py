"""Keys of job files, with their types and descriptions."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, create_model

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.validation import Check
from avss_dist.pruning.methods import Experiment

MAX_REVISIONS = 10_000
OVERRIDES: dict[str, type] = {
    **{f.name: Settings for f in fields(Settings) if f.name != "device"},
    **dict.fromkeys(("partition", "ranks", "gpus_per_replica", "max_memory"), Execution),
}
"""Class of each field that an entry of ``models`` can override, by the field's name."""
OPTIONS_ONLY = {"address": "Use avss run --address.", "fresh": "Use avss run --fresh."}
"""Hints for fields of `Execution` that are no keys of job files."""

Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RevisionRange(_Section):
    """Range of numbered revisions: ``{prefix: step, from: 0, to: 2000, step: 1000}`` is step0, step1000, step2000."""

    prefix: str = ""
    """Text before the number."""
    first: Annotated[int, Field(alias="from", ge=0)]
    """The first number."""
    last: Annotated[int, Field(alias="to", ge=0)]
    """Upper bound of the numbers, inclusive."""
    step: Annotated[int, Field(ge=1)] = 1
    """Difference of consecutive numbers."""

    def names(self) -> list[str]:
        """Return the revisions, in order."""
        return [f"{self.prefix}{number}" for number in range(self.first, self.last + 1, self.step)]


def _short(revisions: RevisionRange) -> RevisionRange:
    number = (revisions.last - revisions.first) // revisions.step + 1
    if not 0 < number <= MAX_REVISIONS:
        raise ConfigError(f"invalid range: expected 'from' up to 'to' in at most {MAX_REVISIONS:,} steps.")
    return revisions


Revision = Annotated[
    Annotated[Text, Tag("text")] | Annotated[RevisionRange, Check(_short), Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, (dict, RevisionRange)) else "text"),
]


Revisions = Annotated[list[Revision], Field(min_length=1)]


class ModelKeys(_Section):
    """Entry of ``models`` without the settings that it overrides."""

    model: Text
    """Hub id (org/name@revision), folder, .gguf file, or a glob of folders."""
    revisions: (
        Annotated[
            Revisions,
            BeforeValidator(
                lambda value: [value] if isinstance(value, dict) else value,
                json_schema_input_type=RevisionRange | Revisions,
            ),
        ]
        | None
    ) = None
    """Revisions of a hub id: names, patterns (stage1-step*), ranges {prefix: step, from: 0, to: 3000, step: 1000}."""


_OVERRIDDEN: dict[str, Any] = dict.fromkeys(OVERRIDES, (Any, None))  # checked together with the settings of the job
ModelEntry: type[ModelKeys] = create_model("ModelEntry", __base__=ModelKeys, **_OVERRIDDEN)


def as_entry(value: Any) -> Any:
    """Return the long form of an entry of ``models``."""
    return {"model": value} if isinstance(value, str) else value


Model: Any = Annotated[ModelEntry, BeforeValidator(as_entry, json_schema_input_type=str | ModelEntry)]


class Job(_Section):
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


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema of job files, for editors."""
    schema = Job.model_json_schema()
    sections: dict[type, Any] = {cls: schema["$defs"][cls.__name__]["properties"] for cls in (Settings, Execution)}
    for name in OPTIONS_ONLY:
        del sections[Execution][name]
    entry = schema["$defs"][ModelEntry.__name__]
    entry["properties"] |= {name: sections[cls][name] for name, cls in OVERRIDES.items()}
    for cls in (Settings, Execution, Experiment):
        del schema["$defs"][cls.__name__]["description"]  # it is about Python
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
