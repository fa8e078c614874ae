"""The sparse forward: what maps read, at which tokens, what is counted; the same on partitions; no trace."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.causal_lm import SMALL, opened, random_shard

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, MapSparsity, Sparsity
from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import resolve
from avss_dist.partition.replica import Placement
from avss_dist.partition.streaming.replica import StreamingReplica
from avss_dist.tasks.cells import Cell, measure_cell
from avss_dist.tasks.task import Row
from avss_dist.tasks.text_loss import TextLoss

RULES = ("all", "last-half")


def cuts_of(model: LanguageModel, **how: Any) -> tuple[MapSparsity, ...]:
    """The same cut of every linear map."""
    how = {"by": "threshold", "value": 0.4} | how
    return tuple(
        MapSparsity(layer=layer.index, path=one.path, outputs=one.outputs, inputs=one.inputs, **how)
        for layer in model.layers
        for one in layer.projections
    )


def cell(model: LanguageModel, sparsity: Sparsity | None, drop: tuple[int, ...] = ()) -> Cell:
    measure = TextLoss(random_shard())
    settings = model.settings
    return Cell(run_id="r", checkpoint=model.checkpoint, settings=settings, task="t", part=0, measure=measure,
                intervention=Intervention(removed=drop, sparsity=sparsity))  # fmt: skip


def plainly(model: LanguageModel, keeps: Any, rule: str, drop: tuple[int, ...] = ()) -> tuple[list[float], float]:
    """Losses of every row alone, without padding, with inputs of maps replaced by a test's own hooks; zeros counted."""
    shard, losses, zeros = random_shard(), [], 0
    for row, length in enumerate(shard.lengths):
        tokens = int(length)
        sparse = torch.zeros(tokens, dtype=torch.bool)
        sparse[{"all": 0, "last-half": tokens // 2}[rule] :] = True

        def replace(module: Any, args: Any, sparse: torch.Tensor = sparse) -> Any:
            nonlocal zeros
            gone = ~keeps(module, args[0]) & sparse[:, None]
            zeros += int(gone.sum())
            return (args[0].masked_fill(gone, 0.0),)

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(model.without(drop))
            for layer in model.layers:
                for name, module in layer.module.named_modules():
                    if name.endswith("_proj"):
                        stack.callback(module.register_forward_pre_hook(replace).remove)
            ids = torch.from_numpy(shard.input_ids[row : row + 1, :tokens]).long()
            losses.append(float(model.module(input_ids=ids, labels=ids).loss) * (tokens - 1))
    return losses, zeros


def by_metric(rows: list[Row]) -> dict[Any, Row]:
    return {(row.metric, row.layer): row for row in rows}


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return opened(tiny_llama, dtype="float32")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drop", [(), (1,)])
def test_small_inputs_are_zero_at_the_tokens_of_a_rule(model: LanguageModel, rule: str, drop: tuple[int, ...]) -> None:
    before = model.losses_under(list(random_shard().batches(2)), [NO_INTERVENTION])[0]
    found = by_metric(list(measure_cell(model, cell(model, Sparsity(maps=cuts_of(model), rule=rule), drop)).rows))
    losses, zeros = plainly(model, lambda _module, x: x.abs() > 0.4, rule, drop)
    assert found["loss", None].samples == pytest.approx(losses, rel=1e-4)
    realized = [row for (metric, _), row in found.items() if metric.startswith("realized:")]
    assert sum(row.samples[0] for row in realized) == zeros
    assert zeros and len(realized) == 7 * (3 - len(drop))
    saved = found["sparsity", None]
    assert 0 < saved.samples[0] < saved.weights[0]
    assert np.array_equal(model.losses_under(list(random_shard().batches(2)), [NO_INTERVENTION])[0], before)
    assert not model.module._forward_pre_hooks


def test_the_largest_of_a_token_stay(model: LanguageModel) -> None:
    def top(module: Any, x: torch.Tensor, weighted: bool = False) -> torch.Tensor:
        number = x.shape[-1] - int(0.3 * x.shape[-1])
        sizes = x.abs() * (module.weight.norm(dim=0) if weighted else 1)
        return sizes >= sizes.sort(dim=-1, descending=True).values[..., number - 1 : number]

    for how, keeps in (
        ({"by": "top_k", "value": 0.3}, top),
        ({"by": "top_k", "value": 0.3, "weighted": True}, lambda m, x: top(m, x, weighted=True)),
    ):
        sparsity = Sparsity(maps=cuts_of(model, **how), rule="all")
        found = by_metric(list(measure_cell(model, cell(model, sparsity)).rows))
        losses, zeros = plainly(model, keeps, "all")
        assert found["loss", None].samples == pytest.approx(losses, rel=2e-3), how  # near ties
        counted = sum(row.samples[0] for (name, _), row in found.items() if name.startswith("realized:"))
        assert counted == pytest.approx(zeros, rel=2e-3), how


def test_streaming_computes_the_same(model: LanguageModel, tiny_llama: Path) -> None:
    replica = StreamingReplica(
        resolve(str(tiny_llama)), Settings(**SMALL | {"batch_size": 2, "dtype": "float32"}), Placement(), head=True
    )
    try:
        streamed = replica.language_model
        assert streamed is not None
        for how in ({}, {"by": "top_k", "value": 0.5, "weighted": True}):
            sparsity = Sparsity(maps=cuts_of(model, **how), rule="last-half")
            rows, wanted = (measure_cell(one, cell(one, sparsity, (1,))).rows for one in (streamed, model))
            assert [(r.metric, r.layer) for r in rows] == [(r.metric, r.layer) for r in wanted]
            assert all(np.array_equal(a.samples, b.samples) for a, b in zip(rows, wanted, strict=True))
    finally:
        replica.close()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": 7}, "There is no layer 7: the model has 3, from 0."),
        ({"path": "mlp.w1"}, "Layer 0 has no linear map 'mlp.w1'"),
        ({"inputs": 64}, "'self_attn.q_proj' of layer 0 is 32 x 32, not 32 x 64."),
    ],
)
def test_a_plan_for_another_model_is_refused(model: LanguageModel, changed: dict[str, Any], message: str) -> None:
    one = {"layer": 0, "path": "self_attn.q_proj", "outputs": 32, "inputs": 32, "by": "threshold", "value": 0.1}
    with pytest.raises(ModelError, match=message), model.sparsified(
        Sparsity(maps=(MapSparsity(**one | changed),), rule="all")
    ):  # fmt: skip
        pass
