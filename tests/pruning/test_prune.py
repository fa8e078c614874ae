"""Plans, skipped layers, and pruned checkpoints that transformers opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, strategies
from safetensors.torch import load_file
from support.checkpoints import llama
from support.families import tiny_model

import avss_dist
from avss_dist.errors import ConfigError
from avss_dist.models.layers import first_tensor
from avss_dist.models.loading import forward_function, open_module
from avss_dist.models.skipping import skipping
from avss_dist.pruning.checkpoint import model_card, prune
from avss_dist.pruning.plan import Choice, Plan, PlanError, make_plan, mergekit_slices, read_plan
from avss_dist.warehouse.reader import Warehouse

Save = Callable[[Any, Path], Path]
IDS = torch.arange(16).reshape(2, 8) + 3
FAMILIES = (
    *("llama", "gemma3_text", "qwen3", "mixtral", "gpt2", "opt", "phi3", "olmo2", "granite", "deepseek_v3", "mamba"),
    *("gpt_neox", "cohere2", "exaone4"),
)


def plan_of(folder: Path, *drop: int, number: int = 3, layers: str = "layers", **fields: Any) -> Plan:
    return Plan(model=str(folder), revision=None, num_layers=number, layers=layers, drop=drop, why={}, **fields)


# Choosing


SCORES = [5.0, 1.0, 4.0, 2.0, 3.0, 0.5, 6.0, 7.0]


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({}, [1, 5]),
        ({"fraction": 0.5}, [1, 3, 4, 5]),
        ({"count": 1}, [5]),
        ({"count": 3, "first": 2}, [3, 4, 5]),
        ({"count": 2, "last": 3}, [1, 3]),
        ({"count": 2, "contiguous": True}, [4, 5]),
        ({"count": 3, "contiguous": True, "last": 3}, [1, 2, 3]),
        ({"mass": 0.13}, [1, 3, 5]),
    ],
)
def test_what_is_dropped(options: dict[str, Any], dropped: list[int]) -> None:
    assert Choice(**options).drop(SCORES) == dropped


@given(
    strategies.lists(strategies.integers(0, 9).map(float), min_size=2, max_size=40),
    strategies.floats(0.01, 0.99),
    strategies.integers(0, 3),
    strategies.integers(0, 3),
)
def test_the_lowest_that_are_not_protected(scores: list[float], share: float, first: int, last: int) -> None:
    choice = Choice(fraction=share, first=first, last=last)
    try:
        dropped = choice.drop(scores)
    except PlanError:
        assert (
            max(1, round(share * len(scores))) > max(0, len(scores) - first - last)
            or len(scores) == 1
            or (round(share * len(scores)) >= len(scores))
        )
        return
    free = range(first, len(scores) - last)
    kept = [scores[layer] for layer in free if layer not in dropped]
    assert set(dropped) <= set(free) and len(dropped) == max(1, round(share * len(scores)))
    assert not kept or max(scores[layer] for layer in dropped) <= min(kept)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"by": "avs"}, ConfigError, "Did you mean 'avss'"),
        ({"fraction": 1.0}, ConfigError, "between 0 and 1"),
        ({"fraction": 0.5, "count": 2}, ConfigError, "fraction and count were given"),
        ({"count": 0}, ConfigError, "at least 1"),
        ({"mass": 0.5, "contiguous": True}, ConfigError, "mass"),
        ({"first": -1}, ConfigError, "fewer than 0"),
        ({"count": 8}, PlanError, "8 of 8 layers would be dropped"),
        ({"count": 7, "first": 2}, PlanError, "6 of 8 are not protected"),
        ({"mass": 0.001}, PlanError, "No layer holds as little"),
    ],
)
def test_choices_that_cannot_be(options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Choice(**options).drop(SCORES)


def test_a_missing_score() -> None:
    with pytest.raises(PlanError, match="Layers 1 have no score"):
        Choice().drop([1.0, float("nan"), 2.0])


# Plan files


def test_a_plan_through_its_file(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1, 4, number=6, run_id="r-1")
    plan.write(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan
    assert plan.keep == (0, 2, 3, 5)
    slices = yaml.safe_load(mergekit_slices(plan))["slices"]
    assert [part["sources"][0]["layer_range"] for part in slices] == [[0, 1], [2, 4], [5, 6]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"drop": [7]}, "no layer 7: the model has 6, from 0"),
        ({"drop": [-1]}, "no layer -1"),
        ({"drop": [1, 1]}, "drops a layer twice"),
        ({"drop": []}, "drops no layer"),
        ({"drop": [0, 1, 2, 3, 4, 5]}, "drops all 6 layers"),
        ({"drop": "1, 2"}, "drop is a list of layers"),
        ({"drop": [True]}, "drop is a list of layers"),
        ({"keep": [0]}, "keep is not what drop leaves"),
        ({"dropp": [1]}, "Did you mean 'drop'"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    plain = {"model": "m", "num_layers": 6, "layers": "layers", "drop": [1]}
    file.write_text(yaml.safe_dump(plain | change))
    with pytest.raises(PlanError, match=told):
        read_plan(file)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "none.yaml")
    for text, told in (("[1", "is not YAML"), ("words", "has no keys"), ("drop: [1]", "has no 'model'")):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(PlanError, match=told):
            read_plan(tmp_path / "plan.yaml")


# Skipping


def test_skipped_layers_leave_no_trace() -> None:
    model = llama(num_hidden_layers=4).eval()
    backbone = open_module(model)
    run = forward_function(backbone.module)
    with torch.no_grad():
        before = first_tensor(run(IDS, None))
        with skipping(backbone.structure.layers, {0, 3}):
            skipped = [first_tensor(run(IDS, None)) for _ in range(2)]
        after = first_tensor(run(IDS, None))
        model.model.layers = torch.nn.ModuleList([model.model.layers[1], model.model.layers[2]])
        model.config.num_hidden_layers = 2
        expected = first_tensor(run(IDS, None))
    assert torch.equal(before, after) and not torch.equal(before, skipped[0])
    assert all(torch.equal(one, expected) for one in skipped)


# Pruned checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_checkpoint_computes_what_skipping_does(family: str, tmp_path: Path) -> None:
    """Reloaded by transformers: logits equal to the original's with the layer skipped; generates with a cache."""
    from transformers import AutoModelForCausalLM

    whole = tiny_model("causal", family).eval()
    whole.save_pretrained(tmp_path / "whole")
    layers = open_module(whole).structure.layers
    path = layers[0].name.rpartition(".")[0]
    drop = len(layers) - 1 if family == "deepseek_v3" else 1
    done = prune(str(tmp_path / "whole"), plan_of(tmp_path, drop, number=len(layers), layers=path), tmp_path / "less")
    assert done["difference"] == 0
    less = AutoModelForCausalLM.from_pretrained(tmp_path / "less").eval()
    assert less.config.get_text_config().num_hidden_layers == len(layers) - 1
    with torch.no_grad(), skipping(layers, {drop}):
        expected = whole(IDS, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(less(IDS, use_cache=False).logits, expected)
    generated = less.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (2, 11)


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
    model.save_pretrained(tmp_path / "whole")
    layers = open_module(model.eval()).structure.layers
    path = layers[0].name.rpartition(".")[0]
    with pytest.raises(PlanError, match=told):
        prune(str(tmp_path / "whole"), plan_of(tmp_path, drop, number=len(layers), layers=path), tmp_path / "less")
    assert not (tmp_path / "less").exists() and not list(tmp_path.glob(".*"))


def test_settings_by_layer_are_cut(tmp_path: Path) -> None:
    """A layer keeps its kind of attention; the embedding stays tied."""
    model = tiny_model("causal", "gemma3_text")
    kinds = model.config.layer_types
    model.save_pretrained(tmp_path / "whole")
    prune(str(tmp_path / "whole"), plan_of(tmp_path, 0, number=len(kinds)), tmp_path / "less")
    assert json.loads((tmp_path / "less" / "config.json").read_text())["layer_types"] == kinds[1:]
    assert "lm_head.weight" not in load_file(tmp_path / "less" / "model.safetensors")


def test_sharded_weights_and_everything_beside(tiny_llama: Path, tmp_path: Path) -> None:
    """Files keep their names, those that hold only dropped layers are gone, and the index tells what there is."""
    whole, less = tmp_path / "whole", tmp_path / "less"
    shutil.copytree(tiny_llama, whole)
    (whole / "model.safetensors").unlink()
    llama().save_pretrained(whole, max_shard_size="20KB")
    (whole / "chat_template.jinja").write_text("{{ messages }}")
    prune(str(whole), plan_of(whole, 1), less)
    index = json.loads((less / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in less.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
    originals = {name: tensor for file in whole.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for tensors in files.values():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, originals[name.replace("layers.1.", "layers.2.")])
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (less / name).read_bytes() == (whole / name).read_bytes()


def test_the_model_card_says_what_and_why(tiny_llama: Path) -> None:
    from avss_dist.models.checkpoints import resolve

    plan = Plan(
        model="m", revision="r", num_layers=3, layers="layers", drop=(1,), why={"by": "<script>"}, run_id="llama-1"
    )
    card = model_card(resolve(str(tiny_llama)), plan)
    assert "without 1 of its 3 layers" in card and "counted from 0: 1." in card and "llama-1" in card
    assert "<script>" not in card.split("---")[2]
    assert yaml.safe_load(card.split("---")[1])["base_model"] == tiny_llama.name


def test_folders_that_hold_something_are_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match="not empty"):
        prune(str(tiny_llama), plan_of(tiny_llama, 1), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_plan_of_another_model(tiny_llama: Path, tmp_path: Path) -> None:
    plan = Plan(model="other", revision="f" * 40, num_layers=3, layers="layers", drop=(1,), why={})
    with pytest.raises(PlanError, match="The plan is for other at ffffffffffff"):
        prune(str(tiny_llama), plan, tmp_path / "less")
    with pytest.raises(PlanError, match="The plan is for 5 layers; the model has 3"):
        prune(str(tiny_llama), plan_of(tiny_llama, 1, number=5), tmp_path / "less")
    with pytest.raises(PlanError, match="are not the 3 modules of 'blocks'"):
        prune(str(tiny_llama), plan_of(tiny_llama, 1, layers="blocks"), tmp_path / "less")


def test_from_scores_to_a_checkpoint(tiny_llama: Path, tmp_path: Path, run_avss: Callable[..., Any]) -> None:
    """The commands: score, plan, prune, and score what came of it."""
    out = tmp_path / "warehouse"
    options: dict[str, Any] = {"max_sequences": 8, "sequence_length": 32, "sequences_per_shard": 4}
    run = avss_dist.score(tiny_llama, corpus="builtin:pydoc", out=out, executor="local", **options)
    plan, less = tmp_path / "plan.yaml", tmp_path / "less"
    done = run_avss("plan", out, "--by", "block_influence", "--count", 1, "--protect", "last=1", "-o", plan)
    assert done.returncode == 0, done.stderr
    made = read_plan(plan)
    rows = Warehouse(out).scores(site="block", recipe="pooled", threshold=1e-5).to_pylist()
    lowest = min(rows[:2], key=lambda row: row["block_influence"])
    assert made.drop == (lowest["layer"],) and made.run_id == run.run_id and made.why["by"] == "block_influence"
    done = run_avss("prune", tiny_llama, plan, "--out", less)
    assert done.returncode == 0 and "2 of 3 layers" in done.stdout and "(largest difference 0)" in done.stdout
    again = avss_dist.score(less, corpus="builtin:pydoc", out=out, executor="local", **options)
    assert again.status == "done" and len(again.scores(site="block", recipe="pooled", threshold=1e-5)) == 2
    done = run_avss("prune", tiny_llama, plan, "--out", less)
    assert done.returncode == 2 and "not empty" in done.stderr and "Traceback" not in done.stderr
    done = run_avss("plan", out, "--by", "block_influense", "-o", plan)
    assert done.returncode == 2 and "Did you mean 'block_influence'" in done.stderr


def test_random_plans_differ_by_seed(tiny_llama: Path) -> None:
    rows = [{"layer": i, "layer_name": f"layers.{i}", "avss_smoothed": float(i)} for i in range(30)]
    run = {"model": "m", "revision": "r", "run_id": "m-1"}
    plans = [make_plan(rows, run, Choice(by="random", seed=seed)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] and plans[0].drop != plans[2].drop and len(plans[0].drop) == 8


def test_layers_that_are_not_one_list() -> None:
    rows = [{"layer": i, "layer_name": name} for i, name in enumerate(("a.0", "shared", "a.1"))]
    with pytest.raises(PlanError, match="not one list of modules"):
        make_plan(rows, {"model": "m", "revision": "r", "run_id": "m-1"}, Choice())
