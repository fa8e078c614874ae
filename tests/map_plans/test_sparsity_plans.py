"""Sparsity plans: exact thresholds from counts, evaluated beside the dense model; what is refused."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.causal_lm import open_whole
from support.checkpoints import llama
from support.command_line import avss, mistake, succeed
from support.tiers import nightly

from avss_dist import evaluate
from avss_dist.analysis.sparsity_plans import MeasuredMaps
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.map_plans.plans import SparsityPlan
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.pruning.plan import read_checked_plan
from avss_dist.pruning.selection import PlanError
from avss_dist.runs.api import score
from avss_dist.warehouse.reader import Warehouse

TEXT = "builtin:pydoc"
SMALL = {"max_sequences": 8, "sequence_length": 32, "batch_size": 4, "sequences_per_shard": 4, "device": "cpu"}


@pytest.fixture(scope="module", params=["bfloat16", *nightly("float32")])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scored(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, dtype: str) -> Path:
    warehouse = tmp_path_factory.mktemp("scored")
    score(tiny_llama, corpus=TEXT, warehouse=warehouse, sites=("inputs",), dtype=dtype, **SMALL)
    return warehouse


def captured(tiny_llama: Path, dtype: str) -> dict[tuple[int, str], np.ndarray]:
    """What each linear map read of the run's text."""
    settings, checkpoint = Settings(**SMALL, dtype=dtype), resolve(str(tiny_llama))
    model, found = open_whole(checkpoint, settings), {}
    with ExitStack() as stack, torch.no_grad():
        for layer in model.layers:
            for one in layer.projections:

                def keep(_m: Any, args: Any, key: tuple[int, str] = (layer.index, one.path)) -> None:
                    found.setdefault(key, []).append(args[0].abs().double().numpy().ravel())

                stack.callback(one.module.register_forward_pre_hook(keep).remove)
        for shard in tokenize_corpus(TEXT, load_tokenizer(checkpoint), settings).shards:
            for batch in shard.batches(4):
                model.losses(batch)
    return {key: np.concatenate(parts) for key, parts in found.items()}


@pytest.mark.parametrize("target", [0.25, 0.65])
def test_thresholds_are_the_quantiles_of_what_maps_read(
    scored: Path, tiny_llama: Path, tmp_path: Path, dtype: str, target: float
) -> None:
    path = tmp_path / "sparse.yaml"
    succeed("sparsify", target, "-w", scored, "-o", path)
    made, read = read_checked_plan(SparsityPlan, path), captured(tiny_llama, dtype)
    assert len(made.projections) == 21
    assert (made.why["by"], made.rule) == ("uniform", "all")
    for one in made.projections:
        sizes = np.sort(read[one.layer, one.map])
        exact = sizes[int(np.ceil(target * len(sizes) - 1e-9)) - 1]
        if dtype == "bfloat16":
            assert one.value == exact
            assert one.sparsity == pytest.approx((sizes <= exact).mean(), abs=1e-6)
        else:
            assert one.value == pytest.approx(exact, rel=2**-7)
    assert made.sparsity == pytest.approx(target, abs=0.01)
    rows = [row for row in Warehouse(scored).table("sparsity").to_pylist() if row["target"] == target]
    assert {(row["layer"], row["map"]): row["value"] for row in rows} == {
        (one.layer, one.map): one.value for one in made.projections
    }


def test_a_plan_is_evaluated_beside_the_dense_model_alone_and_on_top_of_another(
    scored: Path, tmp_path: Path, dtype: str
) -> None:
    sparse, layers, warehouse = tmp_path / "sparse.yaml", tmp_path / "layers.yaml", tmp_path / "w"
    avss("sparsify", 0.5, "-w", scored, "-o", sparse)
    avss("plan", "-w", scored, "--by", "random", "--count", 1, "-o", layers)
    options = {"warehouse": warehouse, "skip_sequences": 8, "dtype": dtype, **SMALL}
    task = f"perplexity:{TEXT}"
    with pytest.raises(Exception, match="is text that the scores of"):
        evaluate([str(sparse)], tasks=[task], **options | {"skip_sequences": 0, "warehouse": scored})
    found = evaluate([str(sparse), str(layers)], tasks=[task], sparse=str(sparse), **options)
    labels = [(one.subject.label, one.result.metric, one.retained is None) for one in found]
    both = f"{layers} + {sparse}"
    assert labels == [
        *((str(sparse), "loss", False), (str(sparse), "sparsity", True)),
        *((f"{sparse} + {sparse}", "loss", False), (f"{sparse} + {sparse}", "sparsity", True)),
        *((str(layers), "loss", False), (both, "loss", False), (both, "sparsity", True)),
    ]
    value = {(label, metric): one.result.value for (label, metric, _), one in zip(labels, found, strict=True)}
    assert value[str(sparse), "sparsity"] == pytest.approx(0.5, abs=0.05)
    assert len({value[label, "loss"] for label in (str(sparse), str(layers), both)}) == 3
    rows = [row for row in Warehouse(warehouse).table("evaluations").to_pylist() if row["task"] == task]
    realized = [row for row in rows if row["metric"].startswith("realized:") and not row["drop"]]
    assert len(realized) == 21 and all(0.4 < row["value"] < 0.6 for row in realized)
    (dense,) = {row["run_id"] for row in rows if row["sparsity_plan"] is None}
    assert all((row["sparsity_plan"] is None) == (row["run_id"] == dense) for row in rows)


def test_what_cannot_be_planned_is_refused_with_the_reason(
    scored: Path, tiny_llama: Path, tmp_path: Path, dtype: str, save_checkpoint: Any
) -> None:
    out = tmp_path / "sparse.yaml"
    for options, message in (
        ([1], "target must be less than 1, not 1."),
        ([0], "target must be greater than 0, not 0."),
    ):
        result = avss("sparsify", *options, "-w", scored, "-o", out)
        assert result.exit_code != 0 and message in " ".join(result.stderr.split()), result.stderr
    assert not out.exists()
    avss("sparsify", 0.5, "-w", scored, "-o", out)
    made = yaml.safe_load(out.read_text())
    one = made["projections"][0]
    broken = tmp_path / "broken.yaml"
    for changes, message in (
        ({"projections": [one, one]}, "names a linear map twice"),
        ({"projections": [one | {"by": "top_k", "value": 1.0}]}, "leaves none of the 32 units of a token"),
        ({"projections": [one | {"sparsity": 1.0}]}, "sparsity must be less than 1, not 1.0"),
        ({"projections": [one | {"layr": 1}]}, "Unknown key 'layr'. Did you mean 'layer'"),
        ({"projections": one}, "projections must be a list, not {"),
        ({"sparsity": 0.9}, "sparsity is 0.9, and the maps of projections have 0.5"),
        ({"num_layers": 40}, "the key 'num_layers' is 40, and"),
        ({"projections": [one | {"layer": 3}]}, "There is no layer 3: the model has 3, from 0."),
        ({"rule": "prefill"}, "Unknown rule 'prefill'"),
        ({"revision": "0" * 40}, "it is at"),
        (
            {"projections": [made["projections"][0], made["projections"][6] | {"inputs": 47}]},
            f"{broken}: map 2 of the key 'projections', 'mlp.down_proj' of layer 0, has 47 inputs and 32 outputs, and "
            f"in {tiny_llama} 48 and 32.",
        ),
        ({"projections": [one | {"map": "mlp.up"}]}, f"{broken}: map 1 of the key 'projections', 'mlp.up' of layer 0,"),
    ):
        broken.write_text(yaml.safe_dump(made | changes))
        assert message in mistake("evaluate", broken, "--tasks", f"perplexity:{TEXT}", "--warehouse", tmp_path / "w")
        assert not list((tmp_path / "w").rglob("*.parquet"))
    broken.write_text(f"{out.read_text()}rule: last-half\n")
    with pytest.raises(PlanError, match=r"yaml:\d+: the key 'rule' is repeated; the first is in line \d\."):
        read_checked_plan(SparsityPlan, broken)
    other = save_checkpoint(llama(seed=3), tmp_path / "other")
    result = avss("evaluate", other, "--sparse", out, "--tasks", f"perplexity:{TEXT}", "--warehouse", tmp_path / "w")
    assert "is another model" in result.stderr


def test_a_run_that_did_not_measure_the_inputs_says_which_command_does(tiny_llama: Path, tmp_path: Path) -> None:
    score(tiny_llama, corpus=TEXT, warehouse=tmp_path / "w", **SMALL)
    result = avss("sparsify", 0.5, "-w", tmp_path / "w", "-o", tmp_path / "sparse.yaml")
    assert result.exit_code != 0
    told = " ".join(result.stderr.split())
    assert f"avss score {tiny_llama} --corpus {TEXT}" in told and told.endswith("--sites inputs")


def test_a_family_whose_experts_are_fused_keeps_its_mlp_dense(save_checkpoint: Any, tmp_path: Path) -> None:
    from support.families import lively, tiny_model

    folder = save_checkpoint(lively(tiny_model("causal", "mixtral")), tmp_path / "mixtral")
    run = score(folder, corpus=TEXT, warehouse=tmp_path / "w", sites=("inputs",), **SMALL)
    warehouse = Warehouse(tmp_path / "w")
    row = warehouse.run(run.run_id)
    assert row is not None
    assert any("'up_input' is absent" in note for note in row["notes"])
    assert {one.site for one in MeasuredMaps.of_run(warehouse, row).maps} == {"query_input", "output_input"}
    result = avss("sparsify", 0.5, "-w", tmp_path / "w", "-o", tmp_path / "sparse.yaml")
    assert "The MLP of 3 of 3 layers stays dense: its maps are fused." in result.stdout
