"""Models that ranks cannot divide, which are refused before any rank starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Execution, Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.partition.autotp import UNSUPPORTED
from avss_dist.partition.choose import place
from avss_dist.system.devices import devices_here


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=320, n_positions=64))
    return save_checkpoint(model, tmp_path_factory.mktemp("models") / "gpt2")


def test_a_family_that_nobody_splits_is_refused_when_it_is_placed(gpt2: Path) -> None:
    checkpoint, settings, devices = resolve(str(gpt2)), Settings(sequence_length=16), devices_here("cpu")
    with pytest.raises(ConfigError, match="Neither transformers nor DeepSpeed can split a gpt2 model") as told:
        place(checkpoint, settings, Execution(partition="tensor_parallel", ranks=2), devices)
    assert "zero3" in str(told.value.hint)
    with pytest.raises(ConfigError, match="expert"):
        place(checkpoint, settings, Execution(partition="expert_parallel", ranks=2), devices)
    assert place(checkpoint, settings, Execution(partition="zero3", ranks=2), devices).ranks == 2


def test_deepspeed_refuses_these_families() -> None:
    auto_tp = pytest.importorskip("deepspeed.module_inject.auto_tp")
    for family in UNSUPPORTED:
        model = type("Model", (), {"__str__": lambda _, name=family: f"x: {name.upper()}Model"})()
        assert not auto_tp.AutoTP.supported(model)
    assert auto_tp.AutoTP.supported(type("Model", (), {"__str__": lambda _: "x: OPTModel"})())
