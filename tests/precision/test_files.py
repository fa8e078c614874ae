"""Precision plans as files of other programs: read by those that are installed, or by the libraries they build on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import avss
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from avss_dist.models.number_formats import FORMATS
from avss_dist.precision.files import EXPORTS
from avss_dist.precision.plan import PrecisionPlan, read_precision_plan

INTEGERS = ("int4-g32", "int8")


def exported(folder: Path, tmp_path: Path, name: str, bits: float, *formats: str) -> tuple[PrecisionPlan, Path]:
    """Write a plan, and the same plan for another program."""
    words = ["quantize", "--bits", bits, "-w", folder, *(word for f in formats for word in ("--quantize", f))]
    for kind in ("plan", name):
        done = avss(*words, "--format", kind, "-o", tmp_path / kind)
        assert done.exit_code == 0, done.stderr
    return read_precision_plan(tmp_path / "plan"), tmp_path / name


def modules_of(plan: PrecisionPlan, *formats: str) -> set[str]:
    return {f"model.layers.{entry.layer}.{entry.map}" for entry in plan.rounded if entry.format in formats}


def test_llama_cpp_has_a_type_for_each_tensor(predicted: Path, tmp_path: Path) -> None:
    plan, file = exported(predicted, tmp_path, "llama-cpp", 8, "q4_0", "bf16")
    types = dict(line.split("=") for line in file.read_text().splitlines())
    assert len(types) == 21 and {*types.values()} == {"q4_0", "bf16"}
    formats = {(entry.layer, entry.map): entry.format for entry in plan.rounded}
    for (layer, path), tensor in {
        (0, "self_attn.q_proj"): r"blk\.0\.attn_q\.weight",
        (1, "self_attn.o_proj"): r"blk\.1\.attn_output\.weight",
        (2, "mlp.down_proj"): r"blk\.2\.ffn_down\.weight",
    }.items():
        assert types[tensor] == formats[layer, path]


def test_a_recipe_has_a_scheme_for_each_format(predicted: Path, tmp_path: Path) -> None:
    """compressed-tensors, which reads the groups of a recipe, applies each to the maps of its format."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    plan, file = exported(predicted, tmp_path, "llm-compressor", 5, *INTEGERS)
    (stage,) = yaml.safe_load(file.read_text()).values()
    modifier = stage["precision_modifiers"]["QuantizationModifier"]
    model = AutoModelForCausalLM.from_pretrained(plan.model)
    apply_quantization_config(model, QuantizationConfig(**modifier))
    weights = {
        name: module.quantization_scheme.weights
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None)
    }
    assert {name for name, args in weights.items() if (args.num_bits, args.group_size) == (4, 32)} == modules_of(
        plan, "int4-g32"
    )
    assert {name for name, args in weights.items() if args.num_bits == 8} == modules_of(plan, "int8")


def test_auto_round_has_bits_for_each_module(predicted: Path, tmp_path: Path) -> None:
    plan, file = exported(predicted, tmp_path, "auto-round", 5, *INTEGERS)
    layers = json.loads(file.read_text())
    assert {name for name, one in layers.items() if (one["bits"], one["group_size"]) == (4, 32)} == modules_of(
        plan, "int4-g32"
    )
    assert {name for name, one in layers.items() if (one["bits"], one["group_size"]) == (8, -1)} == modules_of(
        plan, "int8"
    )


def test_bitsandbytes_skips_what_stays(predicted: Path, tmp_path: Path) -> None:
    plan, file = exported(predicted, tmp_path, "bitsandbytes", 8, "int4-g32", "bf16")
    config = BitsAndBytesConfig(**json.loads(file.read_text()))
    assert config.load_in_4bit and {*config.llm_int8_skip_modules} == {*modules_of(plan, "bf16"), "lm_head"}


def test_torchao_has_the_modules_of_each_format(predicted: Path, tmp_path: Path) -> None:
    plan, file = exported(predicted, tmp_path, "torchao", 5, *INTEGERS)
    assert {name: {*modules} for name, modules in json.loads(file.read_text()).items()} == {
        name: modules_of(plan, name) for name in INTEGERS
    }


@pytest.mark.parametrize(
    ("name", "formats", "message"),
    [
        ("llama-cpp", INTEGERS, "llama.cpp does not have int4-g32, int8"),
        ("llm-compressor", ("q4_0", "bf16"), "llm-compressor does not have"),
        ("auto-round", ("q4_0", "int8"), "auto-round does not have q4_0"),
        ("bitsandbytes", INTEGERS, "bitsandbytes rounds to one format of 4 or 8 bits, and the plan has int4-g32, int8"),
        ("awq", INTEGERS, "Did you mean"),
    ],
)
def test_what_a_program_lacks_is_refused(
    name: str, formats: tuple[str, ...], message: str, predicted: Path, tmp_path: Path
) -> None:
    options = [word for f in formats for word in ("--quantize", f)]
    done = avss("quantize", "--bits", 8.1, "-w", predicted, *options, "--format", name, "-o", tmp_path / "x")
    assert done.exit_code == 2 and (message in " ".join(done.stderr.split()) or name == "awq")
    assert not (tmp_path / "x").exists()


# The programs themselves, where they are installed.


def test_torchao_rounds_these_modules(predicted: Path, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    plan, file = exported(predicted, tmp_path, "torchao", 5, *INTEGERS)
    names, model = json.loads(file.read_text()), AutoModelForCausalLM.from_pretrained(plan.model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in names["int8"])
    rounded = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter}
    assert rounded == modules_of(plan, "int8")


def test_bitsandbytes_rounds_the_other_modules(predicted: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plan, file = exported(predicted, tmp_path, "bitsandbytes", 8, "int4-g32", "bf16")
    config = BitsAndBytesConfig(**json.loads(file.read_text()))
    model = AutoModelForCausalLM.from_pretrained(plan.model, quantization_config=config, device_map="cpu")
    rounded = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert rounded == modules_of(plan, "int4-g32")


def test_llm_compressor_follows_the_recipe(predicted: Path, tmp_path: Path) -> None:
    llmcompressor = pytest.importorskip("llmcompressor")
    plan, file = exported(predicted, tmp_path, "llm-compressor", 5, *INTEGERS)
    model: Any = AutoModelForCausalLM.from_pretrained(plan.model)
    llmcompressor.oneshot(model=model, recipe=str(file))
    for entry in plan.rounded:
        module = model.model.layers[entry.layer].get_submodule(entry.map)
        assert module.quantization_scheme.weights.num_bits == FORMATS[entry.format].element_bits


def test_auto_round_follows_the_configuration(predicted: Path, tmp_path: Path) -> None:
    auto_round = pytest.importorskip("auto_round")
    from transformers import AutoTokenizer

    plan, file = exported(predicted, tmp_path, "auto-round", 5, *INTEGERS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(plan.model), AutoTokenizer.from_pretrained(plan.model)
    options: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    rounding = auto_round.AutoRound(
        model, tokenizer, scheme="W4A16", layer_config=json.loads(file.read_text()), **options
    )
    rounded, _ = rounding.quantize()
    for entry in plan.rounded:
        module = rounded.model.layers[entry.layer].get_submodule(entry.map)
        known = FORMATS[entry.format]
        assert (module.bits, module.group_size) == (known.element_bits, known.group or -1)


def test_every_export_is_an_option() -> None:
    from avss_dist.cli.quantize import FORMATS as OFFERED

    assert ("plan", *EXPORTS) == OFFERED
