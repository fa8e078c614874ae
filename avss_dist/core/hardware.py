"""GPUs by name with their published peak numbers, for estimates of runs on hardware that is not at hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from avss_dist.core.errors import ConfigError, nearest

ASSUMED_EFFICIENCY = 0.5
"""Share of a published peak that is assumed to be reached: of arithmetic, of memory, and of links."""
_HARDWARE = re.compile(r"(?:(\d{1,6})x)?(\d{1,6})x(.+)", re.IGNORECASE)
_EXAMPLE = "Write GPUS and NAME (8xH100), for several nodes with their number in front (4x8xH100)."


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in a server of its maker.

    Attributes:
        memory: bytes.
        flops: peak floating-point operations per second of dense matrix products, by the bytes of an element.
        bandwidth: bytes per second from its memory.
        link: bytes per second that it receives from GPUs of its node.
        host_link: bytes per second that it receives from host memory.
        network: bytes per second that it receives from other nodes.
        host_memory: bytes of host memory of a node.
        source: publication of these numbers.
    """

    memory: int
    flops: Mapping[int, float]
    bandwidth: float
    link: float
    host_link: float
    network: float
    host_memory: int
    source: str


GPUS = {
    "H100": Gpu(
        memory=80 * 10**9,
        flops={2: 989e12, 4: 67e12},
        bandwidth=3.35e12,
        link=450e9,  # NVLink: 900 GB/s both directions
        host_link=64e9,  # PCIe 5: 128 GB/s both directions
        network=50e9,  # 400 Gb/s
        host_memory=2 * 10**12,
        source="NVIDIA H100 SXM and DGX H100 data sheets",
    ),
    "H200": Gpu(
        memory=141 * 10**9,
        flops={2: 989e12, 4: 67e12},
        bandwidth=4.8e12,
        link=450e9,
        host_link=64e9,
        network=50e9,
        host_memory=2 * 10**12,
        source="NVIDIA H200 SXM and DGX H200 data sheets",
    ),
    "A100": Gpu(
        memory=80 * 10**9,
        flops={2: 312e12, 4: 19.5e12},
        bandwidth=2.039e12,
        link=300e9,  # NVLink: 600 GB/s both directions
        host_link=32e9,  # PCIe 4: 64 GB/s both directions
        network=25e9,  # 200 Gb/s
        host_memory=2 * 10**12,
        source="NVIDIA A100 80GB SXM and DGX A100 640GB data sheets",
    ),
}
"""GPUs by name."""


@dataclass(frozen=True)
class Hardware:
    """Nodes of equally many GPUs of one kind, written ``8xH100`` or ``4x8xH100``.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: number of GPUs of each node.
        name: a name of `GPUS`.
    """

    nodes: int
    gpus_per_node: int
    name: str

    def __str__(self) -> str:
        return f"{self.nodes}x" * (self.nodes > 1) + f"{self.gpus_per_node}x{self.name}"

    @property
    def gpu(self) -> Gpu:
        """Numbers of each GPU."""
        return GPUS[self.name]


def parse_hardware(value: Any) -> Any:
    """Return the hardware that a text such as ``4x8xH100`` describes; other values are returned as they are.

    Raises:
        ConfigError: the text has another form, or names an unknown GPU.
    """
    if not isinstance(value, str):
        return value
    match = _HARDWARE.fullmatch(value.strip())
    if not match:
        raise ConfigError(f"invalid hardware '{value}': expected a number of GPUs and their name.", _EXAMPLE)
    nodes, gpus, name = int(match[1] or 1), int(match[2]), match[3].upper()
    if min(nodes, gpus) < 1:
        raise ConfigError(f"invalid hardware '{value}': the numbers of nodes and GPUs must be at least 1.", _EXAMPLE)
    if name not in GPUS:
        raise ConfigError(f"'{match[3]}' is not a GPU whose speed is known here.", nearest(name, GPUS))
    return Hardware(nodes, gpus, name)
