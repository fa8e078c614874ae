"""Choice of the weights that distillation trains: all, or a low-rank adapter."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from avss_dist.core.settings import TRAINED
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.safetensors import DTYPES, read_tensor, tensors_of, weight_files
from avss_dist.models.size import token_embeddings

ALL, LORA = TRAINED
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
