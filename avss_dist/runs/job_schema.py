"""Schema of job files, built from the fields of `Settings`, `Execution` and `Experiment`."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model
from pydantic_core import core_schema

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.validation import Check
from avss_dist.pruning.methods import Experiment

MAX_REVISIONS = 10_000
SETTINGS_FIELDS = tuple(f.name for f in fields(Settings))
EXECUTION_FIELDS = tuple(f.name for f in fields(Execution) if f.name not in ("address", "fresh"))
EXPERIMENT_FIELDS = tuple(f.name for f in fields(Experiment))
MODEL_FIELDS = (
    *(name for name in SETTINGS_FIELDS if name != "device"),
    *("partition", "ranks", "gpus_per_replica", "max_memory", "offload_folder"),
)
"""Fields that an entry of ``models`` can override."""

Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    """Section of a job file. Values are the texts of the YAML file, from which numbers and sizes are parsed."""

    # Sections built from fields have descriptions; searching for docstrings would go through every imported module.
    model_config = ConfigDict(extra="forbid", frozen=True)


def given(section: BaseModel | None) -> dict[str, Any]:
    """Return the values that a section of a file sets, by name, in the order of its class."""
    names = type(section).model_fields if section else ()
    return {name: getattr(section, name) for name in names if section and name in section.model_fields_set}


class RevisionRange(_Section):
    """Range of numbered revisions: ``{prefix: step, from: 0, to: 2000, step: 1000}`` is step0, step1000, step2000."""

    model_config = ConfigDict(use_attribute_docstrings=True)

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


def _kind(value: Any) -> str:
    return "mapping" if isinstance(value, (dict, BaseModel)) else "text"


class _Wrapped:
    """Metadata of a field that accepts a short form, which ``wrap`` converts to the type of the field."""

    def __init__(self, wrap: Any, **schema: Any) -> None:
        self.wrap, self.schema = wrap, schema

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(self.wrap, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {"anyOf": [self.schema, handler(schema)]}


Revision = Annotated[
    Annotated[Text, Tag("text")] | Annotated[RevisionRange, Check(_short), Tag("mapping")], Discriminator(_kind)
]


class ModelKeys(_Section):
    """Model of a job file. Fields that it can override are added below."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: Text
    """Hub id (org/name@revision), folder, .gguf file, or a glob of folders."""
    revisions: (
        Annotated[
            list[Revision], Field(min_length=1), _Wrapped(lambda value: [value] if isinstance(value, dict) else value)
        ]
        | None
    ) = None
    """Revisions of a hub id: names, patterns (stage1-step*), ranges {prefix: step, from: 0, to: 3000, step: 1000}."""


def _fields_of(cls: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return fields of a checked class, for `create_model`."""
    return {name: (cls.__pydantic_fields__[name].annotation, cls.__pydantic_fields__[name]) for name in names}


SettingsSection: Any = create_model("SettingsSection", __base__=_Section, **_fields_of(Settings, SETTINGS_FIELDS))
ExecutionSection: Any = create_model("ExecutionSection", __base__=_Section, **_fields_of(Execution, EXECUTION_FIELDS))
ExperimentSection: Any = create_model(
    "ExperimentSection", __base__=_Section, **_fields_of(Experiment, EXPERIMENT_FIELDS)
)
ModelEntry: Any = create_model(
    "ModelEntry",
    __base__=ModelKeys,
    **_fields_of(Settings, tuple(name for name in MODEL_FIELDS if name in SETTINGS_FIELDS)),
    **_fields_of(Execution, tuple(name for name in MODEL_FIELDS if name in EXECUTION_FIELDS)),
)
Model: Any = Annotated[
    ModelEntry, _Wrapped(lambda value: {"model": value} if isinstance(value, str) else value, type="string")
]
Job: Any = create_model(
    "Job",
    __base__=_Section,
    warehouse=(Text, Field(description="A folder, or an s3://, gs://, hdfs:// URI.")),
    models=(
        list[Model],
        Field(min_length=1, description="Names, or mappings of a model and the settings that it overrides."),
    ),
    corpora=(
        list[Text],
        Field(
            min_length=1,
            description="Corpora, as for --corpus: file.txt, file.jsonl[:field], hf:NAME, wikitext2, builtin:pydoc.",
        ),
    ),
    settings=(SettingsSection | None, Field(None, description="Settings of the measurement.")),
    execution=(ExecutionSection | None, Field(None, description="Execution: workers, devices and placement.")),
    experiment=(
        ExperimentSection | None,
        Field(None, description="Experiment with every run: choices of layers that are evaluated."),
    ),
)
