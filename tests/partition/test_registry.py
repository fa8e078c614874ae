"""The registry's claims about partitions hold for the classes that it names."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import avss_dist
from avss_dist.core.errors import ConfigError
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Execution, Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.partition.memory import PartitionMemory
from avss_dist.partition.replica import Placement, open_replica, replica_class


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_partition_has_a_class_that_opens_replicas_and_a_line_in_the_docs(partition: str) -> None:
    opened = replica_class(partition)
    assert list(inspect.signature(opened.forward).parameters) == ["self", "batches", "context"]
    taken = [name.removeprefix("_") for name in inspect.signature(opened).parameters]
    assert taken == ["checkpoint", "settings", "placement", "head"]
    assert callable(opened.close) and opened.__doc__ and issubclass(opened.memory, PartitionMemory)
    page = Path(avss_dist.__file__).parent / "docs" / "reference" / "partitions.md"
    assert f"\n| `{partition}` | " in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_replica_is_opened_by_its_name(partition: str, tiny_llama: Path) -> None:
    """In one process; a gang says that it has to be several."""
    placement = Placement(partition=partition, ranks=2 if PARTITIONS[partition].gang else 1)
    if PARTITIONS[partition].gang:
        with pytest.raises(ConfigError, match=f"`partition` {partition} needs a group of 2 processes"):
            open_replica(resolve(str(tiny_llama)), Settings(device="cpu"), placement)
        return
    replica = open_replica(resolve(str(tiny_llama)), Settings(device="cpu"), placement)
    assert type(replica) is replica_class(partition)
    assert replica.model["partition"] == partition and len(replica.layers) == 3
    replica.close()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_gangs_alone_take_ranks_and_need_several_processes(partition: str) -> None:
    if PARTITIONS[partition].gang:
        assert Execution(partition=partition, ranks=3).ranks == 3
        with pytest.raises(ConfigError, match="several processes"):
            Execution(partition=partition, executor="local")
    else:
        with pytest.raises(ConfigError, match="`ranks` applies to fsdp, zero3, tensor_parallel and expert_parallel"):
            Execution(partition=partition, ranks=3)
        assert Execution(partition=partition, executor="local").partition == partition
