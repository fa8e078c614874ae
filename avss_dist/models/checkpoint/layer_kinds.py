"""Kinds of layers as programs derive them from a configuration, and as the configuration lists them.

A pruned model's configuration lists the kind of each remaining layer. transformers and vLLM read the list. llama.cpp
goes by a fixed rule for some families, and other programs by what the family's default is. After a cut, such a program
may take a layer for another kind, without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avss_dist.core.text import describe_layers
from avss_dist.models.checkpoint.layer_settings import DERIVED_LISTS, NUM_LAYERS, settings_by_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LLAMA_CPP = "llama.cpp"
Kinds = tuple[Hashable, ...]
"""Kind of each layer, in order."""


@dataclass(frozen=True)
class Rule:
    """A rule by which a program derives the kind of a layer from its place.

    Attributes:
        reader: name of the program.
        meaning: what it takes, as a clause: ``takes full attention at every 6th layer``.
        whole: kind of each layer of the whole model.
        derive: returns the kind at each place of a model with so many layers.
    """

    reader: str
    meaning: str
    whole: Kinds
    derive: Callable[[int], Kinds]

    def misread(self, keep: Sequence[int]) -> list[int]:
        """Return the places, in the pruned model, of layers that the program takes for another kind.

        Args:
            keep: indices of the remaining layers, ascending.
        """
        derived = self.derive(len(keep))
        return [place for place, layer in enumerate(keep) if derived[place] != self.whole[layer]]

    @property
    def reads_whole(self) -> bool:
        """Whether the program reads the whole model as it is."""
        return not self.misread(range(len(self.whole)))


@dataclass(frozen=True)
class Period:
    """A fixed rule of llama.cpp: every so many layers one of another kind, counted from 1.

    Attributes:
        setting: the list of the configuration that says the same by layer, and is not read.
        period: number of layers from one special layer to the next.
        special: what the list has for these.
        meaning: name of that kind.
        only: number of layers of the only models with both kinds; others have a third. None is any number.
    """

    setting: str
    period: int
    special: Hashable
    meaning: str
    only: int | None = None

    def derive(self, number: int) -> Kinds:
        """Return whether the layer at each place is special, of a model with so many layers.

        Where only models of another number have special layers, the layers are of neither kind, and it is None.
        """
        if self.only is not None and number != self.only:
            return (None,) * number
        return tuple((place + 1) % self.period == 0 for place in range(number))

    def describe(self) -> str:
        """Return what llama.cpp takes, as a clause."""
        if self.period == 2:
            text = f"takes {self.meaning} at every second layer"
        else:
            text = f"takes {self.meaning} at every {self.period}th layer"
        if self.only is not None:
            text += f", and at none if there are not {self.only}"
        return text


_PERIODS: Mapping[str, tuple[Period, ...]] = {
    "afmoe": (Period("layer_types", 4, "full_attention", "full attention"),),
    "cohere2": (Period("layer_types", 4, "full_attention", "full attention"),),
    "exaone4": (Period("layer_types", 4, "full_attention", "full attention without positions", only=64),),
    "gemma2": (Period("layer_types", 2, "full_attention", "full attention"),),
    "gemma3_text": (Period("layer_types", 6, "full_attention", "full attention"),),
    "gpt_oss": (Period("layer_types", 2, "full_attention", "full attention"),),
    "llama4_text": (
        Period("layer_types", 4, "full_attention", "full attention"),
        Period("no_rope_layers", 4, 0, "no positions"),
    ),
    "smollm3": (Period("no_rope_layers", 4, 0, "no positions"),),
}
"""Fixed rules of llama.cpp by model type. In its ``src/models/NAME.cpp`` (October 2026), ``load_arch_hparams`` sets a
period, unless the file has a list. The converter writes no list for these families, except for EXAONE 4, whose windows
go by the number of layers. It writes one for OLMo 3, Gemma 3n and others, which is read: measured with OLMo 3."""
_SIZES: Mapping[str, tuple[int, ...]] = {
    "deepseek_v2": (26, 27),
    "deepseek_v3": (26, 27),
    "gemma2": (46,),
    "gemma3_text": (62,),
    "glm4_moe_lite": (47, 48),
}
"""Numbers of layers by which llama.cpp knows a variant of a family that it computes in another way (same source): the
scale of attention of Gemma 2 27B and Gemma 3 27B, the queries of DeepSeek-V2 Lite and of small models of DeepSeek-V3's
kind such as Moonlight, and the sigmoid in the routers of GLM-4.7-Flash."""
_LISTS = {*DERIVED_LISTS, "mlp_layer_types", "moe_layers"}
_REFUSALS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors by which classes of configurations refuse values without their lists, beside that of their own checks."""


def rules_of(config: PreTrainedConfig) -> list[Rule]:
    """Return the rules by which programs derive the kinds of a model's layers.

    Rules that do not describe the whole model are among them, see `Rule.reads_whole`.

    Args:
        config: configuration of transformers, of a model or its text model.
    """
    text = config.get_text_config()
    number = getattr(text, NUM_LAYERS, None)
    if not isinstance(number, int):
        return []
    rules = []
    for period in _PERIODS.get(text.model_type, ()):
        listed = getattr(text, period.setting, None)
        if isinstance(listed, list) and len(listed) == number:
            whole = tuple(kind == period.special for kind in listed)
            rules.append(
                Rule(LLAMA_CPP, f"{period.describe()}, whatever `{period.setting}` says", whole, period.derive)
            )
    if text.model_type in _SIZES:
        rules.append(_rule_of_sizes(_SIZES[text.model_type], number))
    for setting in DERIVED_LISTS:
        rule = _default_rule(text, setting, number)
        if rule is not None and rule.reads_whole:
            rules.append(rule)
    return rules


def describe_misread(rules: Sequence[Rule], keep: Sequence[int]) -> list[str]:
    """Return a sentence for each rule by which a program would read a pruned model as another one.

    Rules that do not describe the whole model either are left out: the cut changes nothing about that.

    Args:
        keep: indices of the remaining layers, ascending.
    """
    sentences = []
    told: list[list[int]] = []
    for rule in rules:
        places = rule.misread(keep)
        if places and rule.reads_whole and places not in told:
            told.append(places)
            sentences.append(
                f"{rule.reader} would read {len(places)} of the {len(keep)} remaining layers as another kind than they "
                f"are ({describe_layers(places)}, counted anew from 0): it {rule.meaning}."
            )
    return sentences


def _rule_of_sizes(sizes: tuple[int, ...], number: int) -> Rule:
    """Return the rule that a model with one of some numbers of layers is another variant.

    Args:
        number: number of layers of the whole model.
    """

    def derive(remaining: int) -> Kinds:
        return (remaining in sizes,) * remaining

    numbers = " or ".join(str(size) for size in sizes)
    return Rule(LLAMA_CPP, f"takes a model of {numbers} layers for a variant of its own", derive(number), derive)


def _default_rule(text: PreTrainedConfig, setting: str, number: int) -> Rule | None:
    """Return the rule that transformers goes by where a file lacks a list; None if it has no such list.

    Args:
        text: configuration of the text model.
        setting: name of the list.
        number: number of layers of the whole model.
    """
    from huggingface_hub.errors import StrictDataclassError

    listed = getattr(text, setting, None)
    depends_on_counts = getattr(text, "use_sliding_window", False) and hasattr(text, "max_window_layers")
    if not isinstance(listed, list) or len(listed) != number or depends_on_counts:
        return None
    values = text.to_dict()
    name = text.attribute_map.get(NUM_LAYERS, NUM_LAYERS)

    def derive(remaining: int) -> Kinds:
        shortened = values | settings_by_layer(values, number, range(remaining)) | {name: remaining}
        without_lists = {key: value for key, value in shortened.items() if key not in _LISTS}
        return tuple(getattr(type(text)(**without_lists), setting, None) or ())

    try:
        lengths = [len(derive(remaining)) for remaining in (number, 1)]
    except (StrictDataclassError, *_REFUSALS):
        return None
    if lengths != [number, 1]:
        return None
    meaning = f"derives `{setting}` as transformers' {type(text).__name__} does"
    return Rule("A program that goes without the list", meaning, tuple(listed), derive)
