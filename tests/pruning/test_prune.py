"""Skipped layers, and pruned checkpoints that transformers opens: of families, quantized, licensed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.checkpoints import LAYERS, checkpoint_at, config_in, llama, weights_in
from support.command_line import mistake, succeed
from support.families import tiny_model
from support.json_files import read_json, write_json
from support.quantized import block_fp8, rewrite
from support.tables import run_rows
from support.tiers import all_of
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import avss_dist
from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.corpus.seen import SCORES, SeenText
from avss_dist.models.change.skipping import skips
from avss_dist.models.checkpoint.layer_settings import LIST_OF_RULE
from avss_dist.models.checkpoint.loading import auto_classes, forward_function, load, load_model, open_module, quiet
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.models.forward import changing
from avss_dist.models.structure.layers import first_tensor
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan, read_plan
from avss_dist.pruning import configuration
from avss_dist.pruning.checkpoint import model_card, prune, source_license
from avss_dist.pruning.quantization import renumber_quantization, require_same_modules
from avss_dist.pruning.weights import LayerNames, StoredWeights
from avss_dist.warehouse.reader import Warehouse

IDS = torch.arange(16).reshape(2, 8) + 3
CAUSAL = (
    *("llama", "gemma3_text", "qwen3", "mixtral", "gpt2", "opt", "phi3", "olmo2", "granite", "deepseek_v3", "mamba"),
    *("gpt_neox", "cohere2", "exaone4"),
)
FAMILIES = [
    *(("causal", family) for family in CAUSAL),
    *(("masked", family) for family in ("bert", "distilbert", "roberta", "modernbert")),
    *(("image-text", family) for family in ("gemma3", "qwen2_vl")),
]
DEFAULT_FAMILIES = [
    *(("causal", family) for family in ("llama", "deepseek_v3", "mamba")),
    *(("masked", "bert"), ("image-text", "gemma3")),
]


def plan_of(folder: Path, *drop: int, number: int = 3, layers: str = "layers", **fields: Any) -> Plan:
    return Plan(model=str(folder), revision=None, num_layers=number, layers=layers, drop=drop, why={}, **fields)


# Skipping


def test_skipped_layers_leave_no_trace() -> None:
    model = llama(num_hidden_layers=4).eval()
    backbone = open_module(model)
    run = forward_function(backbone.module)
    with torch.no_grad():
        before = first_tensor(run(IDS, None))
        with changing(skips(backbone.layers, {0, 3})):
            skipped = [first_tensor(run(IDS, None)) for _ in range(2)]
        after = first_tensor(run(IDS, None))
        model.model.layers = torch.nn.ModuleList([model.model.layers[1], model.model.layers[2]])
        model.config.num_hidden_layers = 2
        expected = first_tensor(run(IDS, None))
    assert torch.equal(before, after)
    assert not torch.equal(before, skipped[0])
    for output in skipped:
        assert torch.equal(output, expected)


# Pruned checkpoints


TASK_SETTINGS = ("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "architectures")


@pytest.mark.parametrize(("kind", "family"), all_of(FAMILIES, DEFAULT_FAMILIES))
def test_a_pruned_checkpoint_of_a_family(kind: str, family: str, tmp_path: Path) -> None:
    """Every class that opens the original opens the pruned checkpoint, with the same labels and task settings.

    What the files lack for a class's head, both lack. Logits of a causal model are those of the original with the layer
    skipped, and it generates with a cache.
    """
    whole = tiny_model(kind, family).eval()
    whole.config.id2label = {0: "negative", 1: "neutral", 2: "positive"}
    whole.config.label2id = {"negative": 0, "neutral": 1, "positive": 2}
    whole.config.problem_type = "single_label_classification"
    whole.config.task_specific_params = {"1": {"prefix": "1: "}}
    whole_folder = tmp_path / "whole"
    whole.save_pretrained(whole_folder)
    layers = open_module(whole).layers
    path = layers[0].name.rpartition(".")[0]
    drop = len(layers) - 1 if family == "deepseek_v3" else 1
    plan = plan_of(tmp_path, drop, number=len(layers), layers=path)
    less_folder = tmp_path / "less"
    done = prune(str(whole_folder), plan, less_folder)
    opened = []
    for auto in auto_classes(AutoConfig.from_pretrained(whole_folder)):
        with quiet():
            try:
                original, before = auto.from_pretrained(whole_folder, output_loading_info=True)
            except Exception:
                continue
            less, after = auto.from_pretrained(less_folder, output_loading_info=True)
        opened.append(type(less).__name__)
        for name in TASK_SETTINGS:
            assert getattr(less.config, name, None) == getattr(original.config, name, None), name
        for names in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert without_numbers(after[names]) == without_numbers(before[names]), names
        assert original.num_parameters() > less.num_parameters()
    assert len(opened) == len(set(opened)) > 1
    ours = config_in(less_folder)
    theirs = config_in(whole_folder)
    assert ours.keys() - theirs.keys() == set()
    assert theirs.keys() - ours.keys() <= LIST_OF_RULE.keys()
    if kind == "causal":
        assert done["difference"] == 0
        less = AutoModelForCausalLM.from_pretrained(less_folder).eval()
        assert less.config.get_text_config().num_hidden_layers == len(layers) - 1
        with torch.no_grad(), changing(skips(layers, {drop})):
            expected = whole(IDS, use_cache=False).logits
        with torch.no_grad():
            assert torch.equal(less(IDS, use_cache=False).logits, expected)
        generated = less.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert generated.shape == (2, 11)


def without_numbers(names: Iterable[Any]) -> set[str]:
    return {re.sub(r"\d+", "N", str(name)) for name in names}


def test_settings_by_layer_are_cut_or_added_where_layers_would_change(tmp_path: Path) -> None:
    """A layer keeps its kind of attention, and the embedding stays tied.

    An old Gemma 3 says which layers attend to all tokens by a pattern. Where it no longer holds, a list replaces it.
    """
    whole = tiny_model("causal", "gemma3_text")
    whole_folder = tmp_path / "whole"
    whole.save_pretrained(whole_folder)
    file = whole_folder / "config.json"
    config = read_json(file)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    write_json(file, {**config, "layer_types": kinds})
    cut = tmp_path / "cut"
    prune(str(whole_folder), plan_of(tmp_path, 0), cut)
    assert config_in(cut)["layer_types"] == kinds[1:]
    assert "lm_head.weight" not in weights_in(cut)

    del config["layer_types"]
    config["sliding_window_pattern"] = 2
    write_json(file, config)
    assert AutoConfig.from_pretrained(whole_folder).layer_types == kinds
    expected = config | {"num_hidden_layers": 2}
    less_2 = tmp_path / "less-2"
    prune(str(whole_folder), plan_of(tmp_path, 2), less_2)
    assert config_in(less_2) == expected
    del expected["sliding_window_pattern"], expected["_sliding_window_pattern"]
    less_1 = tmp_path / "less-1"
    prune(str(whole_folder), plan_of(tmp_path, 1), less_1)
    written = config_in(less_1)
    assert written == expected | {"layer_types": ["sliding_attention"] * 2}


def test_a_setting_that_would_change_is_refused(tmp_path: Path) -> None:
    whole = LlamaConfig(num_hidden_layers=3, num_labels=3)
    less = LlamaConfig(num_hidden_layers=2, num_labels=2)
    with pytest.raises(PlanError, match=r"its setting `id2label.2` would be None for 'LABEL_2'"):
        configuration._require_same_settings(whole, less, {"num_hidden_layers"})
    with pytest.raises(PlanError, match=r"in AutoModelFor\w+, score.weight would have the shape \(2, 4096\) for \(3,"):
        configuration._require_same_classes(whole, less, plan_of(tmp_path, 1), Settings())


@pytest.mark.parametrize(
    ("family", "drop", "told"),
    [
        ("gpt2", 1, "attention is scaled by its place"),
        ("jamba", 1, "tells layers apart by their place"),
        ("zamba2", 1, "would not be what it was"),
    ],
)
def test_families_that_are_refused(family: str, drop: int, told: str, tmp_path: Path) -> None:
    model = tiny_model("causal", family)
    if family == "gpt2":
        model.config.scale_attn_by_inverse_layer_idx = True
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    layers = open_module(model.eval()).layers
    path = layers[0].name.rpartition(".")[0]
    less = tmp_path / "less"
    with pytest.raises(PlanError, match=told):
        prune(str(whole), plan_of(tmp_path, drop, number=len(layers), layers=path), less)
    assert not less.exists()
    assert not list(tmp_path.glob(".*"))


def test_sharded_weights_and_everything_beside(tiny_llama: Path, tmp_path: Path) -> None:
    """Files keep their names, those that hold only dropped layers are gone, and the index tells what there is."""
    whole = tmp_path / "whole"
    less = tmp_path / "less"
    shutil.copytree(tiny_llama, whole)
    (whole / "model.safetensors").unlink()
    llama().save_pretrained(whole, max_shard_size="20KB")
    (whole / "chat_template.jinja").write_text("{{ messages }}")
    prune(str(whole), plan_of(whole, 1), less)
    index = read_json(less / "model.safetensors.index.json")
    files = {file.name: load_file(file) for file in less.glob("*.safetensors")}
    originals = {}
    for file in whole.glob("*.safetensors"):
        originals |= load_file(file)
    file_of_tensor = {}
    total_size = 0
    for file_name, tensors in files.items():
        file_of_tensor |= dict.fromkeys(tensors, file_name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == file_of_tensor
    assert index["metadata"]["total_size"] == total_size
    for tensors in files.values():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, originals[name.replace("layers.1.", "layers.2.")])
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (less / name).read_bytes() == (whole / name).read_bytes()


def test_the_model_card_says_what_and_why(tiny_llama: Path) -> None:
    plan = Plan(
        model="m", revision="r", num_layers=3, layers="layers", drop=(1,), why={"by": "<script>"}, run_id="llama-1"
    )
    card = model_card(checkpoint_at(tiny_llama), plan)
    assert "without 1 of its 3 layers" in card
    assert "counted from 0: 1." in card
    assert "llama-1" in card
    assert "<script>" not in card.split("---")[2]
    assert yaml.safe_load(card.split("---")[1])["base_model"] == str(tiny_llama)
    assert f"# {tiny_llama.name} without 1 of its 3 layers" in card.replace("\\", "")


def test_the_model_card_says_on_which_rows_the_layers_were_chosen(tiny_llama: Path) -> None:
    seen = SeenText(use=SCORES, by="llama-1", corpus="text.txt", max_sequences=16, skip_sequences=8)
    plan = Plan(model="m", num_layers=3, layers="layers", drop=(1,), seen=(seen,))
    assert "- Chosen on text.txt (16 rows after the first 8).\n" in model_card(checkpoint_at(tiny_llama), plan)


def test_the_base_model_of_a_card_is_found_from_other_folders(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    plan = Plan(model="m", num_layers=3, layers="layers", drop=(1,))
    card = model_card(resolve(tiny_llama.name), plan)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == str(tiny_llama)


def test_folders_that_hold_something_are_left_alone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one with the name of a checkpoint that is being written; and the current folder is not replaced."""
    part = tmp_path / ".less.part"
    current = tmp_path / "here"
    part.mkdir()
    (part / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match="not empty"):
        prune(str(tiny_llama), plan_of(tiny_llama, 1), part)
    prune(str(tiny_llama), plan_of(tiny_llama, 1), tmp_path / "less")
    assert [file.name for file in part.iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".less.part", "less"]
    current.mkdir()
    monkeypatch.chdir(current)
    for out in (".", "../here", current):
        with pytest.raises(PlanError, match="the folder that you are in"):
            prune(str(tiny_llama), plan_of(tiny_llama, 1), out)


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "model.safetensors"])
def test_a_link_out_of_the_checkpoint_is_refused(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Its content would be in the new folder, and on the hub with it."""
    whole = tmp_path / "whole"
    secret = tmp_path / "secret"
    shutil.copytree(tiny_llama, whole)
    (whole / "notes.txt").write_text("A note.")
    (whole / name).rename(secret)
    (whole / name).symlink_to("../secret")
    less = tmp_path / "less"
    with pytest.raises(PlanError, match=f"{name} of .* is a link to {secret}, outside of the checkpoint"):
        prune(str(whole), plan_of(whole, 1), less)
    assert not less.exists()
    assert not list(tmp_path.glob(".*"))


def test_links_inside_the_checkpoint_and_the_cache_of_the_hub_are_followed(tiny_llama: Path, tmp_path: Path) -> None:
    """A snapshot consists of links to blobs, in a cache that may itself be behind a link."""
    disk = tmp_path / "disk"
    snapshot = disk / "models--lab--tiny" / "snapshots" / ("0" * 40)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in tiny_llama.iterdir():
        shutil.copyfile(file, blobs / f"blob-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.name}")
    (snapshot / "vocabulary.json").symlink_to("tokenizer.json")
    cache = tmp_path / "cache"
    cache.symlink_to(disk)
    less = tmp_path / "less"
    prune(str(cache / snapshot.relative_to(disk)), plan_of(snapshot, 1), less)
    written = {file.name: file for file in less.iterdir()}
    for path in written.values():
        assert not path.is_symlink()
    for name in ("tokenizer.json", "vocabulary.json"):
        assert written[name].read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()


def test_a_plan_of_another_model(tiny_llama: Path, tmp_path: Path) -> None:
    plan = Plan(model="other", revision="f" * 40, num_layers=3, layers="layers", drop=(1,), why={})
    less = tmp_path / "less"
    with pytest.raises(PlanError, match="The plan is for other at ffffffffffff"):
        prune(str(tiny_llama), plan, less)
    with pytest.raises(PlanError, match="The plan is for 5 layers; the model has 3"):
        prune(str(tiny_llama), plan_of(tiny_llama, 1, number=5), less)
    with pytest.raises(PlanError, match=r"not the 3 modules of 'blocks', each on its own\.\nSet `layers: layers` in"):
        prune(str(tiny_llama), plan_of(tiny_llama, 1, layers="blocks"), less)


def test_from_scores_to_a_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    """The commands: score, plan, prune, and score what came of it."""
    out = tmp_path / "warehouse"
    options: dict[str, Any] = {"max_sequences": 8, "sequence_length": 32, "sequences_per_shard": 4}
    run = avss_dist.score(tiny_llama, corpus="builtin:pydoc", warehouse=out, executor="local", **options)
    plan = tmp_path / "plan.yaml"
    less = tmp_path / "less"
    done = succeed("plan", "-w", out, "--by", "block_influence", "--count", 1, "--last", "1", "-o", plan)
    written_plan = read_plan(plan)
    rows = Warehouse(out).scores(site="block", recipe="pooled", threshold=1e-5).to_pylist()
    lowest = min(rows[:2], key=lambda row: row["block_influence"])
    assert written_plan.drop == (lowest["layer"],)
    assert written_plan.run_id == run.run_id
    assert written_plan.why["by"] == "block_influence"
    size = ["--max-sequences", 2, "--sequence-length", 32, "--executor", "local", "--allow-overlap"]
    done = succeed("evaluate", plan, "--tasks", "perplexity:builtin:pydoc", "-w", out, *size)
    done = succeed("prune", tiny_llama, plan, "-o", less, "-w", out)
    assert "2 of 3 layers" in done.stdout
    assert "(largest difference 0)" in done.stdout
    card = (less / "README.md").read_text()
    assert re.search(
        r"Evaluated: perplexity:builtin:pydoc \(the first 2 rows\): perplexity [\d.,]+, .* of the whole model: "
        r"[\d.]+% kept\.",
        card,
    )
    again = avss_dist.score(less, corpus="builtin:pydoc", warehouse=out, executor="local", **options)
    assert again.status == "done"
    assert len(again.scores(site="block", recipe="pooled", threshold=1e-5)) == 2
    assert "not empty" in mistake("prune", tiny_llama, plan, "-o", less)
    assert "Did you mean 'block_influence'" in mistake("plan", "-w", out, "--by", "block_influense", "-o", plan)


# Quantized checkpoints: what of them names layers, what a check cannot see


PLAN = Plan(model="m", num_layers=LAYERS, layers="layers", drop=(1,))


@pytest.fixture
def fp8(tiny_llama: Path, tmp_path: Path) -> Path:
    """Layers 0 and 2 keep one matrix in float32."""
    skipped = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn", "model.layers.2.mlp.down_proj", "lm_head")
    return block_fp8(tiny_llama, tmp_path / "fp8", 128, skipped)


def test_a_skip_list_is_renumbered_and_every_module_is_quantized_as_it_was(fp8: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    less = tmp_path / "less"
    PLAN.write(plan)
    done = succeed("prune", fp8, plan, "-o", less)
    config = config_in(less)
    assert config["quantization_config"]["modules_to_not_convert"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]
    stored = weights_in(less)
    assert "model.layers.1.mlp.down_proj.weight_scale_inv" not in stored
    assert stored["model.layers.1.mlp.down_proj.weight"].dtype == torch.float32
    assert stored["model.layers.1.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    for note in ("have the names and shapes of the tensors in the files", "compared with the weights dequantized"):
        assert note in done.stdout
        assert note in (less / "README.md").read_text()
    assert "(largest difference 0)" in done.stdout


def test_settings_that_fit_another_layer_are_seen(fp8: Path, tmp_path: Path) -> None:
    less = tmp_path / "less"
    prune(str(fp8), PLAN, less)
    stale = config_in(fp8)["quantization_config"]
    config = config_in(less)
    write_json(less / "config.json", config | {"quantization_config": stale})
    names = StoredWeights.of_checkpoint(checkpoint_at(fp8), PLAN, Settings()).layers
    with pytest.raises(PlanError, match=r"as what they are not once layers are dropped: model\.layers\.1\.") as wrong:
        require_same_modules(checkpoint_at(fp8), names, less, Settings())
    assert "weight_scale_inv" in wrong.value.message


TOWER = re.compile(r"(^|language_model\.)model\.layers\..*_proj")
STAYS = re.compile(r"layers\.[02]\.mlp\.down_proj")


def compressed(folder: Path, source: Path, ignore: list[str]) -> Path:
    """FP8 of compressed-tensors, as vLLM's users publish it: a scale for each projection, but two, to be ignored."""

    def quantize(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if not TOWER.match(name) or STAYS.search(name):
            yield name, tensor
            return
        scale = tensor.abs().max() / 448
        yield name, (tensor / scale).to(torch.float8_e4m3fn)
        yield f"{name}_scale", scale.reshape(1)

    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return rewrite(source, folder, quantize, settings | {"ignore": ignore})


def test_a_pattern_becomes_the_modules_that_it_matches(tiny_llama: Path, tmp_path: Path) -> None:
    whole = compressed(tmp_path / "whole", tiny_llama, ["lm_head", r"re:.*layers\.[02]\.mlp\.down_proj"])
    less = tmp_path / "less"
    done = prune(str(whole), PLAN, less)
    config = config_in(less)
    assert config["quantization_config"]["ignore"] == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert done["difference"] == 0
    assert "have the names and shapes" in done["notes"][0]
    with pytest.raises(ModelError, match=r"is quantized \(compressed-tensors\), and does not run here as it is stored"):
        load(checkpoint_at(whole), Settings(dtype="float32"), torch.device("cpu"))
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(less, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    last = model.model.layers[-1]
    assert last.self_attn.q_proj.weight.dtype == torch.float8_e4m3fn  # as it is stored
    assert last.mlp.down_proj.weight.dtype == torch.float32


@pytest.mark.nightly
def test_the_quantized_tower_of_a_multimodal_model(
    tmp_path: Path, save_checkpoint: Callable[[Any, Path], Path]
) -> None:
    """Its files call the tower otherwise than its modules are called, by which the settings name layers."""
    source = tmp_path / "source"
    tiny_model("image-text", "gemma3").save_pretrained(source)
    others = ["lm_head", "re:.*vision_tower.*", "re:.*projector.*"]
    whole = compressed(tmp_path / "whole", source, [*others, r"re:.*language_model\.layers\.[02]\.mlp\.down_proj"])
    plan = replace(PLAN, layers="language_model.layers")
    less = tmp_path / "less"
    done = prune(str(whole), plan, less)
    config = config_in(less)
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
    modules = []
    for layer in range(LAYERS):
        modules += [f"model.layers.{layer}.mlp.up", f"model.layers.{layer}.mlp.down"]
    assert renumber_quantization(config, LayerNames(PLAN, ("model.layers",), modules)) == config | (expected or {})


def test_a_pattern_that_cannot_be_read_is_refused(fp8: Path, tmp_path: Path) -> None:
    change_quantization(fp8, modules_to_not_convert=["re:model.layers.[0-1.mlp"])
    less = tmp_path / "less"
    with pytest.raises(PlanError, match=r"by 're:model\.layers\.\[0-1\.mlp', which is not a valid pattern"):
        prune(str(fp8), PLAN, less)
    assert not less.exists()


def change_quantization(folder: Path, **changed: Any) -> None:
    config_file = folder / "config.json"
    config = read_json(config_file)
    config["quantization_config"] = config.get("quantization_config", {}) | changed
    write_json(config_file, config)


# What they are computed with


@pytest.mark.nightly
def test_what_no_device_here_computes_with_is_unpacked_only_on_request(fp8: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight " * 20)
    options = ("--corpus", text, "--sequence-length", "8", "--sites", "block", "--executor", "local")
    warehouse = tmp_path / "w"
    refused = mistake("score", fp8, *options, "-w", warehouse)
    assert "is quantized (fp8), and no device here computes with that" in refused
    assert "--dequantize" in refused
    succeed("score", fp8, *options, "-w", warehouse, "--dequantize")
    (row,) = [row for row in run_rows(warehouse) if row["status"] == "done"]
    assert row["quantization"] == "fp8, dequantized"
    assert row["dtype"] == "float32"


def test_dequantized_weights_are_the_stored_ones_times_their_scales(fp8: Path) -> None:
    model = load_model(checkpoint_at(fp8), Settings(dequantize=True, dtype="float32"))
    stored = weights_in(fp8)
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
        load_model(checkpoint_at(folder), settings)


def test_what_cannot_be_compared_here_is_pruned_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(tiny_llama, folder)
    change_quantization(folder, quant_method="gptq", bits=4, group_size=128)
    done = prune(str(folder), PLAN, tmp_path / "less")
    assert done["difference"] is None
    assert "could not be seen here" in done["notes"][0]
    assert "Outputs could not be compared" in done["notes"][1]


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
    given = config_in(whole) | config
    write_json(whole / "config.json", given)
    assert source_license(whole) == expected
    front_matter = yaml.safe_load(model_card(checkpoint_at(whole), PLAN).split("---")[1])
    assert {key: value for key, value in front_matter.items() if key.startswith("license")} == expected
