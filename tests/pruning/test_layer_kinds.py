"""Kinds of layers that programs derive from places: which layers of a pruned model they take for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.families import tiny_model
from transformers import (
    AfmoeConfig,
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    LlamaConfig,
    Olmo3Config,
    Qwen3NextConfig,
    SmolLM3Config,
)

from avss_dist.models.checkpoint.layer_kinds import Rule, describe_misread, rules_of
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune

GEMMA3 = Gemma3TextConfig(num_hidden_layers=18)


def without(number: int, *dropped: int) -> list[int]:
    return [layer for layer in range(number) if layer not in dropped]


def rule(config: Any, reader: str, meaning: str = "") -> Rule:
    (found_rule,) = [rule for rule in rules_of(config) if rule.reader.startswith(reader) and meaning in rule.meaning]
    return found_rule


@pytest.mark.parametrize(
    ("config", "meaning", "dropped", "misread"),
    [
        (GEMMA3, "every 6th", (7, 8, 9, 14), [8, 11, 13]),  # measured: perplexity 321.84 for 297.73
        (GEMMA3, "every 6th", (12, 13, 14, 17), []),
        (Gemma2Config(num_hidden_layers=4), "every second", (0,), [0, 1, 2]),
        (Gemma2Config(num_hidden_layers=4), "every second", (0, 3), [0, 1]),
        (Gemma2Config(num_hidden_layers=4), "every second", (0, 1), []),
        (GptOssConfig(num_hidden_layers=4), "every second", (1,), [1, 2]),
        (Cohere2Config(num_hidden_layers=8), "every 4th", (3,), [3, 6]),
        (AfmoeConfig(num_hidden_layers=8), "every 4th", (3,), [3, 6]),
        (SmolLM3Config(num_hidden_layers=8), "no positions", (0,), [2, 3, 6]),
    ],
    ids=str,
)
def test_llama_cpp_goes_by_a_period(config: Any, meaning: str, dropped: tuple[int, ...], misread: list[int]) -> None:
    keep = without(config.num_hidden_layers, *dropped)
    assert rule(config, "llama.cpp", meaning).misread(keep) == misread


@pytest.mark.parametrize(
    ("config", "dropped", "misread"),
    [
        (Gemma2Config(num_hidden_layers=46), (0, 1), list(range(44))),  # is not the 27B any more
        (Gemma2Config(num_hidden_layers=48), (0, 1), list(range(46))),  # would be taken for it
        (Gemma2Config(num_hidden_layers=42), (0, 1), []),
        (DeepseekV2Config(num_hidden_layers=27), (3,), []),
        (DeepseekV2Config(num_hidden_layers=27), (3, 4), list(range(25))),
        (DeepseekV3Config(num_hidden_layers=27), (3, 4), list(range(25))),  # is refused: it has no low rank of queries
        (Glm4MoeLiteConfig(num_hidden_layers=47), (3,), list(range(46))),  # its routers get a softmax for a sigmoid
    ],
    ids=lambda value: getattr(value, "num_hidden_layers", None) and f"{value.model_type}-{value.num_hidden_layers}",
)
def test_llama_cpp_knows_variants_by_their_number_of_layers(
    config: Any, dropped: tuple[int, ...], misread: list[int]
) -> None:
    keep = without(config.num_hidden_layers, *dropped)
    assert rule(config, "llama.cpp", "variant").misread(keep) == misread


def test_exaone_has_windows_at_64_layers_only() -> None:
    """Of another number, llama.cpp takes all layers for full attention with positions, which none of them is."""
    config = Exaone4Config(num_hidden_layers=64, sliding_window_pattern=4)
    assert rule(config, "llama.cpp").misread(without(64, 0, 1, 2, 3)) == list(range(60))


def test_exaone_is_misread_without_its_layers_of_full_attention() -> None:
    config = Exaone4Config(num_hidden_layers=64, sliding_window_pattern=4)
    assert rule(config, "llama.cpp").misread(without(64, *range(3, 64, 4))) == list(range(48))


@pytest.mark.parametrize("config", [Olmo3Config(num_hidden_layers=8), Gemma3nTextConfig()], ids=["olmo3", "gemma3n"])
def test_llama_cpp_reads_a_list_that_its_converter_writes(config: Any) -> None:
    assert [rule for rule in rules_of(config) if rule.reader == "llama.cpp"] == []


def test_a_default_that_transformers_derives_is_a_rule() -> None:
    """llama.cpp and others take full attention at every fourth layer of a Qwen3-Next whose file gives no interval."""
    config = Qwen3NextConfig(num_hidden_layers=8)
    assert rule(config, "A program").misread(without(8, 0)) == [2, 3, 6]


def test_a_model_of_one_kind_has_no_rule() -> None:
    assert rules_of(LlamaConfig(num_hidden_layers=4)) == []


def test_a_sentence_names_the_layers_and_the_rule() -> None:
    (sentence,) = describe_misread(rules_of(GEMMA3), without(18, 7, 8, 9, 14))
    assert sentence == (
        "llama.cpp would read 3 of the 14 remaining layers as another kind than they are (8, 11, 13, counted anew from "
        "0): it takes full attention at every 6th layer, whatever `layer_types` says."
    )


def test_nothing_is_said_of_a_model_that_is_misread_as_it_is() -> None:
    kinds = ["full_attention"] * 6 + ["sliding_attention"] * 12
    config = Gemma3TextConfig(num_hidden_layers=18, layer_types=kinds)
    assert describe_misread(rules_of(config), without(18, 7)) == []


def test_the_card_of_a_pruned_model_says_it(tmp_path: Path) -> None:
    whole = tiny_model("causal", "gemma2")
    whole_folder = tmp_path / "whole"
    whole.save_pretrained(whole_folder)
    plan = Plan(model=str(whole_folder), num_layers=3, layers="layers", drop=(0,))
    less = tmp_path / "less"
    done = prune(str(whole_folder), plan, less)
    assert any(note.startswith("llama.cpp would read 2 of the 2 remaining layers") for note in done["notes"])
    assert "llama.cpp would read 2 of the 2" in (less / "README.md").read_text()
