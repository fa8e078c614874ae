"""Sparsity plans: exact thresholds from counts, what they are chosen by, evaluated beside the dense model; refusals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import yaml
from support.causal_lm import open_whole, random_shard
from support.checkpoints import checkpoint_at, llama
from support.command_line import as_words, avss, in_one_line, mistake, succeed
from support.experiments import cell_times
from support.families import lively, tiny_model
from support.tables import evaluation_rows
from support.tiers import nightly

from avss_dist import evaluate, sparsify
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, MapSparsity, Sparsity
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.structure.layers import first_tensor
from avss_dist.partition.placement import Placement
from avss_dist.partition.streaming.replica import StreamingReplica
from avss_dist.planning.sparsity import measured_maps
from avss_dist.plans.choice import PlanError
from avss_dist.plans.map_plans import MapPlan, SparsityPlan
from avss_dist.plans.plan import read_checked_plan
from avss_dist.runs.scoring import score
from avss_dist.tasks.block_search import GreedyBlock, Spectra, hill_exponent
from avss_dist.tasks.map_damage import MapDamage
from avss_dist.tasks.task import Cell, MetricRow, measure_cell
from avss_dist.tasks.text_loss import TextLoss
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
    settings = Settings(**SMALL, dtype=dtype)
    checkpoint = checkpoint_at(tiny_llama)
    model = open_whole(checkpoint, settings)
    inputs = {}
    with ExitStack() as stack, torch.no_grad():
        for layer in model.layers:
            for projection in layer.projections:

                def keep(_m: Any, args: Any, key: tuple[int, str] = (layer.index, projection.path)) -> None:
                    sizes = args[0].abs().double().numpy()
                    inputs.setdefault(key, []).append(sizes.ravel())

                handle = projection.module.register_forward_pre_hook(keep)
                stack.callback(handle.remove)
        tokenizer = load_tokenizer(checkpoint)
        for shard in tokenize_corpus(TEXT, tokenizer, settings).shards:
            for batch in shard.batches(4):
                model.losses(batch)
    return {key: np.concatenate(parts) for key, parts in inputs.items()}


def by_map(plan: SparsityPlan) -> dict[tuple[int, str], MapPlan]:
    """What a plan does at each linear map, by layer and path."""
    return {(cut.layer, cut.map): cut for cut in plan.projections}


@pytest.mark.parametrize("target", [0.25, 0.65])
def test_thresholds_are_the_quantiles_of_what_maps_read(
    scored: Path, tiny_llama: Path, tmp_path: Path, dtype: str, target: float
) -> None:
    path = tmp_path / "sparse.yaml"
    succeed("sparsify", target, "-w", scored, "-o", path)
    plan = read_checked_plan(SparsityPlan, path)
    read = captured(tiny_llama, dtype)
    assert len(plan.projections) == 21
    assert plan.why["by"] == "uniform"
    assert plan.rule == "all"
    for place, cut in by_map(plan).items():
        sizes = np.sort(read[place])
        rank = int(np.ceil(target * len(sizes) - 1e-9))
        exact = sizes[rank - 1]
        if dtype == "bfloat16":
            share = (sizes <= exact).mean()
            assert cut.value == exact
            assert cut.sparsity == pytest.approx(share, abs=1e-6)
        else:
            assert cut.value == pytest.approx(exact, rel=2**-7)
    assert plan.sparsity == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("target", [0.25, 0.65])
def test_the_warehouse_has_the_thresholds_of_a_plan(scored: Path, tmp_path: Path, target: float) -> None:
    path = tmp_path / "sparse.yaml"
    succeed("sparsify", target, "-w", scored, "-o", path)
    planned = by_map(read_checked_plan(SparsityPlan, path))
    rows = Warehouse(scored).table("sparsity", where=pc.field("target") == target)
    assert len(rows) == len(planned)
    for row in rows.to_pylist():
        assert row["value"] == planned[row["layer"], row["map"]].value


@pytest.mark.nightly
def test_a_plan_is_evaluated_beside_the_dense_model_alone_and_on_top_of_another(
    scored: Path, tmp_path: Path, dtype: str
) -> None:
    sparse = tmp_path / "sparse.yaml"
    layers = tmp_path / "layers.yaml"
    warehouse = tmp_path / "w"
    avss("sparsify", 0.5, "-w", scored, "-o", sparse)
    avss("plan", "-w", scored, "--by", "random", "--count", 1, "-o", layers)
    options = {"warehouse": warehouse, "skip_sequences": 8, "dtype": dtype, **SMALL}
    task = f"perplexity:{TEXT}"
    seen = options | {"skip_sequences": 0, "warehouse": scored}
    with pytest.raises(Exception, match="is text that the scores of"):
        evaluate([sparse], tasks=[task], **seen)
    evaluations = evaluate([sparse, layers], tasks=[task], sparse=str(sparse), **options)
    alone = str(sparse)
    dropped = str(layers)
    twice = f"{sparse} + {sparse}"
    both = f"{layers} + {sparse}"
    values = {}
    for evaluation in evaluations:
        result = evaluation.result
        values[evaluation.subject.label, result.metric] = result.value
        assert (evaluation.retained is None) == (result.metric == "sparsity")
    assert list(values) == [
        (alone, "loss"),
        (alone, "sparsity"),
        (twice, "loss"),
        (twice, "sparsity"),
        (dropped, "loss"),
        (both, "loss"),
        (both, "sparsity"),
    ]
    assert len(evaluations) == len(values)
    assert values[alone, "sparsity"] == pytest.approx(0.5, abs=0.05)
    losses = {values[alone, "loss"], values[dropped, "loss"], values[both, "loss"]}
    assert len(losses) == 3
    rows = evaluation_rows(warehouse, task)
    realized = [row for row in rows if row["metric"].startswith("realized:") and not row["drop"]]
    assert len(realized) == 21
    for row in realized:
        assert 0.4 < row["value"] < 0.6
    (dense,) = {row["run_id"] for row in rows if row["sparsity_plan"] is None}
    for row in rows:
        assert (row["sparsity_plan"] is None) == (row["run_id"] == dense)


@pytest.fixture(scope="module")
def sparse_plan(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "sparse.yaml"
    succeed("sparsify", 0.5, "-w", scored, "-o", path)
    return path


def refused(plan: dict[str, Any], folder: Path) -> str:
    """Return the message of `avss evaluate` on a plan, which measures nothing."""
    broken = folder / "broken.yaml"
    broken.write_text(yaml.safe_dump(plan))
    warehouse = folder / "w"
    message = mistake("evaluate", broken, "--tasks", f"perplexity:{TEXT}", "--warehouse", warehouse)
    assert not list(warehouse.rglob("*.parquet"))
    return message


@pytest.mark.parametrize(
    ("share", "message"),
    [(1, "SHARE must be less than 1, not 1."), (0, "SHARE must be greater than 0, not 0.")],
)
def test_a_share_that_is_none_or_all_is_refused(scored: Path, tmp_path: Path, share: int, message: str) -> None:
    out = tmp_path / "sparse.yaml"
    result = avss("sparsify", share, "-w", scored, "-o", out)
    assert result.exit_code != 0
    assert message in in_one_line(result.stderr), result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.9}, "sparsity is 0.9, and the maps of projections have 0.5"),
        ({"num_layers": 40}, "the key 'num_layers' is 40, and"),
        ({"rule": "prefill"}, "Unknown rule 'prefill'"),
        ({"revision": "0" * 40}, "it is at"),
    ],
)
def test_a_plan_with_a_wrong_key_is_refused(
    sparse_plan: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    plan = yaml.safe_load(sparse_plan.read_text())
    assert message in refused(plan | changes, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "top_k", "value": 1.0}, "leaves none of the 32 units of a token"),
        ({"sparsity": 1.0}, "sparsity must be less than 1, not 1.0"),
        ({"layr": 1}, "Unknown key 'layr'. Did you mean 'layer'"),
        ({"layer": 3}, "There is no layer 3: the model has 3, from 0."),
        ({"map": "mlp.up"}, "broken.yaml: map 1 of the key 'projections', 'mlp.up' of layer 0,"),
    ],
)
def test_a_plan_with_a_wrong_map_is_refused(
    sparse_plan: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    plan = yaml.safe_load(sparse_plan.read_text())
    first_map = plan["projections"][0]
    plan["projections"] = [first_map | changes]
    assert message in refused(plan, tmp_path)


def test_a_plan_that_names_a_map_twice_is_refused(sparse_plan: Path, tmp_path: Path) -> None:
    plan = yaml.safe_load(sparse_plan.read_text())
    first_map = plan["projections"][0]
    plan["projections"] = [first_map, first_map]
    assert "names a linear map twice" in refused(plan, tmp_path)


def test_a_plan_whose_maps_are_no_list_is_refused(sparse_plan: Path, tmp_path: Path) -> None:
    plan = yaml.safe_load(sparse_plan.read_text())
    plan["projections"] = plan["projections"][0]
    assert "projections must be a list, not {" in refused(plan, tmp_path)


def test_a_plan_for_maps_of_another_size_is_refused(sparse_plan: Path, tiny_llama: Path, tmp_path: Path) -> None:
    plan = yaml.safe_load(sparse_plan.read_text())
    maps = plan["projections"]
    plan["projections"] = [maps[0], maps[6] | {"inputs": 47}]
    message = refused(plan, tmp_path)
    assert "broken.yaml: map 2 of the key 'projections', 'mlp.down_proj' of layer 0, has 47 inputs" in message
    assert f" and 32 outputs, and in {tiny_llama} 48 and 32." in message


def test_a_plan_that_repeats_a_key_is_refused(sparse_plan: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"{sparse_plan.read_text()}rule: last-half\n")
    with pytest.raises(PlanError, match=r"yaml:\d+: the key 'rule' is repeated; the first is in line \d\."):
        read_checked_plan(SparsityPlan, broken)


def test_a_plan_of_another_model_is_refused(sparse_plan: Path, tmp_path: Path, save_checkpoint: Any) -> None:
    other = save_checkpoint(llama(seed=3), tmp_path / "other")
    task = f"perplexity:{TEXT}"
    warehouse = tmp_path / "w"
    result = avss("evaluate", other, "--sparse", sparse_plan, "--tasks", task, "--warehouse", warehouse)
    assert "is another model" in result.stderr


def test_a_run_that_did_not_measure_the_inputs_says_which_command_does(tiny_llama: Path, tmp_path: Path) -> None:
    warehouse = tmp_path / "w"
    score(tiny_llama, corpus=TEXT, warehouse=warehouse, **SMALL)
    result = avss("sparsify", 0.5, "-w", warehouse, "-o", tmp_path / "sparse.yaml")
    assert result.exit_code != 0
    told = in_one_line(result.stderr)
    assert f"avss score {tiny_llama} --corpus {TEXT}" in told
    assert told.endswith("--sites inputs")


def test_a_family_whose_experts_are_fused_keeps_its_mlp_dense(save_checkpoint: Any, tmp_path: Path) -> None:
    mixtral = lively(tiny_model("causal", "mixtral"))
    folder = save_checkpoint(mixtral, tmp_path / "mixtral")
    warehouse_folder = tmp_path / "w"
    run = score(folder, corpus=TEXT, warehouse=warehouse_folder, sites=("inputs",), **SMALL)
    warehouse = Warehouse(warehouse_folder)
    row = warehouse.run(run.run_id)
    assert row is not None
    assert "'up_input' is absent" in "\n".join(row["notes"])
    sites = {measured_map.site for measured_map in measured_maps(warehouse, row)}
    assert sites == {"query_input", "output_input"}
    result = avss("sparsify", 0.5, "-w", warehouse_folder, "-o", tmp_path / "sparse.yaml")
    assert "The MLP of 3 of 3 layers stays dense: its maps are fused." in result.stdout


# What sparsities are chosen by: damage, greedy paths, plans of every method


FEW = {"max_sequences": 2, "sequence_length": 32, "batch_size": 2, "sequences_per_shard": 2, "device": "cpu"}


def split(given: dict[int, torch.Tensor], number: int, _module: object, args: tuple[torch.Tensor]) -> Any:
    """Have the gradient of what goes through one map alone."""
    copy = args[0].detach().clone().requires_grad_()
    given[number] = copy
    return (args[0] + copy - copy.detach(),)


def test_damage_is_that_of_autograd(model: LanguageModel) -> None:
    shard = random_shard()
    keys = [(0, "self_attn.k_proj"), (1, "mlp.up_proj"), (2, "mlp.down_proj")]
    edges = (0.05, 0.4, 1.0)
    measure = MapDamage(shard=shard, thresholds=dict.fromkeys(keys, edges), seed=4)
    damage = by_metric(measure(model))
    first = np.zeros((3, 3))
    second = np.zeros((3, 3))
    for batch in shard.batches(1):
        given: dict[int, torch.Tensor] = {}
        handles = []
        for number, (layer, path) in enumerate(keys):
            linear_map = model.layers[layer].module.get_submodule(path)
            hook = partial(split, given, number)
            handles.append(linear_map.register_forward_pre_hook(hook))
        hidden = model.hidden_states(batch)
        seeds = model.loss_gradients(hidden.detach(), batch, 2, 4)
        inputs = [given[0], given[1], given[2]]
        for number, seed in enumerate(seeds):
            gradients = torch.autograd.grad(hidden, inputs, seed, retain_graph=True)
            for i, gradient in enumerate(gradients):
                products = gradient * inputs[i]
                sizes = inputs[i].abs()
                for k, edge in enumerate(edges):
                    cut = products * (sizes <= edge)
                    change = -cut[0].sum(dim=-1).double()
                    if number == 0:
                        first[i, k] += float(change.sum().detach())
                    else:
                        second[i, k] += float(change.square().sum().detach()) / 4
        for handle in handles:
            handle.remove()
    for i, (layer, path) in enumerate(keys):
        first_order = damage[f"first_order:{path}", layer]
        second_order = damage[f"second_order:{path}", layer]
        assert first_order.samples == pytest.approx(first[i], rel=1e-3, abs=1e-6)
        assert second_order.samples == pytest.approx(second[i], rel=1e-3)


def test_greedy_takes_the_step_that_changes_the_block_least(model: LanguageModel) -> None:
    shard = random_shard(rows=2)
    names = ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    thresholds = {"self_attn.o_proj": (0.1, 0.3), "mlp.gate_proj": (0.3, 0.8), "mlp.down_proj": (0.2, 0.6)}
    steps = dict.fromkeys(names, 0.4)
    sizes = dict.fromkeys(names, 1)
    measure = GreedyBlock(layer=1, shards=(shard,), thresholds=thresholds, steps=steps, sizes=sizes)
    greedy_samples = {row.metric: row.samples for row in measure(model)}
    greedy_errors = greedy_samples["greedy_error"]
    batch = next(iter(shard.batches(2)))
    ids = torch.from_numpy(batch.input_ids).long()

    def output(cuts: dict[str, float]) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        layer = model.layers[1].module

        def keep(_module: object, _args: object, out: Any) -> None:
            outputs.append(first_tensor(out))

        handles = [layer.register_forward_hook(keep)]
        for name, edge in cuts.items():
            linear_map = layer.get_submodule(name)

            def cut(_module: object, args: Any, edge: float = edge) -> Any:
                (inputs,) = args
                return (inputs.where(inputs.abs() > edge, 0.0),)

            handles.append(linear_map.register_forward_pre_hook(cut))
        with torch.no_grad():
            model.module(input_ids=ids)
        for handle in handles:
            handle.remove()
        return outputs[0][:, 18:].double()

    taken = dict.fromkeys(names, 0)
    dense = output({})
    for round_ in range(1, len(greedy_errors)):
        errors = {}
        for name in names:
            if taken[name] < 2:
                trial = taken | {name: taken[name] + 1}
                cuts = {path: thresholds[path][number - 1] for path, number in trial.items() if number}
                change = output(cuts) - dense
                errors[name] = float(change.norm())
        best = min(errors, key=lambda name: errors[name])
        taken[best] += 1
        assert greedy_errors[round_] == pytest.approx(errors[best], rel=1e-4)
        for name in names:
            assert greedy_samples[f"greedy:{name}"][round_] == pytest.approx(0.4 * taken[name])
    assert sum(taken.values()) == 6  # 0.8 of all, and no step more below 1


def test_spectra_are_those_of_the_weights(model: LanguageModel) -> None:
    spectra = {row.metric: row.samples[0] for row in Spectra(1)(model)}
    weight = model.layers[1].module.mlp.up_proj.weight.detach().double().numpy()
    eigenvalues = np.linalg.eigvalsh(weight.T @ weight)
    assert spectra["hill:mlp.up_proj"] == pytest.approx(hill_exponent(eigenvalues), rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 12, 13])
def test_hills_estimate_is_of_the_larger_half_of_what_is_positive(n: int) -> None:
    rng = np.random.default_rng(n)
    values = rng.pareto(1.5, n) + 1
    number = max(2, n // 2)
    tail = sorted(values)[-number:]
    excess = sum(math.log(value / tail[0]) for value in tail)
    exponent = hill_exponent(values)
    assert exponent == pytest.approx(1 + number / excess, rel=1e-12)
    with_others = [*values, *[0.0] * n, -1.0]
    assert hill_exponent(with_others) == exponent
    assert hill_exponent([3.0] * n) == math.inf


@pytest.fixture(scope="module")
def measured(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    warehouse = tmp_path_factory.mktemp("scored")
    score(tiny_llama, corpus=TEXT, warehouse=warehouse, sites=("inputs",), dtype="bfloat16", **FEW)
    return warehouse


@pytest.mark.parametrize("method", ["loss", "acttail", *nightly("teal")])
def test_every_method_meets_the_budget(measured: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "sparse.yaml"
    options = {**FEW, "warehouse": measured, "method": method}
    succeed("sparsify", 0.6, *as_words(options), "-o", out)
    plan = read_checked_plan(SparsityPlan, out)
    assert plan.sparsity == pytest.approx(0.6, abs=0.03)
    sparsities = {round(cut.sparsity, 3) for cut in plan.projections}
    assert len(sparsities) > 3
    assert plan.why["by"] == method
    assert str(plan.why["evaluation"]).startswith("tiny-llama-")
    times = cell_times(measured)
    assert sparsify(0.3, **options).sparsity == pytest.approx(0.3, abs=0.03)
    assert cell_times(measured) == times  # another target measures nothing


@pytest.mark.parametrize("method", ["loss", *nightly("teal", "acttail")])
def test_streaming_makes_the_same_plan(measured: Path, method: str) -> None:
    options = {**FEW, "warehouse": measured, "method": method, "fresh": True}
    single = sparsify(0.6, partition="single", **options)
    streamed = sparsify(0.6, partition="streaming", **options)
    assert single == streamed


def test_a_partition_without_whole_weights_is_refused(measured: Path) -> None:
    with pytest.raises(ConfigError, match="`partition` zero3 has a part of each weight, and loss needs it whole"):
        sparsify(0.5, warehouse=measured, method="loss", partition="zero3", executor="ray")


# The sparse forward: what maps read, at which tokens, what is counted; the same on partitions; no trace


RULES = ("all", "last-half")


def cuts_of(model: LanguageModel, **cut: Any) -> tuple[MapSparsity, ...]:
    """The same cut of every linear map."""
    cut = {"by": "threshold", "value": 0.4} | cut
    cuts = []
    for layer in model.layers:
        for linear in layer.projections:
            place = {"layer": layer.index, "path": linear.path, "outputs": linear.outputs, "inputs": linear.inputs}
            cuts.append(MapSparsity(**place, **cut))
    return tuple(cuts)


def cell(model: LanguageModel, sparsity: Sparsity | None, drop: tuple[int, ...] = ()) -> Cell:
    return Cell(
        run_id="r",
        checkpoint=model.checkpoint,
        settings=model.settings,
        task="t",
        part=0,
        measure=TextLoss(random_shard()),
        intervention=Intervention(removed=drop, sparsity=sparsity),
    )


def rows_of(model: LanguageModel, sparsity: Sparsity, drop: tuple[int, ...] = ()) -> list[MetricRow]:
    """The rows of a text, under a sparsity and without some layers."""
    measured = measure_cell(model, cell(model, sparsity, drop))
    return list(measured.rows)


def realized_zeros(rows: Iterable[MetricRow]) -> list[int]:
    """The number of inputs that were made zero, by linear map."""
    return [row.samples[0] for row in rows if row.metric.startswith("realized:")]


def plainly(model: LanguageModel, keeps: Any, rule: str, drop: tuple[int, ...] = ()) -> tuple[list[float], float]:
    """Losses of every row alone, without padding, with inputs of maps replaced by a test's own hooks; zeros counted."""
    shard = random_shard()
    losses = []
    zeros = 0
    for row, length in enumerate(shard.lengths):
        tokens = int(length)
        first_sparse = 0 if rule == "all" else tokens // 2
        sparse = torch.zeros(tokens, dtype=torch.bool)
        sparse[first_sparse:] = True

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
                        handle = module.register_forward_pre_hook(replace)
                        stack.callback(handle.remove)
            ids = torch.from_numpy(shard.input_ids[row : row + 1, :tokens]).long()
            loss = model.module(input_ids=ids, labels=ids).loss
            losses.append(float(loss) * (tokens - 1))
    return losses, zeros


def by_metric(rows: Iterable[MetricRow]) -> dict[Any, MetricRow]:
    return {(row.metric, row.layer): row for row in rows}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drop", [(), (1,)])
def test_small_inputs_are_zero_at_the_tokens_of_a_rule(model: LanguageModel, rule: str, drop: tuple[int, ...]) -> None:
    batches = list(random_shard().batches(2))
    (before,) = model.losses_under(batches, [NO_INTERVENTION])
    sparsity = Sparsity(maps=cuts_of(model), rule=rule)
    rows = rows_of(model, sparsity, drop)
    losses, zeros = plainly(model, lambda _module, x: x.abs() > 0.4, rule, drop)
    measured = by_metric(rows)
    assert measured["loss", None].samples == pytest.approx(losses, rel=1e-4)
    realized = realized_zeros(rows)
    assert sum(realized) == zeros
    assert zeros
    assert len(realized) == 7 * (3 - len(drop))
    saved = measured["sparsity", None]
    assert 0 < saved.samples[0] < saved.weights[0]
    (after,) = model.losses_under(batches, [NO_INTERVENTION])
    assert np.array_equal(after, before)
    assert not model.module._forward_pre_hooks


@pytest.mark.parametrize("weighted", [False, True])
def test_the_largest_of_a_token_stay(model: LanguageModel, weighted: bool) -> None:
    def top(module: Any, inputs: torch.Tensor) -> torch.Tensor:
        units = inputs.shape[-1]
        number = units - int(0.3 * units)
        sizes = inputs.abs()
        if weighted:
            sizes = sizes * module.weight.norm(dim=0)
        descending = sizes.sort(dim=-1, descending=True).values
        return sizes >= descending[..., number - 1 : number]

    cuts = cuts_of(model, by="top_k", value=0.3, weighted=weighted)
    rows = rows_of(model, Sparsity(maps=cuts, rule="all"))
    losses, zeros = plainly(model, top, "all")
    measured = by_metric(rows)
    assert measured["loss", None].samples == pytest.approx(losses, rel=2e-3)  # near ties
    assert sum(realized_zeros(rows)) == pytest.approx(zeros, rel=2e-3)


def test_streaming_computes_the_same(model: LanguageModel, tiny_llama: Path) -> None:
    settings = Settings(**SMALL | {"batch_size": 2, "dtype": "float32"})
    replica = StreamingReplica(checkpoint_at(tiny_llama), settings, Placement(), head=True)
    try:
        streamed = replica.language_model
        assert streamed is not None
        for cut in ({}, {"by": "top_k", "value": 0.5, "weighted": True}):
            sparsity = Sparsity(maps=cuts_of(model, **cut), rule="last-half")
            rows = rows_of(streamed, sparsity, (1,))
            wanted = rows_of(model, sparsity, (1,))
            for row, expected in zip(rows, wanted, strict=True):
                assert row.metric == expected.metric
                assert row.layer == expected.layer
                assert np.array_equal(row.samples, expected.samples)
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
    threshold = {"layer": 0, "path": "self_attn.q_proj", "outputs": 32, "inputs": 32, "by": "threshold", "value": 0.1}
    cut = MapSparsity(**threshold | changed)
    sparsity = Sparsity(maps=(cut,), rule="all")
    with pytest.raises(ModelError, match=message), model.applying(Intervention(sparsity=sparsity)):
        pass
