"""The size of shards that nobody named: from the model, the kind of device and the text alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama

import avss_dist
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.models.size import Footprint, footprint
from avss_dist.runs.shard_size import FEWEST_SHARDS, FLOPS_OF_A_GPU, FLOPS_OF_A_THREAD, MOST_SECONDS, rows_per_shard
from avss_dist.warehouse.reader import Warehouse

OPTIONS: dict[str, Any] = {"corpus": "builtin:pydoc", "sequence_length": 64, "batch_size": 2, "partition": "single"}


def model(billions: float) -> Footprint:
    """A model of 32 layers in bfloat16."""
    return Footprint(
        num_parameters=int(billions * 1e9),
        weight_bytes=int(2 * billions * 1e9),
        layer_bytes=(int(billions * 2e9 / 32),) * 32,
        other_bytes=0,
        module_bytes=(int(billions * 2e9 / 32),) * 32,
        num_layers=32,
        hidden_size=4096,
        dtype="bfloat16",
        attention="sdpa",
        num_heads=32,
        attention_width=4096,
        attention_layers=32,
        matmul_parameters=int(billions * 1e9),
        mlp_width=14336,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [256, 2048])
@pytest.mark.parametrize("billions", [0.1, 0.5, 1.5, 8, 70])
def test_a_shard_is_about_a_minute_of_a_usual_device(billions: float, length: int, device: str) -> None:
    """Or a batch, where that is longer; or what waits in four GiB, where that is shorter."""
    settings, size = Settings(sequence_length=length, device=device), model(billions)
    rows = rows_per_shard(size, settings, 1 << 30)
    speed = (FLOPS_OF_A_GPU if device == "cuda" else FLOPS_OF_A_THREAD)[2]
    seconds = size.forward_flops(rows, length) / speed
    assert rows / 8 in [2**k for k in range(20)]
    assert seconds <= MOST_SECONDS or rows == 8
    assert seconds > MOST_SECONDS / 2 or size.hidden_bytes(2 * rows, length) > 4 << 30
    assert rows_per_shard(replace(size, dtype="float32"), settings, 1 << 30) in (rows // 16, rows // 8, rows // 2, 8)


@pytest.mark.parametrize("batch_size", [1, 6, 8, 64])
@pytest.mark.parametrize("num_sequences", [1, 5, 15, 16, 17, 63, 160, 1000, 4096, 100_000])
def test_a_text_gives_enough_shards_for_intervals(num_sequences: int, batch_size: int) -> None:
    for size in (None, model(0.1), model(70)):
        rows = rows_per_shard(size, Settings(batch_size=batch_size, device="cpu"), num_sequences)
        assert rows >= 1 and -(-num_sequences // rows) >= min(num_sequences, FEWEST_SHARDS)
        assert rows < batch_size or rows % batch_size == 0
        assert rows >= min(batch_size, num_sequences // FEWEST_SHARDS)


def test_a_run_keeps_its_shards_however_it_is_made(tiny_llama: Path, tmp_path: Path) -> None:
    """Of any number of workers and any partition, and named by hand: one run, which is done once."""
    run = avss_dist.score(tiny_llama, warehouse=tmp_path, executor="local", max_sequences=100, **OPTIONS)
    (row,) = Warehouse(tmp_path).runs().to_pylist()
    assert (run.num_shards, json.loads(row["settings"])["sequences_per_shard"]) == (25, 4)
    for changes in ({"partition": "streaming"}, {"sequences_per_shard": 4}, {"partition": "auto"}):
        again = avss_dist.score(
            tiny_llama, warehouse=tmp_path, executor="local", max_sequences=100, **{**OPTIONS, **changes}
        )
        assert (again.status, again.run_id) == ("skipped", run.run_id)
    named = avss_dist.score(
        tiny_llama, warehouse=tmp_path, executor="local", max_sequences=100, sequences_per_shard=32, **OPTIONS
    )
    assert (named.status, named.num_shards) == ("done", 4) and named.run_id != run.run_id


def test_models_of_one_tokenizer_share_the_tokens_and_not_the_shards(
    tiny_llama: Path, save_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avss_dist.runs import planner, shard_size

    wide = save_checkpoint(llama(hidden_size=64, intermediate_size=512), tmp_path / "wide")
    small = Settings(sequence_length=64, batch_size=2, device="cpu")
    flops = footprint(resolve(str(tiny_llama)), small).forward_flops(9, 64)
    monkeypatch.setattr(shard_size, "FLOPS_OF_A_THREAD", {4: flops / MOST_SECONDS})  # nine rows of the small model
    read: list[str] = []
    own = planner.tokenize_corpus

    def spy(source: str, *arguments: Any) -> Any:
        read.append(source)
        return own(source, *arguments)

    monkeypatch.setattr(planner, "tokenize_corpus", spy)
    options = {**OPTIONS, "executor": "local", "max_sequences": 320}
    runs = avss_dist.score_all([str(tiny_llama), str(wide)], warehouse=tmp_path / "w", **options)
    assert [run.num_shards for run in runs] == [40, 160] and read == ["builtin:pydoc"]
