"""Quantized and licensed checkpoints: what of them names layers, what a check cannot see, what is kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.checkpoints import LAYERS
from support.command_line import mistake, succeed
from support.families import tiny_model
from support.quantized import block_fp8
from transformers import AutoModelForCausalLM

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load, load_model, quiet
from avss_dist.pruning.checkpoint import model_card, prune, source_license
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.quantization import LayerNames, renumber_quantization, require_same_modules
from avss_dist.pruning.selection import PlanError
from avss_dist.warehouse.reader import Warehouse

PLAN = Plan(model="m", num_layers=LAYERS, layers="layers", drop=(1,))


@pytest.fixture
def fp8(tiny_llama: Path, tmp_path: Path) -> Path:
    """Layers 0 and 2 keep one matrix in float32."""
    skipped = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn", "model.layers.2.mlp.down_proj", "lm_head")
    return block_fp8(tiny_llama, tmp_path / "fp8", 128, skipped)


def test_a_skip_list_is_renumbered_and_every_module_is_quantized_as_it_was(fp8: Path, tmp_path: Path) -> None:
    plan, less = tmp_path / "plan.yaml", tmp_path / "less"
    PLAN.write(plan)
    done = succeed("prune", fp8, plan, "-o", less)
    config = json.loads((less / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]
    stored = load_file(less / "model.safetensors")
    assert "model.layers.1.mlp.down_proj.weight_scale_inv" not in stored
    assert stored["model.layers.1.mlp.down_proj.weight"].dtype == torch.float32
    assert stored["model.layers.1.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    for note in ("have the names and shapes of the tensors in the files", "compared with the weights dequantized"):
        assert note in done.stdout and note in (less / "README.md").read_text()
    assert "(largest difference 0)" in done.stdout


def test_settings_that_fit_another_layer_are_seen(fp8: Path, tmp_path: Path) -> None:
    prune(str(fp8), PLAN, tmp_path / "less")
    stale = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    config = json.loads((tmp_path / "less" / "config.json").read_text())
    (tmp_path / "less" / "config.json").write_text(json.dumps(config | {"quantization_config": stale}))
    with pytest.raises(PlanError, match=r"as what they are not once layers are dropped: model\.layers\.1\.") as wrong:
        require_same_modules(resolve(str(fp8)), PLAN, tmp_path / "less", Settings())
    assert "weight_scale_inv" in wrong.value.message


TOWER = re.compile(r"(^|language_model\.)model\.layers\..*_proj")
STAYS = re.compile(r"layers\.[02]\.mlp\.down_proj")


def compressed(folder: Path, source: Path, ignore: list[str]) -> Path:
    """FP8 of compressed-tensors, as vLLM's users publish it: a scale for each projection, but two, to be ignored."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not TOWER.match(name) or STAYS.search(name):
            tensors[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale.reshape(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_pattern_becomes_the_modules_that_it_matches(tiny_llama: Path, tmp_path: Path) -> None:
    whole = compressed(tmp_path / "whole", tiny_llama, ["lm_head", r"re:.*layers\.[02]\.mlp\.down_proj"])
    done = prune(str(whole), PLAN, tmp_path / "less")
    config = json.loads((tmp_path / "less" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert done["difference"] == 0
    assert "have the names and shapes" in done["notes"][0]
    with pytest.raises(ModelError, match=r"is quantized \(compressed-tensors\), and does not run here as it is stored"):
        load(resolve(str(whole)), Settings(dtype="float32"), torch.device("cpu"))
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "less", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    last = model.model.layers[-1]
    assert last.self_attn.q_proj.weight.dtype == torch.float8_e4m3fn  # as it is stored
    assert last.mlp.down_proj.weight.dtype == torch.float32


def test_the_quantized_tower_of_a_multimodal_model(
    tmp_path: Path, save_checkpoint: Callable[[Any, Path], Path]
) -> None:
    """Its files call the tower otherwise than its modules are called, by which the settings name layers."""
    tiny_model("image-text", "gemma3").save_pretrained(tmp_path / "source")
    others = ["lm_head", "re:.*vision_tower.*", "re:.*projector.*"]
    whole = compressed(
        tmp_path / "whole", tmp_path / "source", [*others, r"re:.*language_model\.layers\.[02]\.mlp\.down_proj"]
    )
    plan = replace(PLAN, layers="language_model.layers")
    done = prune(str(whole), plan, tmp_path / "less")
    config = json.loads((tmp_path / "less" / "config.json").read_text())
    down = [f"model.language_model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    assert config["quantization_config"]["ignore"] == [*others, *down]
    assert done["difference"] == 0
    assert "have the names and shapes" in done["notes"][0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"ignored_layers": ["model.layers.2.mlp.gate"]}, {"ignored_layers": ["model.layers.1.mlp.gate"]}),
        ({"ignore": ["re:.*lm_head", "layers.1"]}, {"ignore": ["re:.*lm_head"]}),
        ({"layers": {"model.layers.2.x": {"bits": 4}}}, {"layers": {"model.layers.1.x": {"bits": 4}}}),
        ({"bits": 4, "targets": ["Linear"], "block": [128, 128]}, None),
        (
            {"modules_to_not_convert": None, "nested": {"a": [["model.layers.2"]]}},
            {"nested": {"a": [["model.layers.1"]]}},
        ),
        (
            {"ignore": ["vision_tower.encoder.layers.2.fc1", "language_model.model.layers.2"]},
            {"ignore": ["vision_tower.encoder.layers.2.fc1", "language_model.model.layers.1"]},
        ),
        ({"ignore": [r"re:model\.layers\.[1-2]\.mlp\.up"]}, {"ignore": ["model.layers.1.mlp.up"]}),
        ({"ignore": ["re:model.layers.1.*"]}, {"ignore": []}),
        (
            {"dynamic": {r"+:model\.layers\.2\..*up": {"bits": 8}, r"-:.*\.down": {}}},
            {"dynamic": {r"+:model\.layers\.1\.mlp\.up$": {"bits": 8}, r"-:.*\.down": {}}},
        ),
    ],
)
def test_names_of_layers_wherever_they_stand(config: dict[str, Any], expected: dict[str, Any] | None) -> None:
    modules = [f"model.layers.{layer}.mlp.{part}" for layer in range(LAYERS) for part in ("up", "down")]
    assert renumber_quantization(config, LayerNames(PLAN, ("model.layers",), modules)) == config | (expected or {})


def test_a_pattern_that_cannot_be_read_is_refused(fp8: Path, tmp_path: Path) -> None:
    change_quantization(fp8, modules_to_not_convert=["re:model.layers.[0-1.mlp"])
    with pytest.raises(PlanError, match=r"by 're:model\.layers\.\[0-1\.mlp', which is not a valid pattern"):
        prune(str(fp8), PLAN, tmp_path / "less")
    assert not (tmp_path / "less").exists()


def change_quantization(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | changed
    (folder / "config.json").write_text(json.dumps(config))


# What they are computed with


def test_what_no_device_here_computes_with_is_unpacked_only_on_request(fp8: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight " * 20)
    options = ("--corpus", text, "--sequence-length", "8", "--sites", "block", "--executor", "local")
    refused = mistake("score", fp8, *options, "-w", tmp_path / "w")
    assert "is quantized (fp8), and no device here computes with that" in refused
    assert "--dequantize" in refused
    succeed("score", fp8, *options, "-w", tmp_path / "w", "--dequantize")
    (row,) = [row for row in Warehouse(tmp_path / "w").runs().to_pylist() if row["status"] == "done"]
    assert (row["quantization"], row["dtype"]) == ("fp8, dequantized", "float32")
    succeed("score", fp8, *options, "-w", tmp_path / "streamed", "--dequantize", "--partition", "streaming")
    tables = [Warehouse(tmp_path / folder).scores() for folder in ("w", "streamed")]
    assert tables[0].num_rows and tables[0].equals(tables[1])


def test_dequantized_weights_are_the_stored_ones_times_their_scales(fp8: Path) -> None:
    model = load_model(resolve(str(fp8)), Settings(dequantize=True, dtype="float32"))
    stored = load_file(fp8 / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    expected = stored[name].to(torch.float32) * stored[f"{name}_scale_inv"]
    assert torch.equal(model.state_dict()[name], expected)


@pytest.mark.parametrize(
    ("quantization", "settings", "message"),
    [
        ({"quant_method": "shrinkwrap"}, Settings(), "quantized by 'shrinkwrap', which transformers does not know"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Settings(), r"is quantized \(gptq\)"),
        ({"quant_method": "bitnet"}, Settings(dequantize=True), "transformers cannot unpack while it loads"),
        (None, Settings(dequantize=True), "is not quantized"),
    ],
)
def test_what_cannot_be_computed_with_is_refused(
    quantization: dict[str, Any] | None, settings: Settings, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(tiny_llama, folder)
    if quantization:
        change_quantization(folder, **quantization)
    with pytest.raises(ModelError, match=message):
        load_model(resolve(str(folder)), settings)


def test_what_cannot_be_compared_here_is_pruned_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(tiny_llama, folder)
    change_quantization(folder, quant_method="gptq", bits=4, group_size=128)
    done = prune(str(folder), PLAN, tmp_path / "less")
    assert done["difference"] is None
    assert "could not be seen here" in done["notes"][0] and "Outputs could not be compared" in done["notes"][1]


# The card


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A", {}, {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: gemma\nlicense_link: LICENSE\n---\n",
            {},
            {"license": "other", "license_name": "gemma", "license_link": "LICENSE"},
        ),
        ("# no front matter", {"license": "mit"}, {"license": "mit"}),
        ("---\nlicense: [\n---\n", {}, {}),
        (None, {}, {}),
    ],
)
def test_the_license_is_kept(card: str | None, config: Any, expected: Any, tiny_llama: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(tiny_llama, whole)
    if card is not None:
        (whole / "README.md").write_text(card)
    given = json.loads((whole / "config.json").read_text()) | config
    (whole / "config.json").write_text(json.dumps(given))
    assert source_license(whole) == expected
    kept = yaml.safe_load(model_card(resolve(str(whole)), PLAN).split("---")[1])
    assert {key: value for key, value in kept.items() if key.startswith("license")} == expected
