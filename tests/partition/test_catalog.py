"""The catalog's claims about partitions hold for the classes that it names."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import checkpoint_at

import avss_dist
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import open_replica, replica_class


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_partition_has_a_class_that_opens_replicas_and_a_line_in_the_docs(partition: str) -> None:
    opened = replica_class(partition)
    assert list(inspect.signature(opened.forward).parameters) == ["self", "batches", "context"]
    taken = [name.removeprefix("_") for name in inspect.signature(opened).parameters]
    assert taken[:4] == ["checkpoint", "settings", "placement", "head"]
    assert callable(opened.close)
    assert opened.__doc__
    assert callable(opened.usage)
    page = Path(avss_dist.__file__).parent / "docs" / "reference" / "partitions.md"
    assert f"\n| `{partition}` | " in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_replica_is_opened_by_its_name(partition: str, tiny_llama: Path) -> None:
    """In one process; a gang says that it has to be several."""
    placement = Placement(partition=partition, ranks=2 if PARTITIONS[partition].gang else 1)
    if PARTITIONS[partition].gang:
        with pytest.raises(ConfigError, match=f"`partition` {partition} needs a group of 2 processes"):
            open_replica(checkpoint_at(tiny_llama), Settings(device="cpu"), placement)
        return
    replica = open_replica(checkpoint_at(tiny_llama), Settings(device="cpu"), placement)
    assert type(replica) is replica_class(partition)
    assert replica.model["partition"] == partition
    assert len(replica.layers) == 3
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


SIXTH = '''
from avss_dist.partition.replica import Replica


class SixthReplica(Replica):
    """A replica that has an estimate like that of a whole model, and changes nothing else."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.model = {**self.model, "partition": "sixth"}
'''
USE = """
import contextlib, io, json, sys
from avss_dist.partition.catalog import PARTITIONS, PartitionInfo

PARTITIONS["sixth"] = PartitionInfo(opens="sixth:SixthReplica", summary="like single", whole=True)

if __name__ == "__main__":
    import avss_dist
    from avss_dist.cli import app
    from avss_dist.estimation import preview_job
    from avss_dist.runs.local import LocalExecutor, shards_at_once
    from avss_dist.partition.choose import choose, least_host_bytes
    from avss_dist.partition.placement import with_copies
    from avss_dist.partition.replica import open_replica
    from avss_dist.runs.job_file import read_job
    from avss_dist.partition.execution import Execution
    from avss_dist.core.settings import Settings
    from avss_dist.core.devices import devices_here

    model, folder = sys.argv[1:]
    sizes = {"sequence_length": 32, "max_sequences": 4, "sequences_per_shard": 2, "device": "cpu"}
    settings, execution = Settings(**sizes), Execution(partition="sixth")
    placement = choose(None, settings, execution, devices_here("cpu"))
    automatic = choose(None, settings, Execution(), devices_here("cpu"))
    estimate = avss_dist.estimate(model, **sizes)
    row = {row.partition: row for row in estimate.rows}["sixth"]
    job = f"{folder}/job.yaml"
    with open(job, "w") as file:
        json.dump({"warehouse": f"{folder}/w", "models": [model], "corpora": ["builtin:pydoc"], "settings": sizes,
                   "execution": {"partition": "sixth"}}, file)
    (preview,) = preview_job(read_job(job))
    options = {"corpus": "builtin:pydoc", "executor": "local", **sizes}
    sixth = avss_dist.score(model, warehouse=f"{folder}/sixth", partition="sixth", **options)
    single = avss_dist.score(model, warehouse=f"{folder}/single", partition="single", **options)
    with contextlib.redirect_stdout(io.StringIO()) as dry:
        app(["run", job, "--dry-run", "--format", "json"], standalone_mode=False)
    print(json.dumps({
        "command": '"sixth"' in dry.getvalue(),
        "placed": [placement.partition, automatic.partition, with_copies(placement, 3).ranks],
        "estimated": [row.ranks, row.device_bytes > estimate.weight_bytes],
        "preview": [preview.status, preview.partition, preview.error],
        "same": sixth.run_id == single.run_id,
        "equal": sixth.table().equals(single.table()),
    }))
"""


@pytest.mark.nightly
def test_a_sixth_partition_works_everywhere(tiny_llama: Path, tmp_path: Path) -> None:
    """In a process of its own, which registers it before anything reads the catalog, as a line there would."""
    (tmp_path / "sixth.py").write_text(SIXTH)
    use_file = tmp_path / "use.py"
    use_file.write_text(USE)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, use_file, tiny_llama, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {
        "command": True,
        "placed": ["sixth", "single", 3],
        "estimated": [1, True],
        "preview": ["missing", "sixth", None],
        "same": True,
        "equal": True,
    }
