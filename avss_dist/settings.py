"""Frozen settings: the one home of every default, and what a fingerprint hashes. Checked classes are made here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError, core_schema

from avss_dist.errors import AvssError, ConfigError, nearest, require_known

SCHEMA_VERSION = 2
SITES = ("block", "update", "attention", "mlp", "neuron")
RECIPES = ("pooled", "element", "unit")
RIVALS = {
    "block_influence": "block influence",
    "angular_distance": "angular distance",
    "relative_magnitude": "relative magnitude",
    "update_variance_ratio": "update / input variance",
}
"""Scores that AVSS competes with, by column; and their titles."""
SCORES = ("avss", *RIVALS)  # what layers are ranked by: low is unimportant
GROUND_TRUTH = {"loss": "ablation:", "shapley": "shapley:", "taylor": "gradients:"}
"""What dropping a layer does to the loss: measured, sampled, linearized; and the task of each, before its corpus."""
LOSS = "loss"  # a metric of a model: nats per token; higher is worse
CHANCE = "chance"  # a metric of multiple choice: the accuracy of a guess
PERPLEXITY = "perplexity:"  # before a corpus: the task of predicting it
LAYOUTS = ("packed", "padded")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
EXECUTORS = ("auto", "local", "ray")
PARTITIONS = ("auto", "single", "device_map", "zero3", "tensor_parallel", "streaming")
GANGS = ("zero3", "tensor_parallel")  # partitions whose replicas are several processes
DEVICES = ("auto", "cpu", "cuda")

PUBLISHED_THRESHOLD = 1e-5
THRESHOLDS = (1e-6, PUBLISHED_THRESHOLD, 1e-4, 1e-3, 1e-2, 1e-1)
RELATIVE_THRESHOLDS = (0.01, 0.1)  # multiples of the RMS of the layer and site; scored from stored counts

BOOTSTRAP_RESAMPLES = 1000
BOOTSTRAP_SEED = 0
BOOTSTRAP_BLOCKS = 100  # shards beyond this are resampled in blocks of consecutive ones
INTERVAL = 0.95
LOWEST_SHARE = 0.25


T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """Metadata of a field: what its values must pass. ``Annotated[float, Check(require_share)]``.

    Args:
        check: raises an `AvssError`, or returns the value.
        before: check what was passed, before its type is; ``check`` may then return a value of another type.
    """

    check: Callable[[Any], Any]
    before: bool = False

    def _run(self, value: Any) -> Any:
        try:
            return self.check(value)
        except AvssError as error:  # pydantic collects its own errors only
            raise PydanticCustomError("problem", "{message}", {"message": error.message, "hint": error.hint}) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        if self.before:
            return core_schema.no_info_before_validator_function(self._run, handler(source))
        return core_schema.no_info_after_validator_function(self._run, handler(source))


@dataclass(frozen=True)
class OneOf:
    """Metadata of a field whose values are names: ``Annotated[str, OneOf(DTYPES)]``. Front ends list them."""

    names: tuple[str, ...]

    def _run(self, value: str) -> str:
        if value not in self.names:
            hint = nearest(value, self.names)
            raise PydanticCustomError("unknown_name", "{value}", {"value": value, "hint": hint})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._run, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {**handler(schema), "enum": list(self.names)}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def checked(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that checks its values: all fields, then ``__post_init__``.

    It is a pydantic dataclass: `dataclasses.replace`, ``fields`` and ``asdict`` work, and ``Annotated`` types carry
    ranges, descriptions, `OneOf` and `Check`. A wrong value, an unknown or a missing field is a `ConfigError` that
    lists every problem, each with its field in backticks.
    """
    config = ConfigDict(strict=True, extra="forbid")
    made: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=config)
    initialize = made.__init__

    def initialize_or_explain(self: Any, **values: Any) -> None:
        try:
            initialize(self, **values)
        except ValidationError as error:
            raise ConfigError.of(list(problems_by_field(made, error).values())) from None

    made.__init__ = initialize_or_explain
    return made


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
}
"""What a field must be, by the first word of the type of pydantic's error."""
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def problems_by_field(cls: Any, error: ValidationError) -> dict[tuple[int | str, ...], ConfigError]:
    """What pydantic found wrong with the values of a class, in this package's words, by the path of the value."""
    return {tuple(one["loc"]): _problem(cls, one) for one in error.errors(include_url=False)}


def _problem(cls: Any, error: Any) -> ConfigError:
    kind, value, context = error["type"], error["input"], error.get("ctx") or {}
    name = next((part for part in reversed(error["loc"]) if isinstance(part, str)), "")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return ConfigError(f"Unknown option '{name}'.", nearest(name, sorted(f.name for f in fields(cls))))
    if kind.startswith("missing"):
        return ConfigError(f"`{name}` is missing.")
    if kind == "unknown_name":
        return ConfigError(f"Unknown `{name}` '{value}'.", context["hint"])
    if kind == "problem":
        return ConfigError(f"`{name}`: {context['message']}", context["hint"])
    if kind in ("too_short", "string_too_short"):
        return ConfigError(f"`{name}` must not be empty.")
    if kind in _BOUNDS:
        bound, key = _BOUNDS[kind]
        return ConfigError(f"`{name}` must be {bound} {context[key]:g}, not {value!r}.")
    if expected := _EXPECTED.get(kind.partition("_")[0]):
        return ConfigError(f"`{name}` must be {expected}, not {value!r}.")
    return ConfigError(f"`{name}`: {error['msg']}.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how. Every field can change a number, so every field is fingerprinted.

    Attributes:
        max_sequences: rows of tokens to read at most; None reads the whole corpus.
        sequence_length: tokens in a row.
        batch_size: rows in one forward pass.
        sequences_per_shard: rows in a shard, the unit of work, retry and resampling.
        layout: ``packed`` (no padding exists) or ``padded`` (one document a row).
        skip_first_tokens: leading tokens of every row that are left out of the statistics.
        dtype: compute dtype; ``auto`` is the checkpoint's own.
        sites: where in a layer to measure.
        thresholds: near-zero thresholds, absolute, ascending; the published 1e-5 is always among them.
        layers: module path of the layer list; None finds it by structure.
        attention: attention implementation; None leaves it to transformers.
        device: ``cpu`` or ``cuda``; ``auto`` is ``cuda`` where there is one.
        trust_remote_code: run Python code that the checkpoint ships.

    Raises:
        ConfigError: a value is out of its range; the message names the nearest valid one.
    """

    max_sequences: int | None = None
    sequence_length: int = 256
    batch_size: int = 8
    sequences_per_shard: int = 32
    layout: str = "packed"
    skip_first_tokens: int = 0
    dtype: str = "auto"
    sites: tuple[str, ...] = SITES
    thresholds: tuple[float, ...] = THRESHOLDS
    layers: str | None = None
    attention: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_known("layout", self.layout, LAYOUTS)
        require_known("dtype", self.dtype, DTYPES)
        require_known("device", self.device, DEVICES)
        if self.attention is not None:
            require_known("attention", self.attention, ATTENTIONS)
        for site in self.sites:
            require_known("site", site, SITES)
        if not self.sites:
            raise ConfigError("No site was named.", f"Valid: {', '.join(SITES)}.")
        for name in ("sequence_length", "batch_size", "sequences_per_shard"):
            _require_at_least(name, getattr(self, name), 1)
        if self.max_sequences is not None:
            _require_at_least("max_sequences", self.max_sequences, 1)
        _require_at_least("skip_first_tokens", self.skip_first_tokens, 0)
        if self.skip_first_tokens >= self.sequence_length:
            raise ConfigError(
                f"--skip-first-tokens {self.skip_first_tokens} leaves nothing of {self.sequence_length} tokens.",
                "Make it smaller than --sequence-length.",
            )
        for threshold in self.thresholds:
            if not (math.isfinite(threshold) and threshold > 0):
                raise ConfigError(f"A threshold must be a positive number, not {threshold!r}.")
        object.__setattr__(self, "sites", tuple(s for s in SITES if s in self.sites))
        object.__setattr__(self, "thresholds", tuple(sorted({*self.thresholds, PUBLISHED_THRESHOLD})))

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how wide the work runs. Nothing here can change a number, so nothing here is fingerprinted.

    Attributes:
        executor: ``local`` (in this process), ``ray``, or ``auto`` (Ray for several replicas or a cluster).
        replicas: model copies that work in parallel; None is one for every GPU, or one on a CPU.
        address: a running Ray cluster; None starts a private one.
        fresh: measure again what is done already.
        partition: how one replica is spread over devices; ``auto`` chooses by the checkpoint and the devices.
        ranks: processes of one replica (``zero3``, ``tensor_parallel``); None is one for each of its GPUs, or 2.
        gpus_per_replica: GPUs of one replica; None is one, or what the partition needs.
        max_memory: bytes to use at most on a device, by name: ``cpu``, ``0`` (the first GPU), ``1``, ...
        offload_folder: where weights and hidden states go that have no room; None is a temporary folder.
        placement_seconds: how long to wait until a cluster has room for the first replica.
        hang_seconds: a worker that begins no layer for this long is taken to hang, and is replaced.
    """

    executor: str = "auto"
    replicas: int | None = None
    address: str | None = None
    fresh: bool = False
    partition: str = "auto"
    ranks: int | None = None
    gpus_per_replica: int | None = None
    max_memory: Mapping[str, int] = field(default_factory=dict)
    offload_folder: str | None = None
    placement_seconds: float = 300.0
    hang_seconds: float = 600.0

    def __post_init__(self) -> None:
        require_known("executor", self.executor, EXECUTORS)
        require_known("partition", self.partition, PARTITIONS)
        for name in ("replicas", "ranks", "gpus_per_replica"):
            value = getattr(self, name)
            if value is not None:
                _require_at_least(name, value, 1)
        for name in ("placement_seconds", "hang_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name):g}.")
        if self.ranks and self.partition not in GANGS:
            raise ConfigError(
                f"--ranks is for {' and '.join(GANGS)}, not for --partition {self.partition}.", "Leave it out."
            )
        if self.executor == "local" and self.partition in GANGS:
            raise ConfigError(
                f"--partition {self.partition} is several processes; --executor local is one.", "Use --executor ray."
            )
        for device in self.max_memory:
            if device != "cpu" and not device.isdecimal():
                raise ConfigError(
                    f"--max-memory names '{device}', which is no device.",
                    "Write cpu=20GB, or 0=40GiB for the first GPU.",
                )
        if self.executor == "local" and (self.address or (self.replicas or 1) > 1):
            raise ConfigError(
                "--executor local is one replica in this process; it takes neither --address nor --replicas above 1.",
                "Use --executor ray.",
            )


def split_options(options: dict[str, Any]) -> tuple[Settings, Execution]:
    """Keyword options as Settings and Execution.

    Raises:
        ConfigError: an option does not exist (the nearest one is named), or has a value that it cannot have.
    """
    settings, execution = set(Settings.__dataclass_fields__), set(Execution.__dataclass_fields__)
    for name in options:
        require_known("option", name, sorted(settings | execution), ConfigError)
    return (
        Settings(**{name: value for name, value in options.items() if name in settings}),
        Execution(**{name: value for name, value in options.items() if name in execution}),
    )


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}.")


def fingerprint(**parts: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of ``parts``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
