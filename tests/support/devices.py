"""Devices that are not here."""

from __future__ import annotations

from avss_dist.core.devices import Devices


def devices_of(kind: str, device_bytes: int, *, count: int = 1, nodes: int = 1, host_bytes: int = 0) -> Devices:
    """Return devices of one kind; those of CPUs have the memory of the host.

    Args:
        count: GPUs of all nodes.
        host_bytes: memory of each host; by default that of a device.
    """
    return Devices(
        kind=kind,
        count=count,
        count_of_largest_node=count // nodes,
        device_bytes=device_bytes,
        host_bytes=host_bytes or device_bytes,
        cpus=count,
        cpus_of_largest_node=count // nodes,
    )
