"""Files that lack weights, or hold others than config.json describes: refused by every way of opening them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.causal_lm import open_whole
from support.checkpoints import llama
from support.families import tiny_model

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load, pin, text_config
from avss_dist.partition.replica import Placement, open_replica

SETTINGS = Settings(device="cpu")
Save = Callable[[Any, Path], Path]
Tensors = dict[str, torch.Tensor]


def change(folder: Path, tensors: Callable[[Tensors], Mapping[str, torch.Tensor]], **config: Any) -> Path:
    """The checkpoint with other tensors, and with other values in its config.json."""
    file = folder / "model.safetensors"
    save_file(dict(tensors(load_file(file))), file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def open_as(way: str, folder: Path) -> None:
    if way == "evaluated":
        open_whole(resolve(str(folder)), SETTINGS)
    else:
        open_replica(resolve(str(folder)), SETTINGS, Placement(partition=way))


WAYS = ("single", "streaming", "device_map", "evaluated")


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not re.search(pattern, name)}


def packed(tensors: Tensors) -> Tensors:
    """Every matrix of the layers in eight bits, with a scale."""
    return {
        part: value
        for name, t in tensors.items()
        for part, value in (
            {name: t.to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)} if "_proj" in name else {name: t}
        ).items()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lambda _: {}, {}, r"lack weights of the LlamaForCausalLM .*embed_tokens\.weight.* and \d+ more"),
        (lambda ts: {f"wrong.{n}": t for n, t in ts.items()}, {}, r"lack weights .* They have wrong\."),
        (without(r"layers\.1\."), {}, r"lack weights .*: model\.layers\.1\..* and 6 more\."),
        (without(r"layers\.2\.mlp\.up_proj"), {}, r"lack weights .*: model\.layers\.2\.mlp\.up_proj\.weight\."),
        (dict, {"num_hidden_layers": 4}, r"lack weights .*: model\.layers\.3\."),
        (dict, {"num_hidden_layers": 2}, r"have tensors in its layers .*: model\.layers\.2\."),
        (packed, {}, r"have tensors in its layers .*_proj\.weight_scale"),
    ],
    ids=["no tensors", "prefix", "no layer", "no matrix", "too few layers", "too many layers", "packed"],
)
def test_files_that_do_not_fit_their_configuration_are_refused(
    way: str,
    tensors: Callable[[Tensors], Tensors],
    config: dict[str, Any],
    message: str,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    folder = change(Path(shutil.copytree(tiny_llama, tmp_path / "copy")), tensors, **config)
    with pytest.raises(ModelError) as caught:
        open_as(way, folder)
    assert re.search(message, caught.value.message, re.DOTALL), caught.value.message
    assert caught.value.hint


def test_a_matrix_of_integers_without_a_quantization_config_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    change(folder, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    with pytest.raises(ModelError, match=rf"stores '{name}' as I8, and its config.json has no quantization_config"):
        open_as("single", folder)


def test_a_head_is_needed_to_evaluate_and_not_to_score(tmp_path: Path, save_checkpoint: Save) -> None:
    folder = save_checkpoint(llama(tie_word_embeddings=False), tmp_path / "model")
    change(folder, without("lm_head"))
    open_as("single", folder)
    open_as("streaming", folder)
    with pytest.raises(ModelError, match=r"lack weights of the LlamaForCausalLM .*: lm_head\.weight\."):
        open_as("evaluated", folder)


def test_a_head_that_is_tied_need_not_be_stored(tmp_path: Path, save_checkpoint: Save) -> None:
    folder = save_checkpoint(llama(tie_word_embeddings=True), tmp_path / "model")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    for way in WAYS:
        open_as(way, folder)


def test_a_pooler_need_not_be_stored_and_other_heads_are_left_alone(tmp_path: Path, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_model("masked", "bert"), tmp_path / "bert")
    assert any(name.startswith("cls.") for name in load_file(folder / "model.safetensors"))
    open_as("single", folder)
    open_as("streaming", folder)


def _mixed(tensors: Tensors) -> Tensors:
    """The first tensor of the file and of its names in bfloat16, the others in float32."""
    return {name: t.bfloat16() if i == 0 else t for i, (name, t) in enumerate(sorted(tensors.items()))}


def test_mixed_weights_without_a_dtype_compute_alike_in_every_partition(tiny_llama: Path, tmp_path: Path) -> None:
    folder = change(Path(shutil.copytree(tiny_llama, tmp_path / "copy")), _mixed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    checkpoint = resolve(str(folder))
    settings = pin(Settings(sequence_length=64), checkpoint, text_config(checkpoint), "cpu")
    assert settings.dtype == "float32"
    for partition in ("single", "streaming", "device_map"):
        replica = open_replica(checkpoint, settings, Placement(partition=partition))
        assert replica.model["dtype"] == "float32", partition
        replica.close()
    assert load(checkpoint, settings, torch.device("cpu")).dtype == "float32"
