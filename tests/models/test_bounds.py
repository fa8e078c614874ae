"""Checkpoints that would make whoever opens them wait, or take all memory: refused from what their headers say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama
from support.ggufs import write_gguf
from transformers import AutoConfig

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_model, load_tokenizer, text_config
from avss_dist.models.safetensors import tensors_of
from avss_dist.models.size import footprint

SETTINGS = Settings(device="cpu")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WAYS = (lambda c: footprint(c, SETTINGS), lambda c: load_model(c, SETTINGS), text_config)


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [1_000, 10**7, 10**12])
def test_more_layers_than_the_files_have_are_refused(layers: int, way: Callable[[Any], Any], copy: Path) -> None:
    """Of 10 million layers, a skeleton without memory takes a day; ten to the twelve fill it with their names."""
    checkpoint = resolve(str(copy))
    configure(copy, num_hidden_layers=layers, model_type="qwen2")
    message = rf'copy\' describes {layers:,} layers \("num_hidden_layers"\), and its files have weights of 3 at most'
    with pytest.raises(ModelError, match=message):
        way(checkpoint)
    configure(copy, num_hidden_layers=3, vision_config={"n_layers": layers})
    with pytest.raises(ModelError, match=rf'{layers:,} layers \("n_layers"\)'):
        way(checkpoint)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [1_000, 2**32 - 1])
def test_more_layers_than_a_gguf_file_has_are_refused(
    layers: int, way: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "for_model", lambda **_: pytest.fail("a configuration of that size was made"))
    checkpoint = resolve(str(write_gguf(llama(), tmp_path / "model.gguf", block_count=layers)))
    with pytest.raises(ModelError, match=rf"The metadata of .*\.gguf' describes {layers:,} layers .* of 3 at most"):
        way(checkpoint)


def test_a_gguf_file_is_configured_as_transformers_does(tmp_path: Path) -> None:
    checkpoint = resolve(str(write_gguf(llama(), tmp_path / "model.gguf")))
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
        checkpoint = resolve(str(copy))
        load_tokenizer(checkpoint)
        load_model(checkpoint, SETTINGS)
    except ModelError as error:
        assert str(copy) in error.message
        assert name not in (INDEX, "generation_config.json")
    else:
        assert name in (INDEX, "generation_config.json")
