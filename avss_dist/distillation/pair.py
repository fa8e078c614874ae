"""The two models of a distillation, found and checked before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from avss_dist.core.errors import ConfigError
from avss_dist.core.extras import require_package
from avss_dist.core.settings import TRAINED, Settings
from avss_dist.core.text import count_of
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import load_tokenizer, pin, require_head, text_config
from avss_dist.models.quantization import quantization_method
from avss_dist.pruning.checkpoint import pruned_from
from avss_dist.system.devices import has_fast_bfloat16, pick_device

if TYPE_CHECKING:
    from avss_dist.requests import DistillRequest

ALL, LORA = TRAINED


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
    code = request.settings.trust_remote_code
    student, teacher = (resolve(str(name), trust_remote_code=code) for name in (request.student, request.teacher))
    configs = [text_config(checkpoint, trust_remote_code=code) for checkpoint in (student, teacher)]
    for checkpoint, config in zip((student, teacher), configs, strict=True):
        require_head(checkpoint.name, config)
    if student.gguf or quantization_method(configs[0]):
        raise ConfigError(
            f"'{student.name}' is quantized; distillation trains weights in float32.",
            "Name the checkpoint in safetensors that it was made of.",
        )
    if request.train == LORA:
        require_package("peft", "`train` lora")
    sizes = [config.get_text_config().vocab_size for config in configs]
    words = [load_tokenizer(checkpoint, trust_remote_code=code).get_vocab() for checkpoint in (student, teacher)]
    if words[0] != words[1] or sizes[0] != sizes[1]:  # a token has not the same meaning or place among the logits
        differing = len(set(words[0].items()) ^ set(words[1].items()))
        raise ConfigError(
            f"'{student.name}' and '{teacher.name}' have different vocabularies: {sizes[0]:,} and {sizes[1]:,} logits, "
            f"{count_of(differing, 'token')} in one alone. The student learns the teacher's probability of every "
            "token.",
            "Name the model that the student was made of, or another one with its tokenizer, with `teacher`.",
        )
    device = torch.device(kind) if kind else pick_device(request.settings.device)
    if request.settings.dtype == "float16":
        raise ConfigError("`dtype` float16 cannot be trained in.", "Set `dtype` bfloat16 or float32.")
    bfloat16 = computes_in_bfloat16(request.settings, device.type)
    settings = replace(request.settings, batch_size=request.rows, dtype="float32")
    teacher_settings = replace(settings, dtype="bfloat16" if bfloat16 else "float32", layers=None)
    return ModelPair(
        student=student,
        teacher=teacher,
        settings=pin(settings, student, configs[0], device.type),
        teacher_settings=pin(teacher_settings, teacher, configs[1], device.type),
        device=device,
        bfloat16=bfloat16,
    )


def computes_in_bfloat16(settings: Settings, kind: str) -> bool:
    """Whether passes are computed in bfloat16 on a kind of device."""
    return settings.dtype == "bfloat16" or (settings.dtype == "auto" and has_fast_bfloat16(kind))


def ancestry(models: ModelPair) -> list[str]:
    """Return a note if nothing says that the student was made of the teacher."""
    base = pruned_from(models.student.folder)
    if base and base[1] == models.teacher.revision:
        return []
    made = f"its model card names {base[0]} at {base[1][:12]}" if base else "it has no model card of avss prune"
    return [
        f"Nothing says that {models.student.name} was made of {models.teacher.name}: {made}. It was distilled all the "
        "same."
    ]
