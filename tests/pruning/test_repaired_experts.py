"""Repair of models with routed experts: without some experts, without layers, and without both."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning.test_pruned_experts import FAMILIES, SMALL, experts_of, masked_logits, mixture, plan_of
from pruning.test_repair import READ, TEXT, assert_streaming_writes_the_same_bytes, repair_of
from support.checkpoints import VOCABULARY, one_thread
from support.command_line import mistake, succeed
from support.tiers import all_of
from transformers import AutoModelForCausalLM

from avss_dist.core.errors import CorpusError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.models.experts import ChosenUnits, find_down_projections, find_routed_experts
from avss_dist.models.loading import open_module
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.repair.fits import FitStep, features_of
from avss_dist.pruning.repair.projection import CapturedCall, OutputProjection, RepairError
from avss_dist.pruning.repair.registry import read_repairs
from avss_dist.pruning.repair.repair import Repair, tokens_needed

Save = Callable[[Any, Path], Path]


def saved(family: str, folder: Path, save: Save, **changes: Any) -> tuple[Any, Path]:
    """A tiny mixture that knows the words of the tests' tokenizer, with biases that matter, and its folder."""
    model = mixture(family, vocab_size=VOCABULARY, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.normal_(std=0.1)
    return model, save(model, folder)


def fused(model: Any, layer: int) -> torch.nn.Module:
    block = open_module(model).structure.layers[layer].module
    routed = find_routed_experts(block)
    assert routed is not None
    return block.get_submodule(routed.experts)


@pytest.mark.parametrize(
    ("by", "family"),
    all_of(
        product(("refit", "map"), FAMILIES),
        default=[("refit", "qwen3_moe"), ("refit", "gpt_oss"), ("map", "gpt_oss")],
    ),
)
def test_a_repaired_checkpoint_is_the_masked_model_with_its_weights(
    by: str, family: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    """Stored one by one or in one tensor: the remaining down projections are changed, and nothing else."""
    whole, folder = saved(family, tmp_path / "whole", save_checkpoint)
    drop = experts_of(whole, 1)
    done = prune(str(folder), plan_of(folder, whole, drop), tmp_path / "less", repair=repair_of(by))
    assert done["difference"] <= 1e-5
    cuts = done["repair"].cuts
    assert [(cut.after, cut.removed, cut.experts) for cut in cuts] == [(expert.layer, (), (1,)) for expert in drop]
    assert all(cut.error_after < cut.error_before and cut.changed for cut in cuts)
    assert read_repairs(tmp_path / "less") == [done["repair"]]
    less = AutoModelForCausalLM.from_pretrained(tmp_path / "less").eval()
    before = masked_logits(whole, drop)
    changed = {name for name, value in less.named_parameters() if value.shape != whole.get_parameter(name).shape}
    for expert in drop:
        ours, theirs = fused(whole, expert.layer), fused(less, expert.layer)
        names = ["down_proj", *(["down_proj_bias"] if by == "map" and hasattr(ours, "down_proj_bias") else [])]
        for name, value in theirs.named_parameters():
            rows = getattr(ours, name).data[[0, 2, 3]]
            assert torch.equal(value, rows) == (name not in names), name
            getattr(ours, name).data[[0, 2, 3]] = value.data
    others = [name for name in dict(whole.named_parameters()) if name not in changed]
    assert all(torch.equal(whole.get_parameter(name), less.get_parameter(name)) for name in others)
    after = masked_logits(whole, drop)
    with torch.no_grad():
        logits = less(torch.arange(16).reshape(2, 8) + 3, use_cache=False).logits
    assert float((logits - after).abs().max()) <= 1e-5 < float((before - after).abs().max())


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
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    gates = torch.rand(7, 2)
    with torch.no_grad():
        chosen = down.units((hidden, index, gates), {})
        expected = torch.zeros(7, 2, 80)
        for token in range(7):
            for slot, expert in enumerate(index[token]):
                if family == "qwen3_moe":
                    gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                    units = torch.nn.functional.silu(gate) * up
                else:
                    both = hidden[token] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                    gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
                    units = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
                expected[token, slot] = units
        before = experts.down_proj.clone()
        output = experts(hidden, index, gates)
    torch.testing.assert_close(chosen.units, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(chosen.index, index) and torch.equal(chosen.gates, gates)
    assert torch.equal(experts.down_proj, before)
    with torch.no_grad():
        assert down.is_linear((hidden, index, gates), {}, output, 1e-4)
        assert not down.is_linear((hidden, index, gates), {}, output + 0.1 * output.roll(1), 1e-4)


def test_fits_of_experts_average_to_what_experts_give() -> None:
    """Whatever matrices they have; and what is missing is divided among them without a rest."""
    torch.manual_seed(0)
    chosen = ChosenUnits(torch.randn(9, 2, 5), torch.stack([torch.randperm(4)[:2] for _ in range(9)]), torch.rand(9, 2))
    matrices = torch.randn(4, 5, 3)
    layer = open_module(mixture("qwen3_moe")).structure.layers[1]
    down = find_down_projections(layer.experts.module)
    projection = OutputProjection(layer, "mlp.experts", None, 1.0, down=down, remaining=(0, 1, 2, 3), chosen=2)
    call = CapturedCall(torch.zeros(9, 1), torch.zeros(9, 1), chosen)
    given, shares = torch.zeros(9, 3), torch.zeros(9, 1)
    parts = features_of(FitStep("inputs", "linear", "full"), projection, call, call)
    for matrix, (x, tokens, weight) in zip(matrices, parts, strict=True):
        given[tokens] += weight * (x @ matrix)
        shares[tokens] += weight
    expected = torch.einsum("tk,tku,tkuo->to", chosen.gates, chosen.units, matrices[chosen.index])
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(shares, torch.ones(9, 1))


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_streaming_writes_the_same_bytes(family: str, tmp_path: Path, save_checkpoint: Save) -> None:
    """Without an expert of each layer, and without the last layer."""
    whole, folder = saved(family, tmp_path / "whole", save_checkpoint)
    last = len(open_module(whole).structure.layers) - 1
    drop = [expert for expert in experts_of(whole, 2) if expert.layer < last] + [last]
    record = assert_streaming_writes_the_same_bytes(folder, plan_of(folder, whole, drop), "map", tmp_path)
    assert (record.cuts[-1].removed, record.cuts[-1].experts) == ((last,), (2,))


def test_removed_layers_of_a_mixture_are_given_back(tmp_path: Path, save_checkpoint: Save) -> None:
    """By all experts of the layer before them; of every layer behind the first that loses any, on request."""
    whole, folder = saved("qwen3_moe", tmp_path / "whole", save_checkpoint)
    plan = plan_of(folder, whole, [1])
    done = prune(str(folder), plan, tmp_path / "less", repair=repair_of("refit"))
    (cut,) = done["repair"].cuts
    assert (cut.after, cut.removed, cut.experts) == (0, (1,), ()) and cut.error_after < cut.error_before
    assert "Of the others, the MLP's last map is changed in 0." in (tmp_path / "less" / "README.md").read_text()
    every = prune(str(folder), plan, tmp_path / "every", repair=repair_of("refit_all"))["repair"].cuts
    assert [(cut.after, cut.removed) for cut in every] == [(0, (1,)), (2, ())] and every[1].changed


def test_a_repair_on_workers_is_stored_and_says_what_it_is_for(tmp_path: Path, save_checkpoint: Save) -> None:
    """The command writes the checkpoint that the function does, which is not evaluated on the text of the repair."""
    whole, folder = saved("mixtral", tmp_path / "whole", save_checkpoint)
    file, warehouse = tmp_path / "plan.yaml", tmp_path / "w"
    plan = plan_of(folder, whole, experts_of(whole, 1))
    plan.write(file)
    rows = 30
    read = [
        v for name, value in (READ | {"max_sequences": rows}).items() for v in (f"--{name.replace('_', '-')}", value)
    ]
    repair = ("--repair", "refit", "--repair-corpora", TEXT, *read)
    done = succeed("prune", folder, file, "-o", tmp_path / "less", "-w", warehouse, "--executor", "local", *repair)
    assert "without experts 1 of layer 0: error" in " ".join(done.stdout.split())
    assert len(list((warehouse / "patches").iterdir())) == 1
    with one_thread():
        prune(str(folder), plan, tmp_path / "here", repair=repair_of("refit", max_sequences=rows))
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("less", "here")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)
    task = ("--tasks", f"perplexity:{TEXT}", "-w", warehouse)
    assert "is text that the repair of" in mistake("evaluate", tmp_path / "less", "--base", folder, *task, *SMALL)


def test_what_is_too_little_for_a_repair(
    tmp_path: Path, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text for the units of the experts, of which a token reaches some, and memory; fewer unknowns are named."""
    whole, folder = saved("qwen3_moe", tmp_path / "whole", save_checkpoint)
    plan = plan_of(folder, whole, experts_of(whole, 1))
    units, chosen = whole.config.moe_intermediate_size, whole.config.num_experts_per_tok
    short = Repair(by="refit", corpora=(TEXT,), settings=Settings(**READ | {"max_sequences": 2}))
    with pytest.raises(CorpusError, match=f"needs at least {4 * units * 3 // chosen:,} tokens to fit to") as few:
        prune(str(folder), plan, tmp_path / "less", repair=short)
    assert few.value.hint and "(channel)" in few.value.hint
    assert tokens_needed(resolve(str(folder)), "refit", Settings()) == 4 * units * 4 // chosen
    assert tokens_needed(resolve(str(folder)), "map", Settings()) == 4 * whole.config.hidden_size
    monkeypatch.setattr("avss_dist.pruning.repair.fitter.free_memory", lambda device: 1000)
    with pytest.raises(RepairError, match=f"needs .* of memory for the products of 3 x {units} inputs") as large:
        prune(str(folder), plan, tmp_path / "less", repair=repair_of("refit"))
    assert large.value.hint and "(channel)" in large.value.hint
    assert not (tmp_path / "less").exists()


def test_experts_whose_weights_are_unknown_are_refused(tmp_path: Path, save_checkpoint: Save) -> None:
    """One of them is stored in another format than the others."""
    from safetensors.torch import load_file, save_file

    whole, folder = saved("qwen3_moe", tmp_path / "whole", save_checkpoint)
    weights = load_file(folder / "model.safetensors")
    stored = {name: t.to(torch.float8_e4m3fn) if "experts.0.down_proj" in name else t for name, t in weights.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    plan = plan_of(folder, whole, experts_of(whole, 1))
    with pytest.raises(RepairError, match="nothing can be added to it"):
        prune(str(folder), plan, tmp_path / "less", repair=repair_of("refit"))
    assert not (tmp_path / "less").exists()
