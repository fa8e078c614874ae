"""Checks that a checkpoint's files have all weights, since transformers would initialize missing ones randomly."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from avss_dist.core.errors import ModelError, first_names
from avss_dist.core.values import JsonObject
from avss_dist.models.checkpoint.locate import Checkpoint, read_config, stored_tensors
from avss_dist.models.checkpoint.safetensors import DTYPES, TensorInfo
from avss_dist.models.structure.layers import layer_lists

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ALWAYS_BUILT = 200
"""Number of layers up to which a model is built without a look at its files."""
MAX_SHARED = 100
"""Largest number of layers beside those with weights of their own. ALBERT, for one, runs one block 12 times."""
_NUM_LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?")  # n_layer, num_hidden_layers, ...
_PACKED = re.compile(r"_(packed|blocks)$")  # endings of the names of quantized weights; scales have others
_AFTER_LAYERS = re.compile(r"(^|\.)pooler\.")  # of encoders: many files lack it, and no layer sees it

MTP_COUNTS = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Settings with the number of layers of a head that predicts several tokens (MTP)."""


def require_layers(checkpoint: Checkpoint, config: JsonObject) -> None:
    """Refuse a configuration of far more layers than the files have, before anything of that size is built.

    Args:
        config: the checkpoint's ``config.json``, or transformers' translation of the metadata of its ``.gguf`` file.
            Headers of weight files are read only if its layer count is unusual.

    Raises:
        ModelError: the configuration has too many layers for these files.
    """
    field, number = max(_layer_counts(config), key=lambda count: count[1], default=("", 0))
    if number <= ALWAYS_BUILT:
        return
    indices: set[str] = set()
    for tensor in stored_tensors(checkpoint):
        indices.update(part for part in tensor.name.split(".") if part.isdigit())
    stored = len(indices)
    if number > stored + MAX_SHARED:
        where = "config.json"
        hint = "Download or copy the checkpoint again, or correct its config.json."
        if checkpoint.gguf:
            where = "metadata"
            hint = "Download or copy the checkpoint again."
        raise ModelError(
            f"The {where} of '{checkpoint.name}' describes {number:,} layers (\"{field}\"), and its files have weights "
            f"of {stored:,} at most.",
            hint,
        )


def _layer_counts(config: JsonObject) -> Iterator[tuple[str, int]]:
    """Yield (key, count) of every layer count in a configuration and in those nested in it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _layer_counts(value)
        elif isinstance(value, int) and _NUM_LAYERS.fullmatch(key):
            yield key, value


def require_complete(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    backbone: nn.Module,
    report: Mapping[str, Collection[str]],
    layers: str | None,
    *,
    head: bool = False,
) -> None:
    """Refuse a loaded model if its files lack weights, or have tensors in its layers that the model does not use.

    Weights that the family declares as optional, ties, or derives from others are not missing.

    Args:
        model, backbone: the loaded model, and the model without its head.
        report: transformers' loading info, with the names of ``model``.
        layers: module path of the layer list in the backbone; None finds it.
        head: require the weights of the head, too.

    Raises:
        ModelError: weights are missing or unused; the message names the first of them.
    """
    missing = [name for name in sorted(report["missing_keys"]) if not _AFTER_LAYERS.search(name)]
    if not head:
        outside = _names_outside(model, backbone)
        missing = [name for name in missing if name not in outside]
    unused = sorted(report["unexpected_keys"])
    if missing:
        instead = ""
        if unused:
            instead = f" They have {first_names(unused)}, which the model does not."
        raise ModelError(
            f"The files of '{checkpoint.name}' lack weights of the {type(model).__name__} that config.json describes: "
            f"{first_names(missing)}.{instead}",
            "Download or copy the checkpoint again, or correct its config.json.",
        )
    if strange := _of_layers(unused, model, backbone, layers):
        raise ModelError(
            f"The files of '{checkpoint.name}' have tensors in its layers that the {type(model).__name__} of "
            f"config.json does not use: {first_names(strange)}.",
            "Does config.json have the right number of layers, and the quantization_config of packed weights?",
        )
    _require_numbers(checkpoint, model)


def _names_outside(model: nn.Module, backbone: nn.Module) -> set[str]:
    """Return the names of the parameters and buffers of a model that its backbone does not have."""
    needed = {id(tensor) for tensor in (*backbone.parameters(), *backbone.buffers())}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in tensors if id(tensor) not in needed}


def missing_weights(model: PreTrainedModel, backbone: nn.Module, names: Collection[str]) -> list[str]:
    """Return the weights of a backbone, by their names in a model, that are not among names of stored tensors.

    Of tied weights, one name is enough.
    """
    outside = _names_outside(model, backbone)
    missing = []
    for aliases in weight_names(model):
        name = aliases[0]
        if name in outside or _AFTER_LAYERS.search(name):
            continue
        if not any(alias in names for alias in aliases):
            missing.append(name)
    return missing


def weight_names(model: nn.Module) -> list[list[str]]:
    """Return the names of each tensor of a model's state: several of a tied weight, in the order of its modules."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def require_scales(checkpoint: Checkpoint) -> None:
    """Refuse files that lack the scales of a quantized weight, which transformers would unpack as if they were 1.

    Raises:
        ModelError: scales are missing; the message names the weights.
    """
    scales: defaultdict[str, list[str]] = defaultdict(list)  # names of scales by their module
    quantized: list[str] = []
    for tensor in stored_tensors(checkpoint):
        module, _, leaf = tensor.name.rpartition(".")
        if "scale" in leaf:
            scales[module].append(leaf)
        elif _is_quantized(tensor, leaf):
            quantized.append(tensor.name)
    lacking = []
    for name in quantized:
        module, _, leaf = name.rpartition(".")
        # The name of a scale contains that of the weight: weight_scale_inv, gate_up_proj_scales, qscale_weight.
        stem = _PACKED.sub("", leaf)
        own_scales = [scale for scale in scales[module] if scale == "scale" or stem in scale]
        if not own_scales:
            lacking.append(name)
    if lacking:
        raise ModelError(
            f"The files of '{checkpoint.name}' lack the scales of quantized weights: {first_names(sorted(lacking))}.",
            "Download or copy the checkpoint again.",
        )


def num_mtp_layers(text: PreTrainedConfig) -> int:
    """Return the number of layers of the head that predicts several tokens (MTP) by a text model's configuration."""
    for name in MTP_COUNTS:
        number = getattr(text, name, None)
        if isinstance(number, int):
            return number
    return 0


def _is_quantized(tensor: TensorInfo, leaf: str) -> bool:
    """Whether a stored tensor is a quantized weight, which needs scales.

    Args:
        leaf: the last part of its name.
    """
    if _PACKED.search(leaf) or tensor.dtype.startswith("F8_"):
        return True
    return tensor.dtype == "I8" and leaf == "weight"


def _of_layers(names: Sequence[str], model: PreTrainedModel, backbone: nn.Module, layers: str | None) -> list[str]:
    """Return the names of tensors inside of the layer list, at any index.

    Layers of a head that predicts several tokens, which may stand behind the others, are not among them.
    """
    text = model.config.get_text_config()
    number = getattr(text, "num_hidden_layers", None)
    try:
        lists = layer_lists(backbone, number, layers)
    except ModelError:  # opening the model says so
        return []
    prefix = ""
    for path, module in model.named_modules():
        if module is backbone and path:
            prefix = re.escape(f"{path}.")
            break
    paths = "|".join(re.escape(path) for path in lists)
    inside = re.compile(rf"(?:{prefix})?(?:{paths})\.(\d+)\.")
    behind = range(0)
    if number is not None:
        behind = range(number, number + num_mtp_layers(text))
    in_layers = []
    for name in names:
        match = inside.match(name)
        if match and int(match[1]) not in behind:
            in_layers.append(name)
    return in_layers


def _require_numbers(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse files that store a packed weight without a ``quantization_config`` that tells how to unpack it."""
    if checkpoint.gguf or getattr(model.config, "quantization_config", None):
        return
    if read_config(checkpoint.folder, checkpoint.name).get("quantization_config"):
        return  # The weights were unpacked as they were loaded, and the model's own configuration says so no more.
    floating = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for tensor in stored_tensors(checkpoint):
        if tensor.name in floating and not is_number(tensor):
            raise ModelError(
                f"'{checkpoint.name}' stores '{tensor.name}' as {tensor.dtype}, and its config.json has no "
                "quantization_config that says how to unpack it.",
                "Copy config.json again from where the weights come from.",
            )


def is_number(tensor: TensorInfo) -> bool:
    """Whether the elements of a stored tensor are floating-point numbers of 16 bits or more."""
    dtype = DTYPES.get(tensor.dtype)
    return dtype is not None and dtype.is_floating_point and dtype.itemsize >= 2
