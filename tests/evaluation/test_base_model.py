"""A pruned checkpoint is evaluated beside the model that it was made of."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import llama

from avss_dist import evaluate
from avss_dist.core.errors import AvssError, ConfigError
from avss_dist.pruning.checkpoint import prune, pruned_from
from avss_dist.pruning.plan import Plan
from avss_dist.warehouse.reader import Warehouse

TASK = "perplexity:builtin:pydoc"
SIZES: dict[str, Any] = {"max_sequences": 4, "sequence_length": 32, "device": "cpu", "executor": "local"}


@pytest.fixture(scope="module")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the model, and the model without layer 1 beside it."""
    folder = tmp_path_factory.mktemp("pruned")
    shutil.copytree(tiny_llama, folder / "whole")
    made = Plan(model=str(folder / "whole"), num_layers=3, layers="layers", drop=(1,), why={})
    made.write(folder / "plan.yaml")
    prune(str(folder / "whole"), made, folder / "smaller")
    return folder


def test_the_base_model_of_the_card_is_evaluated_too(pruned: Path, tmp_path: Path) -> None:
    """Its losses, and what is kept, are those of the plan that the checkpoint was made by."""
    warehouse = tmp_path / "w"
    subjects = [str(pruned / "smaller"), str(pruned / "plan.yaml")]
    written, planned = evaluate(subjects, tasks=[TASK], warehouse=warehouse, **SIZES)
    assert written.whole is not None and written.retained is not None and planned.retained is not None
    assert written.whole.value == planned.whole.value  # type: ignore[union-attr]
    assert np.array_equal(written.result.samples, planned.result.samples)
    assert written.retained.value == planned.retained.value
    cells = Warehouse(warehouse).table("cells").num_rows
    evaluate([str(pruned / "smaller")], tasks=[TASK], warehouse=warehouse, **SIZES)
    assert Warehouse(warehouse).table("cells").num_rows == cells


def test_a_card_whose_model_is_not_there_is_told(
    pruned: Path, tiny_llama: Path, tmp_path: Path, save_checkpoint: Callable[[Any, Path], Path]
) -> None:
    alone = tmp_path / "smaller"
    shutil.copytree(pruned / "smaller", alone)
    found = evaluate([str(alone)], tasks=[TASK], warehouse=tmp_path / "w", **SIZES)
    assert found[0].retained is None
    assert any(
        re.search(r"whole, the base model of .*smaller, is not found: name it with `base`", f) for f in found.findings
    )
    (named,) = evaluate([str(alone)], tasks=[TASK], base=str(pruned / "whole"), warehouse=tmp_path / "w", **SIZES)
    assert named.retained is not None
    save_checkpoint(llama(seed=9), tmp_path / "whole")
    changed = evaluate([str(alone)], tasks=[TASK], warehouse=tmp_path / "w", **SIZES)
    assert changed[0].retained is None and any("was made of it at" in finding for finding in changed.findings)


def test_models_that_were_not_pruned_have_no_base(pruned: Path, tmp_path: Path) -> None:
    assert pruned_from(pruned / "whole") is None
    (tmp_path / "README.md").write_text("---\nbase_model: org/name\n---\n\nA fine-tuned model.\n")
    assert pruned_from(tmp_path) is None
    (alone,) = evaluate([str(pruned / "whole")], tasks=[TASK], warehouse=tmp_path / "w", **SIZES)
    assert alone.retained is None


def test_mistakes(pruned: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"tasks": [TASK], "warehouse": tmp_path / "w", **SIZES}
    with pytest.raises(ConfigError, match="`base` has no effect on plans"):
        evaluate([str(pruned / "plan.yaml")], base=str(pruned / "whole"), **common)
    with pytest.raises(AvssError, match="nowhere"):
        evaluate([str(pruned / "smaller")], base=str(tmp_path / "nowhere"), **common)
