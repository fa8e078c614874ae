"""Job files, configurations, and the headers of weight files: mutated real ones are read, or refused in order."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import VOCABULARY, llama
from support.command_line import files
from support.families import tiny_model
from support.fuzzing import damaged_bytes, fuzzed, hold, hold_with_one_error, mutated, values
from support.ggufs import write_gguf
from support.json_files import read_json, write_json

from avss_dist.core.errors import AvssError
from avss_dist.models.checkpoint.locate import locate, stored_tensors

pytestmark = pytest.mark.nightly

JOB: dict[str, Any] = {
    "warehouse": "w",
    "models": [
        "/no/such/model",
        {"model": "org/absent", "dtype": "float32", "revisions": ["main", {"prefix": "step", "from": 0, "to": 2}]},
    ],
    "corpora": ["builtin:pydoc"],
    "settings": {"max_sequences": 4, "sequence_length": 32, "sites": ["block"], "thresholds": [1e-4]},
    "execution": {"replicas": 1, "executor": "local", "max_memory": {"cpu": "1GB"}},
    "experiment": {"shares": [0.25], "scores": ["avss"], "random": 1, "tasks": ["perplexity:builtin:pydoc"]},
}


def dumped(draw: Any, value: Any) -> bytes:
    """A value as YAML, now and then with its bytes damaged."""
    data = yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    return damaged_bytes(draw, data) if draw(st.integers(0, 3)) == 0 else data


@fuzzed(40)
@given(data=st.data())
def test_a_job_is_planned_or_refused(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_bytes(dumped(data.draw, data.draw(mutated(JOB))))
    hold("run", file, "--dry-run")
    assert sorted(files(tmp_path)) == ["job.yaml"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint as safetensors, with an index, and as a .gguf file."""
    folder = tmp_path_factory.mktemp("checkpoints")
    llama().save_pretrained(folder / "one")
    llama().save_pretrained(folder / "several", max_shard_size="30KB")
    write_gguf(llama(), folder / "model.gguf")
    return folder


def headers_are_read_or_refused(model: Path) -> None:
    try:
        checkpoint = locate(str(model))
        assert checkpoint is not None
        for tensor in stored_tensors(checkpoint):
            assert isinstance(tensor.name, str) and isinstance(tensor.dtype, str) and tensor.size >= 0
    except AvssError as error:
        assert str(model) in str(error)


@fuzzed(30)
@given(data=st.data())
def test_a_safetensors_header_is_read_or_refused(data: Any, checkpoints: Path, tmp_path: Path) -> None:
    whole = (checkpoints / "one" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(mutated(json.loads(whole[8 : 8 + length]))), default=str).encode()
        damaged = struct.pack("<Q", len(header)) + header + whole[8 + length :]
    else:
        damaged = damaged_bytes(data.draw, whole)
    (tmp_path / "config.json").write_bytes((checkpoints / "one" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(damaged)
    headers_are_read_or_refused(tmp_path)


@fuzzed(40)
@given(data=st.data())
def test_an_index_is_read_or_refused(data: Any, checkpoints: Path, tmp_path: Path) -> None:
    several = checkpoints / "several"
    for file in several.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).symlink_to(file)
    index = tmp_path / "model.safetensors.index.json"
    index.unlink()
    value = data.draw(mutated(read_json(several / index.name)))
    index.write_text(json.dumps(value, default=str))
    headers_are_read_or_refused(tmp_path)


FAMILIES = ("llama", "gpt2", "mixtral", "gemma3_text")
COMMANDS = [
    ["run", "job.yaml", "--dry-run", "--max-memory", "cpu=1KB"],  # no layer fits, so nothing is benchmarked
    ["ablate", "model", "--corpus", "text.txt", "--warehouse", "w", "--shapley", "1000000"],  # which wants --allow-many
    ["prune", "model", "plan.yaml", "-o", "pruned"],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    """A folder with a tiny checkpoint of each family, and what the commands read. Not to be changed."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        model = tiny_model("causal", family)
        model.resize_token_embeddings(VOCABULARY)
        save_checkpoint(model, root / family)
    (root / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    (root / "plan.yaml").write_text("{model: model, num_layers: 3, layers: model.layers, drop: [1]}")
    (root / "job.yaml").write_text("{warehouse: w, models: [model], corpora: [text.txt]}")
    return root


@st.composite
def configurations(draw: Any, whole: dict[str, Any]) -> Any:
    """A configuration with a few values that are none, of other types or sizes, or missing."""
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated(whole))
    sizes = [0, 1, 2, 7, -1, 1.5, "4", None, True, [4], {}, 2**31, 2**63 - 1, 10**30]
    changed = dict(whole)
    for key in draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=2)):
        changed[key] = draw(st.sampled_from(sizes) | values())
        if draw(st.integers(0, 3)) == 0:
            del changed[key]
    return changed


@fuzzed(16)
@given(data=st.data())
def test_a_command_takes_or_refuses_a_configuration(
    data: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path)
    shutil.copytree(place, tmp_path)
    monkeypatch.chdir(tmp_path)
    Path(data.draw(st.sampled_from(FAMILIES))).rename("model")
    config = Path("model/config.json")
    config.write_text(json.dumps(data.draw(configurations(read_json(config))), default=str))
    hold_with_one_error(*data.draw(st.sampled_from(COMMANDS)))


A_MAP = {"layer": 0, "map": "mlp.down_proj", "site": "neuron", "outputs": 64, "inputs": 128, "sparsity": 0.5}
PLANS: dict[str, dict[str, Any]] = {
    "plan.yaml": {"model": "llama", "num_layers": 3, "layers": "layers", "drop": [1]},
    "sparse.yaml": {
        "model": "llama",
        "num_layers": 3,
        "sparsity": 0.5,
        "rule": "last-half",
        "projections": [A_MAP | {"by": "top_k", "value": 0.5}],
    },
}


@pytest.mark.parametrize("file", PLANS)
def test_a_whole_plan_is_evaluated(file: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    write_json(tmp_path / file, PLANS[file])
    code, said = hold(*evaluated(tmp_path / file))
    assert code == 0, said


def evaluated(plan: Path) -> list[object]:
    small = ("--sequence-length", "32", "--max-sequences", "4", "--executor", "local")
    return ["evaluate", plan, "--tasks", "perplexity:text.txt", "-w", plan.parent / "w", *small]


@fuzzed(20)
@given(data=st.data())
def test_a_plan_is_evaluated_or_refused(
    data: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    plan = tmp_path / data.draw(st.sampled_from(sorted(PLANS)))
    plan.write_bytes(dumped(data.draw, data.draw(mutated(PLANS[plan.name]))))
    hold_with_one_error(*evaluated(plan))


@fuzzed(40)
@given(data=st.data())
def test_a_gguf_header_is_read_or_refused(data: Any, checkpoints: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(damaged_bytes(data.draw, (checkpoints / "model.gguf").read_bytes()[:6000] + bytes(200_000)))
    headers_are_read_or_refused(model)
