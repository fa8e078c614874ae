"""Quantization settings that name layers by number: what they say of the layers that stay.

Such as ``modules_to_not_convert: [model.layers.0.mlp.gate]`` or ``ignore: [re:model.layers.[0-1].mlp]``: after pruning,
another layer has that number, and its weights would be read as what they are not. That each module is quantized as it
was is proved on skeletons of both models with quantized modules, and on the tensors of the files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from avss_dist.errors import ModelError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import quiet, skeleton, text_config
from avss_dist.models.naming import Naming
from avss_dist.models.quantization import describe_quantization, quantize_skeleton
from avss_dist.models.safetensors import tensors_of, weight_files
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.weights import StoredWeights, list_path
from avss_dist.settings import Settings

FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # beside config.json
MAX_NAMED = 3  # tensors in a message
_PATTERN = re.compile(r"[\\^$*+?{}\[\]|()]")
_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d")
_MARK = re.compile(r"(re:|[+-]:)?(.*)", re.DOTALL)  # of a pattern: compressed-tensors', GPTQModel's

Tensors = frozenset[tuple[str, tuple[int, ...]]]  # (name, shape)


@dataclass(frozen=True)
class LayerNames:
    """What quantization settings may call the layers of a plan.

    Attributes:
        lists: paths of the layer list: in the whole model, and in its files.
        modules: paths of the whole model's modules.
    """

    plan: Plan
    lists: tuple[str, ...]
    modules: Sequence[str] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: Plan, settings: Settings) -> LayerNames:
        """Those of a checkpoint.

        Raises:
            PlanError: it is unclear which of its tensors are the plan's layers.
            ModelError: it cannot be read, or its model cannot be built.
        """
        stored = StoredWeights.of(checkpoint, plan, settings).prefix
        config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
        model = skeleton(config, settings, torch.float32)
        return cls(plan, (list_path(model, plan), stored), [name for name, _ in model.named_modules() if name])

    def renumbered(self, name: str) -> str | None:
        """The name of a module or tensor once layers are dropped; None if it is of one of those.

        Names may begin below the model, or above it; what another tower calls its layers stays as it is.
        """
        parts = name.split(".")
        for place, part in enumerate(parts):
            path = f".{'.'.join(parts[:place])}"
            if place and part.isdecimal() and any(_ends_alike(path, f".{layers}") for layers in self.lists):
                if int(part) not in self.plan.keep:
                    return None
                return ".".join([*parts[:place], str(self.plan.keep.index(int(part))), *parts[place + 1 :]])
        return name

    def kept(self, names: Iterable[str], mark: str = "") -> list[str]:
        """The new names of modules and tensors, without those of layers that are dropped."""
        return [f"{mark}{new}" for name in names if (new := self.renumbered(name)) is not None]


def _ends_alike(path: str, other: str) -> bool:
    return path.endswith(other) or other.endswith(path)


def renumber_quantization(config: Any, names: LayerNames) -> Any:
    """Quantization settings, JSON values, with the layers that stay under their new numbers.

    A pattern that has numbers in it becomes the names of the modules that it matches. Patterns match from the start of
    a name, as those of transformers, compressed-tensors and GPTQModel do.

    Raises:
        PlanError: a pattern with numbers is none that can be read.
    """
    if isinstance(config, dict):
        return {
            name: renumber_quantization(part, names) for key, part in config.items() for name in _new_names(key, names)
        }
    if isinstance(config, list):
        parts = (
            _new_names(part, names) if isinstance(part, str) else [renumber_quantization(part, names)]
            for part in config
        )
        return [new for part in parts for new in part]
    return config


def _new_names(text: str, names: LayerNames) -> list[str]:
    """What a text of the settings becomes: a module's path or a pattern of such; none where the layers are dropped."""
    found = _MARK.fullmatch(text)
    assert found
    mark, body = found.groups()
    if not (_PATTERN.search(body) and _NUMBER.search(body)):
        return names.kept([body], mark or "")
    try:
        pattern = re.compile(body)
    except re.error as error:
        raise PlanError(
            f"The quantization settings name layers by '{text}', which is no pattern that can be read: {error}.",
            "Prune the checkpoint before it is quantized, or evaluate the plan without a checkpoint.",
        ) from None
    kept = names.kept(filter(pattern.match, names.modules))
    return [f"{mark}{re.escape(name)}$" for name in kept] if mark in ("+:", "-:") else kept


def require_same_modules(checkpoint: Checkpoint, plan: Plan, folder: Path, settings: Settings) -> str:
    """Compare both checkpoints with the modules that hold quantized weights as they are stored, built of the settings.

    Args:
        folder: of the pruned checkpoint.

    Returns:
        What was seen, or why nothing could be: a note for people.

    Raises:
        PlanError: a weight that stays would be read as something else than it was.
    """
    how = f"The weights are quantized ({describe_quantization(checkpoint, settings)}), and copied as they are"
    names = LayerNames.of(checkpoint, plan, settings)
    try:
        before, after = (_strangers(one, settings) for one in (checkpoint, replace(checkpoint, path=str(folder))))
    except ModelError as error:
        return f"{how}. Whether the settings read each of them as before could not be seen here: {error}"
    expected = {(new, shape) for name, shape in before if (new := names.renumbered(name)) is not None}
    if strange := sorted(name for name, _ in after ^ expected):
        more = f" and {len(strange) - MAX_NAMED} more" if len(strange) > MAX_NAMED else ""
        raise PlanError(
            f"The quantization settings of '{checkpoint.name}' would read weights as what they are not once layers are "
            f"dropped: {', '.join(strange[:MAX_NAMED])}{more}.",
            "Prune the checkpoint before it is quantized, or evaluate the plan without a checkpoint.",
        )
    return f"{how}. Built as quantized modules, they have the names and shapes of the tensors in the files, as before."


def _strangers(checkpoint: Checkpoint, settings: Settings) -> Tensors:
    """Tensors of the files that no quantized module holds in that shape, and those of modules that no file holds."""
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    with quiet():
        model = quantize_skeleton(checkpoint, config, skeleton(copy.deepcopy(config), settings, torch.bfloat16))
        named = _names_in(model)
    held = frozenset((name, tuple(value.shape)) for name, value in model.state_dict().items())
    files = weight_files(checkpoint.folder)
    return held ^ frozenset((named(tensor.name), tensor.shape) for file in files for tensor in tensors_of(file))


def _names_in(model: Any) -> Callable[[str], str]:
    """What a model calls a stored tensor, which keeps its name if transformers does not only rename it."""
    naming = Naming(model)

    def named(stored: str) -> str:
        try:
            renamed = naming.renamed(stored)
        except (ImportError, TypeError, AttributeError, KeyError, ValueError):  # see Naming
            return stored
        return renamed if renamed in naming.state else stored

    return named
