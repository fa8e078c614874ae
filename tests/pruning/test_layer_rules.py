"""Settings that give the kinds of layers by a rule: no file of a pruned model says two things about a layer."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from support.checkpoints import config_in
from support.families import model_types, tiny_config
from support.json_files import write_json
from support.tiers import all_of, nightly
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from avss_dist.core.errors import AvssError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.layer_settings import COUNTS, LAST_INDICES, LIST_OF_RULE, PATTERNS
from avss_dist.models.checkpoint.loading import candidate_layers, skeleton, text_config
from avss_dist.models.checkpoint.locate import locate
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.pruning.configuration import write_config
from avss_dist.pruning.layer_rules import PERIODS

NUM_LAYERS = 8
SETTINGS = Settings(dtype="float32", device="cpu")
OTHER_RULES = {"decoder_sparse_step", "moe_layer_interval"}
"""Rules without a list in the file that are changed or refused."""
NOT_OF_LAYERS = {
    *("activation_sparsity_pattern", "audio_token_offset", "cross_attention_frequency", "cross_layer_interval"),
    *("hidden_stride", "image_token_offset", "max_period", "min_period", "mtp_hybrid_override_pattern"),
    *("num_inference_steps", "patch_stride", "rescale_every", "rope_local_base_freq", "spatial_pool_stride"),
    *("sscp_conv_stride_size", "step_kernel", "time_sampling_offset", "vocab_offset"),
}
"""Settings with such names that give no kind of a text model's layers by its place, or are kept as a list."""


def every_nth(number: int, special: str, usual: str, count: int) -> list[str]:
    """Kinds of ``count`` layers of which every ``number``-th is special, counted from 1."""
    kinds = [usual] * count
    kinds[number - 1 :: number] = [special] * (count // number)
    return kinds


def sliding(config: dict[str, Any], rule: str) -> list[str]:
    return every_nth(config[rule], "full_attention", "sliding_attention", len(config["layer_types"]))


def linear(config: dict[str, Any]) -> list[str]:
    return every_nth(
        config["full_attention_interval"], "full_attention", "linear_attention", len(config["layer_types"])
    )


def without_rope(config: dict[str, Any]) -> list[int]:
    return [int((layer + 1) % config["no_rope_layer_interval"] != 0) for layer in range(len(config["no_rope_layers"]))]


def experts_by_step(config: dict[str, Any]) -> list[int]:
    step = config["interleave_moe_layer_step"]
    return list(range(step - 1, config["num_hidden_layers"], step))


READINGS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "sliding_window_pattern": lambda config: sliding(config, "sliding_window_pattern"),
    "_sliding_window_pattern": lambda config: sliding(config, "_sliding_window_pattern"),
    "global_attn_every_n_layers": lambda config: sliding(config, "global_attn_every_n_layers"),
    "full_attention_interval": linear,
    "no_rope_layer_interval": without_rope,
    "interleave_moe_layer_step": experts_by_step,
}
"""The list that a rule stands for, as programs without transformers read the rule."""


def whole_config(folder: Path, family: str, changes: dict[str, Any], **generic: Any) -> dict[str, Any]:
    """Write the configuration of a small model with changed keys, of which None is left out, and return it."""
    config = tiny_config(family, overrides=False)
    name = config.get_text_config().attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values = config.to_dict() | {name: NUM_LAYERS} | dict.fromkeys(BY_LAYER) | changes | generic
    values = {key: value for key, value in values.items() if value is not None or key not in {*BY_LAYER, *changes}}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, default=str))
    return values


BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "moe_layers", "indexer_types")
"""Lists with an entry for each layer, which the class derives for the number of layers."""


def pruned_config(folder: Path, *drop: int) -> dict[str, Any]:
    """Return the configuration of the model in a folder without some layers."""
    checkpoint = locate(str(folder), weights=False)
    assert checkpoint is not None
    lists = candidate_layers(skeleton(text_config(checkpoint), SETTINGS, torch.float32), None)
    ((path, layers),) = lists.items()
    plan = Plan(model=str(folder), num_layers=len(layers), layers=path, drop=drop)
    output = folder / "-".join(["without", *map(str, drop)])
    output.mkdir()
    write_config(checkpoint, plan, output, SETTINGS)
    written: dict[str, Any] = config_in(output)
    return written


def kinds_of(config: dict[str, Any], folder: Path, name: str) -> list[Any]:
    """Return a list of a configuration as transformers reads its file anew."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    value: list[Any] = getattr(AutoConfig.from_pretrained(folder), name)
    return value


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "afmoe": ("afmoe", "layer_types", {"global_attn_every_n_layers": 4}),
    "cohere2": ("cohere2", "layer_types", {"sliding_window_pattern": 4}),
    "exaone4": ("exaone4", "layer_types", {"sliding_window_pattern": 4}),
    "gemma3": ("gemma3_text", "layer_types", {"sliding_window_pattern": 6, "_sliding_window_pattern": None}),
    "llama4": ("llama4_text", "no_rope_layers", {"no_rope_layer_interval": 4}),
    "llama4-experts": ("llama4_text", "moe_layers", {"interleave_moe_layer_step": 2}),
    "qwen3_next": ("qwen3_next", "layer_types", {"full_attention_interval": 4}),
    "smollm3": ("smollm3", "no_rope_layers", {"no_rope_layer_interval": 4}),
}
"""Family, list of kinds, and the rule in the file of the whole model, which has no list."""


@pytest.mark.parametrize("drop", [*nightly(((0,),), ((3,),)), (1, 4)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_rule_goes_where_it_would_give_other_kinds(case: str, drop: tuple[int, ...], tmp_path: Path) -> None:
    family, name, rule = CASES[case]
    whole_folder = tmp_path / "whole"
    whole = whole_config(whole_folder, family, rule)
    before = kinds_of(whole, tmp_path / "read", name)
    written = pruned_config(whole_folder, *drop)
    removed = [key for key in rule if key in whole and key not in written]
    assert removed, "the rule still stands beside the list"
    after = kinds_of(written, tmp_path / "again", name)
    keep = [layer for layer in range(NUM_LAYERS) if layer not in drop]
    if name == "moe_layers":  # indices, not kinds
        assert after == [new for new, old in enumerate(keep) if old in before]
    else:
        assert after == [before[layer] for layer in keep]


@pytest.mark.parametrize("case", all_of(CASES, ["gemma3", "llama4-experts", "qwen3_next"]))
def test_a_rule_stays_where_it_still_holds(case: str, tmp_path: Path) -> None:
    family, _, rule = CASES[case]
    whole_folder = tmp_path / "whole"
    whole = whole_config(whole_folder, family, rule)
    written = pruned_config(whole_folder, NUM_LAYERS - 1)
    assert written.keys() == whole.keys()


@pytest.mark.parametrize("drop", [*nightly(((1,),)), (3,)], ids=str)
def test_qwen3_next_can_lose_any_layer(drop: tuple[int, ...], tmp_path: Path) -> None:
    """A configuration with only an interval was refused: "its setting would be 4 for None"."""
    whole = tmp_path / "whole"
    whole_config(whole, "qwen3_next", {"full_attention_interval": 4})
    assert "full_attention_interval" not in pruned_config(whole, *drop)


def test_a_pattern_loses_the_characters_of_dropped_layers(tmp_path: Path) -> None:
    pattern = "M-M*M-M*"
    changes = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    whole = tmp_path / "whole"
    whole_config(whole, "nemotron_h", changes)
    written = pruned_config(whole, 1, 4)
    assert written["hybrid_override_pattern"] == "MM*-M*"


@pytest.mark.parametrize(("drop", "dense"), [((0,), [1, 3, 5]), ((3,), [0, 2, 3, 5]), ((0, 1, 4), [0, 3])], ids=str)
def test_dense_layers_of_qwen_are_listed(drop: tuple[int, ...], dense: list[int], tmp_path: Path) -> None:
    """With a step of 2, layers 0, 2, 4 and 6 are dense."""
    whole = tmp_path / "whole"
    whole_config(whole, "qwen3_moe", {"decoder_sparse_step": 2})
    written = pruned_config(whole, *drop)
    assert written["decoder_sparse_step"] == 1
    assert written["mlp_only_layers"] == dense


def test_a_step_stays_where_it_still_holds(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole_config(whole, "qwen3_moe", {"decoder_sparse_step": 2})
    assert pruned_config(whole, 7)["decoder_sparse_step"] == 2


def test_layers_that_are_listed_as_dense_stay_dense(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole_config(whole, "qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert pruned_config(whole, 0)["mlp_only_layers"] == [0, 1, 3, 5]


def test_repeated_blocks_are_written_out(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole_config(whole, "recurrent_gemma", {"block_types": ["recurrent", "recurrent", "attention"]})
    written = pruned_config(whole, 0, 4)
    assert written["block_types"] == ["recurrent", "attention", "recurrent", "attention", "recurrent", "recurrent"]


def test_a_period_is_shifted(tmp_path: Path) -> None:
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    whole = tmp_path / "whole"
    whole_config(whole, "jamba", periods)
    written = pruned_config(whole, 0)
    assert {key: written[key] for key in periods} == {**periods, "attn_layer_offset": 0, "expert_layer_offset": 0}


def test_a_period_that_no_layer_fits_is_refused(tmp_path: Path) -> None:
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    whole = tmp_path / "whole"
    whole_config(whole, "jamba", periods)
    with pytest.raises(PlanError, match="tells layers apart by their place"):
        pruned_config(whole, 2)


@pytest.mark.parametrize(("drop", "start", "end"), [((0,), 0, 6), ((3,), 1, 6), ((0, 7), 0, 5)], ids=str)
def test_first_and_last_layers_with_experts_move(drop: tuple[int, ...], start: int, end: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole_config(whole, "ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 7})
    written = pruned_config(whole, *drop)
    assert written["moe_layer_start_index"] == start
    assert written["moe_layer_end_index"] == end


def test_two_rules_for_one_list_go_together(tmp_path: Path) -> None:
    """Only transformers' older files have both, and it reads them only where there is no list."""
    whole = tmp_path / "whole"
    whole_config(whole, "axk1", {"first_k_dense_replace": 1, "moe_layer_freq": 2})
    written = pruned_config(whole, 2)
    assert not {"first_k_dense_replace", "moe_layer_freq"} & written.keys()
    assert written["mlp_layer_types"] == ["dense", "dense", "dense", "sparse", "dense", "sparse", "dense"]


@pytest.mark.nightly
def test_every_setting_with_the_name_of_a_rule_is_known() -> None:
    """A new version of transformers may bring another one, of which somebody must say what it gives."""
    named = re.compile(r"pattern|interval|period|offset|freq|every|step|stride")
    names = set()
    for _, family in model_types("causal", "masked"):
        config = CONFIG_MAPPING[family]
        source = inspect.getsource(config)
        read_from_file = re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', source)
        names.update(name for name in [*inspect.signature(config).parameters, *read_from_file] if named.search(name))
    known = {*LIST_OF_RULE, *PERIODS, *PERIODS.values(), *COUNTS, *LAST_INDICES, *PATTERNS, *OTHER_RULES}
    unknown = {name for name in names - known - NOT_OF_LAYERS if not name.startswith("time_step_")}
    assert unknown == set()


@pytest.mark.nightly
@pytest.mark.parametrize("family", [family for _, family in model_types("causal")])
def test_files_of_all_families_say_one_thing(family: str, tmp_path: Path) -> None:
    """Wherever a rule stands beside a list, it gives that list, whichever layer is dropped."""
    whole_folder = tmp_path / "whole"
    try:
        whole = whole_config(whole_folder, family, {})
        pruned_config(whole_folder, NUM_LAYERS - 1)
    except (AvssError, ValueError, AssertionError, StrictDataclassError) as error:
        pytest.skip(f"not built at this size, or refused: {error}")
    layers = range(NUM_LAYERS - 1) if READINGS.keys() & whole.keys() else (0, 3)
    for layer in layers:
        try:
            written = pruned_config(whole_folder, layer)
        except PlanError:
            continue
        for rule, name in LIST_OF_RULE.items():
            if rule in READINGS and rule in written and name in written:
                assert READINGS[rule](written) == written[name], f"without {layer}: {rule}"
