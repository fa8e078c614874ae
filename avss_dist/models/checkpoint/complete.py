"""Checks that a checkpoint's files have all weights, since transformers would initialize missing ones randomly."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from avss_dist.core.errors import ModelError, first_names
from avss_dist.models.checkpoint.locate import Checkpoint, read_config, stored_tensors
from avss_dist.models.checkpoint.safetensors import DTYPES
from avss_dist.models.structure.layers import layer_lists

ALWAYS_BUILT = 200  # layers: so many are built without a look at the files
MAX_SHARED = 100  # layers beside those with weights of their own: ALBERT, for one, has one block that it runs 12 times
_NUM_LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?")  # n_layer, num_hidden_layers, ...
_PACKED = re.compile(r"_(packed|blocks)$")  # endings of the names of quantized weights; scales have others
_AFTER_LAYERS = re.compile(r"(^|\.)pooler\.")  # of encoders: many files lack it, and no layer sees it

MTP_COUNTS = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Settings with the number of layers of a head that predicts several tokens (MTP)."""


def require_layers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
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
    stored = len({part for tensor in stored_tensors(checkpoint) for part in tensor.name.split(".") if part.isdigit()})
    if number > stored + MAX_SHARED:
        where, correct = ("metadata", "") if checkpoint.gguf else ("config.json", ", or correct its config.json")
        raise ModelError(
            f"The {where} of '{checkpoint.name}' describes {number:,} layers (\"{field}\"), and its files have weights "
            f"of {stored:,} at most.",
            f"Download or copy the checkpoint again{correct}.",
        )


def _layer_counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (key, count) of every layer count in a configuration and in those nested in it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _layer_counts(value)
        elif isinstance(value, int) and _NUM_LAYERS.fullmatch(key):
            yield key, value


def require_complete(
    checkpoint: Checkpoint,
    model: Any,
    backbone: nn.Module,
    report: Mapping[str, Collection[Any]],
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
        needed = {id(tensor) for tensor in (*backbone.parameters(), *backbone.buffers())}
        values = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
        missing = [name for name in missing if name not in values or id(values[name]) in needed]
    unused = sorted(report["unexpected_keys"])
    if missing:
        instead = f" They have {first_names(unused)}, which the model does not." if unused else ""
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


def require_scales(checkpoint: Checkpoint) -> None:
    """Refuse files that lack the scales of a quantized weight, which transformers would unpack as if they were 1.

    Raises:
        ModelError: scales are missing; the message names the weights.
    """
    leaves: dict[str, list[str]] = {}
    quantized: list[str] = []
    for tensor in stored_tensors(checkpoint):
        module, _, leaf = tensor.name.rpartition(".")
        if "scale" in leaf:
            leaves.setdefault(module, []).append(leaf)
        elif _PACKED.search(leaf) or tensor.dtype.startswith("F8_") or (tensor.dtype, leaf) == ("I8", "weight"):
            quantized.append(tensor.name)
    lacking = []
    for name in quantized:
        module, _, leaf = name.rpartition(".")
        stem = _PACKED.sub("", leaf)  # in weight_scale_inv, gate_up_proj_scales, qscale_weight
        if not any(scale == "scale" or stem in scale for scale in leaves.get(module, ())):
            lacking.append(name)
    if lacking:
        raise ModelError(
            f"The files of '{checkpoint.name}' lack the scales of quantized weights: {first_names(sorted(lacking))}.",
            "Download or copy the checkpoint again.",
        )


def num_mtp_layers(text: Any) -> int:
    """Return the number of layers of the head that predicts several tokens (MTP) by a text model's configuration."""
    for name in MTP_COUNTS:
        number = getattr(text, name, None)
        if isinstance(number, int):
            return number
    return 0


def _of_layers(names: Sequence[str], model: Any, backbone: nn.Module, layers: str | None) -> list[str]:
    """Return the names of tensors inside of the layer list, at any index.

    Layers of a head that predicts several tokens, which may stand behind the others, are not among them.
    """
    text = model.config.get_text_config()
    number = getattr(text, "num_hidden_layers", None)
    try:
        lists = layer_lists(backbone, number, layers)
    except ModelError:  # opening the model says so
        return []
    prefix = next((f"{path}." for path, module in model.named_modules() if module is backbone and path), "")
    paths = "|".join(re.escape(path) for path in lists)
    inside = re.compile(rf"(?:{re.escape(prefix)})?(?:{paths})\.(\d+)\.")
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
        return  # unpacked as it was loaded: the model's own configuration says so no more
    floating = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for tensor in stored_tensors(checkpoint):
        dtype = DTYPES.get(tensor.dtype)
        if tensor.name in floating and (dtype is None or not dtype.is_floating_point or dtype.itemsize < 2):
            raise ModelError(
                f"'{checkpoint.name}' stores '{tensor.name}' as {tensor.dtype}, and its config.json has no "
                "quantization_config that says how to unpack it.",
                "Copy config.json again from where the weights come from.",
            )
