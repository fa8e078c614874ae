"""Routed experts that go: masked in place, chosen by what was measured, taken out of checkpoints, and given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruning.test_repair import READ, TEXT, assert_streaming_writes_the_same_bytes, repair_of
from safetensors.torch import save_file
from support.checkpoints import VOCABULARY, checkpoint_at, config_in, one_thread, weights_in
from support.command_line import as_words, avss, in_one_line, json_rows, mistake, succeed
from support.families import tiny_config, tiny_model
from support.planning import prune
from support.quantized import block_fp8
from support.tiers import all_of
from transformers import AutoModelForCausalLM

from avss_dist.core.errors import ConfigError, CorpusError, ModelError
from avss_dist.core.intervention import Expert
from avss_dist.core.settings import Settings
from avss_dist.models.change.experts import expert_removals, require_experts
from avss_dist.models.checkpoint.loading import open_module
from avss_dist.models.forward import changing
from avss_dist.models.structure.down_projections import find_down_projections
from avss_dist.models.structure.experts import find_routed_experts
from avss_dist.models.structure.layers import Routing
from avss_dist.models.watching import CapturedCall, captured
from avss_dist.plans.choice import PlanError, choose_experts
from avss_dist.plans.plan import Plan, read_plan
from avss_dist.pruning.checkpoint import pruned_from
from avss_dist.pruning.repair.costs import tokens_needed
from avss_dist.pruning.repair.fits import features_of
from avss_dist.pruning.repair.projection import OutputProjection
from avss_dist.pruning.repair.registry import REPAIRS, read_repairs

pytestmark = pytest.mark.usefixtures("equal_skeletons")
Save = Callable[[Any, Path], Path]
Planted = tuple[Path, Path]
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
    layers = open_module(model).layers
    path = layers[0].name.rpartition(".")[0]
    return Plan(model=str(folder), num_layers=len(layers), layers=path, drop=tuple(drop), why={"by": "hand"})


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max())


def reopened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def masked_logits(model: Any, drop: Sequence[Expert]) -> torch.Tensor:
    layers = open_module(model).layers
    require_experts(layers, drop)
    with changing(expert_removals(layers, drop)):
        return logits_of(model)


def experts_of(model: Any, *indices: int) -> list[Expert]:
    """These experts of each layer that has any."""
    layers = [layer for layer in open_module(model).layers if find_routed_experts(layer.module)]
    experts = []
    for layer in layers:
        experts += [Expert(layer.index, expert) for expert in indices]
    return experts


@pytest.mark.parametrize("family", all_of(FAMILIES, default=["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]))
def test_a_checkpoint_without_experts_computes_what_masking_does(family: str, tmp_path: Path) -> None:
    """Another expert of each layer; transformers opens it, and nothing is left of the mask."""
    whole = mixture(family)
    before = logits_of(whole)
    drop = [Expert(expert.layer, i % 2) for i, expert in enumerate(experts_of(whole, 0))]
    masked = masked_logits(whole, drop)
    assert torch.equal(logits_of(whole), before)
    assert largest_difference(masked, before) > 0.01
    whole_folder = tmp_path / "whole"
    whole.save_pretrained(whole_folder)
    file = whole_folder / "config.json"
    name = COUNT.get(family, "num_local_experts")
    if family == "qwen3_moe":
        file.write_text(file.read_text().replace("num_local_experts", name))
    less_folder = tmp_path / "less"
    done = prune(whole_folder, plan_of(whole_folder, whole, drop), less_folder)
    assert done["difference"] <= 1e-5
    less = reopened(less_folder)
    assert largest_difference(logits_of(less), masked) <= 1e-5
    settings = config_in(less_folder)
    original = config_in(whole_folder)
    expected = {**original, name: 3}
    if original.get("num_nextn_predict_layers"):
        # The head that predicts several tokens has experts, too, and is left out.
        expected["num_nextn_predict_layers"] = 0
    assert settings == expected
    assert original[name] == 4
    stored = weights_in(less_folder)
    all_stored = weights_in(whole_folder)
    assert done["bytes"] == bytes_of(stored)
    assert done["bytes"] < bytes_of(all_stored)


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def test_masks_of_passes_may_overlap_and_end_in_any_order() -> None:
    """And those that nest add up; the logits that the router gives of removed experts are minus infinity."""
    model = mixture("qwen3_moe")
    layers = open_module(model).layers

    def without(expert: Expert) -> AbstractContextManager[None]:
        return changing(expert_removals(layers, [expert]))

    both = masked_logits(model, [Expert(1, 0), Expert(1, 2)])
    with without(Expert(1, 0)), without(Expert(1, 2)):
        assert torch.equal(logits_of(model), both)
    first = without(Expert(1, 0))
    second = without(Expert(2, 1))
    first.__enter__()
    second.__enter__()
    router = layers[1].module.mlp.gate
    given, _, index = router(torch.randn(5, router.hidden_dim))
    assert torch.isneginf(given[:, 0]).all()
    assert torch.isfinite(given[:, 1:]).all()
    assert (index != 0).all()
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert "forward" not in vars(router)
    assert router.num_experts == 4
    assert "weight" not in vars(router)


def test_gradients_reach_the_rows_of_the_remaining_experts() -> None:
    model = mixture("mixtral")
    without_last = expert_removals(open_module(model).layers, [Expert(0, 3)])
    with changing(without_last):
        loss = model(IDS, use_cache=False).logits.square().sum()
        loss.backward()
    mlp = model.model.layers[0].mlp
    gradient = mlp.gate.weight.grad
    assert not gradient[3].any()
    assert gradient[:3].abs().sum(dim=1).all()
    assert not mlp.experts.down_proj.grad[3].any()


@pytest.mark.nightly
def test_groups_of_a_router_stay_of_equal_size(tmp_path: Path) -> None:
    """Of two groups of four, one is chosen; each loses an expert."""
    whole = mixture("deepseek_v3", 8, n_group=2, topk_group=1)
    drop = experts_of(whole, 1, 6)
    whole_folder = tmp_path / "whole"
    whole.save_pretrained(whole_folder)
    less_folder = tmp_path / "less"
    done = prune(whole_folder, plan_of(tmp_path, whole, drop), less_folder)
    assert done["difference"] <= 1e-5
    less = reopened(less_folder)
    assert largest_difference(logits_of(less), masked_logits(whole, drop)) <= 1e-5
    layers = open_module(whole).layers
    with pytest.raises(ModelError, match="2 groups of 4 experts each, of which 2 to 4 would remain"):
        require_experts(layers, experts_of(whole, 1, 2))
    with pytest.raises(ModelError, match="1 expert would remain in each of the 2 groups"):
        require_experts(layers, experts_of(whole, 1, 2, 3, 5, 6, 7))
    uneven = plan_of(tmp_path, whole, experts_of(whole, 1, 2))
    with pytest.raises(PlanError, match="2 groups of 4 experts each"):
        prune(whole_folder, uneven, tmp_path / "uneven")


@pytest.mark.nightly
def test_experts_of_a_quantized_checkpoint_are_copied_as_they_are_stored(tmp_path: Path) -> None:
    """Each in tensors of its own, with a scale for each matrix."""
    whole = mixture("qwen3_moe")
    whole_folder = tmp_path / "whole"
    whole.save_pretrained(whole_folder)
    fp8 = block_fp8(whole_folder, tmp_path / "fp8", 128)
    less_folder = tmp_path / "less"
    plan = plan_of(fp8, whole, experts_of(whole, 1))
    done = prune(fp8, plan, less_folder)
    less = weights_in(less_folder)
    stored = weights_in(fp8)
    for name in ("down_proj.weight", "down_proj.weight_scale_inv", "up_proj.weight"):
        expert = "model.layers.2.mlp.experts.{}." + name
        for new, old in enumerate((0, 2, 3)):
            original = stored[expert.format(old)]
            assert less[expert.format(new)].equal(original)
        assert expert.format(3) not in less
    router = "model.layers.2.mlp.gate.weight"
    assert less[router].equal(stored[router][[0, 2, 3]])
    assert "have the names and shapes of the tensors in the files" in "\n".join(done["notes"])
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
    layers = open_module(model).layers
    with pytest.raises(ModelError, match=told):
        require_experts(layers, [Expert(1, 0)])
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    less = tmp_path / "less"
    with pytest.raises(PlanError, match=told):
        prune(whole, plan_of(tmp_path, model, [Expert(1, 0)]), less)
    assert not less.exists()


def test_experts_that_cannot_go(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    layers = open_module(model).layers
    with pytest.raises(ModelError, match="There is no expert 4 in layer 1: it has 4, from 0"):
        require_experts(layers, [Expert(1, 4)])
    with pytest.raises(
        ModelError, match="1 of 4 experts would remain in layer 2, and its router sends each token to 2"
    ):
        require_experts(layers, [Expert(2, i) for i in range(3)])
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    uneven = plan_of(tmp_path, model, [Expert(1, 0)])
    less = tmp_path / "less"
    with pytest.raises(PlanError, match="Layer 1 would have 3 routed experts and layer 0 4, and a qwen3_moe has one"):
        prune(whole, uneven, less)
    layer_and_experts = plan_of(tmp_path, model, [0, Expert(1, 0), Expert(2, 0)])
    done = prune(whole, layer_and_experts, less)
    assert done["difference"] <= 1e-5
    with pytest.raises(ConfigError, match=r"`drop` has expert\.0\.1 and the whole layer 0"):
        plan_of(tmp_path, model, [0, Expert(0, 1)])


SCORES = {1: np.array([3.0, 0, 0, 5, 1, 9, 8, 7]), 4: np.array([1.0, 2, 3, 4, 5, 6, 7, 0])}


def lowest(share: float, **options: Any) -> list[str]:
    """Names of the experts that are chosen by `SCORES`, two of which see each token."""
    return [str(expert) for expert in choose_experts(SCORES, share, 2, **options)]


def test_the_lowest_of_each_layer_are_chosen() -> None:
    """A quarter of eight, of ties the earlier; with two groups, one of each; by chance, the same for the same seed."""
    assert lowest(0.25) == ["expert.1.1", "expert.1.2", "expert.4.0", "expert.4.7"]
    assert lowest(0.25, groups=2) == ["expert.1.1", "expert.1.4", "expert.4.0", "expert.4.7"]
    drawn = lowest(0.25, seed=0)
    other = lowest(0.25, seed=1)
    assert lowest(0.25, seed=0) == drawn
    assert drawn != other
    assert len(drawn) == len(other) == 4


def test_a_share_of_experts_that_is_too_large_is_refused() -> None:
    remains = "would leave 1 of 8 experts in each layer, and each token is sent to 2"
    with pytest.raises(PlanError, match=remains) as caught:
        lowest(0.9)
    assert "at most 0.75" in str(caught.value.hint)
    with pytest.raises(PlanError, match="1 of 4 experts would remain in each of the 2 groups"):
        lowest(0.75, groups=2)
    with pytest.raises(PlanError, match="Layer 7 has 2 routed experts and layer 1 has 8"):
        choose_experts({**SCORES, 7: np.zeros(2)}, 0.25, 2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Planted:
    """A checkpoint of eight experts, and its warehouse: expert 5 is never chosen, 2 is often and adds nothing."""
    root = tmp_path_factory.mktemp("planted")
    model = mixture("deepseek_v3", 8)
    model.resize_token_embeddings(VOCABULARY)
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, 64), generator=seeded)
    often_and_never = torch.tensor([0, 0, 0.2, 0, 0, -100, 0, 0])
    for layer in model.model.layers[1:]:
        gate = layer.mlp.gate
        with torch.no_grad():
            with captured({"gate": gate}) as calls:
                model(ids)
            scores = calls["gate"].output.sigmoid()
            gate.e_score_correction_bias -= scores.mean(0)  # now all are chosen about as often
            gate.e_score_correction_bias += often_and_never
            layer.mlp.experts.down_proj[2] *= 1e-6
    folder = save_checkpoint(model, root / "model")
    warehouse = root / "w"
    options = ("--corpus", "builtin:pydoc", "--experts", "--sites", "block")
    succeed("score", folder, *options, "-w", warehouse, *SMALL)
    return folder, warehouse


SMALL = ("--sequence-length", 32, "--max-sequences", 4, "--device", "cpu", "--dtype", "float32", "--executor", "local")


def planned(warehouse: Path, file: Path, by: str, share: float, *more: object) -> Plan:
    succeed("plan", "-w", warehouse, "--experts", share, "--by", by, "-o", file, *more)
    return read_plan(file)


def test_useless_experts_are_found_and_taken_out(planted: Planted, tmp_path: Path) -> None:
    """By REAP both, by tokens and gates one of them. Without the one that is never chosen, nothing changes at all."""
    folder, warehouse = planted
    plans = {by: planned(warehouse, tmp_path / f"{by}.yaml", by, 0.25) for by in ("reap", "tokens", "gate", "random")}
    assert plans["reap"].experts == {1: (2, 5), 2: (2, 5)}
    for experts in plans["tokens"].experts.values():
        assert 5 in experts
        assert 2 not in experts
    for experts in plans["gate"].experts.values():
        assert 5 in experts
    other = planned(warehouse, tmp_path / "again.yaml", "random", 0.25, "--seed", 1)
    assert other.experts != plans["random"].experts
    reap_plan = tmp_path / "reap.yaml"
    assert "drop: [expert.1.2, expert.1.5, expert.2.2, expert.2.5]" in reap_plan.read_text()
    assert "2 of 16 experts got no token of this text" in "\n".join(plans["reap"].findings)
    table = plans["reap"].table()
    assert table["experts"].to_pylist() == [[], [2, 5], [2, 5]]
    assert table["left_out"].null_count == 3

    idle_plan = tmp_path / "idle.yaml"
    idle = planned(warehouse, idle_plan, "reap", 0.125)
    assert idle.experts == {1: (5,), 2: (5,)}
    files = [idle_plan, reap_plan, tmp_path / "random.yaml"]
    task = ("--tasks", "perplexity:builtin:pydoc", "--skip-sequences", 4, "-w", warehouse)
    shown = succeed("evaluate", *files, *task, "--format", "json", *SMALL)
    perplexities = {row["subject"]: row for row in perplexity_rows(shown.stdout)}
    of_idle = perplexities[str(files[0])]
    of_reap = perplexities[str(files[1])]
    of_random = perplexities[str(files[2])]
    assert of_idle["value"] == pytest.approx(of_idle["whole"], rel=1e-6)
    assert of_reap["dropped"] == ["expert.1.2", "expert.1.5", "expert.2.2", "expert.2.5"]
    assert of_reap["value"] != of_reap["whole"]
    assert of_random["value"] != of_reap["whole"]
    listed = avss("ls", "plans", "-w", warehouse, "--format", "json")
    drops = [row["drop"] for row in json_rows(listed.stdout)]
    assert ["expert.1.5", "expert.2.5"] in drops
    query = "SELECT DISTINCT removals(drop, drop_parts) AS n FROM evaluations WHERE len(drop_parts) = 2"
    names = avss("query", query, "-w", warehouse)
    assert "expert.1.5" in names.stdout, names.stderr
    assert "expert.2.5" in names.stdout, names.stderr

    less_folder = tmp_path / "less"
    done = succeed("prune", folder, files[0], "-o", less_folder, "-w", warehouse)
    assert "3 of 3 layers without 2 experts" in done.stdout
    assert "Outputs are those of the original with the experts masked (largest difference 0)." in done.stdout
    whole = reopened(folder)
    less = reopened(less_folder)
    assert less.config.n_routed_experts == 7
    assert len(less.model.layers[1].mlp.gate.weight) == 7
    assert largest_difference(logits_of(less), logits_of(whole)) <= 1e-5
    text = (less_folder / "README.md").read_text()
    assert "without 2 experts" in text
    assert "layer 1: 5; layer 2: 5." in text
    assert "expert-pruning" in text
    assert "layer-pruning" not in text
    assert "Evaluated: perplexity:builtin:pydoc (" in text
    assert pruned_from(less_folder) == (str(folder), plans["reap"].revision)
    again = succeed("evaluate", less_folder, "--base", folder, *task, "--format", "json", *SMALL)
    (row,) = perplexity_rows(again.stdout)
    assert row["value"] == pytest.approx(of_idle["value"], rel=1e-6)


def perplexity_rows(printed: str) -> list[dict[str, Any]]:
    return [row for row in json_rows(printed) if row["metric"] == "perplexity"]


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
def test_mistakes(options: Sequence[object], told: str, planted: Planted, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    assert told in mistake("plan", "-w", planted[1], *options, "-o", plan_file)
    assert not plan_file.exists()


@pytest.mark.nightly
def test_a_model_without_experts(tiny_llama: Path, tmp_path: Path) -> None:
    warehouse = tmp_path / "w"
    succeed("score", tiny_llama, "--corpus", "builtin:pydoc", "-w", warehouse, *SMALL)
    refused = mistake("plan", "-w", warehouse, "--experts", 0.25, "--by", "reap", "-o", tmp_path / "plan.yaml")
    assert "has no statistics of routed experts" in refused
    hand_plan = tmp_path / "hand.yaml"
    Plan(model=str(tiny_llama), num_layers=3, layers="layers", drop=(Expert(1, 0),)).write(hand_plan)
    task = ("--tasks", "perplexity:builtin:pydoc", "-w", warehouse, "--allow-overlap")
    evaluated = avss("evaluate", hand_plan, *task, *SMALL)
    assert evaluated.exit_code != 0
    assert "has no routed experts" in evaluated.stderr


# Repair: without some experts, without layers, and without both


def saved(family: str, folder: Path, save: Save, **changes: Any) -> tuple[Any, Path]:
    """A tiny mixture that knows the words of the tests' tokenizer, with biases that matter, and its folder."""
    model = mixture(family, vocab_size=VOCABULARY, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.normal_(std=0.1)
    return model, save(model, folder)


def fused(model: Any, layer: int) -> torch.nn.Module:
    block = open_module(model).layers[layer].module
    routed = find_routed_experts(block)
    assert routed is not None
    return block.get_submodule(routed.experts)


@pytest.mark.parametrize(
    ("by", "family"),
    all_of(
        product(("refit", "map"), FAMILIES),
        default=[("refit", "qwen3_moe")],
    ),
)
def test_a_repaired_checkpoint_is_the_masked_model_with_its_weights(
    by: str, family: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    """Stored one by one or in one tensor: the remaining down projections are changed, and nothing else."""
    whole, folder = saved(family, tmp_path / "whole", save_checkpoint)
    drop = experts_of(whole, 1)
    less_folder = tmp_path / "less"
    plan = plan_of(folder, whole, drop)
    done = prune(folder, plan, less_folder, repair=repair_of(by))
    assert done["difference"] <= 1e-5
    for expert, cut in zip(drop, done["repair"].cuts, strict=True):
        assert cut.after == expert.layer
        assert cut.removed == ()
        assert cut.experts == (1,)
        assert cut.error_after < cut.error_before
        assert cut.changed
    assert read_repairs(less_folder) == [done["repair"]]
    less = reopened(less_folder)
    before = masked_logits(whole, drop)
    for expert in drop:
        ours = fused(whole, expert.layer)
        theirs = fused(less, expert.layer)
        names = ["down_proj"]
        if by == "map" and hasattr(ours, "down_proj_bias"):
            names.append("down_proj_bias")
        for name, value in theirs.named_parameters():
            rows = getattr(ours, name).data[[0, 2, 3]]
            assert torch.equal(value, rows) == (name not in names), name
            getattr(ours, name).data[[0, 2, 3]] = value.data
    for path, parameter in whole.named_parameters():
        other = less.get_parameter(path)
        if parameter.shape == other.shape:
            assert torch.equal(parameter, other)
    after = masked_logits(whole, drop)
    assert largest_difference(logits_of(less), after) <= 1e-5
    assert largest_difference(before, after) > 1e-5


def two_of_four(tokens: int) -> torch.Tensor:
    """Two random experts of four for each token."""
    return torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_units_are_those_of_the_definition(family: str) -> None:
    """Of experts that are wider than the residual stream, so that they are read in parts."""
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    model = mixture(family, **{width: 80})
    experts = fused(model, 1)
    down = find_down_projections(experts)
    assert down is not None
    torch.manual_seed(0)
    hidden = torch.randn(7, model.config.hidden_size)
    index = two_of_four(7)
    gates = torch.rand(7, 2)
    with torch.no_grad():
        chosen = down.units((hidden, index, gates), {})
        expected = torch.zeros(7, 2, 80)
        for token in range(7):
            for slot, expert in enumerate(index[token]):
                if family == "qwen3_moe":
                    both = experts.gate_up_proj[expert] @ hidden[token]
                    gate, up = both.chunk(2)
                    units = torch.nn.functional.silu(gate) * up
                else:
                    both = hidden[token] @ experts.gate_up_proj[expert]
                    both += experts.gate_up_proj_bias[expert]
                    gate = both[::2].clamp(max=experts.limit)
                    up = both[1::2].clamp(-experts.limit, experts.limit)
                    activated = gate * torch.sigmoid(gate * experts.alpha)
                    units = (up + 1) * activated
                expected[token, slot] = units
        before = experts.down_proj.clone()
        output = experts(hidden, index, gates)
    torch.testing.assert_close(chosen.hidden, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(chosen.index, index)
    assert torch.equal(chosen.gates, gates)
    assert torch.equal(experts.down_proj, before)
    arguments = (hidden, index, gates)
    other = output + 0.1 * output.roll(1)
    with torch.no_grad():
        assert down.is_linear(arguments, {}, output, 1e-4)
        assert not down.is_linear(arguments, {}, other, 1e-4)


def test_fits_of_experts_average_to_what_experts_give() -> None:
    """Whatever matrices they have; and what is missing is divided among them without a rest."""
    torch.manual_seed(0)
    chosen = Routing(torch.randn(9, 2, 5), two_of_four(9), torch.rand(9, 2))
    matrices = torch.randn(4, 5, 3)
    layer = open_module(mixture("qwen3_moe")).layers[1]
    down = find_down_projections(layer.experts.module)
    projection = OutputProjection(layer, "mlp.experts", None, 1.0, down=down, remaining=(0, 1, 2, 3), chosen=2)
    nothing = torch.zeros(9, 1)
    call = CapturedCall(nothing, nothing, chosen)
    given = torch.zeros(9, 3)
    shares = torch.zeros(9, 1)
    parts = features_of(REPAIRS["refit"], projection, call, call)
    for matrix, (x, tokens, weight) in zip(matrices, parts, strict=True):
        given[tokens] += weight * (x @ matrix)
        shares[tokens] += weight
    expected = torch.einsum("tk,tku,tkuo->to", chosen.gates, chosen.hidden, matrices[chosen.index])
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(shares, torch.ones(9, 1))


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_streaming_writes_the_same_bytes(family: str, tmp_path: Path, save_checkpoint: Save) -> None:
    """Without an expert of each layer, and without the last layer."""
    whole, folder = saved(family, tmp_path / "whole", save_checkpoint)
    last = len(open_module(whole).layers) - 1
    experts = [expert for expert in experts_of(whole, 2) if expert.layer < last]
    plan = plan_of(folder, whole, [*experts, last])
    record = assert_streaming_writes_the_same_bytes(folder, plan, "map", tmp_path)
    *_, cut = record.cuts
    assert cut.removed == (last,)
    assert cut.experts == (2,)


@pytest.mark.nightly
def test_removed_layers_of_a_mixture_are_given_back(tmp_path: Path, save_checkpoint: Save) -> None:
    """By all experts of the layer before them; of every layer behind the first that loses any, on request."""
    whole, folder = saved("qwen3_moe", tmp_path / "whole", save_checkpoint)
    plan = plan_of(folder, whole, [1])
    less = tmp_path / "less"
    done = prune(folder, plan, less, repair=repair_of("refit"))
    (cut,) = done["repair"].cuts
    assert cut.after == 0
    assert cut.removed == (1,)
    assert cut.experts == ()
    assert cut.error_after < cut.error_before
    assert "Of the others, the MLP's last map is changed in 0." in (less / "README.md").read_text()
    done = prune(folder, plan, tmp_path / "every", repair=repair_of("refit_all"))
    first, second = done["repair"].cuts
    assert first.after == 0
    assert first.removed == (1,)
    assert second.after == 2
    assert second.removed == ()
    assert second.changed


@pytest.mark.nightly
def test_a_repair_on_workers_is_stored_and_says_what_it_is_for(tmp_path: Path, save_checkpoint: Save) -> None:
    """The command writes the checkpoint that the function does, which is not evaluated on the text of the repair."""
    whole, folder = saved("mixtral", tmp_path / "whole", save_checkpoint)
    file = tmp_path / "plan.yaml"
    warehouse = tmp_path / "w"
    plan = plan_of(folder, whole, experts_of(whole, 1))
    plan.write(file)
    rows = 30
    read = as_words(READ | {"max_sequences": rows})
    repair = ("--repair", "refit", "--repair-corpora", TEXT, *read)
    less = tmp_path / "less"
    done = succeed("prune", folder, file, "-o", less, "-w", warehouse, "--executor", "local", *repair)
    assert "without experts 1 of layer 0: error" in in_one_line(done.stdout)
    assert len(list((warehouse / "patches").iterdir())) == 1
    in_process = tmp_path / "in process"
    with one_thread():
        prune(folder, plan, in_process, repair=repair_of("refit", max_sequences=rows))
    expected = reopened(in_process).state_dict()
    for name, value in reopened(less).state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    task = ("--tasks", f"perplexity:{TEXT}", "-w", warehouse)
    assert "is text that the repair of" in mistake("evaluate", less, "--base", folder, *task, *SMALL)


def test_what_is_too_little_for_a_repair(
    tmp_path: Path, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text for the units of the experts, of which a token reaches some, and memory; fewer unknowns are named."""
    whole, folder = saved("qwen3_moe", tmp_path / "whole", save_checkpoint)
    plan = plan_of(folder, whole, experts_of(whole, 1))
    units = whole.config.moe_intermediate_size
    chosen = whole.config.num_experts_per_tok
    less = tmp_path / "less"
    needed = 4 * units * 3 // chosen
    with pytest.raises(CorpusError, match=f"needs at least {needed:,} tokens to fit to") as few:
        prune(folder, plan, less, repair=repair_of("refit", max_sequences=2))
    assert few.value.hint
    assert "(channel)" in few.value.hint
    checkpoint = checkpoint_at(folder)
    assert tokens_needed(checkpoint, "refit", Settings()) == 4 * units * 4 // chosen
    assert tokens_needed(checkpoint, "map", Settings()) == 4 * whole.config.hidden_size
    monkeypatch.setattr("avss_dist.pruning.repair.fitter.free_memory", lambda device: 1000)
    with pytest.raises(PlanError, match=f"needs .* of memory for the products of 3 x {units} inputs") as large:
        prune(folder, plan, less, repair=repair_of("refit"))
    assert large.value.hint
    assert "(channel)" in large.value.hint
    assert not less.exists()


@pytest.mark.nightly
def test_experts_whose_weights_are_unknown_are_refused(tmp_path: Path, save_checkpoint: Save) -> None:
    """One of them is stored in another format than the others."""
    whole, folder = saved("qwen3_moe", tmp_path / "whole", save_checkpoint)
    weights = weights_in(folder)
    for name in weights:
        if "experts.0.down_proj" in name:
            weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    plan = plan_of(folder, whole, experts_of(whole, 1))
    less = tmp_path / "less"
    with pytest.raises(PlanError, match="nothing can be added to it"):
        prune(folder, plan, less, repair=repair_of("refit"))
    assert not less.exists()
