"""Rounded weights: predictions against autograd, losses against replaced weights, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.causal_lm import opened, random_shard
from support.checkpoints import llama, one_thread
from torch.nn.functional import cross_entropy

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import Intervention, RoundedPlace, Rounding, parse_rounded, round_place
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.number_formats import FORMATS
from avss_dist.models.predictions import predicted
from avss_dist.models.structure.head import draw_labels, uniform_numbers
from avss_dist.tasks import map_damage
from avss_dist.tasks.map_damage import RoundedLosses, RoundingDamage
from avss_dist.tasks.task import MetricRow
from avss_dist.tasks.text_loss import TextLoss

Save = Callable[[Any, Path], Path]
RowsByPlace = dict[tuple[str, str | None], MetricRow]
Seen = tuple[LanguageModel, RowsByPlace, list[Batch]]
DRAWS = 3
SEED = 5


@pytest.fixture(scope="module", autouse=True)
def same_bytes() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Save) -> Path:
    """Maps of 32 and 64 inputs, which formats with groups can take."""
    model = llama(intermediate_size=64, initializer_range=0.2)
    return save_checkpoint(model, tmp_path_factory.mktemp("rounding") / "grouped")


def by_place(rows: list[MetricRow]) -> RowsByPlace:
    return {(row.metric, row.rounding): row for row in rows}


def maps_of(model: LanguageModel) -> list[tuple[int, str, Any]]:
    maps = []
    for layer in model.layers:
        maps += [(layer.index, projection.path, projection.module) for projection in layer.projections]
    return maps


@pytest.fixture(scope="module", params=[0, 4], ids=["every token", "skipped tokens"])
def seen(request: pytest.FixtureRequest, grouped: Path) -> Seen:
    """Predictions for rows in batches of two, and the same rows one by one."""
    model = opened(grouped, dtype="float32")
    shard = random_shard(skip=request.param)
    measure = RoundingDamage(shard=shard, formats=("int4", "q4_0"), draws=DRAWS, seed=SEED)
    return model, by_place(measure(model)), list(shard.batches(1))


def products(model: LanguageModel, batch: Batch, name: str) -> dict[tuple[int, str], torch.Tensor]:
    """<g, (Q(W) - W) x> of every map, [1 + draws, tokens], by autograd through an added change that is zero."""
    changes: dict[tuple[int, str], torch.Tensor] = {}
    zeros: dict[tuple[int, str], torch.Tensor] = {}

    def add(key: tuple[int, str], module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        weight = module.weight.detach()
        changes[key] = (args[0].detach() @ (FORMATS[name].round(weight) - weight).T)[0]
        zeros[key] = torch.zeros_like(output, requires_grad=True)
        return output + zeros[key]

    handles = [
        module.register_forward_hook(lambda m, a, o, key=(layer, path): add(key, m, a, o))
        for layer, path, module in maps_of(model)
    ]
    ids = torch.from_numpy(batch.input_ids).long()
    with torch.enable_grad():
        logits = model.module(input_ids=ids, use_cache=False).logits[0, :-1]
    for handle in handles:
        handle.remove()
    chosen = torch.from_numpy(predicted(batch)[0])
    labels = ids[0, 1:][chosen]
    uniform = torch.from_numpy(uniform_numbers(batch, DRAWS, SEED)[:, predicted(batch)])
    drawn = draw_labels(logits.detach()[chosen].float(), uniform)
    products_by_map: dict[tuple[int, str], list[torch.Tensor]] = {key: [] for key in zeros}
    for targets in (labels, *drawn):
        loss = cross_entropy(logits[chosen].float(), targets, reduction="sum")
        gradients = torch.autograd.grad(loss, list(zeros.values()), retain_graph=True)
        for key, gradient in zip(zeros, gradients, strict=True):
            products_by_map[key].append((gradient[0] * changes[key]).sum(-1))
    return {key: torch.stack(values) for key, values in products_by_map.items()}


@pytest.mark.parametrize("name", ["int4", "q4_0"])
def test_orders_are_those_of_autograd_token_by_token(name: str, seen: Seen) -> None:
    model, rows, batches = seen
    for row, batch in enumerate(batches):
        by_map = products(model, batch, name)
        for (layer, path), values in by_map.items():
            key = str(RoundedPlace(layer=layer, path=path, format=name))
            first = values[0].sum().item()
            second = values[1:].square().sum().item() / (2 * DRAWS)
            assert rows["first_order", key].samples[row] == pytest.approx(first, rel=1e-3, abs=1e-5)
            assert rows["second_order", key].samples[row] == pytest.approx(second, rel=1e-3)
            assert rows["predicted", key].samples[row] == pytest.approx(first + second, rel=1e-3, abs=1e-5)
        for layer in range(3):
            of_layer = torch.stack([values for (at, _), values in by_map.items() if at == layer])
            assert len(of_layer) == 7
            key = f"{name}@{layer}"
            first = of_layer[:, 0].sum().item()
            apart = of_layer[:, 1:].square().sum().item() / (2 * DRAWS)
            assert rows["first_order", key].samples[row] == pytest.approx(first, rel=1e-3, abs=1e-5)
            assert rows["second_order", key].samples[row] == pytest.approx(apart, rel=1e-3)
    weights = [predicted(batch).sum() for batch in batches]
    for (metric, _), measured in rows.items():
        if "order" in metric:
            assert measured.weights.tolist() == weights


def test_errors_of_outputs_and_sizes(seen: Seen) -> None:
    model, rows, batches = seen
    module = model.layers[2].module.mlp.down_proj
    weight = module.weight.detach()
    difference = FORMATS["q4_0"].round(weight) - weight
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, args, _o: inputs.append(args[0][0]))
    for batch in batches:
        model.losses(batch)
    handle.remove()
    key = "q4_0@2.mlp.down_proj"
    for row, (x, batch) in enumerate(zip(inputs, batches, strict=True)):
        error = (x @ difference.T).square().sum(-1)
        size = (x @ weight.T).square().sum(-1)
        relative = error / size
        observed = relative[torch.from_numpy(batch.observed[0])]
        assert rows["output_error", key].samples[row] == pytest.approx(observed.sum().item(), rel=1e-3)
    assert rows["num_weights", key].samples == [weight.numel()]
    bits = rows["bits_per_weight", key]
    assert bits.samples / bits.weights == 4.5


@pytest.mark.nightly
def test_changes_that_find_no_room_are_computed_again(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(grouped, dtype="float32")
    measure = RoundingDamage(shard=random_shard(), formats=("int4", "nvfp4"))
    expected = measure(model)
    calls: list[Any] = []
    own = map_damage._output_change

    def counted(*args: Any) -> Any:
        calls.append(args)
        return own(*args)

    monkeypatch.setattr(map_damage, "_output_change", counted)
    for room, times in ((2 << 30, 1), (0, 3)):
        calls.clear()
        monkeypatch.setattr(map_damage, "MAX_KEPT_BYTES", room)
        rows = measure(model)
        assert len(calls) == times * 3 * 2 * 21  # passes, batches, formats, maps
        for row, expected_row in zip(rows, expected, strict=True):
            assert np.array_equal(row.samples, expected_row.samples)


def test_losses_are_those_of_replaced_weights(grouped: Path) -> None:
    model = opened(grouped, dtype="float32")
    shard = random_shard()
    whole = TextLoss(shard)(model)[0].samples
    original = {name: value.clone() for name, value in model.module.state_dict().items()}
    rows = by_place(RoundedLosses(shard, "int4-g32")(model))
    assert np.array_equal(rows["loss", None].samples, whole)
    assert len(rows) == 1 + 3
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, original[name])
    for (_, key), row in rows.items():
        if key is None:
            continue
        place = parse_rounded(key)
        assert place is not None
        assert place.path is None
        with torch.no_grad():
            for layer, _, module in maps_of(model):
                if layer == place.layer:
                    module.weight.copy_(FORMATS["int4-g32"].round(module.weight))
            assert np.array_equal(TextLoss(shard)(model)[0].samples, row.samples)
            model.module.load_state_dict(original)
        assert not np.array_equal(row.samples, whole)


def test_half_precision_weights_are_rounded_to_what_they_can_hold(grouped: Path) -> None:
    model = opened(grouped, dtype="bfloat16")
    weight = model.layers[0].module.mlp.up_proj.weight
    expected = FORMATS["int4"].round(weight).bfloat16()
    with model.applying(Intervention(rounding=round_place("int4", 0, "mlp.up_proj"))):
        assert torch.equal(weight, expected)
        assert weight.dtype == torch.bfloat16


def test_a_repaired_weight_is_rounded_in_memory_or_while_its_map_runs(grouped: Path) -> None:
    model = opened(grouped, dtype="float32")
    (batch, *_) = random_shard().batches(2)
    path = "mlp.down_proj.weight"
    patch = {(1, path): model.value(1, path) * 2 + 0.01}
    losses = []
    for model.weights_stay in (True, False):
        with model.patched(patch), model.applying(Intervention(rounding=round_place("int4", 1, "mlp.down_proj"))):
            losses.append(model.losses(batch))
    with model.patched(patch):
        assert not np.array_equal(losses[0], model.losses(batch))
    assert np.array_equal(*losses)


def test_weights_that_were_rounded_before_are_noted(grouped: Path) -> None:
    model = opened(grouped, dtype="bfloat16")
    RoundedLosses(random_shard(), "int4")(model)
    assert not model.notes
    weight = model.layers[0].projections[0].module.weight
    with torch.no_grad():
        weight.copy_(FORMATS["q4_0"].round(weight))  # type: ignore[operator, arg-type]
    RoundedLosses(random_shard(), "int4")(model)
    (note,) = model.notes
    assert note.startswith("1 of 21 linear maps have at most 16 different values among 32 neighbouring weights")


def test_a_rounding_of_several_places(grouped: Path) -> None:
    """The format of a map overrides that of its layer, in any order."""
    model = opened(grouped, dtype="float32")
    layer = RoundedPlace(layer=1, format="int4")
    path = RoundedPlace(layer=1, path="mlp.up_proj", format="q8_0")
    both = Rounding((layer, path))
    assert both.key == Rounding((path, layer)).key
    assert len(both.key) == 64
    assert Rounding((layer,)).key == "int4@1"
    assert Rounding((path,)).key == "q8_0@1.mlp.up_proj"
    assert parse_rounded(both.key) is None
    assert parse_rounded(str(layer)) == layer
    assert parse_rounded(str(path)) == path
    mlp = model.layers[1].module.mlp
    wanted_up = FORMATS["q8_0"].round(mlp.up_proj.weight)
    wanted_down = FORMATS["int4"].round(mlp.down_proj.weight)
    with model.applying(Intervention(rounding=both)):
        assert torch.equal(mlp.up_proj.weight, wanted_up)
        assert torch.equal(mlp.down_proj.weight, wanted_down)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (RoundedPlace(layer=3, format="int4"), "There is no layer 3"),
        (RoundedPlace(layer=0, path="mlp.up", format="int4"), "Layer 0 has no linear map 'mlp.up'"),
        (RoundedPlace(layer=0, format="tq2_0"), "tq2_0 cannot take '.*' of layer 0: its .* not a multiple of 256"),
    ],
)
def test_what_does_not_fit_is_refused(place: RoundedPlace, message: str, grouped: Path) -> None:
    model = opened(grouped, dtype="float32")
    with pytest.raises(ModelError, match=message), model.applying(Intervention(rounding=Rounding((place,)))):
        pass


def test_a_format_that_no_map_takes_names_others(tiny_llama: Path) -> None:
    model = opened(tiny_llama, dtype="float32")
    for measure in (RoundedLosses(random_shard(), "tq1_0"), RoundingDamage(shard=random_shard(), formats=("tq1_0",))):
        with pytest.raises(ModelError, match="tq1_0 cannot take") as caught:
            measure(model)
        assert "int4, " in str(caught.value.hint)
        assert "tq1_0" not in str(caught.value.hint)
