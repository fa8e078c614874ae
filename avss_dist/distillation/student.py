"""The student of a distillation: weights that are trained, learning rate, and the written checkpoint."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from avss_dist.distillation.loss import Predict
from avss_dist.distillation.pair import ALL, LORA, ModelPair
from avss_dist.distillation.record import DistillRecord, write_card, write_record
from avss_dist.models.checkpoints import Checkpoint, locate, stored_tensors
from avss_dist.models.loading import load_model
from avss_dist.models.safetensors import DTYPES, floating_dtype, read_tensor, tensors_of, weight_files
from avss_dist.models.size import token_embeddings
from avss_dist.system.files import staged_folder

STEP_SIZES = {ALL: 1e-3, LORA: 5e-3}
"""Default learning rate by what is trained, divided by the size of the student's weights."""
LEAST_WEIGHT = 1e-3  # size of weights, of which the learning rate is a share: Adafactor's epsilon_2
_VALUES_READ = 1 << 18  # of each matrix, in whole rows, to tell the size of its weights


def default_learning_rate(student: Checkpoint, train: str) -> float:
    """Return a learning rate in proportion to the size of the student's weights, with two significant digits.

    A step of Adam changes every weight by about the learning rate, however small the gradient is, and the weights of
    one model may be twelve times as large as another's. Adafactor scales the steps of each tensor by its root mean
    square (Shazeer and Stern 2018, arXiv 1804.04235, section 8). Here, one rate for all follows from the median over
    the matrices, of the first rows of each as stored.

    Args:
        train: one of `core.settings.TRAINED`.
    """
    sizes = []
    for stored in chain.from_iterable(map(tensors_of, weight_files(Path(student.folder)))):
        dtype = DTYPES.get(stored.dtype)
        if len(stored.shape) > 1 and stored.size and dtype and dtype.is_floating_point:
            rows, *of_row = stored.shape
            first = min(rows, max(1, _VALUES_READ // math.prod(of_row)))  # rows, or experts
            part = replace(stored, shape=(first, *of_row), size=stored.size // rows * first)
            sizes.append(read_tensor(part).float().square().mean().sqrt().item())
    return float(f"{STEP_SIZES[train] * max(median(sizes), LEAST_WEIGHT):.1e}")


def choose_trained(model: Any, train: str, rank: int) -> Any:
    """Return the model to train. Weights that are not trained require no gradient.

    Args:
        model: the student, or its skeleton on the meta device.
        train: one of `core.settings.TRAINED`.
        rank: rank of the adapter for `LORA`.
    """
    if train == LORA:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    model.requires_grad_(True)
    embeddings, head = token_embeddings(model), model.get_output_embeddings()
    if isinstance(embeddings, nn.Module) and getattr(head, "weight", None) is getattr(embeddings, "weight", model):
        embeddings.requires_grad_(False)
    return model


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
