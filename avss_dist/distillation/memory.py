"""Memory of a distillation, estimated before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.distillation.trained import LORA, NEAR, choose_trained
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.size import Footprint, footprint, load_skeleton
from avss_dist.system.devices import available_memory, devices_here

FLOAT32 = 4  # bytes of a weight that is trained, of its gradient, and of each of the optimizer's two moments
LIBRARIES = 400 << 20  # of a process with its libraries, on a CPU


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes of a distillation in one process.

    Attributes:
        weights: weights of the student, in float32.
        gradients: gradients of the trained weights.
        moments: the two moments of the optimizer.
        teacher: weights of the teacher, in its compute dtype.
        activations: activations of a batch that the backward pass reads.
        logits: logits of the student for a batch, and those of the teacher or the gradient.
        trained: number of trained parameters.
    """

    weights: int
    gradients: int
    moments: int
    teacher: int
    activations: int
    logits: int
    trained: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.moments + self.teacher + self.activations + self.logits

    def describe(self) -> str:
        """Return the total and its parts, in a line."""
        parts = {
            "student": self.weights,
            "gradients": self.gradients,
            "optimizer": self.moments,
            "teacher": self.teacher,
            "activations": self.activations,
            "logits": self.logits,
        }
        listed = ", ".join(f"{name} {describe_bytes(size)}" for name, size in parts.items() if size)
        return f"{describe_bytes(self.total)} ({listed})"


def estimate_memory(
    student: Checkpoint,
    teacher: Checkpoint,
    settings: Settings,
    teacher_settings: Settings,
    *,
    train: str,
    rank: int,
    top: int | None = None,
) -> Memory:
    """Estimate the memory of a distillation from configurations and headers alone.

    Args:
        settings: of the student; ``batch_size`` and ``sequence_length`` are those of a training step.
        teacher_settings: of the teacher, with its compute dtype.
        train, rank: see `choose_trained`.
        top: number of tokens of each prediction that come from a cache instead of the teacher.

    Raises:
        ModelError: a checkpoint cannot be read or built.
    """
    _, skeleton, _ = load_skeleton(student, settings)
    model = choose_trained(skeleton, student, train, rank, settings)
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    size = footprint(student, settings)
    return Memory(
        weights=FLOAT32 * sum(p.numel() for p in parameters),
        gradients=FLOAT32 * trained,
        moments=2 * FLOAT32 * trained,
        teacher=0 if top else footprint(teacher, teacher_settings).weight_bytes,
        activations=_activations(size, settings.batch_size, settings.sequence_length),
        logits=2 * FLOAT32 * settings.batch_size * settings.sequence_length * size.vocabulary,
        trained=trained,
    )


def _activations(size: Footprint, rows: int, tokens: int) -> int:
    """Return the bytes of activations that a forward pass keeps for the backward pass.

    Of a layer: 6 tensors as wide as the residual stream (its input, norms, sums), 5 as the attention (queries, keys,
    values, output), and half as many again as the outputs of all linear maps of the MLP.
    """
    width = 6 * size.hidden_size + 5 * size.attention_width + int(1.5 * size.mlp_width)
    return FLOAT32 * rows * tokens * width * size.num_layers


def without_layers(memory: Memory, size: Footprint, count: int) -> Memory:
    """Return the estimate for a student without ``count`` layers, the largest ones, of which all weights are trained.

    Args:
        memory: estimate for a student with all layers.
        size: size of the student with all layers, in float32.
    """
    dropped = sum(sorted(size.layer_bytes)[size.num_layers - count :])
    return replace(
        memory,
        weights=memory.weights - dropped,
        gradients=memory.gradients - dropped,
        moments=memory.moments - 2 * dropped,
        activations=memory.activations * (size.num_layers - count) // size.num_layers,
        trained=memory.trained - dropped // FLOAT32,
    )


def require_memory(memory: Memory, device: str, train: str, hint: str = "") -> None:
    """Raise ConfigError if the estimate exceeds the memory of the device, with the size and what would lower it.

    Args:
        hint: replaces the hint that names options of `DistillRequest`.
    """
    free, needed = available_memory(), memory.total
    if device == "cuda":
        free = devices_here(device).device_bytes
    else:
        needed += LIBRARIES
    if needed <= free:
        return
    others = [name for name in (NEAR, LORA) if name != train]
    raise ConfigError(
        f"Distillation with `train` {train} needs about {describe_bytes(needed)} of memory: {memory.describe()}. There "
        f"are {describe_bytes(free)}.",
        hint or f"Lower `batch_size` or `sequence_length`, or set `train` {' or '.join(others)}.",
    )
