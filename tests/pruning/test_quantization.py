"""Quantized, multimodal and licensed checkpoints: what of them names layers, what a check cannot see, what is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.causal_lm import open_whole
from support.checkpoints import LAYERS, VOCABULARY, block_fp8
from support.command_line import avss

from avss_dist.errors import ModelError
from avss_dist.models.checkpoints import resolve
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.model_card import source_license
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.quantization import renumber_quantization
from avss_dist.pruning.selection import PlanError
from avss_dist.settings import Settings

PLAN = Plan(model="m", num_layers=LAYERS, layers="layers", drop=(1,))


@pytest.fixture
def fp8(tiny_llama: Path, tmp_path: Path) -> Path:
    """Layers 0 and 2 keep one matrix in float32."""
    skipped = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn", "model.layers.2.mlp.down_proj", "lm_head")
    return block_fp8(tiny_llama, tmp_path / "fp8", skipped)


def test_a_skip_list_is_renumbered_and_the_check_says_what_it_cannot_see(fp8: Path, tmp_path: Path) -> None:
    plan, less = tmp_path / "plan.yaml", tmp_path / "less"
    PLAN.write(plan)
    done = avss("prune", fp8, plan, "--out", less)
    assert done.exit_code == 0, done.stderr
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
    note = "cannot see whether a device computes with them as before"
    assert note in done.stdout and note in (less / "README.md").read_text()


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
    ],
)
def test_names_of_layers_wherever_they_stand(config: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert renumber_quantization(config, PLAN) == config | (expected or {})


def test_a_pattern_that_names_layers_by_number_is_refused(fp8: Path, tmp_path: Path) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["re:model.layers.[0-1].mlp"]
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"by a pattern, 're:model\.layers"):
        prune(str(fp8), PLAN, tmp_path / "less")
    assert not (tmp_path / "less").exists()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, num_hidden_layers=2, image_size=16, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(**small, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=64),
        image_token_index=5,
    )
    return save_checkpoint(LlavaForConditionalGeneration(config), tmp_path_factory.mktemp("models") / "llava")


def test_a_multimodal_checkpoint_is_refused_for_what_it_is(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is multimodal: only models of text alone can be evaluated"):
        open_whole(resolve(str(llava)), Settings())
    plan = Plan(model=str(llava), num_layers=LAYERS, layers="language_model.layers", drop=(1,))
    with pytest.raises(PlanError, match="is multimodal") as refused:
        prune(str(llava), plan, tmp_path / "less")
    assert "save_pretrained" not in str(refused.value)


# The folder, and the card in it


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
    prune(str(whole), PLAN, tmp_path / "less")
    kept = yaml.safe_load((tmp_path / "less" / "README.md").read_text().split("---")[1])
    assert {key: value for key, value in kept.items() if key.startswith("license")} == expected


def test_what_is_not_ours_is_not_deleted(tiny_llama: Path, tmp_path: Path) -> None:
    mine = tmp_path / ".less.part"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    prune(str(tiny_llama), PLAN, tmp_path / "less")
    assert (mine / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".less.part", "less"]


def test_the_folder_that_one_stands_in_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here", tmp_path / "here"):
        with pytest.raises(PlanError, match="the folder that you are in"):
            prune(str(tiny_llama), PLAN, out)
