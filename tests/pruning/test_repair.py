"""Repair: what is fitted at a cut and folded into weights, on families, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import checkpoint_at, host_limit, llama, one_thread, weights_in
from support.command_line import files, mistake, succeed
from support.corpora import rows_of, tokenized
from support.families import lively, tiny_model
from support.json_files import read_json, write_json
from support.planning import fit, prune
from support.quantized import block_fp8
from support.tiers import all_of
from transformers import AutoModelForCausalLM

import avss_dist
from avss_dist import evaluate
from avss_dist.core.errors import AvssError, ConfigError, CorpusError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.change.skipping import skips
from avss_dist.models.checkpoint.loading import open_module
from avss_dist.models.checkpoint.size import footprint
from avss_dist.models.forward import changing
from avss_dist.partition.execution import Execution
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import model_card
from avss_dist.pruning.repair.cuts import RepairCut, find_cuts
from avss_dist.pruning.repair.fits import NormalEquations, fit_ridge, fit_steps, fold
from avss_dist.pruning.repair.hidden_states import MEMORY_SHARE, HiddenStateSource
from avss_dist.pruning.repair.projection import OutputProjection
from avss_dist.pruning.repair.registry import (
    DEFAULT_REPAIR,
    FILE,
    NO_REPAIR,
    REPAIRS,
    RepairedCut,
    RepairRecord,
    read_repairs,
    searched_repair,
    split_weight,
)
from avss_dist.pruning.repair.repair import Repair

pytestmark = pytest.mark.usefixtures("equal_skeletons")
Save = Callable[[Any, Path], Path]
TEXT = "builtin:pydoc"
READ = {"max_sequences": 60, "sequence_length": 48, "batch_size": 8, "device": "cpu"}
IDS = torch.arange(16).reshape(2, 8) + 3
FAMILIES = (
    *("llama", "gemma3_text", "qwen3", "gpt2", "opt", "phi3", "olmo2", "granite", "gpt_neox", "cohere2"),
    *("exaone4", "gemma2", "glm4", "falcon"),
)
ENDS = ("llama", "gemma3_text", "gpt2", "opt", "granite", "cohere2")
"""One of each way to write the end of a layer: plain, a norm after it, `Conv1D`, a bias, a multiplier, one sum."""
CASES = [*product(FAMILIES, ("refit",)), *product(ENDS, ("map",)), ("llama", "channel"), ("gemma3_text", "channel")]
DEFAULT_CASES = [("gemma3_text", "refit"), ("gpt2", "map")]
TIED = ("gemma3_text", "gpt2", "opt", "cohere2", "gemma2", "falcon")


def repair_of(by: str = "map", *corpora: str, **options: Any) -> Repair:
    settings = Settings(**READ | options)
    return Repair(by=by, corpora=corpora or (TEXT,), settings=settings)


def tokens_of(folder: Path, **options: Any) -> torch.Tensor:
    """The rows of the text that repairs are fitted on, in the tokens of a checkpoint."""
    text = tokenized(folder, TEXT, **READ, **options)
    return torch.from_numpy(rows_of(text)).long()


def only_cut(done: dict[str, Any]) -> RepairedCut:
    """The cut of a checkpoint that was pruned and repaired at one place."""
    (cut,) = done["repair"].cuts
    return cut


def plan_of(model: object, number: int, *drop: int) -> Plan:
    """A plan without some layers of a Llama of so many."""
    return Plan(model=str(model), num_layers=number, layers="layers", drop=drop)


def whole_of(model: Any, folder: Path, save: Save) -> tuple[Path, Plan]:
    """A saved model, and a plan without its second layer."""
    layers = open_module(model).layers
    path = layers[0].name.rpartition(".")[0]
    plan = Plan(model=str(folder), num_layers=len(layers), layers=path, drop=(1,))
    return save(model, folder), plan


@pytest.fixture
def whole_llama(tmp_path: Path, save_checkpoint: Save) -> tuple[Path, Plan]:
    """A saved Llama of three layers, and a plan without its second layer."""
    return whole_of(lively(llama()), tmp_path / "whole", save_checkpoint)


def has_tied_weights(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def next_tokens(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The most likely token after each row of ids."""
    logits = model(ids, use_cache=False).logits[:, -1:]
    return logits.argmax(-1)


# Families


@pytest.mark.parametrize(("family", "by"), all_of(CASES, DEFAULT_CASES))
def test_a_repaired_checkpoint_is_the_model_repaired_in_place(
    family: str, by: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    """Reloaded: the logits are those of the original with the layer skipped and the same weights changed.

    With the cache it generates what that model predicts token by token; tied weights stay tied.
    """
    whole = lively(tiny_model("causal", family))
    folder, plan = whole_of(whole, tmp_path / "whole", save_checkpoint)
    less_folder = tmp_path / "less"
    done = prune(folder, plan, less_folder, repair=repair_of(by))
    cut = only_cut(done)
    assert cut.after == 0
    assert cut.removed == (1,)
    assert cut.error_after < cut.error_before
    assert cut.ridges[0] is not None
    less = AutoModelForCausalLM.from_pretrained(less_folder).eval()
    stored = weights_in(less_folder)
    before = weights_in(folder)
    changed = []
    for name, tensor in stored.items():
        is_later = ".1." in name or ".2." in name
        if not is_later and not torch.equal(tensor, before[name]):
            changed.append(name)
    assert changed
    for tensor_name in changed:
        assert ".0." in tensor_name
    assert ("lm_head.weight" in stored) == ("lm_head.weight" in before)
    without_second = skips(open_module(whole).layers, {1})
    with torch.no_grad(), changing(without_second):
        unrepaired = whole(IDS, use_cache=False).logits
        for path, parameter in whole.named_parameters():
            for name in changed:
                if path.endswith(name):
                    parameter.copy_(stored[name])
        expected = whole(IDS, use_cache=False).logits
        ids = IDS
        for _ in range(3 if by == "refit" else 0):
            ids = torch.cat([ids, next_tokens(whole, ids)], dim=1)
    with torch.no_grad():
        repaired = less(IDS, use_cache=False).logits
    assert torch.equal(repaired, expected)
    assert not torch.equal(repaired, unrepaired)
    if by == "refit":
        generated = less.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert less.generation_config.use_cache
        assert torch.equal(generated, ids)
    assert has_tied_weights(whole) == (family in TIED)
    assert has_tied_weights(less) == (family in TIED)


# What is fitted, and folded

DATA = np.random.default_rng(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(DATA.normal(size=shape))


def projection(norm: str | None = None, factor: float = 1.0) -> OutputProjection:
    layer = open_module(llama()).layers[0]
    return OutputProjection(layer, "mlp.down_proj", norm, factor)


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("by", ["map", "refit"])
def test_an_exact_map_is_recovered(by: str, factor: float) -> None:
    """Where what is missing is a linear map of what the MLP adds, the folded weights add it."""
    hidden = normal(200, 9)
    linear = normal(9, 6)
    bias = normal(6)
    missing = normal(6, 6)
    added = hidden @ linear + (bias if by == "map" else 0)
    (step,) = fit_steps(REPAIRS[by], projection(factor=factor))
    read = factor * (hidden if by == "refit" else added)
    sums = NormalEquations.from_tokens(read, factor * added @ missing)
    fitted = fit_ridge(sums, sums, "full", [1e-12])
    weights = {"linear": linear}
    if by == "map":
        weights["bias"] = bias
    covariance = sums.gram / sums.count
    new = fold(step, weights, fitted.weights, covariance, factor)
    again = hidden @ new["linear"] + new.get("bias", 0)
    torch.testing.assert_close(again, added + added @ missing)


@pytest.mark.parametrize("by", ["map", "refit"])
def test_behind_a_norm_every_token_gets_its_direction(by: str) -> None:
    """The new gain and weights give each token the direction that is wanted, and on average its size."""
    hidden = normal(400, 9)
    linear = normal(9, 6)
    gain = normal(6).abs() + 0.5
    factor = 0.5
    first, second = fit_steps(REPAIRS[by], projection("post_norm", factor))
    assert first == REPAIRS[by]
    assert second == REPAIRS["channel"]

    def size(output: torch.Tensor) -> torch.Tensor:
        return output.square().mean(-1, keepdim=True).sqrt()

    def norm(output: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return gain * output / size(output)

    output = hidden @ linear
    normed = norm(output, gain)
    read = factor * normed
    if by == "refit":
        read = factor * (hidden / size(output))
    fitted = 0.3 * normal(read.shape[1], 6)
    wanted = normed + read @ fitted / factor
    covariance = read.T @ read / len(read)
    new = fold(first, {"linear": linear, "gain": gain}, fitted, covariance, factor)
    given = norm(hidden @ new["linear"], new["gain"])
    cosines = torch.nn.functional.cosine_similarity(given, wanted)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    relative = wanted / new["gain"]
    assert float(relative.square().mean()) == pytest.approx(1.0)


def places_of(cuts: Iterable[RepairCut | RepairedCut]) -> list[int]:
    """The layers behind which cuts are."""
    return [cut.after for cut in cuts]


def test_cuts_are_runs_of_removed_layers_and_on_request_all_layers_behind_the_first() -> None:
    """Each with the run of removed layers after it; before the first cut there is nothing to give back."""
    cuts = find_cuts(plan_of("m", 12, 0, 1, 4, 6, 7, 11))
    assert {cut.after: cut.removed for cut in cuts} == {3: (4,), 5: (6, 7), 10: (11,)}
    plan = plan_of("m", 10, 2, 5, 6)
    cuts = find_cuts(plan, every_layer=True)
    assert {cut.after: cut.removed for cut in cuts} == {1: (2,), 3: (), 4: (5, 6), 7: (), 8: (), 9: ()}
    assert [cut.last for cut in cuts] == [2, 3, 6, 7, 8, 9]
    first = replace(plan, drop=(0, 1, 5))
    cuts = find_cuts(first, every_layer=True)
    assert places_of(cuts) == [2, 3, 4, 6, 7, 8, 9]


@pytest.mark.nightly
@pytest.mark.parametrize(("drop", "by", "places"), [((1,), "refit", [0, 2, 3, 4]), ((0, 1), None, [2, 3, 4])])
def test_what_is_still_missing_is_given_back_by_later_layers(
    drop: tuple[int, ...], by: str | None, places: list[int], tmp_path: Path, save_checkpoint: Save
) -> None:
    """The last layer's stream is nearer to the whole model's than after a repair of the cut alone, on other text.

    Before the first layers there is no cut, and the pruned model is what it is compared with.
    """
    whole = lively(llama(num_hidden_layers=5))
    folder = save_checkpoint(whole, tmp_path / "whole")
    ids = tokens_of(folder, skip_sequences=60)
    plan = plan_of(folder, 5, *drop)

    def error(out: Path) -> float:
        less = AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            difference = whole(ids).logits - less(ids).logits
        return float(difference.norm())

    prune(folder, plan, tmp_path / "cut", repair=repair_of(by) if by else None)
    done = prune(folder, plan, tmp_path / "all", repair=repair_of("refit_all"))
    assert error(tmp_path / "all") < 0.98 * error(tmp_path / "cut")
    for note in done["notes"]:
        assert "not given back" not in note
    (record,) = read_repairs(tmp_path / "all")
    assert places_of(record.cuts) == places
    assert "Repaired after 2: error" in "\n".join(record.describe())


@pytest.mark.nightly
def test_each_cut_sees_the_repairs_before_it(tmp_path: Path, save_checkpoint: Save) -> None:
    """The errors of the second cut are those of plain transformers with the first repair alone, and with both."""
    whole = lively(llama(num_hidden_layers=6))
    folder = save_checkpoint(whole, tmp_path / "whole")
    drops = plan_of(folder, 6, 1, 4)
    less = tmp_path / "less"
    done = prune(folder, drops, less, repair=repair_of("refit"))
    _, second = done["repair"].cuts
    ids = tokens_of(folder)[-6:]  # a tenth of 60 rows
    both = AutoModelForCausalLM.from_pretrained(less)
    first = AutoModelForCausalLM.from_pretrained(less)
    unrepaired = whole.model.layers[3].mlp.down_proj.weight.data
    first.model.layers[2].mlp.down_proj.weight.data = unrepaired
    with torch.no_grad():
        wanted = whole(ids, output_hidden_states=True).hidden_states[5]
        before = first(ids, output_hidden_states=True).hidden_states[3]
        after = both(ids, output_hidden_states=True).hidden_states[3]
    lengths = wanted.norm(dim=-1)
    later_length = lengths[:, 1:].mean(1)
    scale = torch.ones_like(lengths)
    scale[:, 0] = later_length / lengths[:, 0]

    def relative_error(stream: torch.Tensor) -> float:
        missing = scale * (wanted - stream).norm(dim=-1)
        size = (scale * lengths).norm()
        return float(missing.norm() / size)

    assert second.error_before == pytest.approx(relative_error(before), rel=1e-4)
    assert second.error_after == pytest.approx(relative_error(after), rel=1e-4)


@pytest.mark.nightly
def test_passes_that_begin_at_the_last_cut_change_nothing(
    tmp_path: Path, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for the streams of all batches, of some, or of none: the same weights to the bit."""
    folder = save_checkpoint(lively(llama(num_hidden_layers=8)), tmp_path / "whole")
    plan = plan_of(folder, 8, 1, 3, 6, 7)
    batch_bytes = 8 * 48 * 32 * 4
    rooms = {"all": 1 << 30, "some": 2 * 3 * MEMORY_SHARE * batch_bytes, "none": 0}  # some: three of each model
    written = []
    for name, room in rooms.items():
        monkeypatch.setattr("avss_dist.pruning.repair.hidden_states.available_memory", lambda room=room: room)
        prune(folder, plan, tmp_path / name, repair=repair_of("refit_all"))
        written.append(weights_in(tmp_path / name))
    for others in written[1:]:
        for path, tensor in written[0].items():
            assert torch.equal(tensor, others[path])


def assert_streaming_writes_the_same_bytes(folder: Path, plan: Plan, by: str, parent: Path) -> RepairRecord:
    """With room for one layer and for no hidden state; and the comparison of both models by streaming too."""
    size = footprint(checkpoint_at(folder), Settings(dtype="float32"))
    two_layers = 2 * (max(size.layer_bytes) + 512)
    room = size.weight_bytes - sum(size.layer_bytes) + two_layers
    limit = host_limit(folder, room, dtype="float32")
    streamed = Execution(partition="streaming", max_memory={"cpu": limit})
    single = Execution(partition="single")
    streamed_folder = parent / "streamed"
    whole_in_memory = parent / "whole-in-memory"
    with one_thread():
        in_memory = prune(
            folder,
            plan,
            whole_in_memory,
            repair=repair_of(by),
            execution=single,
        )
        by_streaming = prune(folder, plan, streamed_folder, repair=repair_of(by), execution=streamed)
    assert in_memory["repair"] == by_streaming["repair"]
    assert by_streaming["difference"] is not None
    assert by_streaming["difference"] <= 1e-5
    assert files(whole_in_memory) == files(streamed_folder)
    record: RepairRecord = in_memory["repair"]
    return record


@pytest.mark.nightly
def test_streaming_writes_the_same_bytes(tmp_path: Path, save_checkpoint: Save) -> None:
    model = lively(llama(num_hidden_layers=6))
    folder, plan = whole_of(model, tmp_path / "whole", save_checkpoint)
    plan = replace(plan, num_layers=6, drop=(2, 4))
    record = assert_streaming_writes_the_same_bytes(folder, plan, "refit_all", tmp_path)
    assert len(record.cuts) == 3


def test_the_ends(tmp_path: Path, save_checkpoint: Save) -> None:
    """The last layers are given back before the final norm; before the first layer nothing can give anything back."""
    model = lively(llama(num_hidden_layers=5))
    folder = save_checkpoint(model, tmp_path / "whole")
    plan = plan_of(folder, 5, 0, 1, 3, 4)
    done = prune(folder, plan, tmp_path / "less", repair=repair_of("refit"))
    (cut,) = done["repair"].cuts
    assert cut.after == 2
    assert cut.removed == (3, 4)
    assert cut.error_after < cut.error_before
    assert done["notes"] == ["Nothing stands before layers 0-1: what they did is not given back."]
    first = plan_of(folder, 5, 0, 1)
    with pytest.raises(PlanError, match="Layers 0-1 are the first"):
        prune(folder, first, tmp_path / "first", repair=repair_of())


@pytest.mark.nightly
def test_tokens_that_are_padding_take_no_part(tmp_path: Path, whole_llama: tuple[Path, Plan]) -> None:
    """Rows of one document each, in batches of any size: the same repair."""
    folder, plan = whole_llama
    cuts = []
    for batch_size in (1, 8):
        repair = repair_of("map", layout="padded", batch_size=batch_size)
        (cut,) = fit(folder, plan, tmp_path / "less", repair).record.cuts
        cuts.append(cut)
    row_by_row, in_batches = cuts
    assert row_by_row.ridges == in_batches.ridges
    assert row_by_row.error_after == pytest.approx(in_batches.error_after, rel=1e-4)


def test_the_checkpoint_keeps_its_dtype(tmp_path: Path, save_checkpoint: Save) -> None:
    model = lively(llama()).to(torch.bfloat16)
    folder, plan = whole_of(model, tmp_path / "whole", save_checkpoint)
    less = tmp_path / "less"
    done = prune(folder, plan, less, repair=repair_of("refit", dtype="float32"))
    for tensor in weights_in(less).values():
        assert tensor.dtype == torch.bfloat16
    cut = only_cut(done)
    assert cut.error_after < cut.error_before


@pytest.mark.nightly
def test_weights_in_several_files(tmp_path: Path, save_checkpoint: Save) -> None:
    """The same tensors as in one file, each in the file that it was in."""
    model = lively(llama())
    folder, plan = whole_of(model, tmp_path / "whole", save_checkpoint)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "model.safetensors").unlink()
    model.save_pretrained(cut, max_shard_size="20KB")
    repair = repair_of("refit")
    less = tmp_path / "less-whole"
    less_cut = tmp_path / "less-cut"
    prune(folder, plan, less, repair=repair)
    prune(cut, plan, less_cut, repair=repair)
    in_one_file = weights_in(less)
    several = {file.name: load_file(file) for file in less_cut.glob("*.safetensors")}
    index = read_json(less_cut / "model.safetensors.index.json")
    files_of_weights = index["weight_map"]
    assert len(several) > 2
    assert set(files_of_weights) == set(in_one_file)
    for path, file in files_of_weights.items():
        assert torch.equal(several[file][path], in_one_file[path])


# Refusals


@pytest.mark.parametrize(
    ("kind", "family", "told"),
    [
        ("causal", "mamba", "has no MLP that ends in one linear map"),
        ("causal", "openai-gpt", "does not simply add what its MLP gives"),  # which is normalized after the sum
    ],
)
def test_families_that_are_refused(kind: str, family: str, told: str, tmp_path: Path, save_checkpoint: Save) -> None:
    model = lively(tiny_model(kind, family))
    folder, plan = whole_of(model, tmp_path / "whole", save_checkpoint)
    less = tmp_path / "less"
    with pytest.raises(PlanError, match=told):
        prune(folder, plan, less, repair=repair_of())
    assert not less.exists()
    assert not list(tmp_path.glob(".*"))


def test_too_little_text(tiny_llama: Path, tmp_path: Path) -> None:
    """What is needed and what is given: four tokens for each unknown of an output."""
    few = {"max_sequences": 5, "sequence_length": 32}
    less = tmp_path / "less"
    with pytest.raises(CorpusError, match="refit of this model needs at least 192 tokens to fit to, not 124"):
        prune(tiny_llama, PLAN, less, repair=repair_of("refit", **few))
    with pytest.raises(CorpusError, match="map of this model needs at least 128 tokens to fit to, not 124"):
        prune(tiny_llama, PLAN, less, repair=repair_of("map", **few))
    with pytest.raises(CorpusError, match="has no token to fit to"):
        prune(tiny_llama, PLAN, less, repair=repair_of("channel", max_sequences=1))
    with pytest.raises(ConfigError, match="`corpora` must not be empty"):
        Repair(corpora=())


# The record


def error_of(record: RepairRecord) -> float:
    """The error of a repair at its only cut."""
    (cut,) = record.cuts
    return cut.error_after


@pytest.mark.nightly
def test_every_text_counts_alike_or_by_its_weight(tiny_llama: Path, tmp_path: Path) -> None:
    """A text given twice changes nothing; beside another, it counts as with twice the weight. The record says it."""
    other = tmp_path / "other.txt"
    other.write_text("words of another kind, and again other words " * 400)

    def fitted_on(*corpora: str) -> RepairRecord:
        """The record of a repair that is fitted on texts, which it names without their weights."""
        record = fit(tiny_llama, PLAN, tmp_path / "less", repair_of("map", *corpora)).record
        named = [text.corpus for text in record.texts]
        assert named == [corpus.removesuffix("=2") for corpus in corpora]
        return record

    once = error_of(fitted_on(TEXT))
    assert error_of(fitted_on(TEXT, TEXT)) == pytest.approx(once, rel=1e-6)
    alike = error_of(fitted_on(TEXT, str(other)))
    assert alike != pytest.approx(once, rel=1e-3)
    first_twice = error_of(fitted_on(TEXT, TEXT, str(other)))
    record = fitted_on(f"{TEXT}=2", str(other))
    by_weight = error_of(record)
    assert by_weight == pytest.approx(first_twice, rel=1e-6)
    assert by_weight != pytest.approx(alike, rel=1e-4)
    assert {text.corpus: text.weight for text in record.texts} == {TEXT: 2.0, str(other): 1.0}
    assert "builtin:pydoc (2,538 tokens of the first 60 rows, weight 2)" in record.describe()[0]


def test_a_weight_stands_at_the_end_of_a_text_that_is_no_file(tmp_path: Path) -> None:
    file = tmp_path / "step=100"
    file.write_text("text")
    remote = "s3://bucket/a.txt?region=us-east-1&retries=3"
    assert split_weight("a.txt") == ("a.txt", 1.0)
    assert split_weight("a.txt=0.5") == ("a.txt", 0.5)
    assert split_weight("a.jsonl:text=3") == ("a.jsonl:text", 3.0)
    assert split_weight("a=b.txt") == ("a=b.txt", 1.0)
    for text in (remote, str(file)):
        assert split_weight(text) == (text, 1.0)
    with pytest.raises(ConfigError, match=r"weight of 'a.txt=0' is 0"):
        Repair(corpora=("a.txt=0",))


@pytest.mark.nightly
def test_a_repaired_checkpoint_is_not_evaluated_on_its_text(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_llama, 3, 1)
    less = tmp_path / "less"
    text = tmp_path / "text.txt"
    lines = [f"line {i} of a text that has {i * i} words and {i % 7} ideas" for i in range(400)]
    text.write_text("\n".join(lines))
    prune(tiny_llama, plan, less, repair=repair_of("map", str(text), max_sequences=20))
    (record,) = read_repairs(less)
    assert record.texts[0].rows == 20
    assert record.removed == (1,)
    assert record.repair == "map"
    options: dict[str, Any] = {**READ, "max_sequences": 8, "warehouse": tmp_path / "w"}
    tasks = [f"perplexity:{text}"]
    with pytest.raises(ConfigError, match=r"is text that the repair of .* was fitted on") as refused:
        evaluate([less], tasks=tasks, **options)
    assert "`skip_sequences` 20" in str(refused.value)
    evaluate([less], tasks=tasks, skip_sequences=20, **options)
    evaluate([less], tasks=tasks, allow_overlap=True, **options)
    text.unlink()
    with pytest.raises(ConfigError, match=r"text of the repair of .* cannot be read again"):
        evaluate([less], tasks=["perplexity:builtin:pydoc"], **options)
    (less / FILE).write_text('{"repairs": [{"repair": "magic"}]}')
    with pytest.raises(ModelError, match="is not a valid record of a repair"):
        evaluate([less], tasks=["perplexity:builtin:pydoc"], **options)


@pytest.mark.nightly
def test_a_second_repair_keeps_the_record_of_the_first(tmp_path: Path, save_checkpoint: Save) -> None:
    folder = save_checkpoint(lively(llama(num_hidden_layers=4)), tmp_path / "whole")
    for number, name in ((4, "once"), (3, "twice")):
        plan = plan_of("m", number, 2)
        prune(folder, plan, tmp_path / name, repair=repair_of("channel"))
        folder = tmp_path / name
    first, second = read_repairs(folder)
    assert first.removed == (2,)
    assert second.removed == (2,)
    card = (folder / "README.md").read_text()
    assert "last map is changed in 1" in card
    assert "fitted on builtin:pydoc" in card
    unhelped = [replace(cut, ridges=(None,)) for cut in second.cuts]
    vain = replace(second, cuts=tuple(unhelped))
    assert "The others are unchanged" in model_card(checkpoint_at(folder), plan, repair=vain)


# The command


def test_the_command(tiny_llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    less = tmp_path / "less"
    plan_of(tiny_llama, 3, 1).write(plan)
    read = ["--max-sequences", 40, "--sequence-length", 48]
    done = succeed("prune", tiny_llama, plan, "-o", less, "--repair-corpora", TEXT, *read)
    assert "Repaired by borrow, fitted on builtin:pydoc (1,692 tokens of the first 40 rows)" in done.stdout
    assert "Repaired without 1, after 0: error" in done.stdout
    assert "and the repaired weights (largest" in done.stdout
    (record,) = read_repairs(less)
    assert record.repair == "borrow"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--repair", "map"], "--repair map needs text to be fitted on"),
        (["--repair", "mapp", "--repair-corpora", TEXT], "Did you mean 'map'"),
    ],
)
def test_mistakes(options: list[str], told: str, tiny_llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan_of(tiny_llama, 3, 1).write(plan)
    assert told in mistake("prune", tiny_llama, plan, "-o", tmp_path / "no", *options)


# What is hard to repair


PLAN = plan_of("m", 3, 1)
FEW: dict[str, Any] = {"max_sequences": 20, "sequence_length": 32}


@pytest.mark.parametrize("by", all_of(REPAIRS, ["borrow"]))
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
    folder = save_checkpoint(model, tmp_path / "whole")
    text = tmp_path / "text.txt"
    text.write_text("again and " * 2000)
    fitted = fit(folder, PLAN, tmp_path / "less", repair_of(by, str(text), **FEW))
    for cut in fitted.record.cuts:
        assert cut.error_after <= cut.error_before
    for tensor in fitted.tensors.values():
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("by", ["channel", "refit"])
def test_an_mlp_that_adds_nothing_gives_nothing_back(by: str, tmp_path: Path, save_checkpoint: Save) -> None:
    model = lively(llama())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    folder = save_checkpoint(model, tmp_path / "whole")
    less = tmp_path / "less"
    with pytest.raises(AvssError, match="the inputs of the fit are zero"):
        prune(folder, PLAN, less, repair=repair_of(by, **FEW))
    assert not less.exists()


@pytest.mark.nightly
def test_quantized_weights_are_refused_before_a_text_is_seen(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layer before a cut: where it keeps its down projection in plain numbers, others may be quantized."""
    folder = block_fp8(tiny_llama, tmp_path / "fp8", skipped=["model.layers.0.mlp.down_proj", "lm_head"])
    repair = repair_of(dequantize=True, **FEW)
    done = prune(folder, PLAN, tmp_path / "less", repair=repair)
    cut = only_cut(done)
    assert cut.error_after < cut.error_before
    monkeypatch.setattr(HiddenStateSource, "visit", lambda *_, **__: pytest.fail("text was read"))
    unwritten = tmp_path / "no"
    with pytest.raises(PlanError, match=r"'mlp.down_proj.weight' of layer 1 as float8_e4m3fn, quantized") as refused:
        prune(folder, replace(PLAN, drop=(2,)), unwritten, repair=repair)
    assert "Repair the checkpoint that it was quantized from" in str(refused.value)
    assert not unwritten.exists()


# The registry


def test_a_matrix_has_an_unknown_for_each_input_of_its_fit() -> None:
    unknowns = [method.unknowns(inputs=1536, outputs=576) for method in REPAIRS.values()]
    assert list(REPAIRS) == ["channel", "map", "refit", "borrow", "refit_all"]
    assert unknowns == [1, 576, 1536, 1536, 1536]
    assert REPAIRS["map"].tokens_needed(1536, 576) == 4 * 576


def test_a_search_fits_no_repair_that_needs_more_text_than_a_map() -> None:
    searched = {name: searched_repair(name) for name in (NO_REPAIR, *REPAIRS)}
    of_few_unknowns = {"none": "none", "channel": "channel", "map": "map"}
    assert searched == of_few_unknowns | {"refit": "map", "borrow": "map", "refit_all": "map"}
    assert DEFAULT_REPAIR in REPAIRS


def test_a_record_of_a_repair_that_no_longer_exists_is_read(tmp_path: Path) -> None:
    """As earlier versions wrote it, with the linear maps that were fitted behind a cut."""
    cut = {"after": 2, "removed": [], "ridges": [0.01, None], "error_before": 0.5, "error_after": 0.25}
    cuts = [{**cut, "maps": []}, {**cut, "maps": ["self_attn.q_proj", "mlp.up_proj"]}]
    text = {"corpus": "a.txt", "fingerprint": "f", "rows": 9, "tokens": 99, "weight": 1.0}
    record = {
        "repair": "refit_around",
        "model": "m",
        "revision": "r",
        "removed": [1],
        "texts": [text],
        "cuts": cuts,
        "sequence_length": 32,
        "layout": "packed",
        "row_start": "auto",
        "dtype": "float32",
    }
    write_json(tmp_path / FILE, {"repairs": [record]})
    (read,) = read_repairs(tmp_path)
    assert read.repair == "refit_around"
    assert read.describe() == [
        "Repaired by refit_around, fitted on a.txt (99 tokens of the first 9 rows); evaluate on other rows or text.",
        "Repaired after 2: error 0.5 -> 0.25 on held-back text (ridge 0.01, none helps).",
        "Repaired in 2: error 0.5 -> 0.25 on held-back text (ridge 0.01, none helps).",
    ]


@pytest.mark.parametrize("name", REPAIRS)
def test_the_docs_name_every_repair(name: str) -> None:
    page = Path(avss_dist.__file__).parent / "docs" / "explanations" / "repair.md"
    assert f"`{name}`" in page.read_text(encoding="utf-8")
