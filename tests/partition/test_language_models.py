"""Every question to every partition that one process holds: the answers of `single`, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lm import random_shard
from support.checkpoints import checkpoint_at
from support.questions import WHOLLY_ASKED, answers, assert_same, composed, generated, write_questions
from support.tiers import all_of

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.size import footprint
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica, open_replica
from avss_dist.partition.streaming.replica import StreamingReplica
from avss_dist.tasks.harness import harness_task
from avss_dist.tasks.text_loss import LeaveOneOut

SETTINGS = Settings(batch_size=2, sequence_length=24, dtype="float32", device="cpu")
TOWERS = ("gemma3", "blip-2")  # read as text; that of blip-2 is a causal model of its own
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "mamba", "qwen3_moe", *TOWERS)
OTHERS = ("falcon", "bloom")  # whose layers give on more than hidden states


@pytest.fixture
def folder_of(family_folder: Callable[[str, str], Path]) -> Callable[[str], Path]:
    return lambda family: family_folder("image-text" if family in TOWERS else "causal", family)


def opened(folder: Path, partition: str, settings: Settings = SETTINGS, **placement: Any) -> Replica:
    return open_replica(checkpoint_at(folder), settings, Placement(partition=partition, **placement), head=True)


def model_of(replica: Replica) -> LanguageModel:
    assert replica.language_model is not None
    return replica.language_model


def room(folder: Path, layers: int) -> dict[str, int]:
    """Memory for what is no layer, and so many layers."""
    size = footprint(checkpoint_at(folder), SETTINGS)
    return {"cpu": size.weight_bytes - sum(size.layer_bytes) + layers * (max(size.layer_bytes) + 512)}


@pytest.mark.parametrize("family", all_of([*FAMILIES, *OTHERS], ["gpt2"]))
def test_streaming_answers_as_one_device_does(family: str, folder_of: Callable[[str], Path]) -> None:
    """With room for no hidden state, so that those that wait are in files; one family also without limit."""
    single = opened(folder_of(family), "single")
    skip = (*composed(family), *(("gradients",) if family in OTHERS else ()))
    expected = answers(model_of(single), skip)
    text = generated(model_of(single))
    for limit in (room(folder_of(family), 2), *([{}] if family == WHOLLY_ASKED else [])):
        streaming = opened(folder_of(family), "streaming", max_memory=limit)
        assert_same(answers(model_of(streaming), skip), expected)
        if family in OTHERS:
            with pytest.raises(ModelError, match=f"streaming has no gradients of a {family} model"):
                answers(model_of(streaming), ("loss", "leave", "sublayers", "shapley"))
        assert torch.equal(generated(model_of(streaming)), text)
        assert any("without a key-value cache" in note for note in model_of(streaming).notes)
        streaming.close()
    single.close()


@pytest.mark.nightly
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_device_map_answers_as_one_device_does(family: str, folder_of: Callable[[str], Path]) -> None:
    """Two layers are on disk; then nothing is, and there are gradients, which is tried of one family."""
    single = opened(folder_of(family), "single")
    on_disk = opened(folder_of(family), "device_map", max_memory=room(folder_of(family), 1))
    expected = answers(model_of(single), composed(family))
    some = {name: rows for name, rows in expected.items() if not name.startswith("gradients")}
    assert_same(answers(model_of(on_disk), skip=(*composed(family), "gradients")), some)
    assert torch.equal(generated(model_of(on_disk)), generated(model_of(single)))
    with pytest.raises(ModelError, match=r"device_map.*no gradients(?s:.*)streaming"):
        answers(model_of(on_disk), skip=("loss", "leave", "sublayers", "shapley"))
    on_disk.close()
    if family != WHOLLY_ASKED:
        return
    in_memory = opened(folder_of(family), "device_map")
    assert_same(answers(model_of(in_memory), composed(family)), expected)


@pytest.mark.parametrize("partition", all_of(["streaming", "device_map"], ["streaming"]))
def test_the_harness_is_answered_as_by_one_device(partition: str, tiny_llama: Path, tmp_path: Path) -> None:
    """All batches of a task are asked together: streaming reads the weights once for them."""
    (measure,) = harness_task(write_questions(tmp_path)).parts
    expected = measure(model_of(opened(tiny_llama, "single")), NO_INTERVENTION.without(1))
    replica = opened(tiny_llama, partition, max_memory=room(tiny_llama, 2))
    before = replica._weights.bytes_read if partition == "streaming" else 0
    found = measure(model_of(replica), NO_INTERVENTION.without(1))
    assert [row.samples.tolist() for row in found] == [row.samples.tolist() for row in expected]
    if isinstance(replica, StreamingReplica):
        layers = sum(footprint(checkpoint_at(tiny_llama), SETTINGS).layer_bytes)
        assert replica._weights.bytes_read - before == layers * 2 // 3  # of three layers two


def test_leave_one_out_reads_each_weight_once(folder_of: Callable[[str], Path]) -> None:
    """However many layers are left out in turn; and once more for each group of batches that has no room."""
    folder = folder_of("llama")
    layers = sum(footprint(checkpoint_at(folder), SETTINGS).layer_bytes)
    for limit, groups in (({}, 1), (room(folder, 2), 3)):
        replica = opened(folder, "streaming", max_memory=limit)
        assert isinstance(replica, StreamingReplica)
        before = replica._weights.bytes_read
        LeaveOneOut(random_shard())(model_of(replica))
        assert replica._weights.bytes_read - before == groups * layers
