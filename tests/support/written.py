"""Folders of checkpoints as a training writes them, without torch: tiny files of weights, and those around them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from support.json_files import write_json

WEIGHT_BYTES = 40


def safetensors_bytes(value: int = 0) -> bytes:
    """Return a safetensors file with one tensor of ten equal numbers."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [10], "data_offsets": [0, WEIGHT_BYTES]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<f", value) * 10


def write_weights(folder: Path, value: int = 0) -> Path:
    """Write a checkpoint with one file of weights, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "llama"})
    (folder / "model.safetensors").write_bytes(safetensors_bytes(value))
    return folder


def write_parts(folder: Path) -> Path:
    """Write a checkpoint whose weights are two files with an index, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "llama"})
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (folder / name).write_bytes(safetensors_bytes())
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": names[0], "b": names[1]}})
    return folder


def write_as_trainer(folder: Path) -> Path:
    """Write a checkpoint as the Trainer of transformers does, and return its folder."""
    write_weights(folder)
    (folder / "training_args.bin").write_bytes(b"arguments")
    write_json(folder / "trainer_state.json", {"global_step": 1})
    return folder


def write_pieces(folder: Path) -> Path:
    """Write a checkpoint as a training with FSDP does, whose configuration is above, and return its folder."""
    pieces = folder / "pytorch_model_fsdp_0"
    pieces.mkdir(parents=True, exist_ok=True)
    write_json(folder.parent / "config.json", {"model_type": "llama"})
    for rank in (0, 1):
        (pieces / f"__{rank}_0.distcp").write_bytes(b"piece")
    (pieces / ".metadata").write_bytes(b"list")
    return folder
