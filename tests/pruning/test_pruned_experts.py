"""Routed experts that go: masked in place, chosen by what was measured of them, and taken out of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import VOCABULARY
from support.command_line import avss, mistake, succeed
from support.families import tiny_config, tiny_model
from support.quantized import block_fp8
from support.tiers import all_of
from transformers import AutoModelForCausalLM

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.intervention import Expert
from avss_dist.models.experts import find_routed_experts, require_experts, without_experts
from avss_dist.models.loading import open_module
from avss_dist.pruning.checkpoint import prune, pruned_from
from avss_dist.pruning.plan import Plan, read_plan
from avss_dist.pruning.selection import ExpertChoice, PlanError

Save = Callable[[Any, Path], Path]
IDS = torch.arange(16).reshape(2, 8) + 3
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "minimax_m2")
COUNT = {"deepseek_v3": "n_routed_experts", "qwen3_moe": "num_experts"}  # as published; else num_local_experts


def mixture(family: str, experts: int = 4, **changes: Any) -> Any:
    """A tiny model in which every expert matters."""
    config = tiny_config(family)
    config.update({COUNT.get(family, "num_local_experts"): experts, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    return model


def plan_of(folder: Path, model: Any, drop: Sequence[Any]) -> Plan:
    layers = open_module(model).structure.layers
    path = layers[0].name.rpartition(".")[0]
    return Plan(model=str(folder), num_layers=len(layers), layers=path, drop=tuple(drop), why={"by": "hand"})


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def masked_logits(model: Any, drop: Sequence[Expert]) -> torch.Tensor:
    layers = open_module(model).structure.layers
    require_experts(layers, drop)
    with without_experts(layers, drop):
        return logits_of(model)


def experts_of(model: Any, *indices: int) -> list[Expert]:
    """These experts of each layer that has any."""
    layers = [layer for layer in open_module(model).structure.layers if find_routed_experts(layer.module)]
    return [Expert(layer.index, expert) for layer in layers for expert in indices]


@pytest.mark.parametrize("family", all_of(FAMILIES, default=["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]))
def test_a_checkpoint_without_experts_computes_what_masking_does(family: str, tmp_path: Path) -> None:
    """Another expert of each layer; transformers opens it, and nothing is left of the mask."""
    whole = mixture(family)
    before = logits_of(whole)
    drop = [Expert(expert.layer, i % 2) for i, expert in enumerate(experts_of(whole, 0))]
    masked = masked_logits(whole, drop)
    assert torch.equal(logits_of(whole), before) and float((masked - before).abs().max()) > 0.01
    whole.save_pretrained(tmp_path / "whole")
    file, name = tmp_path / "whole" / "config.json", COUNT.get(family, "num_local_experts")
    if family == "qwen3_moe":
        file.write_text(file.read_text().replace("num_local_experts", name))
    done = prune(str(tmp_path / "whole"), plan_of(tmp_path / "whole", whole, drop), tmp_path / "less")
    assert done["difference"] <= 1e-5
    less = AutoModelForCausalLM.from_pretrained(tmp_path / "less").eval()
    assert float((logits_of(less) - masked).abs().max()) <= 1e-5
    settings, original = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("less", "whole"))
    assert settings == {**original, name: 3} and original[name] == 4
    stored, all_stored = (load_file(tmp_path / name / "model.safetensors") for name in ("less", "whole"))
    assert done["bytes"] == sum(t.nbytes for t in stored.values()) < sum(t.nbytes for t in all_stored.values())


def test_masks_of_passes_may_overlap_and_end_in_any_order() -> None:
    """And those that nest add up; the logits that the router gives of removed experts are minus infinity."""
    model = mixture("qwen3_moe")
    layers = open_module(model).structure.layers
    both = masked_logits(model, [Expert(1, 0), Expert(1, 2)])
    with without_experts(layers, [Expert(1, 0)]), without_experts(layers, [Expert(1, 2)]):
        assert torch.equal(logits_of(model), both)
    first, second = without_experts(layers, [Expert(1, 0)]), without_experts(layers, [Expert(2, 1)])
    first.__enter__()
    second.__enter__()
    router = layers[1].module.mlp.gate
    given, _, index = router(torch.randn(5, router.hidden_dim))
    assert torch.isneginf(given[:, 0]).all() and torch.isfinite(given[:, 1:]).all()
    assert (index != 0).all()
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert "forward" not in vars(router) and router.num_experts == 4 and "weight" not in vars(router)


def test_gradients_reach_the_rows_of_the_remaining_experts() -> None:
    model = mixture("mixtral")
    with without_experts(open_module(model).structure.layers, [Expert(0, 3)]):
        model(IDS, use_cache=False).logits.square().sum().backward()
    gradient = model.model.layers[0].mlp.gate.weight.grad
    assert not gradient[3].any() and gradient[:3].abs().sum(dim=1).all()
    assert not model.model.layers[0].mlp.experts.down_proj.grad[3].any()


def test_groups_of_a_router_stay_of_equal_size(tmp_path: Path) -> None:
    """Of two groups of four, one is chosen; each loses an expert."""
    whole = mixture("deepseek_v3", 8, n_group=2, topk_group=1)
    drop = experts_of(whole, 1, 6)
    whole.save_pretrained(tmp_path / "whole")
    assert prune(str(tmp_path / "whole"), plan_of(tmp_path, whole, drop), tmp_path / "less")["difference"] <= 1e-5
    less = AutoModelForCausalLM.from_pretrained(tmp_path / "less").eval()
    assert float((logits_of(less) - masked_logits(whole, drop)).abs().max()) <= 1e-5
    layers = open_module(whole).structure.layers
    with pytest.raises(ModelError, match="2 groups of 4 experts each, of which 2 to 4 would remain"):
        require_experts(layers, experts_of(whole, 1, 2))
    with pytest.raises(ModelError, match="1 expert would remain in each of the 2 groups"):
        require_experts(layers, experts_of(whole, 1, 2, 3, 5, 6, 7))
    with pytest.raises(PlanError, match="2 groups of 4 experts each"):
        prune(str(tmp_path / "whole"), plan_of(tmp_path, whole, experts_of(whole, 1, 2)), tmp_path / "uneven")


def test_experts_of_a_quantized_checkpoint_are_copied_as_they_are_stored(tmp_path: Path) -> None:
    """Each in tensors of its own, with a scale for each matrix."""
    whole = mixture("qwen3_moe")
    whole.save_pretrained(tmp_path / "whole")
    fp8 = block_fp8(tmp_path / "whole", tmp_path / "fp8", 128)
    done = prune(str(fp8), plan_of(fp8, whole, experts_of(whole, 1)), tmp_path / "less")
    less, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "less", fp8))
    for name in ("down_proj.weight", "down_proj.weight_scale_inv", "up_proj.weight"):
        expert = "model.layers.2.mlp.experts.{}." + name
        for new, old in enumerate((0, 2, 3)):
            assert less[expert.format(new)].equal(stored[expert.format(old)])
        assert expert.format(3) not in less
    assert less["model.layers.2.mlp.gate.weight"].equal(stored["model.layers.2.mlp.gate.weight"][[0, 2, 3]])
    assert any("have the names and shapes of the tensors in the files" in note for note in done["notes"])
    assert done["difference"] <= 1e-5


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("llama", r"Layer 1 \(LlamaDecoderLayer\) has no routed experts"),
        ("llama4_text", "Llama4Router also counts experts in `out_features`"),
        ("afmoe", "cannot be removed: no module beside its experts has"),
        ("ernie4_5_moe", "has a tensor 'moe_statics.e_score_correction_bias', whose meaning for an expert is unknown"),
    ],
)
def test_families_whose_routers_are_not_understood_are_refused(family: str, told: str, tmp_path: Path) -> None:
    model = tiny_model("causal", family)
    layers = open_module(model).structure.layers
    with pytest.raises(ModelError, match=told):
        require_experts(layers, [Expert(1, 0)])
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(PlanError, match=told):
        prune(str(tmp_path / "whole"), plan_of(tmp_path, model, [Expert(1, 0)]), tmp_path / "less")
    assert not (tmp_path / "less").exists()


def test_experts_that_cannot_go(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    layers = open_module(model).structure.layers
    with pytest.raises(ModelError, match="There is no expert 4 in layer 1: it has 4, from 0"):
        require_experts(layers, [Expert(1, 4)])
    with pytest.raises(
        ModelError, match="1 of 4 experts would remain in layer 2, and its router sends each token to 2"
    ):
        require_experts(layers, [Expert(2, i) for i in range(3)])
    model.save_pretrained(tmp_path / "whole")
    uneven = plan_of(tmp_path, model, [Expert(1, 0)])
    with pytest.raises(PlanError, match="Layer 1 would have 3 routed experts and layer 0 4, and a qwen3_moe has one"):
        prune(str(tmp_path / "whole"), uneven, tmp_path / "less")
    both = plan_of(tmp_path, model, [0, *(Expert(layer, 0) for layer in (1, 2))])
    assert prune(str(tmp_path / "whole"), both, tmp_path / "less")["difference"] <= 1e-5  # a layer and experts at once
    with pytest.raises(ConfigError, match=r"`drop` has expert\.0\.1 and the whole layer 0"):
        plan_of(tmp_path, model, [0, Expert(0, 1)])


SCORES = {1: np.array([3.0, 0.0, 0.0, 5, 1, 9, 8, 7]), 4: np.array([1.0, 2, 3, 4, 5, 6, 7, 0])}


def test_the_lowest_of_each_layer_are_chosen() -> None:
    """A quarter of eight, of ties the earlier; with two groups, one of each; by chance, the same for the same seed."""
    reap = ExpertChoice(by="reap", experts=0.25)
    assert reap.drop(SCORES, 2) == (Expert(1, 1), Expert(1, 2), Expert(4, 0), Expert(4, 7))
    assert reap.drop(SCORES, 2, groups=2) == (Expert(1, 1), Expert(1, 4), Expert(4, 0), Expert(4, 7))
    draws = [ExpertChoice(by="random", experts=0.25, seed=seed).drop(SCORES, 2) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and {len(draw) for draw in draws} == {4}
    with pytest.raises(
        PlanError, match="would leave 1 of 8 experts in each layer, and each token is sent to 2"
    ) as caught:
        ExpertChoice(by="reap", experts=0.9).drop(SCORES, 2)
    assert "at most 0.75" in str(caught.value.hint)
    with pytest.raises(PlanError, match="1 of 4 experts would remain in each of the 2 groups"):
        ExpertChoice(by="reap", experts=0.75).drop(SCORES, 2, groups=2)
    with pytest.raises(PlanError, match="Layer 7 has 2 routed experts and layer 1 has 8"):
        reap.drop({**SCORES, 7: np.zeros(2)}, 2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> tuple[Path, Path]:
    """A checkpoint of eight experts, and its warehouse: expert 5 is never chosen, 2 is often and adds nothing."""
    root = tmp_path_factory.mktemp("planted")
    model = mixture("deepseek_v3", 8)
    model.resize_token_embeddings(VOCABULARY)
    ids = torch.randint(3, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers[1:]:
        means: list[torch.Tensor] = []
        gate = layer.mlp.gate
        watching = gate.register_forward_hook(lambda _m, _a, out, means=means: means.append(out[0].sigmoid().mean(0)))
        with torch.no_grad():
            model(ids)
            watching.remove()
            gate.e_score_correction_bias -= means[0]  # now all are chosen about as often
            gate.e_score_correction_bias += torch.tensor([0, 0, 0.2, 0, 0, -100, 0, 0])
            layer.mlp.experts.down_proj[2] *= 1e-6
    folder = save_checkpoint(model, root / "model")
    succeed("score", folder, "--corpus", "builtin:pydoc", "-w", root / "w", "--experts", "--sites", "block", *SMALL)
    return folder, root / "w"


SMALL = ("--sequence-length", 32, "--max-sequences", 4, "--device", "cpu", "--dtype", "float32", "--executor", "local")


def planned(warehouse: Path, file: Path, by: str, share: float, *more: object) -> Plan:
    succeed("plan", "-w", warehouse, "--experts", share, "--by", by, "-o", file, *more)
    return read_plan(file)


def test_useless_experts_are_found_and_taken_out(planted: tuple[Path, Path], tmp_path: Path) -> None:
    """By REAP both, by tokens and gates one of them. Without the one that is never chosen, nothing changes at all."""
    folder, warehouse = planted
    plans = {by: planned(warehouse, tmp_path / f"{by}.yaml", by, 0.25) for by in ("reap", "tokens", "gate", "random")}
    assert plans["reap"].experts == {1: (2, 5), 2: (2, 5)}
    assert all(5 in experts and 2 not in experts for experts in plans["tokens"].experts.values())
    assert all(5 in experts for experts in plans["gate"].experts.values())
    assert planned(warehouse, tmp_path / "again.yaml", "random", 0.25, "--seed", 1).experts != plans["random"].experts
    assert "drop: [expert.1.2, expert.1.5, expert.2.2, expert.2.5]" in (tmp_path / "reap.yaml").read_text()
    assert any("2 of 16 experts got no token of this text" in line for line in plans["reap"].findings)
    table = plans["reap"].table().to_pylist()
    assert [row["experts"] for row in table] == [[], [2, 5], [2, 5]] and not any(row["left_out"] for row in table)

    idle = planned(warehouse, tmp_path / "idle.yaml", "reap", 0.125)
    assert idle.experts == {1: (5,), 2: (5,)}
    files = [tmp_path / f"{name}.yaml" for name in ("idle", "reap", "random")]
    task = ("--tasks", "perplexity:builtin:pydoc", "--skip-sequences", 4, "-w", warehouse)
    shown = succeed("evaluate", *files, *task, "--format", "json", *SMALL)
    rows = {row["subject"]: row for row in map(json.loads, shown.stdout.splitlines()) if row["metric"] == "perplexity"}
    assert rows[str(files[0])]["value"] == pytest.approx(rows[str(files[0])]["whole"], rel=1e-6)
    assert rows[str(files[1])]["dropped"] == ["expert.1.2", "expert.1.5", "expert.2.2", "expert.2.5"]
    assert rows[str(files[1])]["value"] != rows[str(files[1])]["whole"] != rows[str(files[2])]["value"]
    listed = avss("ls", "plans", "-w", warehouse, "--format", "json").stdout.splitlines()
    assert ["expert.1.5", "expert.2.5"] in [json.loads(line)["drop"] for line in listed]
    names = avss("query", "SELECT DISTINCT removals(drop) AS n FROM evaluations WHERE len(drop) = 2", "-w", warehouse)
    assert "expert.1.5" in names.stdout and "expert.2.5" in names.stdout, names.stderr

    done = succeed("prune", folder, files[0], "-o", tmp_path / "less", "-w", warehouse)
    assert "3 of 3 layers without 2 experts" in done.stdout
    assert "Outputs are those of the original with the experts masked (largest difference 0)." in done.stdout
    whole, less = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "less"))
    assert less.config.n_routed_experts == 7 and less.model.layers[1].mlp.gate.weight.shape[0] == 7
    assert float((logits_of(less) - logits_of(whole)).abs().max()) <= 1e-5
    text = (tmp_path / "less" / "README.md").read_text()
    assert "without 2 experts" in text and "layer 1: 5; layer 2: 5." in text and "expert-pruning" in text
    assert "layer-pruning" not in text and "Evaluated: perplexity:builtin:pydoc: perplexity" in text
    assert pruned_from(tmp_path / "less") == (folder.name, plans["reap"].revision)
    again = succeed("evaluate", tmp_path / "less", "--base", folder, *task, "--format", "json", *SMALL)
    (row,) = (row for row in map(json.loads, again.stdout.splitlines()) if row["metric"] == "perplexity")
    assert row["value"] == pytest.approx(rows[str(files[0])]["value"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--experts", 0.9, "--by", "reap"), "would leave 1 of 8 experts in each layer, and each token is sent to 2"),
        (("--experts", 0.25, "--by", "reep"), "reap"),
        (("--experts", 0.25, "--by", "loss"), "Unknown"),
        (("--experts", 0.25), "--experts needs a score to choose by"),
        (("--by", "reap"), "--by reap is a score of routed experts"),
        (("--experts", 0.25, "--by", "reap", "--share", 0.5), "--share has no effect on routed experts"),
        (("--experts", 0.25, "--by", "reap", "--last", "1"), "has no effect on routed experts"),
        (("--experts", 1.5, "--by", "reap"), "--experts"),
    ],
)
def test_mistakes(options: Sequence[object], told: str, planted: tuple[Path, Path], tmp_path: Path) -> None:
    assert told in mistake("plan", "-w", planted[1], *options, "-o", tmp_path / "plan.yaml")
    assert not (tmp_path / "plan.yaml").exists()


def test_a_model_without_experts(tiny_llama: Path, tmp_path: Path) -> None:
    warehouse = tmp_path / "w"
    assert avss("score", tiny_llama, "--corpus", "builtin:pydoc", "-w", warehouse, *SMALL).exit_code == 0
    refused = mistake("plan", "-w", warehouse, "--experts", 0.25, "--by", "reap", "-o", tmp_path / "plan.yaml")
    assert "has no statistics of routed experts" in refused
    Plan(model=str(tiny_llama), num_layers=3, layers="layers", drop=(Expert(1, 0),)).write(tmp_path / "hand.yaml")
    task = ("--tasks", "perplexity:builtin:pydoc", "-w", warehouse, "--allow-overlap")
    evaluated = avss("evaluate", tmp_path / "hand.yaml", *task, *SMALL)
    assert evaluated.exit_code != 0 and "has no routed experts" in evaluated.stderr
