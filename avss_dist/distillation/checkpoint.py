"""The trained model: loaded from the best checkpoint of a training, and written as a checkpoint like the student's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from avss_dist.distillation.loss import Predict
from avss_dist.distillation.pair import ModelPair
from avss_dist.distillation.record import DistillRecord, write_card, write_record
from avss_dist.distillation.trained import LORA
from avss_dist.models.checkpoints import Checkpoint, locate, stored_tensors
from avss_dist.models.loading import load_model
from avss_dist.models.safetensors import floating_dtype, weight_files
from avss_dist.system.files import staged_folder

_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "README.md", "COMPLETE", ".*")


def load_trained(models: ModelPair, folder: Path, train: str) -> Any:
    """Load the model of a training's checkpoint in float32, with its adapter merged if it has one."""
    if train == LORA:
        from peft import PeftModel

        student = load_model(models.student, models.settings, head=True)
        return PeftModel.from_pretrained(student, folder).merge_and_unload()
    checkpoint = locate(str(folder))
    assert checkpoint is not None
    return load_model(checkpoint, models.settings, head=True)


def round_to_stored_dtype(model: Any, student: Checkpoint) -> torch.dtype:
    """Round all that a checkpoint of a model holds to the dtype of the student's files, and return this dtype.

    The model keeps its own dtype, and its non-persistent buffers (rotary frequencies) their values, so that it computes
    what the written files give once they are loaded in that dtype.
    """
    dtype = floating_dtype(stored_tensors(student))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return dtype


def autocast(predict: Predict, models: ModelPair) -> Predict:
    """Return predictions that are computed in the dtype of training."""

    def run(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast(models.device.type, torch.bfloat16, enabled=models.bfloat16):
            return predict(ids, mask).float()

    return run


def write_distilled(student: Checkpoint, model: Any, output: Path, record: DistillRecord) -> None:
    """Write a checkpoint: the model's weights, the student's other files, a model card and the record.

    Args:
        output: folder that does not exist or is empty; it appears when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    with staged_folder(output) as staged:
        model.cpu().save_pretrained(staged)
        for file in sorted(student.folder.iterdir()):
            if file.is_file() and not any(file.match(pattern) for pattern in _NOT_COPIED):
                shutil.copyfile(file, staged / file.name)
        for file in weight_files(staged):
            shutil.copymode(staged / "config.json", file)  # safetensors lets nobody else read them
        write_record(staged, record)
        write_card(student.folder, staged, record)
