"""Pickled weights: converted once, as tensors alone, to the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import avss

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoints import convert_pickles, resolve
from avss_dist.warehouse.reader import Warehouse

SMALL = ("--sequence-length", "32", "--max-sequences", "2", "--executor", "local")


def pickled(folder: Path, copy: Path) -> Path:
    """The checkpoint with its weights in two pickles and an index, as older ones are."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, copy / file)
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return copy


def test_a_pickle_is_converted_once_and_noted(tiny_llama: Path, tmp_path: Path) -> None:
    folder, out = pickled(tiny_llama, tmp_path / "pickled"), tmp_path / "warehouse"
    done = avss("score", folder, "--corpus", "builtin:pydoc", "-w", out, "--allow-pickle", *SMALL)
    assert done.exit_code == 0, done.stderr
    (run,) = Warehouse(str(out)).runs().to_pylist()
    assert any("stored as pickles" in note for note in run["notes"])
    found = resolve(str(folder))  # without being allowed to: nothing is unpickled any more
    kept = {name: t for file in Path(found.path).glob("*.safetensors") for name, t in load_file(file).items()}
    original = load_file(tiny_llama / "model.safetensors")
    assert kept.keys() == original.keys() and all(torch.equal(kept[name], original[name]) for name in kept)
    weights = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({name: t + 1 for name, t in torch.load(weights, weights_only=True).items()}, weights)
    with pytest.raises(ModelError, match="has pickled weights only"):  # of other content
        resolve(str(folder))


def test_what_is_no_table_of_tensors_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds more than tensors"):
        convert_pickles(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="holds more than tensors, or is damaged"):
        convert_pickles(str(folder))
