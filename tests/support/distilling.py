"""Options of a distillation that takes a second."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "sequence_length": 32,
    "batch_size": 4,
    "tokens": 8 * 4 * 32,
    "self_texts": 0,
    "held_out": 4,
    "learning_rate": 3e-3,
    "warmup": 2,
    "evaluations": 2,
    "device": "cpu",
    "dtype": "float32",  # with auto, processors that compute fast in bfloat16 do
}
