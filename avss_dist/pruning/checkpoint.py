"""Pruned checkpoints: a folder like the original's, without some layers. No weight is loaded: tensors are copied.

That the layers which stay are what they were is proved on skeletons of both models: the same modules, shapes and
settings, layer by layer; and outputs are compared (`comparison`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from avss_dist.errors import ModelError, unwritable
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import quiet, skeleton, text_config, without_head
from avss_dist.models.patching import Patch
from avss_dist.models.pickled import PICKLED
from avss_dist.models.quantization import KEYS, comparable, quantization_method, require_known
from avss_dist.models.safetensors import WEIGHTS
from avss_dist.pruning.comparison import largest_difference
from avss_dist.pruning.model_card import model_card
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.quantization import FILES, LayerNames, renumber_quantization, require_same_modules
from avss_dist.pruning.repair.record import read_repairs, write_repairs
from avss_dist.pruning.repair.repair import Repair, Repaired, repair_layers
from avss_dist.pruning.repair.rivals import require_foldable
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.weights import StoredWeights, copy_weights
from avss_dist.settings import Execution, Settings
from avss_dist.system.staging import staged_folder

COUNTS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "first_num_dense_layers")
_NO_LAYERS = re.compile(r"token|architectures|rope|section|words|factor|label|kernel|size", re.IGNORECASE)
_INDICES = re.compile(r"layer|idx|indices|index", re.IGNORECASE)
_OWN_INDEX = re.compile(r"^(layer|block)?_?(idx|index|id|number)$")
_NOT_COPIED = (WEIGHTS, *PICKLED, "*.gguf", "*.safetensors.index.json", "*.bin.index.json", "config.json", "README.md")


def prune(
    model: str,
    plan: Plan,
    output: str | Path,
    *,
    repair: Repair | Repaired | None = None,
    execution: Execution | None = None,
    trust_remote_code: bool = False,
    copied: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the checkpoint without the plan's layers, and prove that it is one.

    Args:
        model: hub id, folder: that of the plan, whatever its name.
        output: a folder that does not exist, or is empty; it appears when it is whole.
        repair: how what the layers did is given back by those that stay, or the weights that were fitted for that; not
            at all by default.
        execution: with ``partition`` single or streaming, and the memory for it, for the repair and the comparison; it
            is chosen by default.
        copied: called with the bytes of weights that were copied, now and then.

    Returns:
        ``folder``; ``bytes`` of weights; ``difference``: the largest between outputs of the last layer, of the pruned
        checkpoint and of the original with the layers skipped and the weights repaired, in float32; None where both do
        not fit in memory, and cannot be streamed; ``notes``: what that comparison cannot see; ``repair``: what the
        checkpoint says of its repair, a `RepairRecord` or None.

    Raises:
        PlanError: the plan is of another model, the family cannot be pruned or repaired (the message says why), or the
            folder is not empty.
        ModelError: the checkpoint cannot be read.
        CorpusError: the text of the repair cannot be read, or is too short.
        StorageFull: there is no space left.
    """
    settings = Settings(dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
    output = Path(output)
    require_free(output)
    if repair is not None:
        require_foldable(repair.by if isinstance(repair, Repair) else repair.record.repair)
    checkpoint = resolve(model, trust_remote_code=trust_remote_code)
    _require_planned(checkpoint, plan)
    notes: list[str] = []
    try:
        with staged_folder(output) as staged:
            _write_config(checkpoint, plan, staged, settings)
            weights = StoredWeights.of(checkpoint, plan, settings)
            if isinstance(repair, Repair):
                repaired: Repaired | None = repair_layers(checkpoint, plan, repair, weights.read, execution)
            else:
                repaired = repair
            notes += repaired.notes if repaired else []
            replaced = repaired.tensors if repaired else {}
            size = copy_weights(checkpoint, weights, replaced, staged, copied)
            _copy_files(checkpoint, plan, staged, settings)
            difference, seen = _compare(checkpoint, plan, replaced, staged, settings, execution or Execution())
            notes += seen
            _write_card(checkpoint, plan, staged, notes, repaired)
    except OSError as error:
        raise unwritable(output, error, "Name another folder with `output`.", PlanError) from error
    record = repaired.record if repaired else None
    return {"folder": str(output), "bytes": size, "difference": difference, "notes": notes, "repair": record}


def require_free(output: Path) -> None:
    """Refuse a folder that holds something, or that somebody stands in.

    Raises:
        PlanError: it is one.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PlanError(f"{output} exists already, and is not empty.", "Name another folder with `output`.")
    if output.resolve() == Path.cwd():
        raise PlanError(
            f"{output} is the folder that you are in; it would be replaced.", "Name a new one with `output`."
        )


def _require_planned(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse a checkpoint that a plan is not of, or that has no safetensors."""
    if checkpoint.gguf:
        raise PlanError(
            f"'{checkpoint.name}' is a .gguf file.", "Prune the checkpoint in safetensors that it was made of."
        )
    if plan.revision is not None and plan.revision != checkpoint.revision:
        raise PlanError(
            f"The plan is for {plan.model} at {plan.revision[:12]}; '{checkpoint.name}' is at "
            f"{checkpoint.revision[:12]}.",
            "Score this checkpoint, and make a plan of its own.",
        )


def require_prunable(checkpoint: Checkpoint, plan: Plan, settings: Settings) -> None:
    """Refuse a checkpoint that cannot be without a plan's layers, as far as its headers tell; nothing is left of it.

    Raises:
        PlanError: it cannot; the message says why.
    """
    _require_planned(checkpoint, plan)
    with TemporaryDirectory() as folder:
        _write_config(checkpoint, plan, Path(folder), settings)
    StoredWeights.of(checkpoint, plan, settings)


def _write_config(checkpoint: Checkpoint, plan: Plan, folder: Path, settings: Settings) -> None:
    """Write the ``config.json`` that gives each layer that stays the settings that it had.

    Raises:
        PlanError: none does.
    """
    plan.require_whole_layers("No configuration has layers without one, and zeros in its weights would remove nothing")
    whole = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    text = whole.get_text_config()
    _refuse(text, plan)
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    part = next((raw[n] for n in ("text_config", "llm_config", "decoder") if text is not whole and n in raw), raw)
    part |= _settings_by_layer(text.to_dict(), plan)
    part[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(plan.keep)
    if method := quantization_method(whole):
        require_known(checkpoint, method)
        names = LayerNames.of(checkpoint, plan, settings)
        for settings_of in [raw] if part is raw else [raw, part]:
            settings_of |= {key: renumber_quantization(settings_of[key], names) for key in KEYS if key in settings_of}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    try:
        less = text_config(replace(checkpoint, path=str(folder)), trust_remote_code=settings.trust_remote_code)
    except ModelError as error:
        raise _unlike(whole, error.message) from error
    _require_same_layers(whole, less, plan, settings)


def _refuse(text: Any, plan: Plan) -> None:
    number = getattr(text, "num_hidden_layers", None)
    if number != plan.num_layers:
        raise PlanError(f"The plan is for {plan.num_layers} layers; the model has {number}.", "Make a plan of its own.")
    for name, why in (
        ("num_kv_shared_layers", "its last layers use the keys and values of earlier ones"),
        ("scale_attn_by_inverse_layer_idx", "a layer's attention is scaled by its place"),
    ):
        if getattr(text, name, None):
            raise PlanError(f"A {text.model_type} with {name} cannot be pruned: {why}.")


def _settings_by_layer(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The settings by layer of a configuration, for the layers that stay."""
    shortened: dict[str, Any] = {}
    for name, value in config.items():
        if name in COUNTS and isinstance(value, int):
            shortened[name] = sum(layer < value for layer in plan.keep)
        elif isinstance(value, list) and not _NO_LAYERS.search(name):
            shortened[name] = _shortened_list(name, value, plan)
        elif isinstance(value, Mapping):
            shortened[name] = _shortened_mapping(value, plan)
    return {name: value for name, value in shortened.items() if value is not None}


def _shortened_list(name: str, value: list[Any], plan: Plan) -> list[Any] | None:
    """A list by layer, or of layers' indices, for the layers that stay; None of another."""
    if len(value) == plan.num_layers:
        return [value[layer] for layer in plan.keep]
    if _INDICES.search(name) and _are_layers(value, plan.num_layers):
        return [plan.keep.index(layer) for layer in value if layer in plan.keep]
    return None


def _shortened_mapping(value: Mapping[Any, Any], plan: Plan) -> dict[str, Any] | None:
    """What is said of layers by their indices, for the layers that stay; None of another mapping."""
    of = {str(layer): i for i, layer in enumerate(plan.keep)}
    if not value or not {str(key) for key in value} <= {str(layer) for layer in range(plan.num_layers)}:
        return None
    return {str(of[str(key)]): settings for key, settings in value.items() if str(key) in of}


def _are_layers(values: list[Any], num_layers: int) -> bool:
    return bool(values) and all(type(value) is int and 0 <= value < num_layers for value in values)


def _require_same_layers(whole: Any, less: Any, plan: Plan, settings: Settings) -> None:
    """Compare the modules of both models: the same kinds, shapes and settings, layer by layer."""
    models = [without_head(skeleton(config, settings, torch.float32)) for config in (whole, less)]
    lists = []
    for model, number in zip(models, (plan.num_layers, len(plan.keep)), strict=True):
        layers = dict(model.named_modules()).get(plan.layers)
        if not isinstance(layers, nn.ModuleList) or len(layers) != number:
            raise PlanError(
                f"The layers of a {whole.model_type} are not the {number} modules of '{plan.layers}', each on its own.",
                "None can be taken out of a checkpoint.",
            )
        lists.append(layers)
    before, after = lists
    for new, old in enumerate(plan.keep):
        seen = zip(_described(before[old], old), _described(after[new], new), strict=False)
        for (path, what, a), (other, _, b) in seen:
            if path != other or a != b:
                raise _unlike(whole, f"layer {old} would have {path} {what} {b!r} for {a!r} as layer {new}")
        if len(list(before[old].modules())) != len(list(after[new].modules())):
            raise _unlike(whole, f"layer {old} would have other modules as layer {new}")


def _unlike(config: Any, why: str) -> PlanError:
    return PlanError(
        f"A pruned {config.model_type} would not be what it was: {why}.",
        "Its configuration tells layers apart by their place: drop others, or evaluate the plan without a checkpoint.",
    )


def _described(layer: nn.Module, index: int) -> Iterator[tuple[str, str, Any]]:
    """(module path, what, value) of all that makes a layer what it is, but for its own index."""
    for path, module in layer.named_modules():
        yield path, "kind", type(module).__name__
        for name, parameter in sorted(module._parameters.items()):
            yield path, name, None if parameter is None else tuple(parameter.shape)
        for name, value in sorted(vars(module).items()):
            own = _OWN_INDEX.match(name) and value in (index, index + 1)
            if not name.startswith("_") and not own and isinstance(value, (int, float, str, bool, tuple)):
                yield path, name, value


def _copy_files(checkpoint: Checkpoint, plan: Plan, folder: Path, settings: Settings) -> None:
    """Everything but configuration, weights and model card."""
    for file in checkpoint.folder.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _NOT_COPIED) and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    found = [name for name in FILES if (folder / name).is_file()]
    if not found:
        return
    names = LayerNames.of(checkpoint, plan, settings)
    for name in found:
        quantization = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(renumber_quantization(quantization, names), indent=2) + "\n")


def _compare(
    checkpoint: Checkpoint, plan: Plan, replaced: Patch, folder: Path, settings: Settings, execution: Execution
) -> tuple[float | None, list[str]]:
    """The largest difference of outputs, see `prune`, and what is to be known of the comparison."""
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    notes = [require_same_modules(checkpoint, plan, folder, settings)] if quantization_method(config) else []
    try:
        with quiet():
            settings = comparable(checkpoint, config, settings)
    except ModelError as error:
        return None, [*notes, f"Outputs could not be compared here: {error}"]
    difference = largest_difference(checkpoint, plan, replaced, folder, settings, execution)
    if difference is None:
        notes.append("There was no room to compare the outputs of both models.")
    elif settings.dequantize:
        notes.append("Outputs were compared with the weights dequantized.")
    return difference, notes


def _write_card(checkpoint: Checkpoint, plan: Plan, folder: Path, notes: list[str], repaired: Repaired | None) -> None:
    """The model card, and what is to be known of all repairs."""
    record = repaired.record if repaired else None
    (folder / "README.md").write_text(model_card(checkpoint, plan, notes, record), encoding="utf-8")
    if record:
        write_repairs(folder, [*read_repairs(checkpoint.folder), record])
