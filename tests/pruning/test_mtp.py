"""Heads that predict several tokens (MTP): pruned checkpoints keep them behind their last layer, or leave them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import checkpoint_at, config_in, weights_in
from support.families import tiny_model
from support.json_files import read_json, write_json

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import load_model, open_module
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune

NUM_LAYERS = 4
SETTINGS = Settings(dtype="float32", device="cpu")


def add_layers(folder: Path, num_mtp_layers: int, *, declared: int | None = None) -> dict[str, torch.Tensor]:
    """Store layers of an MTP head behind the last layer, as DeepSeek-V3 does, and return their tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    added = {}
    for number in range(num_mtp_layers):
        prefix = f"model.layers.{NUM_LAYERS + number}."
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{NUM_LAYERS - 1}."):
                added[prefix + name.split(".", 3)[3]] = tensor + 1 + number
        added[f"{prefix}eh_proj.weight"] = torch.full((4, 8), float(number))
    save_file(tensors | added, file, {"format": "pt"})
    config_file = folder / "config.json"
    config = read_json(config_file)
    config["num_nextn_predict_layers"] = num_mtp_layers if declared is None else declared
    write_json(config_file, config)
    return added


@pytest.fixture(params=["deepseek_v3", "glm4_moe"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with four layers, of which one is dense."""
    whole_folder = tmp_path / "whole"
    tiny_model("causal", request.param, num_hidden_layers=NUM_LAYERS).save_pretrained(whole_folder)
    return whole_folder


def plan(folder: Path, *drop: object) -> Plan:
    return Plan(model=str(folder), num_layers=NUM_LAYERS, layers="layers", drop=drop)


@pytest.mark.parametrize("number", [1, 2])
def test_the_head_stands_behind_the_remaining_layers(whole: Path, number: int, tmp_path: Path) -> None:
    head = add_layers(whole, number)
    less = tmp_path / "less"
    done = prune(str(whole), plan(whole, 1), less)
    written = weights_in(less)
    for name, tensor in head.items():
        layer, path = name.removeprefix("model.layers.").split(".", 1)
        assert torch.equal(written[f"model.layers.{int(layer) - 1}.{path}"], tensor)
    assert f"model.layers.{NUM_LAYERS + number - 1}.eh_proj.weight" not in written
    assert config_in(less)["num_nextn_predict_layers"] == number
    assert done["difference"] == 0


def test_the_card_says_that_the_head_is_kept(whole: Path, tmp_path: Path) -> None:
    add_layers(whole, 1)
    less = tmp_path / "less"
    prune(str(whole), plan(whole, 1), less)
    assert "(MTP) is kept" in (less / "README.md").read_text()


def test_models_with_a_head_are_opened_before_and_after(whole: Path, tmp_path: Path) -> None:
    add_layers(whole, 1)
    less = tmp_path / "less"
    prune(str(whole), plan(whole, 2), less)
    numbers = []
    for folder in (whole, less):
        checkpoint = checkpoint_at(folder)
        numbers.append(len(open_module(load_model(checkpoint, SETTINGS)).layers))
    assert numbers == [NUM_LAYERS, NUM_LAYERS - 1]


def test_the_head_is_left_out_where_experts_are_dropped(whole: Path, tmp_path: Path) -> None:
    """Its router has a row for each expert of the whole model, and the configuration has one number of experts."""
    add_layers(whole, 1)
    experts = [f"expert.{layer}.0" for layer in range(1, NUM_LAYERS)]
    less = tmp_path / "less"
    prune(str(whole), plan(whole, *experts), less)
    assert not [name for name in weights_in(less) if name.startswith("model.layers.4.")]
    assert config_in(less)["num_nextn_predict_layers"] == 0
    assert "(MTP) is left out" in (less / "README.md").read_text()


def test_layers_that_no_setting_declares_are_refused(whole: Path, tmp_path: Path) -> None:
    add_layers(whole, 1, declared=0)
    with pytest.raises(PlanError, match="It is unclear which stored tensors"):
        prune(str(whole), plan(whole, 1), tmp_path / "less")


@pytest.mark.parametrize(("drop", "is_kept"), [((1,), True), (("expert.0.0", "expert.1.0", "expert.2.0"), False)])
def test_a_head_with_names_of_its_own(drop: tuple[object, ...], is_kept: bool, tmp_path: Path) -> None:
    """Qwen3-Next names it `mtp`."""
    whole = tmp_path / "whole"
    tiny_model("causal", "qwen3_next").save_pretrained(whole)
    file = whole / "model.safetensors"
    save_file(load_file(file) | {"mtp.layers.0.mlp.gate.weight": torch.zeros(4, 64)}, file, {"format": "pt"})
    less = tmp_path / "less"
    prune(str(whole), Plan(model=str(whole), num_layers=3, layers="layers", drop=drop), less)
    names = weights_in(less)
    assert ("mtp.layers.0.mlp.gate.weight" in names) == is_kept
