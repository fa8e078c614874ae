"""The footprint of a checkpoint: what single loads, told from config.json and headers alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
from huggingface_hub.utils._safetensors import TensorInfo
from support.checkpoints import VOCABULARY, checkpoint_at, config_in, llama, weights_in
from support.families import tiny_model
from support.ggufs import write_gguf
from support.json_files import write_json
from support.quantized import block_fp8
from support.tiers import all_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import load
from avss_dist.models.checkpoint.quantization import unpacking_bytes
from avss_dist.models.checkpoint.size import footprint
from avss_dist.partition.replica import Replica

SETTINGS = Settings(device="cpu")
CPU = torch.device("cpu")
FAMILIES = all_of(
    [
        ("causal", "llama"),
        ("causal", "qwen2"),
        ("causal", "gemma3_text"),
        ("causal", "gpt2"),
        ("causal", "gpt_neox"),
        ("causal", "opt"),
        ("causal", "phi"),
        ("causal", "bloom"),
        ("causal", "mixtral"),
        ("causal", "qwen2_moe"),
        ("causal", "mamba"),
        ("masked", "bert"),
    ],
    [
        ("causal", "llama"),
        ("causal", "gemma3_text"),
        ("causal", "gpt2"),
        ("causal", "opt"),
        ("causal", "mixtral"),
        ("causal", "mamba"),
        ("masked", "bert"),
    ],
)
Save = Callable[[Any, Path], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("families")

    def folder(kind: str, family: str) -> Path:
        if not (root / family).exists():
            save_checkpoint(tiny_model(kind, family), root / family)
        return root / family

    return folder


def loaded_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(("kind", "family"), FAMILIES)
def test_it_is_what_single_loads(kind: str, family: str, dtype: str, folder_of: Callable[[str, str], Path]) -> None:
    folder = folder_of(kind, family)
    settings = Settings(device="cpu", dtype=dtype)
    size = footprint(str(folder), settings)
    checkpoint = checkpoint_at(folder)
    replica = Replica(checkpoint, settings)
    backbone = load(checkpoint, settings, CPU)
    assert size.num_parameters == replica.model["num_parameters"]
    assert size.hidden_size == replica.model["hidden_size"]
    assert size.dtype == replica.model["dtype"]
    assert size.attention == replica.model["attention_implementation"]
    assert size.num_layers == len(replica.layers) == len(size.layer_bytes)
    assert size.layer_bytes == tuple(loaded_bytes(layer.module) for layer in replica.layers)
    assert size.other_bytes + sum(size.layer_bytes) == loaded_bytes(backbone.module)
    assert size.weight_bytes == size.num_parameters * size.element_bytes


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
def test_operations_are_those_that_torch_counts(kind: str, family: str, folder_of: Callable[[str, str], Path]) -> None:
    """In the layers, and with an attention that the counter sees."""
    folder = folder_of(kind, family)
    settings = Settings(device="cpu", attention=None if family == "mamba" else "eager")
    size = footprint(str(folder), settings)
    backbone = load(checkpoint_at(folder), settings, CPU)
    backbone.module.config._experts_implementation = "eager"  # the counter knows no grouped multiplication
    rows = 2
    tokens = 32
    ids = torch.arange(rows * tokens).reshape(rows, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.module(input_ids=ids)
    layers = {f"{type(backbone.module).__name__}.{layer.name}" for layer in backbone.layers}
    counted = sum(sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name in layers)
    assert counted > 0
    scan = 0.08  # of a state space, which is small but in a model as tiny as this
    assert size.forward_flops(rows, tokens) == pytest.approx(counted, rel=scan if family == "mamba" else 0.03)


def test_an_untied_head_counts_as_weights_and_not_as_what_runs(tmp_path: Path, save_checkpoint: Save) -> None:
    tied = footprint(str(save_checkpoint(llama(tie_word_embeddings=True), tmp_path / "tied")), SETTINGS)
    free = footprint(str(save_checkpoint(llama(tie_word_embeddings=False), tmp_path / "free")), SETTINGS)
    head = VOCABULARY * 32
    assert free.num_parameters - tied.num_parameters == head
    assert free.weight_bytes - tied.weight_bytes == 4 * head
    assert free.other_bytes == tied.other_bytes
    assert free.layer_bytes == tied.layer_bytes


def test_only_headers_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    """The file ends after its header; a whole file of zeros after the header gives the same."""
    whole = (tiny_llama / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    (tmp_path / "model.safetensors").write_bytes(whole[: 8 + length])
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    assert footprint(str(tmp_path), SETTINGS) == footprint(str(tiny_llama), SETTINGS)


def test_quantized_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """Unpacked, they have the bytes of the whole model; kept as stored, those of the files."""
    folder = block_fp8(tiny_llama, tmp_path / "fp8")
    whole = footprint(str(tiny_llama), SETTINGS)
    size = footprint(str(folder), replace(SETTINGS, dequantize=True))
    stored = sum(tensor.nbytes for tensor in weights_in(folder).values())
    unpacking = {"unpacking_bytes": 2 * 4 * 32 * 48, "stored_share": stored / whole.weight_bytes}
    assert size == replace(whole, **unpacking)
    as_stored = footprint(str(folder), SETTINGS)
    assert as_stored.weight_bytes == stored
    assert as_stored.unpacking_bytes == 0
    assert as_stored.stored_share == 1.0
    assert as_stored.quantized
    assert not size.quantized
    experts = torch.empty(4, 64, 32, dtype=torch.bfloat16, device="meta")
    assert unpacking_bytes(experts) == 2 * experts.nbytes
    assert unpacking_bytes(experts[0]) == 4 * experts[0].nbytes


def test_a_gguf_file(tmp_path: Path) -> None:
    file = write_gguf(llama(), tmp_path / "tiny.gguf")
    size = footprint(str(file), SETTINGS)
    assert size.num_parameters == Replica(checkpoint_at(file), SETTINGS).model["num_parameters"]
    assert size.weight_bytes == 4 * size.num_parameters
    assert size.unpacking_bytes == max(2 * 4 * 320 * 32 - size.layer_bytes[0], 2 * 4 * 32 * 48)  # embeddings, MLP
    bad_file = tmp_path / "bad.gguf"
    bad_file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        footprint(str(bad_file), SETTINGS)


@pytest.mark.parametrize("dtype", ["float99", {"a": 1}, ["float32"], "nn", 7])
def test_a_dtype_that_torch_lacks_is_an_error(dtype: Any, tiny_llama: Path, tmp_path: Path) -> None:
    config = config_in(tiny_llama)
    write_json(tmp_path / "config.json", config | {"dtype": dtype})
    (tmp_path / "model.safetensors").symlink_to(tiny_llama / "model.safetensors")
    with pytest.raises(ModelError):
        footprint(str(tmp_path), SETTINGS)


def test_shards_are_those_of_the_index(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy, which transformers does not load")
    assert footprint(str(tmp_path), SETTINGS) == footprint(str(tiny_llama), SETTINGS)


def test_a_hub_checkpoint_is_its_configuration_and_headers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is played by a folder: only config.json and the headers of the weight files are asked of it."""
    asked: list[Any] = []

    def snapshot(name: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        asked.append((name, revision, allow_patterns))
        (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
        return str(tmp_path)

    def headers(name: str, revision: str | None = None) -> SafetensorsRepoMetadata:
        asked.append((name, revision))
        whole = (tiny_llama / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8 : 8 + length])
        header.pop("__metadata__")
        tensors = {}
        for key, tensor in header.items():
            offsets = tuple(tensor["data_offsets"])
            tensors[key] = TensorInfo(dtype=tensor["dtype"], shape=tensor["shape"], data_offsets=offsets)
        file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        return SafetensorsRepoMetadata(
            metadata=None, sharded=False, weight_map={}, files_metadata={"model.safetensors": file}
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    assert footprint("org/name@v1", SETTINGS) == footprint(str(tiny_llama), SETTINGS)
    assert asked == [("org/name", "v1", ["config.json"]), ("org/name", tmp_path.name)]


def test_eager_attention_holds_scores(tiny_llama: Path) -> None:
    fused = footprint(str(tiny_llama), Settings(attention="sdpa"))
    eager = footprint(str(tiny_llama), Settings(attention="eager"))
    assert eager.activation_bytes(2, 512) - fused.activation_bytes(2, 512) >= 2 * 4 * 512 * 512 * 4
    assert fused.activation_bytes(4, 64) == 2 * fused.activation_bytes(2, 64)
    assert fused.hidden_bytes(2, 8) == 2 * 8 * 32 * 4
