"""A module that takes the weights of the next checkpoint equals a new one to the bit, or is not used at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import checkpoint_at, config_in, llama, weights_in
from support.families import tiny_model

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import load, load_model
from avss_dist.models.checkpoint.reloading import ReloadableModel

SETTINGS = Settings(device="cpu")
CPU = torch.device("cpu")
Save = Callable[[Any, Path], Path]


def reloadable(folder: Path, settings: Settings = SETTINGS) -> ReloadableModel:
    """Return the model of a folder after the forward pass that finds its layers."""
    checkpoint = checkpoint_at(folder)
    return ReloadableModel(checkpoint, settings, CPU, load(checkpoint, settings, CPU).model)


def everything(model: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    """Return dtype and bytes of all parameters and buffers, also of those that are not stored."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (tensor.dtype, tensor.detach().float().numpy().tobytes()) for name, tensor in tensors}


def other_weights(source: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Write a checkpoint of the same shape with other weights."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = {name: change(tensor).contiguous() for name, tensor in weights_in(source).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2 if tensor.is_floating_point() else tensor


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings."""
    folder = tmp_path_factory.mktemp("first")
    llama(tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture
def second(first: Path, tmp_path: Path) -> Path:
    """A checkpoint of the same shape with other weights."""
    return other_weights(first, tmp_path / "second", doubled)


def assert_reloaded(first: Path, second: Path, settings: Settings = SETTINGS) -> None:
    """The module of the first checkpoint takes the weights of the second, and then equals a new one."""
    module = reloadable(first, settings)
    assert module.reload(checkpoint_at(second), settings, CPU)
    assert everything(module.model) == everything(load_model(checkpoint_at(second), settings))


def test_tied_embeddings_and_buffers_that_are_not_stored_equal_those_of_a_new_model(first: Path, second: Path) -> None:
    assert_reloaded(first, second)


def test_tied_weights_stay_one_weight(first: Path, second: Path) -> None:
    module = reloadable(first)
    module.reload(checkpoint_at(second), SETTINGS, CPU)
    model: Any = module.model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_stored_buffers_are_read(tmp_path: Path) -> None:
    tiny_model("causal", "gemma4_text").save_pretrained(tmp_path / "first")
    assert_reloaded(tmp_path / "first", other_weights(tmp_path / "first", tmp_path / "second", doubled))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_another_dtype_are_converted(dtype: torch.dtype, first: Path, tmp_path: Path) -> None:
    second = other_weights(first, tmp_path / "second", lambda tensor: (tensor * 3).to(dtype))
    assert_reloaded(first, second)


def test_weights_are_converted_to_the_dtype_of_the_settings(first: Path, second: Path) -> None:
    assert_reloaded(first, second, Settings(device="cpu", dtype="bfloat16"))


def test_weights_in_several_files_are_read(first: Path, tmp_path: Path) -> None:
    second = other_weights(first, tmp_path / "second", doubled)
    split(second)
    assert_reloaded(first, second)


def split(folder: Path) -> list[Path]:
    """Divide the weights of a checkpoint into two files with an index."""
    weights = weights_in(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    index = {}
    files = []
    for number, half in enumerate(halves, 1):
        file = folder / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, file, {"format": "pt"})
        index |= dict.fromkeys(half, file.name)
        files.append(file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return files


def test_several_files_that_transformers_refuses_are_loaded_anew(first: Path, tmp_path: Path) -> None:
    second = other_weights(first, tmp_path / "second", doubled)
    split(second)
    index = second / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    assert_dropped(reloadable(first), second)


def test_a_third_checkpoint_is_read_after_the_first_was_deleted(first: Path, tmp_path: Path) -> None:
    copy = other_weights(first, tmp_path / "first", lambda tensor: tensor)
    second = other_weights(first, tmp_path / "second", doubled)
    third = other_weights(first, tmp_path / "third", lambda tensor: tensor * 5)
    module = reloadable(copy)
    assert module.reload(checkpoint_at(second), SETTINGS, CPU)
    (copy / "model.safetensors").unlink()
    assert module.reload(checkpoint_at(third), SETTINGS, CPU)
    assert everything(module.model) == everything(load_model(checkpoint_at(third), SETTINGS))


def test_names_and_versions_may_differ(first: Path, second: Path) -> None:
    config = config_in(second) | {"_name_or_path": "elsewhere", "transformers_version": "4.0.0"}
    (second / "config.json").write_text(json.dumps(config))
    assert_reloaded(first, second)


def assert_dropped(module: ReloadableModel, second: Path, settings: Settings = SETTINGS) -> None:
    """The weights of a checkpoint are not taken, and the module is not kept."""
    assert not module.reload(checkpoint_at(second), settings, CPU)
    assert module.model is None


@pytest.mark.parametrize("change", [{"rope_theta": 77.0}, {"rms_norm_eps": 0.1}, {"dtype": "bfloat16"}])
def test_another_configuration_is_loaded_anew(change: dict[str, Any], first: Path, second: Path) -> None:
    (second / "config.json").write_text(json.dumps(config_in(second) | change))
    assert_dropped(reloadable(first), second)


def test_other_settings_are_loaded_anew(first: Path, second: Path) -> None:
    assert_dropped(reloadable(first), second, Settings(device="cpu", attention="eager"))


def test_a_checkpoint_that_lacks_a_tensor_is_loaded_anew(first: Path, second: Path) -> None:
    weights = weights_in(second)
    del weights["model.norm.weight"]
    save_file(weights, second / "model.safetensors", {"format": "pt"})
    assert_dropped(reloadable(first), second)


def test_a_checkpoint_with_a_further_tensor_is_loaded_anew(first: Path, second: Path) -> None:
    weights = weights_in(second) | {"model.layers.7.extra": torch.zeros(1)}
    save_file(weights, second / "model.safetensors", {"format": "pt"})
    assert_dropped(reloadable(first), second)


def test_a_tensor_of_another_shape_is_loaded_anew(first: Path, second: Path) -> None:
    weights = weights_in(second) | {"model.norm.weight": torch.zeros(31)}
    save_file(weights, second / "model.safetensors", {"format": "pt"})
    assert_dropped(reloadable(first), second)


def test_tied_weights_that_are_stored_twice_are_loaded_anew(first: Path, tmp_path: Path) -> None:
    """transformers ties them only if they are equal."""
    folders = []
    for name in ("both", "second"):
        folder = other_weights(first, tmp_path / name, doubled)
        weights = weights_in(folder)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    assert_dropped(reloadable(folders[0]), folders[1])


def test_quantized_weights_are_loaded_anew(first: Path, tmp_path: Path) -> None:
    second = other_weights(first, tmp_path / "second", lambda tensor: tensor.to(torch.float8_e4m3fn))
    assert_dropped(reloadable(first), second)


def test_code_of_the_checkpoint_is_loaded_anew(first: Path, second: Path) -> None:
    from dataclasses import replace

    module = reloadable(first)
    assert not module.reload(replace(checkpoint_at(second), trust_remote_code=True), SETTINGS, CPU)


def test_weights_that_transformers_computes_are_loaded_anew(tmp_path: Path) -> None:
    """It stacks the experts of a mixture."""
    tiny_model("causal", "mixtral").save_pretrained(tmp_path / "first")
    second = other_weights(tmp_path / "first", tmp_path / "second", doubled)
    assert_dropped(reloadable(tmp_path / "first"), second)


def test_a_checkpoint_that_ends_in_the_middle_leaves_no_module(first: Path, tmp_path: Path) -> None:
    """The first of its files was read by then."""
    second = other_weights(first, tmp_path / "second", doubled)
    _, last = split(second)
    last.write_bytes(last.read_bytes()[:-8])
    assert_dropped(reloadable(first), second)


def change_attribute(model: Any) -> None:
    model.model.layers[1].mlp.calls = 1


def change_plain_attribute(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


def change_buffer_in_place(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


def replace_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2


@pytest.mark.parametrize("change", [change_attribute, change_plain_attribute, change_buffer_in_place, replace_buffer])
def test_a_module_that_changed_while_it_ran_is_loaded_anew(
    change: Callable[[Any], None], first: Path, second: Path
) -> None:
    module = reloadable(first)
    change(module.model)
    assert_dropped(module, second)


def test_weights_that_changed_since_they_were_loaded_are_loaded_anew(first: Path, second: Path) -> None:
    module = reloadable(first)
    model: Any = module.model
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert_dropped(module, second)
