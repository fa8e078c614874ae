"""Pruned checkpoints: a folder like the original's, without some layers or routed experts. No model is loaded for that.

Skeletons of both models prove that the remaining layers have the same modules, shapes and settings as before, but for
the number of experts, and the outputs of both are compared (`largest_difference`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from huggingface_hub import metadata_load

from avss_dist.core.devices import available_memory, devices_here, pick_device
from avss_dist.core.errors import AvssError, ConfigError, ModelError, explain_unwritable
from avss_dist.core.files import staged_folder
from avss_dist.core.intervention import Removals, count_removed
from avss_dist.core.settings import Settings
from avss_dist.core.text import basename, describe_layers, describe_rows, escape_markdown, printable
from avss_dist.core.values import JsonObject, NewObject
from avss_dist.corpus.seen import describe_corpus
from avss_dist.models.change.experts import require_experts
from avss_dist.models.change.patches import Patch, patch_changes
from avss_dist.models.change.removal import removal_changes
from avss_dist.models.checkpoint.layer_kinds import describe_misread, rules_of
from avss_dist.models.checkpoint.loading import forward_function, has_head, load_model, open_module, quiet, text_config
from avss_dist.models.checkpoint.locate import PICKLED, VERIFIED, Checkpoint, read_config, resolve
from avss_dist.models.checkpoint.quantization import can_unpack, quantization_method, ready_quantizer
from avss_dist.models.checkpoint.size import footprint
from avss_dist.models.checkpoint.weight_files import WEIGHTS, weight_files
from avss_dist.models.forward import changing
from avss_dist.models.structure.layers import first_tensor
from avss_dist.partition.catalog import LAYERWISE
from avss_dist.partition.choose import place
from avss_dist.partition.execution import Execution
from avss_dist.partition.replica import open_replica
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan, describe_reason
from avss_dist.plans.seen import read_seen, write_seen
from avss_dist.pruning.configuration import write_config
from avss_dist.pruning.quantization import FILES, renumber_quantization, require_same_modules
from avss_dist.pruning.repair.registry import RepairRecord, read_repairs, write_repairs
from avss_dist.pruning.repair.repair import Repaired
from avss_dist.pruning.weights import LayerNames, StoredWeights, copy_weights

_NOT_COPIED = (
    *(WEIGHTS, *PICKLED, "*.gguf", "*.safetensors.index.json", "*.bin.index.json", "config.json", "README.md"),
    VERIFIED,  # a comparison of the original says nothing about the pruned one
)


def prune(
    model: str,
    plan: Plan,
    output: str | Path,
    *,
    repair: Repaired | None = None,
    execution: Execution | None = None,
    trust_remote_code: bool = False,
) -> NewObject:
    """Write a checkpoint without the plan's layers and experts, and verify it against the original.

    Args:
        model: hub id or folder of the checkpoint that the plan is for.
        output: folder that does not exist or is empty; it appears when it is complete.
        repair: fitted repair of the remaining layers; none by default.
        execution: ``partition`` (single or streaming) and memory limits for the comparison; chosen by default.

    Returns:
        ``folder``; ``bytes`` of weights; ``difference``: largest difference between the outputs of the last layer, in
        float32, of the pruned checkpoint and of the original with the layers skipped, the experts masked and the
        weights repaired, or None if the models neither fit in memory nor can be streamed; ``notes``: limits of that
        comparison; ``repair``: the `RepairRecord`, or None.

    Raises:
        PlanError: the plan is for another model, the family cannot be pruned or repaired (the message says why), or the
            folder is not empty.
        ModelError: the checkpoint cannot be read.
        StorageFull: there is no space left.
    """
    settings = Settings(dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
    output = Path(output)
    require_free(output)
    checkpoint = resolve(model, trust_remote_code=trust_remote_code)
    _require_planned(checkpoint, plan)
    with explain_unwritable(output, "Name another folder with `output`.", PlanError), staged_folder(output) as staged:
        write_config(checkpoint, plan, staged, settings)
        weights = StoredWeights.of_checkpoint(checkpoint, plan, settings)
        replaced = repair.tensors if repair else {}
        size = copy_weights(checkpoint, weights, replaced, staged)
        _copy_files(checkpoint, weights.layers, staged)
        difference, remarks = _compare(checkpoint, weights.layers, replaced, staged, settings, execution or Execution())
        record = None
        misread = describe_misread(rules_of(text_config(checkpoint)), plan.keep)
        if weights.has_mtp_head:
            remarks.append(_describe_mtp_head(plan))
        notes = [*remarks, *(sentence for sentence in misread if sentence not in plan.findings)]
        if repair:
            record = repair.record
            notes = [*repair.notes, *notes]
        (staged / "README.md").write_text(model_card(checkpoint, plan, notes, record), encoding="utf-8")
        write_seen(staged, [*read_seen(checkpoint.folder), *plan.seen])
        if record:
            write_repairs(staged, [*read_repairs(checkpoint.folder), record])
    return {"folder": str(output), "bytes": size, "difference": difference, "notes": notes, "repair": record}


def _describe_mtp_head(plan: Plan) -> str:
    """Return a sentence on the head that predicts several tokens (MTP) of a checkpoint that has one."""
    if plan.experts:
        return "The head that predicts several tokens (MTP) is left out, as its router would be wider than the others."
    return "The head that predicts several tokens (MTP) is kept as it was; it was trained behind the whole model."


def require_free(output: Path) -> None:
    """Raise PlanError if a folder is not empty, or is the current directory."""
    if output.exists():
        is_empty = output.is_dir() and not any(output.iterdir())
        if not is_empty:
            raise PlanError(f"{output} exists already, and is not empty.", "Name another folder with `output`.")
    if output.resolve() == Path.cwd():
        raise PlanError(
            f"{output} is the folder that you are in; it would be replaced.", "Name a new one with `output`."
        )


def _require_planned(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise PlanError if a plan is for another checkpoint, or the checkpoint cannot be copied."""
    require_copyable(checkpoint)
    if plan.revision is not None and plan.revision != checkpoint.revision:
        raise PlanError(
            f"The plan is for {plan.model} at {plan.revision[:12]}; '{checkpoint.name}' is at "
            f"{checkpoint.revision[:12]}.",
            "Score this checkpoint, and make a plan of its own.",
        )


def require_copyable(checkpoint: Checkpoint) -> None:
    """Raise PlanError for a .gguf file, or a link to a file outside of the checkpoint, whose content would be copied.

    Links of a snapshot in the hub's cache to files of the same repository are allowed.
    """
    if checkpoint.gguf:
        raise PlanError(
            f"'{checkpoint.name}' is a .gguf file.", "Prune the checkpoint in safetensors that it was made of."
        )
    folder = checkpoint.folder.resolve()
    own_folders = [folder]
    if folder.parent.name == "snapshots":
        own_folders.append(folder.parents[1] / "blobs")
    files = [*_other_files(folder), folder / "config.json", folder / "README.md", *weight_files(folder)]
    for file in dict.fromkeys(files):
        target = file.resolve()
        if not any(target.is_relative_to(own_folder) for own_folder in own_folders):
            raise PlanError(
                f"{file.relative_to(folder)} of '{checkpoint.name}' is a link to {target}, outside of the checkpoint.",
                "Put the file itself into the folder if it belongs to the model, or remove the link.",
            )


def require_prunable(checkpoint: Checkpoint, plan: Plan, settings: Settings) -> None:
    """Raise PlanError if a checkpoint cannot be pruned by a plan, as far as its headers tell. Nothing is written."""
    _require_planned(checkpoint, plan)
    with TemporaryDirectory() as folder:
        write_config(checkpoint, plan, Path(folder), settings)
    StoredWeights.of_checkpoint(checkpoint, plan, settings)


def _other_files(folder: Path) -> list[Path]:
    """Return the files that are copied as they are."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and _is_copied(file)]


def _is_copied(file: Path) -> bool:
    """Whether a file of a checkpoint is copied as it is, by its name."""
    if file.name.startswith("."):
        return False
    return not any(file.match(pattern) for pattern in _NOT_COPIED)


def _copy_files(checkpoint: Checkpoint, names: LayerNames, folder: Path) -> None:
    """Copy all files but configuration, weights and model card, and renumber quantization settings."""
    for file in _other_files(checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        quantization = renumber_quantization(json.loads(file.read_text(encoding="utf-8")), names)
        file.write_text(json.dumps(quantization, indent=2) + "\n")


def _compare(
    checkpoint: Checkpoint, names: LayerNames, replaced: Patch, folder: Path, settings: Settings, execution: Execution
) -> tuple[float | None, list[str]]:
    """Return the largest difference of outputs, see `prune`, and notes on the comparison."""
    config = text_config(checkpoint)
    is_quantized = quantization_method(config) is not None
    notes = []
    if is_quantized:
        notes.append(require_same_modules(checkpoint, names, folder, settings))
    try:
        with quiet():
            if is_quantized:
                settings = replace(settings, dequantize=can_unpack(checkpoint, config))
                ready_quantizer(checkpoint, config, settings)
    except ModelError as error:
        return None, [*notes, f"Outputs could not be compared here: {error}"]
    difference = largest_difference(checkpoint, names.plan, replaced, folder, settings, execution)
    if difference is None:
        notes.append("There was no room to compare the outputs of both models.")
    elif settings.dequantize:
        notes.append("Outputs were compared with the weights dequantized.")
    return difference, notes


TOLERANCE = 1e-5
"""Largest difference of outputs in float32, as a multiple of the largest output."""
CHECKED_TOKENS = torch.arange(24).reshape(2, 12) + 5


def largest_difference(
    checkpoint: Checkpoint, plan: Plan, replaced: Patch, folder: Path, settings: Settings, execution: Execution
) -> float | None:
    """Return the largest difference between the outputs of both backbones' last layers on some tokens.

    Args:
        plan: its layers are skipped in the original, and its experts masked.
        replaced: weights of the original to replace.
        folder: folder of the pruned checkpoint.
        settings: settings with which both compute.
        execution: memory limits for streaming, which is used if the models do not fit in memory twice, or on request.

    Returns:
        None if the models do not fit in memory and have no head, without which they cannot be streamed.

    Raises:
        PlanError: the outputs differ.
        ModelError: one of them cannot be opened, or returns no hidden states.
    """
    fit_twice = 2 * footprint(checkpoint, settings).weight_bytes <= available_memory() // 2
    is_streamed = not fit_twice or execution.partition == LAYERWISE
    pruned = resolve(str(folder), trust_remote_code=settings.trust_remote_code)
    pruned = replace(pruned, name=f"{checkpoint.name} without these {'experts' if plan.experts else 'layers'}")
    if is_streamed and not (has_head(text_config(checkpoint)) and has_head(text_config(pruned))):
        return None
    settings = replace(settings, layers=plan.layers)
    if is_streamed:
        expected = _streamed_output(checkpoint, settings, plan.drop, replaced, execution)
        output = _streamed_output(pruned, settings, (), {}, execution)
    else:
        expected = _output(checkpoint, settings, plan.drop, replaced)
        output = _output(pruned, settings, (), {})
    difference = float((expected - output).abs().max())
    # A difference of NaN is not the same either.
    is_same = difference <= TOLERANCE * float(expected.abs().max())
    if not is_same:
        raise PlanError(
            f"The pruned checkpoint would compute something else than '{checkpoint.name}' with these "
            f"{'experts masked' if plan.experts else 'layers skipped'}: outputs differ by {difference:.3g}.",
            "Layers of this family depend on each other; evaluate the plan without a checkpoint.",
        )
    return difference


def _output(checkpoint: Checkpoint, settings: Settings, drop: Removals, patch: Patch) -> torch.Tensor:
    """Return the output of the last layer for the checked tokens, of a model that is loaded whole."""
    backbone = open_module(load_model(checkpoint, settings), layers=settings.layers)
    layers = backbone.layers
    require_experts(layers, drop)
    changes = [*patch_changes(layers, patch), *removal_changes(layers, drop)]
    with torch.no_grad(), changing(changes):
        hidden = first_tensor(forward_function(backbone.module)(CHECKED_TOKENS, None))
    return _require_hidden_states(hidden, checkpoint)


def _streamed_output(
    checkpoint: Checkpoint, settings: Settings, drop: Removals, patch: Patch, execution: Execution
) -> torch.Tensor:
    """Return the output of the last layer for the checked tokens, of a model whose weights are streamed."""
    streamed = Execution(partition=LAYERWISE, max_memory=execution.max_memory)
    placement = place(checkpoint, settings, streamed, devices_here(pick_device(settings.device).type), head=True)
    with closing(open_replica(checkpoint, settings, placement, head=True)) as replica:
        model = replica.language_model
        assert model is not None
        forward = forward_function(model.backbone.module)
        with model.without(drop), model.patched(patch):
            (hidden,) = model.together([lambda: first_tensor(forward(CHECKED_TOKENS, None))])
    return _require_hidden_states(hidden, checkpoint)


def _require_hidden_states(hidden: torch.Tensor | None, checkpoint: Checkpoint) -> torch.Tensor:
    """Return the hidden states that a model has returned. Raise ModelError if there are none."""
    if hidden is None:
        raise ModelError(f"'{checkpoint.name}' returns no hidden states.")
    return hidden


_BASE = re.compile(r"Base model at (\w+)\.")
LAYERS_TAG = "layer-pruning"
EXPERTS_TAG = "expert-pruning"
LICENSE = ("license", "license_name", "license_link")


def model_card(
    checkpoint: Checkpoint, plan: Plan, notes: list[str] | None = None, repair: RepairRecord | None = None
) -> str:
    """Return a model card with the removed layers and experts and the reason, the repair, and the license."""
    if checkpoint.source == "hub":
        name = checkpoint.name
    else:
        name = Path(checkpoint.named_path).absolute().name
    if plan.experts:
        removed = count_removed(plan.drop)
    else:
        removed = f"{len(plan.drop)} of its {plan.num_layers} layers"
    reason = escape_markdown(describe_reason(plan.why))
    if plan.run_id:
        reason += f", of run {plan.run_id}"
    lines = list(_chosen_on(plan))
    lines += [f"Finding: {finding}" for finding in plan.findings]
    lines += notes or []
    if repair:
        lines += repair.describe()
    lines.append(f"Evaluated: {' '.join(plan.evaluated) or 'not when it was planned.'}")
    items = [f"- {escape_markdown(line)}\n" for line in lines]
    sections = [
        f"---\n{_card_fields(checkpoint, plan)}\n---",
        f"# {escape_markdown(name)} without {removed}",
        _describe_changes(plan, repair),
        f"Chosen {reason}. Base model at {checkpoint.revision}.",
        "".join(items),
    ]
    return "\n\n".join(sections) + "\nWritten by avss_dist.\n"


def _card_fields(checkpoint: Checkpoint, plan: Plan) -> str:
    """Return the fields of a model card, as the hub reads them."""
    base = checkpoint.name
    if checkpoint.source != "hub":
        base = str(Path(checkpoint.named_path).absolute())  # A card is read from other folders, too.
    tags = ["pruned"]
    if plan.dropped_layers:
        tags.append(LAYERS_TAG)
    if plan.experts:
        tags.append(EXPERTS_TAG)
    fields = {
        "base_model": base,
        "base_model_relation": "finetune",  # the nearest of the relations that the hub knows
        **source_license(checkpoint.folder),
        "library_name": "transformers",
        "tags": tags,
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return printable("\n".join(lines))


def _chosen_on(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each text that was read to choose what is removed, with its rows."""
    for text in plan.seen:
        rows = "all rows"
        if text.max_sequences is not None:
            rows = describe_rows(text.skip_sequences, text.max_sequences)
        yield f"Chosen on {describe_corpus(text.corpus)} ({rows})."


def _describe_changes(plan: Plan, repair: RepairRecord | None) -> str:
    """Return sentences with the removed layers and experts, and the changed weights."""
    sentences = []
    if plan.dropped_layers:
        layers = ", ".join(str(layer) for layer in plan.dropped_layers)
        sentences.append(f"Removed, counted from 0: {layers}.")
    if plan.experts:
        by_layer = []
        for layer, experts in plan.experts.items():
            by_layer.append(f"layer {layer}: {', '.join(str(expert) for expert in experts)}")
        sentences.append(f"Removed routed experts, both counted from 0: {'; '.join(by_layer)}.")
    changed = [cut.after for cut in repair.cuts if cut.changed] if repair else []
    borrowing = [cut.after for cut in repair.cuts if cut.borrowed] if repair else []
    if changed:
        sentences.append(f"Of the others, the MLP's last map is changed in {describe_layers(changed)}.")
        if borrowing:
            sentences.append(f"Neurons of removed layers took the place of some in {describe_layers(borrowing)}.")
    else:
        sentences.append("The others are unchanged.")
    return " ".join(sentences)


def pruned_from(folder: Path) -> tuple[str, str] | None:
    """Return base model and revision from the card of a pruned checkpoint, or None for another checkpoint."""
    card = folder / "README.md"
    try:
        fields = metadata_load(card) or {}
        text = card.read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    tags = set(fields.get("tags") or ())
    if not tags.intersection((LAYERS_TAG, EXPERTS_TAG)):
        return None
    base = fields.get("base_model")
    revision = _BASE.search(text)
    if not isinstance(base, str) or not base or not revision:
        return None
    return base, revision[1]


def find_base(checkpoint: Checkpoint, label: str, hint: str) -> Checkpoint | None:
    """Return the base model that a pruned checkpoint's card names, beside the checkpoint or where the card says.

    Args:
        label: name of the checkpoint in messages.
        hint: what to do if the base model is not there.

    Returns:
        None for a model that `prune` has not written.

    Raises:
        ConfigError: the base model is not there, or has changed.
    """
    folder = checkpoint.folder
    if not folder.is_dir():
        return None
    card = pruned_from(folder)
    if card is None:
        return None
    name, revision = card
    places = [str(folder.parent / basename(name)), name]
    if Path(name).is_absolute():
        places.reverse()
    base = None
    for spec in places:
        with suppress(AvssError):
            base = resolve(spec, trust_remote_code=checkpoint.trust_remote_code)
            if base.revision == revision:
                return base
    if base is None:
        raise ConfigError(f"{name}, the base model of {label}, is not found.", hint)
    raise ConfigError(f"{name} is at {base.revision[:12]}, and {label} was made of it at {revision[:12]}.", hint)


def source_license(folder: Path) -> NewObject:
    """Return the license that a checkpoint's model card names, else its configuration. Empty if neither does."""
    unreadable = (OSError, ValueError, RecursionError, yaml.YAMLError, ModelError)
    with suppress(*unreadable):
        fields = metadata_load(folder / "README.md") or {}
        if fields.get("license"):
            return _license_fields(fields)
    with suppress(*unreadable):
        config = read_config(folder, folder.name)
        if config.get("license"):
            return _license_fields(config)
    return {}


def _license_fields(values: JsonObject) -> dict[str, str]:
    """Return those of the values that name a license."""
    return {key: str(values[key]) for key in LICENSE if values.get(key)}
