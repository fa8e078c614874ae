"""What a plan saves, and how many layers a budget takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import LAYERS

from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_model
from avss_dist.models.size import Footprint, footprint
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.plan import Plan, count_for_memory, describe_savings
from avss_dist.pruning.selection import PlanError


@pytest.fixture(scope="module")
def size(tiny_llama: Path) -> Footprint:
    return footprint(str(tiny_llama), Settings())


def test_what_is_said_to_be_saved_is_missing_in_the_files(size: Footprint, tiny_llama: Path, tmp_path: Path) -> None:
    plan = Plan(model=str(tiny_llama), num_layers=LAYERS, layers="layers", drop=(0, 2))
    done = prune(str(tiny_llama), plan, tmp_path / "less")
    before, after = (load_file(folder / "model.safetensors").values() for folder in (tiny_llama, tmp_path / "less"))
    fewer = sum(map(torch.numel, before)) - sum(map(torch.numel, after))
    saved = sum(tensor.nbytes for tensor in before) - done["bytes"]
    said = describe_savings(plan, size)
    assert f"Saves 2 of 3 layers, {fewer:,} of" in said
    assert f" parameters ({saved / size.weight_bytes:.1%}), {describe_bytes(saved)} of" in said


def test_keys_and_values_take_what_a_cache_takes(size: Footprint, tiny_llama: Path) -> None:
    model = load_model(resolve(str(tiny_llama)), Settings(device="cpu"), head=True)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(7)[None], use_cache=True).past_key_values
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert [7 * of_token for of_token in size.cache_bytes] == held


@pytest.mark.parametrize(("memory", "count"), [(91, 1), (90, 2), (70, 2), (69, 3)])  # 90: the smallest is not enough
def test_any_layers_of_that_number_leave_so_much(memory: int, count: int, size: Footprint) -> None:
    uneven = replace(size, weight_bytes=101, num_parameters=50, layer_bytes=(30, 10, 21, 30), num_layers=4)
    assert count_for_memory(uneven, memory) == count


def test_memory_that_suffices_or_cannot(size: Footprint) -> None:
    with pytest.raises(PlanError, match="as it is, which meets `memory`"):
        count_for_memory(size, size.weight_bytes)
    least = describe_bytes(size.weight_bytes - size.layer_bytes[0] - size.layer_bytes[1])
    with pytest.raises(PlanError, match=f"cannot be met: with one layer left, {least} of"):
        count_for_memory(size, 1)
