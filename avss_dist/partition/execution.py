"""Execution of work: workers, their devices, and a cluster. No option here can change a number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, WithJsonSchema
from pydantic_core import PydanticKnownError

from avss_dist.core.errors import ConfigError
from avss_dist.core.validation import RARE, Accepts, Bytes, OneOf, Positive, Seconds, check, checked
from avss_dist.partition.catalog import GANGS, PARTITIONS

EXECUTORS = ("auto", "local", "ray")


def _device_name(name: str) -> str:
    if name != "cpu" and not (name.isascii() and name.isdecimal()):
        raise ConfigError(
            f"'{name}' is not a device: expected cpu or the number of a GPU.",
            "Write cpu=20GB, or 0=40GiB for the first GPU.",
        )
    return name


def _by_device(sizes: Iterable[object] | Mapping[str, object]) -> Mapping[str, object]:
    """Return sizes by device from texts such as ``cpu=20GB``."""
    if isinstance(sizes, Mapping):
        return sizes
    by_device = {}
    for text in sizes:
        name, equals, size = str(text).partition("=")
        if not equals:
            raise ConfigError(f"{name} names no device.", "Write cpu=20GB, or 0=40GiB for the first GPU.")
        by_device[name] = size
    return by_device


Sizes = Annotated[Mapping[Annotated[str, check(_device_name)], Bytes], check(_by_device, before=True)]
"""Sizes of memory by device: ``cpu``, or the number of a GPU."""
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
        if self.minimum == 1:
            return str(self.maximum)
        return f"{self.minimum}..{self.maximum}"


def _replicas(value: object) -> Replicas:
    """Return replicas from a number, from text such as ``4..64``, or from replicas, which may be out of range."""
    match = _REPLICAS.fullmatch(str(value).strip())
    if not match:
        raise ConfigError(
            f"invalid replica count '{value}': expected an integer (8) or a range (4..64).",
            "4..64 starts with 4 copies, and uses up to 64 when there is room.",
        )
    replicas = Replicas(minimum=int(match[1] or 1), maximum=int(match[2]))
    if replicas.minimum < 1 or replicas.maximum < 1:
        raise PydanticKnownError("greater_than_equal", {"ge": 1})
    if replicas.minimum > replicas.maximum:
        raise ConfigError(
            f"the minimum of '{value}' is larger than its maximum.", f"Write {replicas.maximum}..{replicas.minimum}."
        )
    return replicas


ReplicaRange = Annotated[
    Replicas,
    check(_replicas, before=True),
    WithJsonSchema(
        {"type": ["integer", "string"], "minimum": 1, "pattern": r"^([1-9]\d*\.\.)?[1-9]\d*$", "examples": [8, "4..64"]}
    ),
    Accepts("int | str"),
]
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # Ray's syntax, without operators


def _node_label(value: str) -> str:
    key, _, label = value.partition("=")
    if not key or not _LABEL_VALUE.fullmatch(label):
        raise ConfigError(f"'{value}' is no label of a node.", "Write KEY=VALUE: ray.io/accelerator-type=H100.")
    return value


def _single_values(labels: tuple[str, ...]) -> tuple[str, ...]:
    names = [label.partition("=")[0] for label in labels]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"a node has one value of '{name}'; several were given", "Give one.")
    return labels


NodeLabels = Annotated[tuple[Annotated[str, check(_node_label)], ...], Field(strict=False), check(_single_values)]
"""Labels of nodes, ``KEY=VALUE``, each key once."""


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
        gangs = f"{', '.join(GANGS[:-1])} and {GANGS[-1]}"
        is_local = self.executor == "local"
        needs_cluster = self.address or (self.replicas and self.replicas.maximum > 1)
        problems = []
        if self.ranks and self.partition not in GANGS:
            message = f"`ranks` applies to {gangs}, not to `partition` {self.partition}."
            problems.append(ConfigError(message, "Leave it out."))
        if is_local and self.partition in GANGS:
            message = f"`partition` {self.partition} needs several processes; `executor` local is one."
            problems.append(ConfigError(message, "Use `executor` ray."))
        if is_local and needs_cluster:
            message = (
                "`executor` local is one replica in this process; it takes neither `address` nor `replicas` above 1."
            )
            problems.append(ConfigError(message, "Use `executor` ray."))
        if is_local and self.node_labels:
            message = "`node_labels` chooses nodes of a cluster; `executor` local is this process."
            problems.append(ConfigError(message, "Use `executor` ray, with an `address`."))
        if problems:
            raise ConfigError.combine(problems)
