"""The device_map partition: weights in memory, half on disk or all on disk, the same bytes come out."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lm import packed_or_padded
from support.checkpoints import checkpoint_at, llama
from support.families import tiny_model
from support.ggufs import write_gguf
from support.oracle import assert_same_result
from support.tiers import nightly

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Shard
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.size import footprint, sharing_skeletons
from avss_dist.partition.choose import gpus_filled
from avss_dist.partition.device_map import DeviceMapReplica, require_complete, spread
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica, open_replica
from avss_dist.stats.layer_stats import ShardResult

SETTINGS = Settings(batch_size=2, sequence_length=24, dtype="float32", device="cpu")
CLASSES = [("causal", "llama"), ("causal", "mixtral"), ("masked", "bert")]
OTHERS = [("causal", family) for family in ("gemma3_text", "gpt2", "gpt_neox", "bloom", "mamba")]


def placed(checkpoint: Checkpoint, cpu: int, settings: Settings = SETTINGS) -> Any:
    """A replica whose weights may take ``cpu`` bytes of memory."""
    placement = Placement(partition="device_map", max_memory={"cpu": cpu})
    return open_replica(checkpoint, settings, placement)


def measured(replica: Any, shard: Shard, settings: Settings = SETTINGS) -> ShardResult:
    result = analyze_shard(replica, shard, settings)
    replica.close()
    return result


def room_for(checkpoint: Checkpoint) -> int:
    """Bytes into which everything fits but half of a layer."""
    size = footprint(checkpoint, SETTINGS)
    return size.weight_bytes - min(size.layer_bytes) // 2


def on_disk(replica: Any) -> list[bool]:
    """Of each layer, whether its weights are not in memory."""
    return [all(p.is_meta for p in layer.module.parameters()) for layer in replica.layers]


@pytest.mark.parametrize(("kind", "family"), [*CLASSES, *nightly(*OTHERS)])
def test_statistics_are_those_of_single(
    kind: str, family: str, family_folder: Callable[[str, str], Path], offload: Path
) -> None:
    """A packed and a padded shard through the same replica; of Llama also where all is in memory."""
    checkpoint = checkpoint_at(family_folder(kind, family))
    shards = [packed_or_padded(padded=padded) for padded in (False, True)]
    single = Replica(checkpoint, SETTINGS)
    expected = [analyze_shard(single, shard, SETTINGS) for shard in shards]
    limits = [(room_for(checkpoint), False, True), (1, True, True)]
    for cpu, first, last in (*limits, *([(1 << 40, False, False)] if family == "llama" else [])):
        replica = placed(checkpoint, cpu)
        assert (on_disk(replica)[0], on_disk(replica)[-1]) == (first, last)
        for shard, wanted in zip(shards, expected, strict=True):
            assert_same_result(analyze_shard(replica, shard, SETTINGS), wanted)
        replica.close()
    assert list(offload.iterdir()) == []


def test_bfloat16_and_a_dtype_that_is_not_stored(tiny_llama: Path) -> None:
    checkpoint = checkpoint_at(tiny_llama)
    settings = replace(SETTINGS, dtype="bfloat16")
    shard = packed_or_padded()
    expected = measured(Replica(checkpoint, settings), shard, settings)
    assert_same_result(measured(placed(checkpoint, 1, settings=settings), shard, settings), expected)


def test_layers_are_not_split(tiny_llama: Path) -> None:
    checkpoint = checkpoint_at(tiny_llama)
    replica = placed(checkpoint, room_for(checkpoint))
    layers = {name: device for name, device in replica.device_map.items() if name.startswith("model.layers.")}
    assert layers.keys() == {f"model.layers.{i}" for i in range(3)}
    assert layers["model.layers.0"] == "cpu"
    assert layers["model.layers.2"] == "disk"
    replica.close()


def test_weights_on_disk_stay_there_and_activations_do_not(tiny_llama: Path) -> None:
    """Between batches nothing of an offloaded layer is in memory; its output is where the model computes."""
    checkpoint = checkpoint_at(tiny_llama)
    replica = placed(checkpoint, 1)
    layer = replica.layers[1].module
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(2):
        replica.forward(list(packed_or_padded().batches(2)), lambda batch: torch.no_grad())
        assert all(p.device.type == "meta" for p in layer.parameters())
    assert len(seen) == 6
    assert all(t.device == replica.device and t.isfinite().all() for t in seen)
    replica.close()


def test_what_must_be_rewritten_is_and_is_removed(
    family_folder: Callable[[str, str], Path], offload: Path, tiny_llama: Path
) -> None:
    """Experts that are fused when they are loaded go into a folder of the replica's own; Llama needs none."""
    replica = placed(checkpoint_at(family_folder("causal", "mixtral")), 1)
    written = [file.name for file in offload.rglob("*.safetensors")]
    assert written
    assert all("experts" in name for name in written)
    replica.close()
    assert list(offload.iterdir()) == []
    replica = placed(checkpoint_at(tiny_llama), 1)
    assert not list(offload.rglob("*.safetensors"))
    replica.close()


def test_close_frees_the_weights(tiny_llama: Path) -> None:
    import gc
    import weakref

    checkpoint = checkpoint_at(tiny_llama)
    replica = placed(checkpoint, room_for(checkpoint))
    module = weakref.ref(replica.layers[0].module)
    assert module() is not None
    replica.close()
    gc.collect()
    assert module() is None


def test_a_model_that_does_not_open_leaves_nothing(tmp_path: Path, offload: Path, tiny_llama: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(ModelError):
        placed(checkpoint_at(folder), 1)
    assert list(offload.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("cup", "names 'cup', which is no device", "Did you mean 'cpu'"),
        ("0", "names GPU 0; this replica has no GPUs", "Valid: cpu"),
        ("-1", "names '-1', which is no device", "Valid: cpu"),
    ],
)
def test_a_device_that_is_not_here_is_refused(name: str, said: str, hint: str, tiny_llama: Path) -> None:
    placement = Placement(partition="device_map", max_memory={name: 1000})
    with pytest.raises(ConfigError) as raised:
        DeviceMapReplica(checkpoint_at(tiny_llama), SETTINGS, placement)
    assert said in raised.value.message
    assert hint in (raised.value.hint or "")


def test_a_full_offload_folder_is_refused(
    family_folder: Callable[[str, str], Path], offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is said to be nearly full; the fused experts of Mixtral need more than that."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    checkpoint = checkpoint_at(family_folder("causal", "mixtral"))
    with pytest.raises(ConfigError, match=r"needs 1\.18 MB and has 1 kB free: 1\.18 MB of weights have no place"):
        placed(checkpoint, 1)
    assert list(offload.iterdir()) == []
    placed(checkpoint, 1 << 40).close()  # all in memory: the disk does not matter


def test_a_gguf_file_stays_in_memory(tmp_path: Path) -> None:
    checkpoint = checkpoint_at(write_gguf(llama(), tmp_path / "tiny.gguf"))
    shard = packed_or_padded()
    expected = measured(Replica(checkpoint, SETTINGS), shard)
    assert_same_result(measured(placed(checkpoint, 1 << 40), shard), expected)
    with pytest.raises(ConfigError, match=r"134 kB of weights have no place: those of a \.gguf file"):
        placed(checkpoint, 1)


def test_a_folder_that_cannot_be_written_is_refused(offload: Path, tiny_llama: Path) -> None:
    offload.rmdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        placed(checkpoint_at(tiny_llama), 1)


@pytest.mark.parametrize(("kind", "family"), [("causal", "llama"), *nightly(("image-text", "gemma3"))])
def test_the_fewest_gpus_on_which_all_weights_fit(kind: str, family: str, tmp_path: Path) -> None:
    """As counted from sizes alone; with one GPU fewer, weights go to host memory."""
    tiny_model(kind, family).save_pretrained(tmp_path)
    size = footprint(str(tmp_path), SETTINGS)

    def on_host(gpus: int, room: int) -> int:
        limits = {**dict.fromkeys(range(gpus), room), "cpu": 1 << 40}
        return spread(checkpoint_at(tmp_path), SETTINGS, limits)[0].get("cpu", 0)

    with sharing_skeletons():
        for share in (1.0, 1.2, 1.5, 2.0):
            room = int(share * max(size.module_bytes))
            gpus = int(gpus_filled(size, room))
            assert on_host(gpus, room) == 0
            assert gpus == 2 or on_host(gpus - 1, room)


def test_an_incomplete_map_is_refused() -> None:
    model = llama()
    require_complete(model, {"model": "cpu", "lm_head": "disk"})
    with pytest.raises(ConfigError, match=r"no place for 41 kB of weights, lm_head\.weight first"):
        require_complete(model, {"model": "cpu"})
