"""The two models of a distillation, found and checked before weights are loaded, and the student that is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from avss_dist.core.devices import has_fast_bfloat16, pick_device
from avss_dist.core.errors import ConfigError
from avss_dist.core.extras import require_package
from avss_dist.core.files import staged_folder
from avss_dist.core.settings import Settings
from avss_dist.core.text import count_of
from avss_dist.distillation.loss import Predict
from avss_dist.distillation.record import DistillRecord, read_record, write_card, write_record
from avss_dist.models.checkpoint.loading import load_model, load_tokenizer, pin, require_head, text_config
from avss_dist.models.checkpoint.locate import VERIFIED, Checkpoint, find_checkpoint, resolve, stored_tensors
from avss_dist.models.checkpoint.quantization import quantization_method
from avss_dist.models.checkpoint.safetensors import DTYPES, StoredTensor, floating_dtype, read_tensor, tensors_of
from avss_dist.models.checkpoint.size import token_embeddings
from avss_dist.models.checkpoint.weight_files import weight_files
from avss_dist.plans.seen import read_seen, write_seen
from avss_dist.pruning.checkpoint import pruned_from
from avss_dist.requests import TRAINED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from avss_dist.requests import DistillRequest

ALL, LORA = TRAINED
STEP_SIZES = {ALL: 7.5e-4, LORA: 2.5e-3}
"""Default learning rate of one row in a step by what is trained, divided by the size of the student's weights."""
LEAST_WEIGHT = 1e-3  # size of weights, of which the learning rate is a share: Adafactor's epsilon_2
_VALUES_READ = 1 << 18  # of each matrix, in whole rows, to tell the size of its weights
_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "README.md", "COMPLETE", ".*"),
    VERIFIED,  # a comparison of the student before the training says nothing about the one after it
)


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """Student and teacher, resolved but not loaded.

    Attributes:
        settings: settings of the student's passes: float32 weights, rows and length of a rank's training step.
        teacher_settings: settings of the teacher's passes.
        bfloat16: whether passes are computed in bfloat16.
    """

    student: Checkpoint
    teacher: Checkpoint
    settings: Settings
    teacher_settings: Settings
    device: torch.device
    bfloat16: bool


def resolve_pair(request: DistillRequest, kind: str | None = None) -> ModelPair:
    """Find both models, and refuse those that cannot be distilled before anything is loaded.

    Args:
        kind: kind of the devices of the ranks; by default that of this process's device.
    """
    trust_remote_code = request.settings.trust_remote_code
    student = resolve(str(request.student), trust_remote_code=trust_remote_code)
    teacher = resolve(str(request.teacher), trust_remote_code=trust_remote_code)
    student_config = text_config(student)
    teacher_config = text_config(teacher)
    require_head(student.name, student_config)
    require_head(teacher.name, teacher_config)
    if student.gguf or quantization_method(student_config):
        raise ConfigError(
            f"'{student.name}' is quantized; distillation trains weights in float32.",
            "Name the checkpoint in safetensors that it was made of.",
        )
    if request.train == LORA:
        require_package("peft", "`train` lora")
    problems = list(_vocabulary_problems(student, teacher, student_config, teacher_config))
    if request.settings.dtype == "float16":
        problems.append(ConfigError("`dtype` float16 cannot be trained in.", "Set `dtype` bfloat16 or float32."))
    if problems:
        raise ConfigError.combine(problems)
    device = torch.device(kind) if kind else pick_device(request.settings.device)
    bfloat16 = computes_in_bfloat16(request.settings, device.type)
    settings = replace(request.settings, batch_size=request.rows, dtype="float32")
    teacher_settings = replace(settings, dtype="bfloat16" if bfloat16 else "float32", layers=None)
    return ModelPair(
        student=student,
        teacher=teacher,
        settings=pin(settings, student, student_config, device.type),
        teacher_settings=pin(teacher_settings, teacher, teacher_config, device.type),
        device=device,
        bfloat16=bfloat16,
    )


def _vocabulary_problems(
    student: Checkpoint, teacher: Checkpoint, student_config: PreTrainedConfig, teacher_config: PreTrainedConfig
) -> Iterator[ConfigError]:
    """Yield an error if a token has another meaning, or another place among the logits, in one of the models.

    Args:
        student_config, teacher_config: their configurations, of transformers.
    """
    student_logits = student_config.get_text_config().vocab_size
    teacher_logits = teacher_config.get_text_config().vocab_size
    student_tokens = set(load_tokenizer(student).get_vocab().items())
    teacher_tokens = set(load_tokenizer(teacher).get_vocab().items())
    differing = len(student_tokens ^ teacher_tokens)
    if differing or student_logits != teacher_logits:
        yield ConfigError(
            f"'{student.name}' and '{teacher.name}' have different vocabularies: {student_logits:,} and "
            f"{teacher_logits:,} logits, {count_of(differing, 'token')} in one alone. The student learns the teacher's "
            "probability of every token.",
            "Name the model that the student was made of, or another one with its tokenizer, with `teacher`.",
        )


def computes_in_bfloat16(settings: Settings, kind: str) -> bool:
    """Whether passes are computed in bfloat16 on a kind of device."""
    return settings.dtype == "bfloat16" or (settings.dtype == "auto" and has_fast_bfloat16(kind))


def ancestry(models: ModelPair) -> list[str]:
    """Return a note if nothing says that the student was made of the teacher."""
    origin = "it has no model card of avss prune"
    base = pruned_from(models.student.folder)
    if base is not None:
        name, revision = base
        if revision == models.teacher.revision:
            return []
        origin = f"its model card names {name} at {revision[:12]}"
    return [
        f"Nothing says that {models.student.name} was made of {models.teacher.name}: {origin}. "
        "It was distilled all the same."
    ]


def default_learning_rate(student: Checkpoint, train: str, rows: int) -> float:
    """Return a learning rate in proportion to the size of the student's weights, with two significant digits.

    A step of Adam changes every weight by about the learning rate, however small the gradient is, and the weights of
    one model may be twelve times as large as another's. Adafactor scales the steps of each tensor by its root mean
    square (Shazeer and Stern 2018, arXiv 1804.04235, section 8). Here, one rate for all follows from the median over
    the matrices, of the first rows of each as stored. It grows with the square root of the rows in a step (Malladi et
    al. 2022, arXiv 2205.10287, section 5).

    Args:
        train: one of `requests.TRAINED`.
        rows: rows in a training step.
    """
    sizes = []
    for file in weight_files(Path(student.folder)):
        for stored in tensors_of(file):
            dtype = DTYPES.get(stored.dtype)
            is_floating = dtype is not None and dtype.is_floating_point
            if len(stored.shape) > 1 and stored.size and is_floating:
                part = read_tensor(_first_rows(stored))
                sizes.append(part.float().square().mean().sqrt().item())
    rate = STEP_SIZES[train] * max(median(sizes), LEAST_WEIGHT) * math.sqrt(rows)
    return float(f"{rate:.1e}")


def _first_rows(stored: StoredTensor) -> StoredTensor:
    """Return the first rows, or experts, of a tensor: about `_VALUES_READ` values."""
    rows, *row_shape = stored.shape
    number = min(rows, max(1, _VALUES_READ // math.prod(row_shape)))
    return replace(stored, shape=(number, *row_shape), size=stored.size // rows * number)


def choose_trained(model: PreTrainedModel, train: str, rank: int) -> nn.Module:
    """Return the model to train. Weights that are not trained require no gradient.

    Args:
        model: the student, or its skeleton on the meta device.
        train: one of `requests.TRAINED`.
        rank: rank of the adapter for `LORA`.
    """
    if train == LORA:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    model.requires_grad_(True)
    embeddings = token_embeddings(model)
    if isinstance(embeddings, nn.Module) and _is_tied(embeddings, model.get_output_embeddings()):
        embeddings.requires_grad_(False)
    return model


def _is_tied(embeddings: nn.Module, head: object) -> bool:
    """Whether the head of a model has the weight of its embeddings."""
    weight = getattr(embeddings, "weight", None)
    return weight is not None and getattr(head, "weight", None) is weight


def load_trained(models: ModelPair, folder: Path, train: str) -> Any:
    """Load the model of a training's checkpoint in float32, with its adapter merged if it has one."""
    if train == LORA:
        from peft import PeftModel

        student_model = load_model(models.student, models.settings, head=True)
        return PeftModel.from_pretrained(student_model, folder).merge_and_unload()
    student = find_checkpoint(str(folder), trust_remote_code=models.student.trust_remote_code)
    return load_model(student, models.settings, head=True)


def round_to_stored_dtype(model: PreTrainedModel, student: Checkpoint) -> torch.dtype:
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


def write_distilled(student: Checkpoint, model: PreTrainedModel, output: Path, record: DistillRecord) -> None:
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
        seen = [*read_seen(student.folder)]
        earlier = read_record(student.folder)
        if earlier is not None:
            seen += earlier.seen(student.name)
        write_seen(staged, seen)
        write_record(staged, record)
        write_card(student.folder, staged, record)
