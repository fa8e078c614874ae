"""Repairs of what is hard to repair: text that says nothing, units that repeat or are dead, quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import llama
from support.families import lively
from support.quantized import block_fp8

from avss_dist.core.settings import Settings
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.fits import FitError
from avss_dist.pruning.repair.hidden_states import HiddenStateSource
from avss_dist.pruning.repair.projection import RepairError
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.repair.repair import Repair

Save = Callable[[Any, Path], Path]
PLAN = Plan(model="m", num_layers=3, layers="layers", drop=(1,))


def repair_of(by: str, corpus: Path | str, **options: Any) -> Repair:
    settings = Settings(max_sequences=20, sequence_length=32, batch_size=8, device="cpu", **options)
    return Repair(by=by, corpora=(str(corpus),), settings=settings)


@pytest.mark.parametrize("by", REPAIRS)
def test_constant_text_and_units_that_repeat_give_weights_that_are_numbers(
    by: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    """The equations are of a rank below their size: a ridge makes them solvable, and held-back text judges."""
    model = lively(llama())
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            weight = model.model.layers[0].mlp.get_submodule(name).weight
            weight[1::2] = weight[::2]
        weight = model.model.layers[0].mlp.down_proj.weight
        weight[1::2] = weight[::2]
    folder, text = save_checkpoint(model, tmp_path / "whole"), tmp_path / "text.txt"
    text.write_text("again and " * 2000)
    done = prune(str(folder), PLAN, tmp_path / "less", repair=repair_of(by, text))
    assert all(cut.error_after <= cut.error_before for cut in done["repair"].cuts)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "less" / "model.safetensors").values())


@pytest.mark.parametrize("by", ["channel", "refit"])
def test_an_mlp_that_adds_nothing_gives_nothing_back(by: str, tmp_path: Path, save_checkpoint: Save) -> None:
    model = lively(llama())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    folder = save_checkpoint(model, tmp_path / "whole")
    with pytest.raises(FitError, match="the inputs of the fit are zero"):
        prune(str(folder), PLAN, tmp_path / "less", repair=repair_of(by, "builtin:pydoc"))
    assert not (tmp_path / "less").exists()


def test_quantized_weights_are_refused_before_a_text_is_seen(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layer before a cut: where it keeps its down projection in plain numbers, others may be quantized."""
    folder = block_fp8(tiny_llama, tmp_path / "fp8", skipped=["model.layers.0.mlp.down_proj", "lm_head"])
    repair = repair_of("map", "builtin:pydoc", dequantize=True)
    done = prune(str(folder), PLAN, tmp_path / "less", repair=repair)
    assert done["repair"].cuts[0].error_after < done["repair"].cuts[0].error_before
    monkeypatch.setattr(HiddenStateSource, "visit", lambda *_, **__: pytest.fail("text was read"))
    with pytest.raises(RepairError, match=r"'mlp.down_proj.weight' of layer 1 as float8_e4m3fn, quantized") as refused:
        prune(str(folder), replace(PLAN, drop=(2,)), tmp_path / "no", repair=repair)
    assert "Repair the checkpoint that it was quantized from" in str(refused.value)
    assert not (tmp_path / "no").exists()
