"""Settings of a measurement and of its execution, with their defaults, valid values and fingerprints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Self

from pydantic import Field, WithJsonSchema
from pydantic_core import PydanticKnownError

from avss_dist.core.errors import ConfigError
from avss_dist.core.registry import GANGS, PARTITIONS
from avss_dist.core.text import parse_bytes, parse_threshold
from avss_dist.core.validation import NO_OPTION, RARE, Accepts, Count, OneOf, Positive, check, checked

SITES = ("block", "update", "attention", "mlp", "neuron")  # measured by default
INPUT_SITES = ("query_input", "output_input", "up_input")  # what q, k and v read; what o reads; what gate and up read
EVERY_SITE = (*SITES, *INPUT_SITES)
INPUTS = (*INPUT_SITES, "neuron")
"""Sites of the inputs of a layer's linear maps, where activations are made sparse."""
SITE_FAMILIES = {"inputs": INPUTS}
"""Names that stand for several sites."""
ROW_STARTS = ("auto", "none")
TRAINED = ("all", "lora")
"""Weights that distillation trains: see `distillation.pair`."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
EXECUTORS = ("auto", "local", "ray")

PUBLISHED_THRESHOLD = 1e-5
THRESHOLDS = (1e-6, PUBLISHED_THRESHOLD, 1e-4, 1e-3, 1e-2, 1e-1)


def _in_order(sites: tuple[str, ...]) -> tuple[str, ...]:
    members = {member for site in sites for member in SITE_FAMILIES.get(site, (site,))}
    return tuple(site for site in EVERY_SITE if site in members)


def _absolute(threshold: Any) -> Any:
    value, kind = parse_threshold(threshold) if isinstance(threshold, str) else (threshold, "absolute")
    if kind != "absolute":
        raise ConfigError(
            f"{threshold}: expected an absolute threshold. Multiples of the RMS are always scored.",
            "Write 1e-4, for example.",
        )
    return value


def _with_published(thresholds: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({*thresholds, PUBLISHED_THRESHOLD}))


def _device_name(name: str) -> str:
    if name != "cpu" and not (name.isascii() and name.isdecimal()):
        raise ConfigError(
            f"'{name}' is not a device: expected cpu or the number of a GPU.",
            "Write cpu=20GB, or 0=40GiB for the first GPU.",
        )
    return name


def _by_device(sizes: Any) -> Any:
    """Return sizes by device from texts such as ``cpu=20GB``."""
    if isinstance(sizes, Mapping):
        return sizes
    pairs = [str(text).partition("=") for text in sizes]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ConfigError(f"{wrong[0]} names no device.", "Write cpu=20GB, or 0=40GiB for the first GPU.")
    return {name: size for name, _, size in pairs}


_REPLICAS = re.compile(r"(?:(\d{1,9})\.\.)?(\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Replicas:
    """A range of model copies that work in parallel, written ``8`` (1 to 8) or ``4..64``.

    Attributes:
        minimum: number of copies that a run waits for before it begins.
        maximum: maximum number of copies.
    """

    minimum: int
    maximum: int

    def __str__(self) -> str:
        return str(self.maximum) if self.minimum == 1 else f"{self.minimum}..{self.maximum}"


def _replicas(value: Any) -> Any:
    """Return replicas from a number, from text such as ``4..64``, or from replicas, which may be out of range."""
    match = _REPLICAS.fullmatch(str(value).strip())
    if not match:
        raise ConfigError(
            f"invalid replica count '{value}': expected an integer (8) or a range (4..64).",
            "4..64 starts with 4 copies, and uses up to 64 when there is room.",
        )
    replicas = Replicas(int(match[1] or 1), int(match[2]))
    if min(replicas.minimum, replicas.maximum) < 1:
        raise PydanticKnownError("greater_than_equal", {"ge": 1})
    if replicas.minimum > replicas.maximum:
        raise ConfigError(
            f"the minimum of '{value}' is larger than its maximum.", f"Write {replicas.maximum}..{replicas.minimum}."
        )
    return replicas


def _node_label(value: str) -> str:
    key, _, label = value.partition("=")
    if not key or not _LABEL_VALUE.fullmatch(label):
        raise ConfigError(f"'{value}' is no label of a node.", "Write KEY=VALUE: ray.io/accelerator-type=H100.")
    return value


def _single_values(labels: tuple[str, ...]) -> tuple[str, ...]:
    names = [label.partition("=")[0] for label in labels]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"a node has one value of '{repeated[0]}'; several were given", "Give one.")
    return labels


_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # Ray's syntax, without operators
NodeLabels = Annotated[tuple[Annotated[str, check(_node_label)], ...], Field(strict=False), check(_single_values)]
Sites = Annotated[
    tuple[Annotated[str, OneOf((*EVERY_SITE, *SITE_FAMILIES))], ...],
    Field(strict=False, min_length=1),
    check(_in_order),
]
Threshold = Annotated[float, check(_absolute, before=True), Field(gt=0, allow_inf_nan=False), Accepts("float | str")]
Thresholds = Annotated[tuple[Threshold, ...], Field(strict=False), check(_with_published)]
Bytes = Annotated[
    int,
    check(lambda size: parse_bytes(size) if isinstance(size, str) else size, before=True),
    Field(ge=1),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["20GB"]}),
    Accepts("int | str"),
]
ReplicaRange = Annotated[
    Replicas,
    check(_replicas, before=True),
    WithJsonSchema(
        {"type": ["integer", "string"], "minimum": 1, "pattern": r"^([1-9]\d*\.\.)?[1-9]\d*$", "examples": [8, "4..64"]}
    ),
    Accepts("int | str"),
]
Sizes = Annotated[Mapping[Annotated[str, check(_device_name)], Bytes], check(_by_device, before=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@checked
class TextOptions:
    """Options by which a text becomes rows of tokens.

    Raises:
        ConfigError: values out of their range; the message names all of them, and the nearest valid ones.
    """

    max_sequences: Positive | None = None
    """Rows to read at most; by default the whole corpus."""
    skip_sequences: Annotated[Count, RARE] = 0
    """Skip this many rows at the start of each text."""
    sequence_length: Positive = 256
    """Tokens in a row."""
    shuffle_seed: Annotated[Count | None, RARE] = None
    """Read the whole corpus and take its rows in a random order with this seed; by default they keep their order."""
    chat_template: Annotated[bool, RARE] = False
    """Format conversations (columns of messages), and questions of tasks, with the tokenizer's chat template."""
    layout: Annotated[str, OneOf(("packed", "padded")), RARE] = "packed"
    """Rows of equal length without padding (packed), or one document per row (padded)."""
    row_start: Annotated[str, OneOf(ROW_STARTS), RARE] = "auto"
    """Put the tokenizer's own special tokens, such as BOS, around the text of each packed row (auto), or not (none)."""

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Self:
        """Make an instance from stored values by name, without names that it does not have."""
        values = {"row_start": "none", **values}  # default of what was stored before this option existed
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def text_options(self) -> dict[str, Any]:
        """Return the values of the fields of `TextOptions` by name."""
        return {name: getattr(self, name) for name in TEXT_OPTIONS}


TEXT_OPTIONS = tuple(f.name for f in fields(TextOptions))


@checked
class ModelOptions:
    """How a model is opened."""

    dtype: Annotated[str, OneOf(DTYPES)] = "auto"
    """Compute dtype: auto (the checkpoint's own), float32, bfloat16 or float16."""
    layers: Annotated[str | None, RARE] = None
    """Module path of the layer list, if it is not found automatically."""
    attention: Annotated[Annotated[str, OneOf(ATTENTIONS)] | None, RARE] = None
    """Attention implementation; by default transformers chooses."""
    device: Annotated[str, OneOf(("auto", "cpu", "cuda"))] = "auto"
    """Device that computes; auto is cuda where there is one."""
    trust_remote_code: Annotated[bool, RARE] = False
    """Run the Python code that comes with the checkpoint."""


@checked
class BatchOptions:
    """How a model computes its rows."""

    batch_size: Positive = 8
    """Rows in a forward pass."""
    sequences_per_shard: Annotated[Positive | None, RARE] = None
    """Rows in a shard, the unit of work, retry and resampling; by default by the model's size, 32 in evaluations."""
    dequantize: Annotated[bool, RARE] = False
    """Unpack quantized weights to the compute dtype instead of computing with them as stored."""
    threads: Annotated[Positive, RARE] = 1
    """CPU threads that compute one shard or one part of a task. Remaining cores compute others at the same time."""


@checked
class StatisticsOptions:
    """Statistics to measure inside of layers."""

    sites: Sites = SITES
    """Sites in a layer to measure; inputs are those of its linear maps."""
    thresholds: Thresholds = THRESHOLDS
    """Absolute near-zero thresholds; the published 1e-5 is always included."""
    experts: Annotated[bool, RARE] = False
    """Also measure routed experts: their tokens, gates and outputs, which computes each expert twice."""
    skip_first_tokens: Annotated[Count, RARE] = 0
    """Leave this many tokens at the start of every row out of the statistics."""
    allow_pickle: Annotated[bool, RARE] = False
    """Accept pickled weights (pytorch_model*.bin): load tensors only, and cache them as safetensors."""


@checked
class Settings(StatisticsOptions, BatchOptions, ModelOptions, TextOptions):
    """Settings of a measurement. Every field can change a number, so every field is fingerprinted."""

    def __post_init__(self) -> None:
        if self.skip_first_tokens >= self.sequence_length:
            raise ConfigError(
                f"`skip_first_tokens` {self.skip_first_tokens} leaves nothing of {self.sequence_length} tokens.",
                "It must be smaller than `sequence_length`.",
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, `skip_sequences` only if rows are skipped, as it is newer."""
        return {name: value for name, value in vars(self).items() if name != "skip_sequences" or value}

    def numbers(self, *, statistics: bool) -> dict[str, Any]:
        """Return the settings that can change a number, except those of the text, whose tokens are hashed.

        Args:
            statistics: include the settings of statistics inside of layers.
        """
        of_statistics = () if statistics else ("sites", "thresholds", "experts", "sequences_per_shard")
        without = {*TEXT_OPTIONS, *of_statistics, "trust_remote_code", "allow_pickle"} - {"sequence_length"}
        return {name: value for name, value in self.as_dict().items() if name not in without}


@checked
class ClusterOptions:
    """A cluster, and how long to wait for it."""

    address: str | None = None
    """Address of a Ray cluster; otherwise a private one is started."""
    node_labels: Annotated[NodeLabels, RARE] = ()
    """Label that a node of the cluster must have to take work: KEY=VALUE, such as ray.io/accelerator-type=H100."""
    placement_seconds: Annotated[Seconds, RARE] = 300.0
    """Seconds to wait for room on the cluster for the minimum number of replicas."""
    hang_seconds: Annotated[Seconds, RARE] = 600.0
    """Seconds without a new layer after which a worker counts as hung and is replaced."""


@checked
class Execution(ClusterOptions):
    """Execution of the work: workers and devices. No field can change a number, so none is fingerprinted.

    Raises:
        ConfigError: values that are out of their range or mutually exclusive.
    """

    executor: Annotated[str, OneOf(EXECUTORS)] = "auto"
    """This process (local) or Ray workers; auto decides."""
    replicas: ReplicaRange | None = None
    """Model copies in parallel: 8, or 4..64; by default one per GPU, or one per node of a cluster without GPUs."""
    fresh: bool = False
    """Measure again what has already been measured."""
    partition: Annotated[str, OneOf(("auto", *PARTITIONS))] = "auto"
    """Distribution of a replica over devices; auto chooses."""
    ranks: Annotated[Positive | None, RARE] = None
    """Processes per replica (fsdp, zero3, tensor_parallel, expert_parallel); by default one per GPU of it, or 2."""
    gpus_per_replica: Annotated[Positive | None, RARE] = None
    """GPUs per replica; by default one, or what the partition needs."""
    max_memory: Annotated[Sizes, RARE] = field(default_factory=dict)
    """Maximum memory of a replica on a device: cpu=20GB (with interpreter and activations), 0=40GB, ..."""

    def __post_init__(self) -> None:
        gangs, local = f"{', '.join(GANGS[:-1])} and {GANGS[-1]}", self.executor == "local"
        several = self.address or (self.replicas and self.replicas.maximum > 1)
        ConfigError.refuse(
            (
                self.ranks and self.partition not in GANGS,
                f"`ranks` applies to {gangs}, not to `partition` {self.partition}.",
                "Leave it out.",
            ),
            (
                local and self.partition in GANGS,
                f"`partition` {self.partition} needs several processes; `executor` local is one.",
                "Use `executor` ray.",
            ),
            (
                local and several,
                "`executor` local is one replica in this process; it takes neither `address` nor `replicas` above 1.",
                "Use `executor` ray.",
            ),
            (
                local and self.node_labels,
                "`node_labels` chooses nodes of a cluster; `executor` local is this process.",
                "Use `executor` ray, with an `address`.",
            ),
        )


@checked
class Request:
    """Values of a command. It inherits groups of options: of a text, a model, batches, statistics, a cluster."""

    on_event: Annotated[Any, NO_OPTION, Accepts("Callable[[Any], object] | None")] = field(
        default=None, compare=False, repr=False
    )
    """Function that receives the events of the work."""

    @property
    def settings(self) -> Settings:
        """Settings of the groups that the command has, and the defaults of the others."""
        return Settings(**group_values(self, Settings))

    @property
    def execution(self) -> Execution:
        """Execution of the groups that the command has, and the defaults of the others."""
        return Execution(**group_values(self, Execution))

    @property
    def options(self) -> dict[str, Any]:
        """Values of all groups that the command has, as keywords of another command."""
        return group_values(self, Settings) | group_values(self, Execution)

    def __getstate__(self) -> dict[str, Any]:
        """Return the values without the function, which stays in its process."""
        return vars(self) | {"on_event": None}


def group_values(request: Any, cls: type) -> dict[str, Any]:
    """Return the values of the groups of options that a request shares with a class."""
    groups = [base for base in type(request).__mro__ if base is not object and issubclass(cls, base)]
    return {f.name: getattr(request, f.name) for group in groups for f in fields(group)}


def refuse_unused(values: Mapping[str, Any], reason: str, hint: str) -> None:
    """Raise ConfigError if an option without effect has another value than its default.

    Args:
        values: values by option. The default of an option that is no setting is empty, such as 0 or None.
        reason: end of the message, such as "without a search".
    """
    defaults = vars(Settings()) | vars(Execution())
    for name, value in values.items():
        if value and value != defaults.get(name):
            raise ConfigError(f"`{name}` has no effect {reason}.", hint)


NUMBERS_VERSION = 3
"""Version of the numbers, hashed into the ids of runs, evaluations and experiments.

A change after which the same request gives other numbers raises it. A new column of a table does not.
"""


def fingerprint(**parts: Any) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of ``parts``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
