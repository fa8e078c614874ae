"""Pruned checkpoints: a folder like the original's, without some layers or routed experts. No model is loaded for that.

Skeletons of both models prove that the remaining layers have the same modules, shapes and settings as before, but for
the number of experts, and outputs are compared (`comparison`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from avss_dist.core.errors import ModelError, unwritable
from avss_dist.core.settings import Execution, Settings
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import quiet, text_config
from avss_dist.models.patching import Patch
from avss_dist.models.pickled import PICKLED
from avss_dist.models.quantization import quantization_method, runnable_settings
from avss_dist.models.safetensors import WEIGHTS, weight_files
from avss_dist.pruning.comparison import largest_difference
from avss_dist.pruning.configuration import write_config
from avss_dist.pruning.model_card import model_card
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.quantization import FILES, LayerNames, renumber_quantization, require_same_modules
from avss_dist.pruning.repair.record import read_repairs, write_repairs
from avss_dist.pruning.repair.repair import Repair, Repaired, repair_layers
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.weights import StoredWeights, copy_weights
from avss_dist.system.files import staged_folder

_NOT_COPIED = (WEIGHTS, *PICKLED, "*.gguf", "*.safetensors.index.json", "*.bin.index.json", "config.json", "README.md")


def prune(
    model: str,
    plan: Plan,
    output: str | Path,
    *,
    repair: Repair | Repaired | None = None,
    execution: Execution | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint without the plan's layers and experts, and verify it against the original.

    Args:
        model: hub id or folder of the checkpoint that the plan is for.
        output: folder that does not exist or is empty; it appears when it is complete.
        repair: repair to fit to the remaining layers, or a fitted repair; none by default.
        execution: ``partition`` (single or streaming) and memory limits for the repair and the comparison; chosen by
            default.

    Returns:
        ``folder``; ``bytes`` of weights; ``difference``: largest difference between the outputs of the last layer, in
        float32, of the pruned checkpoint and of the original with the layers skipped, the experts masked and the
        weights repaired, or None if the models neither fit in memory nor can be streamed; ``notes``: limits of that
        comparison; ``repair``: the `RepairRecord`, or None.

    Raises:
        PlanError: the plan is for another model, the family cannot be pruned or repaired (the message says why), or the
            folder is not empty.
        ModelError: the checkpoint cannot be read.
        CorpusError: the text of the repair cannot be read, or is too short.
        StorageFull: there is no space left.
    """
    settings = Settings(dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
    output = Path(output)
    require_free(output)
    checkpoint = resolve(model, trust_remote_code=trust_remote_code)
    _require_planned(checkpoint, plan)
    notes: list[str] = []
    try:
        with staged_folder(output) as staged:
            write_config(checkpoint, plan, staged, settings)
            weights = StoredWeights.of_checkpoint(checkpoint, plan, settings)
            if isinstance(repair, Repair):
                repaired: Repaired | None = repair_layers(checkpoint, plan, repair, weights.read, execution)
            else:
                repaired = repair
            notes += repaired.notes if repaired else []
            replaced = repaired.tensors if repaired else {}
            size = copy_weights(checkpoint, weights, replaced, staged)
            _copy_files(checkpoint, plan, staged, settings)
            difference, seen = _compare(checkpoint, plan, replaced, staged, settings, execution or Execution())
            notes += seen
            _write_card(checkpoint, plan, staged, notes, repaired)
    except OSError as error:
        raise unwritable(output, error, "Name another folder with `output`.", PlanError) from error
    record = repaired.record if repaired else None
    return {"folder": str(output), "bytes": size, "difference": difference, "notes": notes, "repair": record}


def require_free(output: Path) -> None:
    """Raise PlanError if a folder is not empty, or is the current directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
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
    inside = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    read = (folder / name for name in ("config.json", "README.md"))
    for file in dict.fromkeys([*_other_files(folder), *read, *weight_files(folder)]):
        target = file.resolve()
        if not any(target.is_relative_to(place) for place in inside):
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
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not any(file.match(pattern) for pattern in _NOT_COPIED) and not file.name.startswith(".")
    ]


def _copy_files(checkpoint: Checkpoint, plan: Plan, folder: Path, settings: Settings) -> None:
    """Copy all files but configuration, weights and model card, and renumber quantization settings."""
    for file in _other_files(checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    files = [name for name in FILES if (folder / name).is_file()]
    if not files:
        return
    names = LayerNames.of_checkpoint(checkpoint, plan, settings)
    for name in files:
        quantization = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(renumber_quantization(quantization, names), indent=2) + "\n")


def _compare(
    checkpoint: Checkpoint, plan: Plan, replaced: Patch, folder: Path, settings: Settings, execution: Execution
) -> tuple[float | None, list[str]]:
    """Return the largest difference of outputs, see `prune`, and notes on the comparison."""
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    notes = [require_same_modules(checkpoint, plan, folder, settings)] if quantization_method(config) else []
    try:
        with quiet():
            settings = runnable_settings(checkpoint, config, settings)
    except ModelError as error:
        return None, [*notes, f"Outputs could not be compared here: {error}"]
    difference = largest_difference(checkpoint, plan, replaced, folder, settings, execution)
    if difference is None:
        notes.append("There was no room to compare the outputs of both models.")
    elif settings.dequantize:
        notes.append("Outputs were compared with the weights dequantized.")
    return difference, notes


def _write_card(checkpoint: Checkpoint, plan: Plan, folder: Path, notes: list[str], repaired: Repaired | None) -> None:
    """Write the model card, and the records of all repairs of the checkpoint."""
    record = repaired.record if repaired else None
    (folder / "README.md").write_text(model_card(checkpoint, plan, notes, record), encoding="utf-8")
    if record:
        write_repairs(folder, [*read_repairs(checkpoint.folder), record])
