"""Refusals of work that a partition cannot do, or that is more than the user can have meant."""

from __future__ import annotations

from collections.abc import Callable

from avss_dist.core.errors import ConfigError
from avss_dist.partition.catalog import PARTITIONS, PartitionInfo

MOST_LISTED = 1_000_000
"""Units of work, such as evaluations or permutations, that can be listed. All are, before the first is measured."""


def require_partition(
    partition: str, is_able: Callable[[PartitionInfo], bool], problem: str, hint: str = "Use {}."
) -> None:
    """Refuse a partition without a capability. ``auto`` is not refused.

    Args:
        is_able: whether a partition has the capability.
        problem: end of the message, such as "has no gradients."
        hint: hint of the error, with a place for the partitions that have the capability.

    Raises:
        ConfigError: the partition lacks the capability.
    """
    if partition != "auto" and not is_able(PARTITIONS[partition]):
        able = ", ".join(name for name, info in PARTITIONS.items() if is_able(info))
        raise ConfigError(f"`partition` {partition} {problem}", hint.format(able))


def require_intended(number: int, maximum: int, message: str, hint: str, *, allow_many: bool) -> None:
    """Refuse more work than a maximum unless ``allow_many`` is set. Call it before work of that size is listed.

    Args:
        number: units of work.
        maximum: units of work that need no permission.
        message: message of the error, with a place for the number: ``"{} passes would be made"``.
        hint: options that reduce the work.

    Raises:
        ConfigError: ``number`` is larger than ``maximum``, and ``allow_many`` is not set.
    """
    if number > maximum and not allow_many:
        raise ConfigError(f"{message.format(f'{number:,}')}.", f"{hint} More than {maximum:,} need `allow_many`.")


def require_listable(number: int, units: str, hint: str) -> None:
    """Refuse more units of work than can be listed, even if ``allow_many`` is set.

    Args:
        units: name of the units, a plural.
        hint: options that reduce the work.

    Raises:
        ConfigError: ``number`` is larger than `MOST_LISTED`.
    """
    if number > MOST_LISTED:
        raise ConfigError(f"{number:,} {units} are more than one command takes: {MOST_LISTED:,}.", hint)
