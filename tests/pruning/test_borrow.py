"""Borrowed neurons: which ones are chosen, how their rows are translated, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.causal_lm import opened
from support.checkpoints import llama, one_thread
from support.command_line import files
from support.families import lively, tiny_model
from support.planning import prune
from support.quantized import block_fp8
from support.tiers import all_of, nightly
from transformers import AutoModelForCausalLM

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.change.skipping import skips
from avss_dist.models.checkpoint.loading import load_tokenizer, open_module
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.models.forward import changing
from avss_dist.partition.execution import Execution
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import model_card
from avss_dist.pruning.repair.fits import NormalEquations, RidgeFit
from avss_dist.pruning.repair.hidden_states import HiddenStateSource
from avss_dist.pruning.repair.neuron_choice import (
    NeuronFit,
    choose_neurons,
    fit_columns,
    largest_errors,
    number_of_pieces,
    removal_errors,
    restricted,
    spare_columns,
)
from avss_dist.pruning.repair.neurons import MlpNeurons, NotBorrowed, Recipient
from avss_dist.pruning.repair.registry import RepairRecord
from avss_dist.pruning.repair.repair import Repair

Save = Callable[[Any, Path], Path]
TEXT = "builtin:pydoc"
ROWS = 60
HELD_BACK_ROWS = 6
READ: dict[str, Any] = {"max_sequences": ROWS, "sequence_length": 48, "batch_size": 8, "device": "cpu"}
IDS = torch.arange(16).reshape(2, 8) + 3
BORROWING = ("llama", "gemma3_text", "gpt2", "phi3")
"""Gate and up, a norm with 1 + w and one after the MLP, biases without a gate, and gate and up in one map."""
FAMILIES = (
    *("llama", "gemma3_text", "qwen3", "gpt2", "opt", "phi3", "olmo2", "granite", "gpt_neox", "cohere2"),
    *("exaone4", "gemma2", "glm4", "falcon", "qwen2"),
)


def repair_of(by: str = "borrow", **options: Any) -> Repair:
    return Repair(by=by, corpora=(TEXT,), settings=Settings(**READ | options))


def whole_of(model: Any, folder: Path, save: Save, *drop: int) -> tuple[Path, Plan]:
    """A saved model, and a plan without some layers."""
    layers = open_module(model).layers
    path = layers[0].name.rpartition(".")[0]
    plan = Plan(model=str(folder), num_layers=len(layers), layers=path, drop=drop or (1,), why={})
    return save(model, folder), plan


# Which neurons stay


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def sums_of(features: torch.Tensor, target: torch.Tensor, start: torch.Tensor) -> NormalEquations:
    """Sums with what is missing after the weights that features have before a fit."""
    return NormalEquations.from_tokens(features, target - features @ start)


def test_what_dropped_features_gave_is_missing() -> None:
    features = normal(50, 7)
    target = normal(50, 3, seed=1)
    start = normal(7, 3, seed=2)
    start[5] = 0  # a borrowed neuron
    columns = torch.tensor([0, 2, 5, 6])
    expected = sums_of(features[:, columns], target, start[columns])
    sums = restricted(sums_of(features, target, start), columns, start)
    torch.testing.assert_close(sums.gram, expected.gram)
    torch.testing.assert_close(sums.cross, expected.cross)
    torch.testing.assert_close(sums.target, expected.target)


def test_a_removal_error_is_the_growth_of_the_ridged_error() -> None:
    """Against a dense solution without each feature in turn."""
    features = normal(60, 6)
    target = normal(60, 3, seed=1)
    start = normal(6, 3, seed=2)
    sums = sums_of(features, target, start)
    ridge = 0.1
    penalty = ridge * float(sums.gram.diagonal().mean())

    def least(columns: list[int]) -> float:
        """Return the least error with some features; the weights of the others go to zero."""
        x = torch.cat([features[:, columns], penalty**0.5 * torch.eye(6, dtype=torch.float64)[:, columns]])
        y = torch.cat([target, penalty**0.5 * start])
        weights = torch.linalg.lstsq(x, y).solution
        return float((y - x @ weights).square().sum())

    every = list(range(6))
    errors = sums.removal_errors(start, ridge)
    for feature in every:
        without = [other for other in every if other != feature]
        assert float(errors[feature]) == pytest.approx(least(without) - least(every), rel=1e-8)


def test_neurons_that_give_the_target_are_chosen() -> None:
    """Two of the layer's own neurons give way to the two borrowed ones that the target is made of."""
    fitted = normal(400, 9)
    held_back = normal(80, 9, seed=1)
    wanted = normal(9, 4, seed=2)
    wanted[[1, 4, 6, 7]] = 0
    start = normal(9, 4, seed=3)
    start[5:] = 0
    sums = [sums_of(features, features @ wanted, start) for features in (fitted, held_back)]
    choice = choose_neurons(*sums, start, number=5)
    assert choice.columns.tolist() == [0, 2, 3, 5, 8]
    torch.testing.assert_close(start[choice.columns] + choice.fit.weights, wanted[choice.columns], atol=0.01, rtol=0)


def test_own_neurons_stay_if_no_other_helps() -> None:
    features = normal(400, 8)
    start = normal(8, 4, seed=1)
    start[5:] = 0
    target = features @ start + 0.1 * normal(400, 4, seed=2)
    sums = sums_of(features, target, start)
    held_back = sums_of(normal(80, 8, seed=3), normal(80, 4, seed=4), start)
    assert choose_neurons(sums, held_back, start, number=5).columns.tolist() == [0, 1, 2, 3, 4]


def test_of_two_neurons_that_do_the_same_one_stays() -> None:
    """In one round both would be dropped, as each is useless beside the other."""
    features = normal(400, 6)
    features[:, 5] = features[:, 4] + 1e-4 * normal(400, seed=1)
    wanted = normal(6, 4, seed=2)
    wanted[[0, 1, 2]] *= 0.3
    wanted[5] = 0
    wanted[4] *= 10
    start = torch.zeros(6, 4, dtype=torch.float64)
    start[:3] = normal(3, 4, seed=3)
    sums = sums_of(features, features @ wanted, start)
    at_once = largest_errors(removal_errors(sums, sums, start), 3)
    assert not {4, 5} & set(at_once.tolist())
    choice = choose_neurons(sums, sums, start, number=3)
    assert len({4, 5} & set(choice.columns.tolist())) == 1
    assert choice.fit.after < fit_columns(sums, sums, at_once, start).fit.after


def test_a_constant_feature_stays() -> None:
    errors = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert largest_errors(errors, 2, constants=1).tolist() == [0, 2, 3]


def test_borrowed_neurons_take_the_places_of_dropped_ones() -> None:
    """Of a layer with four neurons and a constant feature."""
    fit = RidgeFit(torch.zeros(5, 1), None, 0.0, 0.0)
    choice = NeuronFit(torch.tensor([0, 3, 5, 6, 8]), fit)
    assert choice.features(4).tolist() == [0, 5, 6, 3, 8]


def test_more_neurons_than_fit_into_memory_are_compared_in_pieces() -> None:
    """A piece has at least half as many borrowed neurons as the layer has of its own, whatever they take."""
    assert spare_columns(1536, 576) >= 5 * 1536
    assert spare_columns(4864, 896) == 4864
    assert spare_columns(28672, 8192) == 14336


@pytest.mark.parametrize(("pool", "pieces"), [(0, 1), (40, 1), (41, 2), (60, 2), (61, 3), (5 * 48, 11)])
def test_each_piece_but_the_first_has_half_of_its_neurons_from_the_last(pool: int, pieces: int) -> None:
    assert number_of_pieces(pool, spare=40) == pieces


# What is written


@pytest.mark.parametrize("family", all_of(FAMILIES, ["llama"]))
def test_a_checkpoint_with_borrowed_neurons_is_the_masked_model_with_its_weights(
    family: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    whole = lively(tiny_model("causal", family))
    folder, plan = whole_of(whole, tmp_path / "whole", save_checkpoint)
    done = prune(str(folder), plan, tmp_path / "less", repair=repair_of())
    (cut,) = done["repair"].cuts
    assert cut.error_after < cut.error_before
    assert (cut.borrowed > 0) >= (family in BORROWING)
    stored = load_file(tmp_path / "less" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    parameters = dict(whole.named_parameters())
    with torch.no_grad(), changing(skips(open_module(whole).layers, {1})):
        for name, tensor in stored.items():
            if ".0." in name and not torch.equal(tensor, before[name]):
                parameters[next(n for n in parameters if n.endswith(name))].copy_(tensor)
        expected = whole(IDS, use_cache=False).logits
    less = AutoModelForCausalLM.from_pretrained(tmp_path / "less").eval()
    with torch.no_grad():
        assert torch.equal(less(IDS, use_cache=False).logits, expected)


class Dense:
    """What `borrow` does to a Llama without its second layer, by plain transformers and numpy in float64."""

    def __init__(self, folder: Path, record: RepairRecord) -> None:
        self.whole = AutoModelForCausalLM.from_pretrained(folder).eval()
        text = tokenize_corpus(TEXT, load_tokenizer(resolve(str(folder))), Settings(**READ))
        self.ids = torch.from_numpy(np.concatenate([shard.input_ids for shard in text.shards])).long()
        (self.ridge,) = record.cuts[0].ridges
        layers = self.whole.model.layers
        streams: dict[str, torch.Tensor] = {}

        def keep(name: str, module: Any) -> None:
            module.register_forward_hook(lambda _module, _args, output: streams.update({name: output}))

        keep("normed", layers[0].post_attention_layernorm)
        keep("before", layers[0])
        keep("added", layers[0].mlp)
        keep("after", layers[1])
        with torch.no_grad():
            self.whole(self.ids)
        self.normed = streams["normed"]
        self.wanted = (streams["after"] - streams["before"] + streams["added"]).double()
        lengths = streams["after"].double().norm(dim=-1)
        self.scale = torch.ones_like(lengths)
        self.scale[:, 0] = lengths[:, 1:].mean(1) / lengths[:, 0]

    def rows(self) -> dict[str, torch.Tensor]:
        """Rows of the first layer's neurons, and of the second layer's for the norm of the first."""
        first, second = self.whole.model.layers[:2]
        ratio = second.post_attention_layernorm.weight.double() / first.post_attention_layernorm.weight.double()
        rows = {}
        for name in ("gate_proj", "up_proj"):
            own = first.mlp.get_submodule(name).weight
            borrowed = second.mlp.get_submodule(name).weight.double() * ratio
            rows[name] = torch.cat([own, borrowed.to(own.dtype)]).detach()
        return rows

    def features(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Values of neurons, float64[rows, tokens, neurons]."""
        return (torch.nn.functional.silu(self.normed @ gate.T) * (self.normed @ up.T)).double()

    def fit(self, features: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Weights of least ridged error on the rows that are not held back."""
        fitted = slice(0, ROWS - HELD_BACK_ROWS)
        x = (self.scale[fitted, :, None] * features[fitted]).flatten(0, 1)
        y = (self.scale[fitted, :, None] * self.wanted[fitted]).flatten(0, 1)
        gram = x.T @ x
        penalty = self.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        return start + torch.linalg.solve(gram + penalty, x.T @ (y - x @ start))

    def error(self, features: torch.Tensor, weights: torch.Tensor) -> float:
        """Error of weights on held-back rows."""
        held_back = slice(ROWS - HELD_BACK_ROWS, ROWS)
        missing = self.wanted[held_back] - features[held_back] @ weights
        return float((self.scale[held_back, :, None] * missing).norm())


@pytest.fixture(scope="module")
def dense(
    tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save
) -> tuple[Dense, dict[str, torch.Tensor], RepairRecord]:
    """The dense solution, the weights of the first layer that were written, and the record."""
    parent = tmp_path_factory.mktemp("dense")
    model = lively(llama())
    with torch.no_grad():  # Most of what the second layer does is done by its neurons.
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.mul_(4)
    folder, plan = whole_of(model, parent / "whole", save_checkpoint)
    record = prune(str(folder), plan, parent / "less", repair=repair_of())["repair"]
    stored = load_file(parent / "less" / "model.safetensors")
    prefix = "model.layers.0.mlp."
    written = {}
    for name, tensor in stored.items():
        if name.startswith(prefix):
            written[name.removeprefix(prefix).removesuffix(".weight")] = tensor
    return Dense(folder, record), written, record


def columns_of(written: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> list[int]:
    """The neuron, of the layer's own and those that it could borrow, whose rows stand in each place."""
    columns = []
    for gate, up in zip(written["gate_proj"], written["up_proj"], strict=True):
        is_equal = (rows["gate_proj"] == gate).all(1) & (rows["up_proj"] == up).all(1)
        (column,) = torch.where(is_equal)[0].tolist()
        columns.append(column)
    return columns


def test_written_rows_are_those_of_neurons_for_the_norm_of_their_new_layer(
    dense: tuple[Dense, dict[str, torch.Tensor], RepairRecord],
) -> None:
    solution, written, record = dense
    columns = columns_of(written, solution.rows())
    assert len(set(columns)) == len(columns)
    assert record.cuts[0].borrowed == sum(column >= len(columns) for column in columns)
    assert record.cuts[0].borrowed > 0


def test_own_neurons_that_stay_keep_their_places(
    dense: tuple[Dense, dict[str, torch.Tensor], RepairRecord],
) -> None:
    solution, written, _ = dense
    for place, column in enumerate(columns_of(written, solution.rows())):
        assert column == place or column >= len(written["gate_proj"])


def test_written_weights_are_those_of_a_dense_solution(
    dense: tuple[Dense, dict[str, torch.Tensor], RepairRecord],
) -> None:
    """Of the neurons as they are stored, starting from the weights that the layer's own had."""
    solution, written, _ = dense
    columns = columns_of(written, solution.rows())
    down = solution.whole.model.layers[0].mlp.down_proj.weight.detach().double().T
    start = torch.cat([down, torch.zeros_like(down)])[columns]
    weights = solution.fit(solution.features(written["gate_proj"], written["up_proj"]), start)
    torch.testing.assert_close(written["down_proj"].T.double(), weights, rtol=1e-3, atol=1e-5)


def test_the_error_is_less_than_that_of_the_own_neurons(
    dense: tuple[Dense, dict[str, torch.Tensor], RepairRecord],
) -> None:
    """By the dense solution, which the record's error agrees with."""
    solution, written, record = dense
    features = solution.features(written["gate_proj"], written["up_proj"])
    error = solution.error(features, written["down_proj"].T.double())
    own_rows = [rows[: len(written["gate_proj"])] for rows in solution.rows().values()]
    own = solution.features(*own_rows)
    down = solution.whole.model.layers[0].mlp.down_proj.weight.detach().double().T
    assert error < solution.error(own, solution.fit(own, down))
    before = solution.error(own, down)
    cut = record.cuts[0]
    assert error / before == pytest.approx(cut.error_after / cut.error_before, rel=1e-4)


# Rows for another norm


def source_of(model: Any, folder: Path, save: Save, change: Callable[[Any], None] | None = None) -> HiddenStateSource:
    """Hidden states of a saved model without its second layer, by which neurons are tried.

    ``change`` makes its second layer another one.
    """
    loaded = opened(save(model, folder), dtype="float32")
    if change is not None:
        change(loaded.layers[1].module)
    return HiddenStateSource(loaded, [], {1})


def recipient_of(source: HiddenStateSource, model: Any) -> tuple[Recipient, MlpNeurons]:
    """The first layer as a recipient, and the neurons of the second one."""
    layers = open_module(model).layers

    def read(layer: int, path: str) -> torch.Tensor:
        return layers[layer].module.get_parameter(path).detach()

    recipient = source.neurons(0)
    donor = source.neurons(1)
    assert recipient is not None
    assert donor is not None
    return Recipient(recipient, read), donor


@pytest.mark.parametrize("family", all_of(FAMILIES, ("llama", "gemma3_text", "gpt2", "phi3", "olmo2")))
def test_neurons_have_the_same_values_in_their_new_layer(family: str, tmp_path: Path, save_checkpoint: Save) -> None:
    """With gains of 1 + w, biases of norms, rows of gate and up in one matrix, and no norm before the MLP."""
    model = lively(tiny_model("causal", family))
    source = source_of(model, tmp_path / "whole", save_checkpoint)
    recipient, donor = recipient_of(source, model)
    assert source.have_the_same_values(recipient, donor, recipient.borrowed_from(donor))


def with_another_activation(layer: Any) -> None:
    layer.mlp.act_fn = torch.nn.Tanh()


def with_another_eps(layer: Any) -> None:
    layer.post_attention_layernorm.variance_epsilon = 1.0


def with_another_norm(layer: Any) -> None:
    layer.post_attention_layernorm = torch.nn.LayerNorm(32, bias=False)


@pytest.mark.parametrize("change", [with_another_activation, with_another_eps, with_another_norm])
def test_neurons_that_would_be_others_are_told(
    change: Callable[[Any], None], tmp_path: Path, save_checkpoint: Save
) -> None:
    model = lively(llama())
    source = source_of(model, tmp_path / "whole", save_checkpoint, change)
    recipient, donor = recipient_of(source, model)
    assert not source.have_the_same_values(recipient, donor, recipient.borrowed_from(donor))


def test_a_bias_without_a_place_is_refused(tmp_path: Path, save_checkpoint: Save) -> None:
    """The norms of StableLM have biases, and its linear maps have none."""
    model = lively(tiny_model("causal", "stablelm"))
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.bias.fill_(0.1)
    recipient, donor = recipient_of(source_of(model, tmp_path / "whole", save_checkpoint), model)
    with pytest.raises(NotBorrowed, match=r"its neurons have a bias, for which 'mlp\.gate_proj' has no place"):
        recipient.borrowed_from(donor)


def test_a_channel_with_a_tiny_gain_is_read_with_gain_1(tmp_path: Path, save_checkpoint: Save) -> None:
    """The layer's own rows take the gain, so that its own neurons are the same."""
    model = lively(llama())
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = 1e-9
    source = source_of(model, tmp_path / "whole", save_checkpoint)
    recipient, donor = recipient_of(source, model)
    borrowed = recipient.borrowed_from(donor)
    assert recipient.read("post_attention_layernorm.weight")[3] == 1
    assert source.have_the_same_values(recipient, donor, borrowed)
    own = recipient.borrowed_from(recipient.neurons)
    assert source.have_the_same_values(recipient, recipient.neurons, own)
    torch.testing.assert_close(
        own.rows["mlp.up_proj.weight"].flatten(0, 1), recipient.read("mlp.up_proj.weight"), rtol=1e-6, atol=0
    )


# Notes and records


@pytest.mark.nightly
def test_a_layer_whose_neurons_are_left_out_is_named(tmp_path: Path, save_checkpoint: Save) -> None:
    """Without neurons to borrow, the repair is that of `refit`, to the bit."""
    model = lively(tiny_model("causal", "stablelm"))
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.bias.fill_(0.1)
    folder, plan = whole_of(model, tmp_path / "whole", save_checkpoint)
    done = prune(str(folder), plan, tmp_path / "less", repair=repair_of())
    assert "borrows no neurons of layer 1: its neurons have a bias" in done["notes"][0]
    prune(str(folder), plan, tmp_path / "refit", repair=repair_of("refit"))
    written = load_file(tmp_path / "less" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "refit" / "model.safetensors").items():
        assert torch.equal(written[name], tensor)


def test_the_record_says_how_many_neurons_are_borrowed(
    dense: tuple[Dense, dict[str, torch.Tensor], RepairRecord],
) -> None:
    _, _, record = dense
    (cut,) = record.cuts
    assert cut.describe().endswith(f"; {cut.borrowed} of its neurons are borrowed from removed layers")


def test_the_card_names_layers_with_borrowed_neurons(
    tiny_llama: Path, dense: tuple[Dense, dict[str, torch.Tensor], RepairRecord]
) -> None:
    _, _, record = dense
    plan = Plan(model=str(tiny_llama), num_layers=3, layers="layers", drop=(1,), why={})
    card = model_card(resolve(str(tiny_llama)), plan, repair=record)
    assert "Neurons of removed layers took the place of some in 0." in card


@pytest.mark.parametrize(
    ("dense_layers", "drop", "told"),
    [
        ([0, 1], 1, None),
        *nightly(
            ([0, 1], 2, "Layer 1 (layers.1) borrows no neurons of layer 2: its MLP has none with rows of their own.")
        ),
        ([1, 2], 1, "Layer 0 (layers.0) borrows no neurons: its MLP has none with rows of their own."),
    ],
)
def test_in_a_mixture_dense_layers_borrow_from_dense_ones(
    dense_layers: list[int], drop: int, told: str | None, tmp_path: Path, save_checkpoint: Save
) -> None:
    """The others are repaired as by `refit`."""
    whole = lively(tiny_model("causal", "qwen3_moe", mlp_only_layers=dense_layers))
    folder, plan = whole_of(whole, tmp_path / "whole", save_checkpoint, drop)
    done = prune(str(folder), plan, tmp_path / "less", repair=repair_of())
    notes = [note for note in done["notes"] if "borrows" in note]
    assert notes == ([] if told is None else [told])
    assert done["repair"].cuts[0].error_after < done["repair"].cuts[0].error_before


# Memory


@pytest.mark.nightly
def test_neurons_that_do_not_fit_at_once_are_compared_in_pieces(
    tmp_path: Path, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two removed layers with 48 neurons each, 40 at a time beside the layer's own: no worse than without them."""
    monkeypatch.setattr("avss_dist.pruning.repair.borrow.spare_columns", lambda neurons, outputs: 40)
    folder, plan = whole_of(lively(llama(num_hidden_layers=4)), tmp_path / "whole", save_checkpoint, 1, 2)
    pieces: list[int] = []
    visit = HiddenStateSource.visit

    def counted(*args: Any, banks: Any = (), **kwargs: Any) -> None:
        pieces.append(sum(bank.number for bank in banks))
        visit(*args, banks=banks, **kwargs)

    monkeypatch.setattr(HiddenStateSource, "visit", counted)
    done = prune(str(folder), plan, tmp_path / "less", repair=repair_of())
    assert pieces == [40, 40, 40, 36]
    assert number_of_pieces(2 * 48, 40) == len(pieces)
    (cut,) = done["repair"].cuts
    assert cut.borrowed > 0
    refit = prune(str(folder), plan, tmp_path / "refit", repair=repair_of("refit"))["repair"].cuts[0]
    assert cut.error_after < refit.error_after


def test_too_little_memory_is_refused_with_a_repair_that_takes_less(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avss_dist.pruning.repair.fitter.free_memory", lambda device: 1000)
    plan = Plan(model=str(tiny_llama), num_layers=3, layers="layers", drop=(1,), why={})
    with pytest.raises(PlanError, match="for the products of 1 x 96 inputs") as refused:
        prune(str(tiny_llama), plan, tmp_path / "less", repair=repair_of())
    assert "(refit, map, channel)" in str(refused.value.hint)


# Partitions


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_streaming_writes_the_same_bytes(family: str, tmp_path: Path, save_checkpoint: Save) -> None:
    whole = lively(tiny_model("causal", family))
    folder, plan = whole_of(whole, tmp_path / "whole", save_checkpoint, 1)
    written = []
    with one_thread():
        for partition in ("single", "streaming"):
            execution = Execution(partition=partition)
            done = prune(str(folder), plan, tmp_path / partition, repair=repair_of(), execution=execution)
            assert any(cut.borrowed for cut in done["repair"].cuts)
            written.append(files(tmp_path / partition))
    assert written[0] == written[1]


def test_quantized_rows_are_refused_before_a_text_is_seen(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the down projection of the layer before a cut is in plain numbers."""
    folder = block_fp8(tiny_llama, tmp_path / "fp8", skipped=["model.layers.0.mlp.down_proj", "lm_head"])
    monkeypatch.setattr(HiddenStateSource, "visit", lambda *_, **__: pytest.fail("text was read"))
    plan = Plan(model=str(folder), num_layers=3, layers="layers", drop=(1,), why={})
    with pytest.raises(PlanError, match=r"'mlp.gate_proj.weight' of layer 1 as float8_e4m3fn, quantized"):
        prune(str(folder), plan, tmp_path / "less", repair=repair_of(dequantize=True))
