"""The memory of a distillation, estimated for one process and for ranks that divide it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.command_line import avss
from support.devices import devices_of

from avss_dist.core.errors import ConfigError
from avss_dist.core.registry import SHARDINGS
from avss_dist.core.settings import Settings
from avss_dist.distillation.memory import LIBRARIES
from avss_dist.estimation.estimate import DistillRow, distillation_rows
from avss_dist.models.checkpoints import locate
from avss_dist.models.size import sharing_skeletons
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.plan import Plan
from avss_dist.requests import EstimateRequest
from avss_dist.system.devices import Devices

SETTINGS = Settings(batch_size=8, sequence_length=32, device="cpu")


@pytest.fixture(scope="module")
def student(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    prune(str(tiny_llama), Plan(model=str(tiny_llama), num_layers=3, layers="layers", drop=(1,)), folder)
    return folder


def rows_of(student: Path, teacher: Path, devices: Devices, **options: Any) -> Sequence[DistillRow]:
    request = EstimateRequest(str(student), teacher=str(teacher), batch_size=8, **options)
    checkpoint = locate(str(student))
    assert checkpoint is not None
    return list(distillation_rows(checkpoint, request, SETTINGS, devices))


def test_each_way_has_a_row(student: Path, tiny_llama: Path) -> None:
    """What is divided is less with more ranks; on a CPU all ranks need their memory on one host."""
    devices = devices_of("cpu", 2 * LIBRARIES)
    rows = {(row.train, row.sharding): row for row in rows_of(student, tiny_llama, devices)}
    assert list(rows) == [(train, name) for train in ("all", "lora") for name in ("", *SHARDINGS)]
    assert all(
        row.ranks == (2 if sharding else 1) and row.fits != bool(sharding) for (_, sharding), row in rows.items()
    )
    trained = [rows[train, ""].trained for train in ("all", "lora")]
    assert trained[0] > trained[1] > 0
    eight = {row.sharding: row for row in rows_of(student, tiny_llama, devices, ranks=8) if row.train == "all"}
    assert eight["zero3"].device_bytes < eight["zero2"].device_bytes < eight["zero1"].device_bytes
    assert eight["fsdp"].device_bytes < eight["ddp"].device_bytes < rows["all", "ddp"].device_bytes
    assert "exchange" in eight["fsdp"].why and "exchange" not in eight[""].why


def test_an_adapter_is_not_left_in_a_shared_skeleton(student: Path, tiny_llama: Path) -> None:
    devices = devices_of("cpu", 2**40)
    apart = rows_of(student, tiny_llama, devices)
    with sharing_skeletons():
        assert [rows_of(student, tiny_llama, devices) for _ in range(2)] == [apart] * 2


def test_a_gpu_has_no_libraries_and_each_rank_needs_one(student: Path, tiny_llama: Path) -> None:
    on_cpu = rows_of(student, tiny_llama, devices_of("cpu", 2**40), ranks=4, dtype="float32")
    on_gpus = rows_of(student, tiny_llama, devices_of("cuda", 2**40, count=2), ranks=4, dtype="float32")
    assert {a.device_bytes - b.device_bytes for a, b in zip(on_cpu, on_gpus, strict=True)} == {LIBRARIES}
    assert [row.fits for row in on_gpus[:3]] == [True, False, False]


def test_rows_that_ranks_cannot_divide_are_refused(student: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="`batch_size` 8 cannot be divided among 3 `ranks`"):
        rows_of(student, tiny_llama, devices_of("cpu", 2**40), ranks=3)


def test_the_command_tells_it_where_a_teacher_is_named(student: Path, tiny_llama: Path) -> None:
    command = ["estimate", student, "--sequence-length", 32, "--device", "cpu"]
    told = json.loads(avss(*command, "--teacher", tiny_llama, "--format", "json").stdout)
    assert {row["train"] for row in told["distillation"]} == {"all", "lora"}
    shown = avss(*command, "--teacher", tiny_llama).stdout
    assert "one process" in shown and "fsdp" in shown
