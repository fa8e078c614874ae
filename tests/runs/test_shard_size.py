"""The default size of shards: from the model, the kind of device and the text alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama
from support.planning import plan, run_spec

from avss_dist.core.settings import Settings
from avss_dist.executors.local import LocalExecutor
from avss_dist.models.checkpoints import resolve
from avss_dist.models.size import Footprint, footprint
from avss_dist.runs import planner
from avss_dist.runs.planner import FEWEST_SHARDS, FLOPS_OF_A_GPU, FLOPS_OF_A_THREAD, MOST_SECONDS, rows_per_shard
from avss_dist.warehouse.store import Store

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
    """It is a batch if that is longer, and has hidden states of at most four GiB."""
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
    """The partition does not matter, nor whether the size is given."""
    options = {**OPTIONS, "max_sequences": 100}
    planned = plan(tiny_llama, tmp_path, **options)
    assert (planned.run.num_shards, planned.replica_spec.settings.sequences_per_shard) == (25, 4)
    for changes in ({"partition": "streaming"}, {"sequences_per_shard": 4}, {"partition": "auto"}):
        assert plan(tiny_llama, tmp_path, **{**options, **changes}).run.run_id == planned.run.run_id
    other = plan(tiny_llama, tmp_path, **options, sequences_per_shard=32).run
    assert other.num_shards == 4 and other.run_id != planned.run.run_id


def test_models_of_one_tokenizer_share_the_tokens_and_not_the_shards(
    tiny_llama: Path, save_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = save_checkpoint(llama(hidden_size=64, intermediate_size=512), tmp_path / "wide")
    small = Settings(sequence_length=64, batch_size=2, device="cpu")
    flops = footprint(resolve(str(tiny_llama)), small).forward_flops(9, 64)
    monkeypatch.setattr(planner, "FLOPS_OF_A_THREAD", {4: flops / MOST_SECONDS})  # nine rows of the small model
    read: list[str] = []
    tokenize = planner.tokenize_corpus

    def spy(source: str, *arguments: Any) -> Any:
        read.append(source)
        return tokenize(source, *arguments)

    monkeypatch.setattr(planner, "tokenize_corpus", spy)
    planning = planner.Planner(LocalExecutor(small), Store(tmp_path))
    specs = [run_spec(model, **OPTIONS, max_sequences=320) for model in (tiny_llama, wide)]
    assert [planning.prepare(spec).run.num_shards for spec in specs] == [40, 160] and read == ["builtin:pydoc"]
