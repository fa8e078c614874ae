"""Checkpoints that are refused, by every way of opening them.

Those that would make whoever opens them wait, or take all memory, from what their headers say; and files that lack
weights, or hold others than config.json describes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.causal_lm import open_whole
from support.checkpoints import checkpoint_at, llama, weights_in
from support.families import tiny_model
from support.ggufs import write_gguf
from support.json_files import read_json, write_json
from transformers import AutoConfig

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import load, load_model, load_tokenizer, pin, text_config
from avss_dist.models.checkpoint.safetensors import tensors_of
from avss_dist.models.checkpoint.size import footprint
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import open_replica

SETTINGS = Settings(device="cpu")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OPENINGS = (lambda c: footprint(c, SETTINGS), lambda c: load_model(c, SETTINGS), text_config)


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def configure(folder: Path, **values: Any) -> None:
    """Set values of the checkpoint's config.json; None removes one."""
    file = folder / "config.json"
    config = read_json(file) | values
    write_json(file, {name: value for name, value in config.items() if value is not None})


@pytest.mark.parametrize("way", OPENINGS)
@pytest.mark.parametrize("layers", [1_000, 10**7, 10**12])
def test_more_layers_than_the_files_have_are_refused(layers: int, way: Callable[[Any], Any], copy: Path) -> None:
    """Of 10 million layers, a skeleton without memory takes a day; ten to the twelve fill it with their names."""
    checkpoint = checkpoint_at(copy)
    configure(copy, num_hidden_layers=layers, model_type="qwen2")
    message = rf'copy\' describes {layers:,} layers \("num_hidden_layers"\), and its files have weights of 3 at most'
    with pytest.raises(ModelError, match=message):
        way(checkpoint)
    configure(copy, num_hidden_layers=3, vision_config={"n_layers": layers})
    with pytest.raises(ModelError, match=rf'{layers:,} layers \("n_layers"\)'):
        way(checkpoint)


@pytest.mark.parametrize("way", OPENINGS)
@pytest.mark.parametrize("layers", [1_000, 2**32 - 1])
def test_more_layers_than_a_gguf_file_has_are_refused(
    layers: int, way: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "for_model", lambda **_: pytest.fail("a configuration of that size was made"))
    checkpoint = checkpoint_at(write_gguf(llama(), tmp_path / "model.gguf", block_count=layers))
    with pytest.raises(ModelError, match=rf"The metadata of .*\.gguf' describes {layers:,} layers .* of 3 at most"):
        way(checkpoint)


def test_a_gguf_file_is_configured_as_transformers_does(tmp_path: Path) -> None:
    checkpoint = checkpoint_at(write_gguf(llama(), tmp_path / "model.gguf"))
    config = AutoConfig.from_pretrained(checkpoint.folder, **checkpoint.gguf)
    assert text_config(checkpoint).to_dict() | {"_name_or_path": config.name_or_path} == config.to_dict()


@pytest.mark.parametrize(
    "values", [{"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"pad_token_id": 10**9}], ids=str
)
def test_a_configuration_that_transformers_stumbles_over_is_an_error(values: dict[str, int], copy: Path) -> None:
    configure(copy, **values)
    with pytest.raises(ModelError) as caught:
        footprint(str(copy), SETTINGS)
    assert 0 not in values.values() or "a size in its config.json is 0" in caught.value.message


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (with_header([]), "no header"),
        (with_header({"a": {"dtype": "F32", "shape": [2]}}), "no 'data_offsets'"),
        (with_header({"a": ENTRY | {"shape": [10**18]}}), "'a' has 8 bytes, and its shape wants 4,000"),
        (with_header({"a": ENTRY | {"shape": [[2]]}}), "no dtype, shape and offsets"),
        (with_header(b"[" * 100_000), "no header"),
        ((1 << 40).to_bytes(8, "little"), "would be 1099511627776 bytes long"),
        (b"{}", "no header"),
    ],
)
def test_an_odd_header_is_an_error_with_the_file(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match=says) as caught:
        tensors_of(tmp_path / WEIGHTS)
    assert str(tmp_path / WEIGHTS) in caught.value.message


@pytest.mark.parametrize("index", [b"{}", b"[]", b"{", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}'])
def test_an_odd_index_is_an_error_with_the_file(index: bytes, copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / "other.safetensors")
    (copy / INDEX).write_bytes(index)
    with pytest.raises(ModelError) as caught:
        footprint(str(copy), SETTINGS)
    assert str(copy / INDEX) in caught.value.message


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX, "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("device", [False, True])
def test_what_is_no_file_is_never_opened(name: str, device: bool, copy: Path) -> None:
    """A pipe would be waited for, and a device has no end."""
    (copy / name).unlink(missing_ok=True)
    if device:
        (copy / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(copy / name)
    try:
        checkpoint = checkpoint_at(copy)
        load_tokenizer(checkpoint)
        load_model(checkpoint, SETTINGS)
    except ModelError as error:
        assert str(copy) in error.message
        assert name not in (INDEX, "generation_config.json")
    else:
        assert name in (INDEX, "generation_config.json")


Save = Callable[[Any, Path], Path]
Tensors = dict[str, torch.Tensor]


def change(folder: Path, tensors: Callable[[Tensors], Mapping[str, torch.Tensor]], **config: Any) -> Path:
    """The checkpoint with other tensors, and with other values in its config.json."""
    file = folder / "model.safetensors"
    save_file(dict(tensors(load_file(file))), file, metadata={"format": "pt"})
    configure(folder, **config)
    return folder


def open_as(way: str, folder: Path) -> None:
    if way == "evaluated":
        open_whole(checkpoint_at(folder), SETTINGS)
    else:
        open_replica(checkpoint_at(folder), SETTINGS, Placement(partition=way))


PARTITIONS = ("single", "streaming", "device_map", "evaluated")


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not re.search(pattern, name)}


def packed(tensors: Tensors) -> Tensors:
    """Every matrix of the layers in eight bits, with a scale."""
    packed_tensors = dict(tensors)
    for name, tensor in tensors.items():
        if "_proj" in name:
            packed_tensors[name] = tensor.to(torch.float8_e4m3fn)
            packed_tensors[f"{name}_scale"] = torch.ones(1)
    return packed_tensors


@pytest.mark.parametrize("way", PARTITIONS)
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
    way: str, tensors: Callable[[Tensors], Tensors], config: dict[str, Any], message: str, copy: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        open_as(way, change(copy, tensors, **config))
    assert re.search(message, caught.value.message, re.DOTALL), caught.value.message
    assert caught.value.hint


def test_a_matrix_of_integers_without_a_quantization_config_is_refused(copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = change(copy, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
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
    assert "lm_head.weight" not in weights_in(folder)
    for way in PARTITIONS:
        open_as(way, folder)


def test_a_pooler_need_not_be_stored_and_other_heads_are_left_alone(tmp_path: Path, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_model("masked", "bert"), tmp_path / "bert")
    assert any(name.startswith("cls.") for name in weights_in(folder))
    open_as("single", folder)
    open_as("streaming", folder)


def _mixed(tensors: Tensors) -> Tensors:
    """The first tensor of the file and of its names in bfloat16, the others in float32."""
    mixed = dict(sorted(tensors.items()))
    first = min(mixed)
    mixed[first] = mixed[first].bfloat16()
    return mixed


@pytest.mark.nightly
def test_mixed_weights_without_a_dtype_compute_alike_in_every_partition(copy: Path) -> None:
    checkpoint = checkpoint_at(change(copy, _mixed, dtype=None))
    settings = pin(Settings(sequence_length=64), checkpoint, text_config(checkpoint), "cpu")
    assert settings.dtype == "float32"
    for partition in ("single", "streaming", "device_map"):
        replica = open_replica(checkpoint, settings, Placement(partition=partition))
        assert replica.model["dtype"] == "float32", partition
        replica.close()
    assert load(checkpoint, settings, torch.device("cpu")).columns["dtype"] == "float32"
