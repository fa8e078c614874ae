"""Precision plans by predicted losses: budgets, controls, evaluation in place, files of other programs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch
import yaml
from support.checkpoints import llama
from support.command_line import as_words, mistake, succeed
from support.warehouses import write_scores
from transformers import AutoModelForCausalLM

import avss_dist
from avss_dist.core.errors import AvssError, QueryError
from avss_dist.models.change.number_formats import FORMATS
from avss_dist.plans.catalog import PRECISION_FILES
from avss_dist.plans.choice import PlanError
from avss_dist.plans.map_plans import MapPrecision, PrecisionPlan
from avss_dist.plans.plan import read_checked_plan
from avss_dist.plans.precision_files import EXPORTS
from avss_dist.studies.evaluate import Evaluations
from avss_dist.warehouse.reader import Warehouse

TASK = "perplexity:builtin:pydoc"
READ: dict[str, Any] = {"max_sequences": 8, "sequence_length": 32, "executor": "local"}
PAIR = ("int4-g32", "int8")
WEIGHTS = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
"""Number of weights of the linear maps of three layers: two of 64 x 64, two of 64 x 32, and three of the MLP."""


def as_formats(*names: str) -> list[str]:
    """Return the words of a command line that name number formats."""
    words = []
    for name in names:
        words += ["--quantize", name]
    return words


@pytest.fixture(scope="module")
def predicted(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with a run, and with predictions for four formats."""
    folder = tmp_path_factory.mktemp("predicted") / "w"
    formats = as_formats(*PAIR, "q4_0", "bf16")
    text = ("--corpus", "builtin:pydoc", *as_words(READ), "-w", folder)
    succeed("score", wide, *text)
    succeed("ablate", wide, *text, *formats, "--no-leave-one-out", "--no-rounded-layers")
    return folder


def chosen(folder: Path, **options: Any) -> PrecisionPlan:
    return avss_dist.quantize(warehouse=folder, **{"bits": 5.0, "quantize": PAIR, **options})


def predicted_sum(plan: PrecisionPlan, by: str) -> float:
    """The sum of an estimate over the maps of a plan."""
    return float(str(plan.why[f"sum_of_{by}"]))


@pytest.mark.parametrize("by", ["second_order", "random", "uniform"])
def test_every_method_keeps_the_budget_and_none_predicts_less(by: str, predicted: Path) -> None:
    plan = chosen(predicted, by=by)
    best = chosen(predicted)
    assert len(plan.rounded) == 21
    assert plan.weights == WEIGHTS
    assert plan.bits <= 5.0
    assert plan.bits == pytest.approx(plan.total / plan.weights)
    assert predicted_sum(plan, "second_order") >= predicted_sum(best, "second_order")
    formats = {*PAIR}
    if by == "uniform":
        formats = {"int4-g32"}
    used = {entry.format for entry in plan.rounded}
    assert used == formats
    for entry in plan.rounded:
        inputs = 128 if entry.map == "mlp.down_proj" else 64
        assert entry.bits == FORMATS[entry.format].bits(1, inputs)


@pytest.mark.parametrize("by", ["predicted", "output_error"])
def test_other_estimates_choose_too(by: str, predicted: Path) -> None:
    plan = chosen(predicted, by=by)
    assert plan.bits <= 5.0
    assert predicted_sum(plan, by) > 0
    assert plan.rounded != chosen(predicted).rounded


def test_a_format_that_costs_much_is_a_finding(predicted: Path) -> None:
    """Four bits cost this model nats, and eight bits next to nothing."""
    assert "to int4-g32 is predicted to cost 1." in chosen(predicted).findings[0]
    assert chosen(predicted, quantize=("int8",), bits=9.0).findings == ()
    assert chosen(predicted, by="output_error").findings == ()


def test_gains_on_the_text_of_the_prediction_are_a_finding(predicted: Path) -> None:
    """The sum of what maps gain is that of the estimates in the warehouse; second orders are never negative."""
    plan = chosen(predicted, by="predicted")
    rows = Warehouse(predicted).table("evaluations", where=pc.field("metric") == "predicted")
    rises = {row["rounding"]: row["value"] for row in rows.to_pylist()}
    gain = 0.0
    for entry in plan.rounded:
        rise = rises[f"{entry.format}@{entry.layer}.{entry.map}"]
        gain += max(0.0, -rise)
    assert gain > 0.01
    assert f"lower the loss when they are rounded, by {gain:.2g} nats per token together" in plan.findings[-1]
    for finding in chosen(predicted).findings:
        assert "lower the loss" not in finding


def test_a_random_choice_is_that_of_its_seed(predicted: Path) -> None:
    first = chosen(predicted, by="random", seed=1).rounded
    assert chosen(predicted, by="random", seed=1).rounded == first
    assert chosen(predicted, by="random", seed=2).rounded != first


def test_memory_is_that_of_the_whole_model(predicted: Path, wide: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(wide)
    others = whole.num_parameters() - WEIGHTS
    plan = chosen(predicted, bits=None, memory=4 * others + 70_000)
    used = plan.total / 8
    assert used <= 70_000 < used + 8 * 128 * 64
    assert plan.why["memory"] == "236 kB"


def test_a_plan_is_read_as_it_was_written(predicted: Path, tmp_path: Path) -> None:
    plan = chosen(predicted, quantize=())
    bits_plan = tmp_path / "bits.yaml"
    plan.write(bits_plan)
    again = read_checked_plan(PrecisionPlan, bits_plan)
    assert again.rounded == plan.rounded
    assert again.evaluation == plan.evaluation
    assert again.intervention.key == plan.intervention.key
    assert again.why["formats"] == "int4-g32, q4_0, int8, bf16"


def test_a_plan_is_evaluated_as_the_rounded_model(predicted: Path, wide: Path, tmp_path: Path) -> None:
    """In place, beside a control: as plain transformers with the weights of the plan."""
    plan_file = tmp_path / "predicted.yaml"
    control_file = tmp_path / "uniform.yaml"
    plan = chosen(predicted, by="predicted")
    plan.write(plan_file)
    chosen(predicted, by="uniform").write(control_file)
    options = {"tasks": [TASK], "skip_sequences": 30, "dtype": "float32", **READ}
    evaluations = avss_dist.evaluate([plan_file, control_file], warehouse=predicted, **options)
    losses = losses_of(evaluations)
    assert "4.986 bits per weight of 21 linear maps" in "\n".join(evaluations.findings)
    model = AutoModelForCausalLM.from_pretrained(wide)
    with torch.no_grad():
        for entry in plan.rounded:
            weight = model.model.layers[entry.layer].get_submodule(entry.map).weight
            weight.copy_(FORMATS[entry.format].round(weight))
    rounded = tmp_path / "rounded"
    model.save_pretrained(rounded)
    for file in wide.glob("token*"):
        (rounded / file.name).write_bytes(file.read_bytes())
    alone = avss_dist.evaluate([rounded], warehouse=tmp_path / "w", **options)
    (expected,) = losses_of(alone).values()
    loss = losses[str(plan_file)]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert loss != losses[str(control_file)]


def losses_of(evaluations: Evaluations) -> dict[str, float]:
    """The losses of the subjects of evaluations."""
    losses = {}
    for evaluation in evaluations:
        if evaluation.result.metric == "loss":
            losses[evaluation.subject.label] = evaluation.result.value
    return losses


def test_the_text_of_the_prediction_is_not_held_out(predicted: Path, tmp_path: Path) -> None:
    bits_plan = tmp_path / "bits.yaml"
    chosen(predicted).write(bits_plan)
    with pytest.raises(AvssError, match="is text that number formats of a plan were predicted on"):
        avss_dist.evaluate([bits_plan], tasks=[TASK], warehouse=predicted, **READ)


def test_the_command_prints_the_plan(predicted: Path, tmp_path: Path) -> None:
    bits_plan = tmp_path / "bits.yaml"
    done = succeed("quantize", "--bits", 5, "-w", predicted, "-o", bits_plan)
    assert "bits per weight of 21 linear maps: " in done.stdout
    assert "avss evaluate" in done.stderr
    assert len(yaml.safe_load(bits_plan.read_text())["rounded"]) == 21


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"bits": 3.0}, PlanError, "`bits` 3 is below the 4.5 bits per weight of the smallest formats"),
        ({"bits": None, "memory": 50_000}, PlanError, "`memory` 50 kB is below the .* its other weights take"),
        ({"quantize": ("fp8",)}, QueryError, r"(?s)lacks one prediction of fp8 .*avss ablate .* --quantize fp8"),
        ({"quantize": ("int5",)}, AvssError, "Did you mean"),
        ({"memory": 10**6}, AvssError, "Expected one budget: `bits` or `memory`"),
        ({"bits": None}, AvssError, "Expected one budget: `bits` or `memory`"),
        ({"by": "loudest"}, AvssError, "loudest"),
    ],
)
def test_mistakes(options: dict[str, Any], kind: type[Exception], message: str, predicted: Path) -> None:
    with pytest.raises(kind, match=message) as caught:
        chosen(predicted, **options)
    assert isinstance(caught.value, AvssError)
    assert caught.value.exit_code == 2


@pytest.fixture
def narrow(tmp_path: Path) -> Callable[..., Path]:
    """Writes a warehouse with a run, without predictions, of a model with the given sizes."""

    narrow_folder = tmp_path / "narrow"
    warehouse = tmp_path / "w"

    def write(**sizes: int) -> Path:
        llama(**sizes).save_pretrained(narrow_folder)
        write_scores(warehouse, "a", [1.0, 2.0, 3.0], model=str(narrow_folder), revision="x")
        return warehouse

    return write


@pytest.mark.parametrize(
    ("sizes", "format"),
    [
        ({"hidden_size": 64, "intermediate_size": 128}, "int4-g64"),
        ({"hidden_size": 32, "intermediate_size": 96}, "int4-g32"),
        ({"hidden_size": 32, "intermediate_size": 48}, "int4"),
    ],
)
def test_formats_that_every_map_can_take_are_suggested(
    sizes: dict[str, int], format: str, narrow: Callable[..., Path]
) -> None:
    with pytest.raises(QueryError) as caught:
        avss_dist.quantize(warehouse=narrow(**sizes), bits=5.0)
    assert f"--quantize {format} --quantize int8" in str(caught.value)


def test_of_a_model_that_is_gone_formats_without_groups_are_suggested(tmp_path: Path) -> None:
    warehouse = tmp_path / "w"
    write_scores(warehouse, "a", [1.0, 2.0, 3.0], model=str(tmp_path / "gone"), revision="x")
    with pytest.raises(QueryError) as caught:
        avss_dist.quantize(warehouse=warehouse, bits=5.0)
    assert "--quantize int4 --quantize int8" in str(caught.value)


def test_formats_that_a_map_cannot_take_are_refused_before_they_are_suggested(narrow: Callable[..., Path]) -> None:
    root = narrow(hidden_size=32, intermediate_size=48)
    with pytest.raises(QueryError) as caught:
        avss_dist.quantize(warehouse=root, bits=5.0, quantize=("int4-g32", "int8"))
    assert "int4-g32 cannot. Formats that can take every linear map of" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bits: 4.986111", "bits: 7.0"), "bits is 7, and the maps of rounded have 4.98611 bits"),
        (("layer: 2,", "layer: 9,"), "There is no layer 9"),
        (("map: mlp.up_proj", "map: mlp.down_proj"), "names a linear map twice"),
        (("format: int8", "format: int7"), "int8"),
        (("num_layers: 3", "num_layers: 4"), "has 3 layers"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(
    change: tuple[str, str], message: str, predicted: Path, tmp_path: Path
) -> None:
    bits_plan = tmp_path / "bits.yaml"
    chosen(predicted).write(bits_plan)
    text = bits_plan.read_text()
    assert change[0] in text
    bits_plan.write_text(text.replace(*change))
    done = mistake("evaluate", bits_plan, "--tasks", TASK, "-w", predicted)
    assert message in done


# Files of other programs, read by the libraries that they build on


def exported(folder: Path, tmp_path: Path, name: str, bits: float, *formats: str) -> tuple[PrecisionPlan, Path]:
    """Write a plan, and the same plan for another program."""
    words = ["quantize", "--bits", bits, "-w", folder, *as_formats(*formats)]
    for kind in ("plan", name):
        succeed(*words, "--format", kind, "-o", tmp_path / kind)
    return read_checked_plan(PrecisionPlan, tmp_path / "plan"), tmp_path / name


def modules_of(plan: PrecisionPlan, *formats: str) -> set[str]:
    return {f"model.layers.{entry.layer}.{entry.map}" for entry in plan.rounded if entry.format in formats}


def test_llama_cpp_has_a_type_for_each_tensor(predicted: Path, tmp_path: Path) -> None:
    plan, file = exported(predicted, tmp_path, "llama-cpp", 8, "q4_0", "bf16")
    lines = file.read_text().splitlines()
    types = dict(line.split("=") for line in lines)
    assert len(types) == 21
    assert {*types.values()} == {"q4_0", "bf16"}
    formats = {(entry.layer, entry.map): entry.format for entry in plan.rounded}
    assert types[r"blk\.0\.attn_q\.weight"] == formats[0, "self_attn.q_proj"]
    assert types[r"blk\.1\.attn_output\.weight"] == formats[1, "self_attn.o_proj"]
    assert types[r"blk\.2\.ffn_down\.weight"] == formats[2, "mlp.down_proj"]


def test_a_recipe_has_a_scheme_for_each_format(predicted: Path, tmp_path: Path) -> None:
    """compressed-tensors, which reads the groups of a recipe, applies each to the maps of its format."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    plan, file = exported(predicted, tmp_path, "llm-compressor", 5, *PAIR)
    (stage,) = yaml.safe_load(file.read_text()).values()
    modifier = stage["precision_modifiers"]["QuantizationModifier"]
    model = AutoModelForCausalLM.from_pretrained(plan.model)
    apply_quantization_config(model, QuantizationConfig(**modifier))
    in_groups = set()
    in_8_bits = set()
    for path, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme and scheme.weights.num_bits == 4 and scheme.weights.group_size == 32:
            in_groups.add(path)
        elif scheme and scheme.weights.num_bits == 8:
            in_8_bits.add(path)
    assert in_groups == modules_of(plan, "int4-g32")
    assert in_8_bits == modules_of(plan, "int8")


@pytest.mark.parametrize(
    ("name", "formats", "message"),
    [
        ("llama-cpp", PAIR, "llama.cpp does not have int4-g32, int8"),
        ("llm-compressor", ("q4_0", "bf16"), "Choose from its formats for this model: int8, int4, int4-g64, int4-g32"),
        ("awq", PAIR, "Did you mean"),
    ],
)
def test_what_a_program_lacks_is_refused(
    name: str, formats: tuple[str, ...], message: str, predicted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x"
    command = ("quantize", "--bits", 8.1, "-w", predicted, *as_formats(*formats))
    done = mistake(*command, "--format", name, "-o", output)
    if name != "awq":
        assert message in done
    assert not output.exists()


def test_every_export_is_an_option() -> None:
    assert ("plan", *EXPORTS) == PRECISION_FILES


# Plans whose sizes were edited: what contradicts the formats or the model is refused


def plan_of(model: Path, *maps: MapPrecision) -> PrecisionPlan:
    total = sum(entry.bits * entry.weights for entry in maps)
    weights = sum(entry.weights for entry in maps)
    return PrecisionPlan(model=str(model), num_layers=3, bits=total / weights, rounded=maps)


def rounded_map(format: str, layer: int = 0, outputs: int = 128, inputs: int = 64) -> MapPrecision:
    bits = FORMATS[format].bits(outputs, inputs)
    return MapPrecision(layer=layer, map="mlp.up_proj", format=format, weights=outputs * inputs, bits=bits)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_bits_of_any_shape(name: str) -> None:
    for outputs, inputs in ((1, 256), (256, 256), (1000, 4096)):
        entry = rounded_map(name, outputs=outputs, inputs=inputs)
        assert entry.wrong_bits((outputs, inputs)) is None
        plan_of(Path("org/a"), entry)


@pytest.mark.parametrize(("format", "bits"), [("bf16", "has 16 bits"), ("int8", "int8 has 8.00195 to 24 bits")])
def test_bits_that_the_format_does_not_have_are_refused(format: str, bits: str, wide: Path, tmp_path: Path) -> None:
    """As after a search and replace in the file."""
    plan_file = tmp_path / "plan.yaml"
    maps = [rounded_map("int4-g32", layer=layer) for layer in (0, 1)]
    plan_of(wide, *maps).write(plan_file)
    text = plan_file.read_text()
    plan_file.write_text(text.replace("int4-g32", format))
    with pytest.raises(PlanError, match=bits) as told:
        read_checked_plan(PrecisionPlan, plan_file)
    assert "'mlp.up_proj' of layer 0, has bits 4.5" in told.value.message
    assert "and 1 other map" in told.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 8_192_000}, "has 8,192,000 weights, and in .* 8,192"),
        ({"bits": 8.5}, "has `bits` 8.5, and int8 has 8.25 bits per weight"),
        ({"map": "mlp.other"}, "is not in"),
    ],
)
def test_sizes_that_the_model_does_not_have_are_refused(
    change: dict[str, Any], message: str, wide: Path, tmp_path: Path
) -> None:
    plan_file = tmp_path / "plan.yaml"
    changed = replace(rounded_map("int8"), **change)
    plan_of(wide, rounded_map("int8", layer=1), changed).write(plan_file)
    with pytest.raises(PlanError, match=f"plan.yaml: map 2 of the key 'rounded', .*{message}"):
        avss_dist.evaluate((str(plan_file),), tasks=(TASK,), warehouse=tmp_path / "w")
