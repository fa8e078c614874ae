"""Sparsity plans: what is accepted is done as an independent reading of the file says; all else is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import event, given
from hypothesis import strategies as st
from support.causal_lm import open_whole
from support.checkpoints import llama
from support.fuzzing import fuzzed, hold

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer

pytestmark = pytest.mark.nightly

LAYERS = 3
SIZES = {"self_attn.o_proj": (32, 32), "mlp.down_proj": (32, 48)}  # outputs and inputs
SMALL = {"sequence_length": 32, "max_sequences": 4, "device": "cpu", "dtype": "float32", "batch_size": 4}
WEIRD = (
    *("null", "~", "true", "no", "0", "-1", "1.0", "1e3", "0x1", "01", "1_0", "123456789012345678901234567890", ".inf"),
    *("''", "x", "'1'", "é", "2026-01-01", "[]", "{}", "[1]", "[[1]]", "{1: 2}", "!!str 1", "!!set {1}", "*absent"),
)
ODD_KEYS = (
    "dröp",
    "drop\u200b",
    "DROP",
    "1",
    "true",
    "null",
    "'drop '",
    "layer",
    "<<",
    "'<<'",
    "? [a]\n",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Iterator[Path]:
    """A folder, which is the working directory, with a model whose layers all matter, and a text."""
    root = tmp_path_factory.mktemp("place")
    save_checkpoint(llama(5, initializer_range=0.4), root / "m")
    (root / "text.txt").write_text("It was the best of times, it was the worst of times; so they say. " * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def model(place: Path) -> LanguageModel:
    return open_whole(resolve(str(place / "m")), Settings(**SMALL))


@pytest.fixture(scope="module")
def rows(model: LanguageModel, place: Path) -> torch.Tensor:
    """int64[rows, tokens] of the text."""
    shards = tokenize_corpus(str(place / "text.txt"), load_tokenizer(model.checkpoint), Settings(**SMALL)).shards
    return torch.cat([torch.from_numpy(shard.input_ids).long() for shard in shards])


# Files as texts


@st.composite
def documents(draw: Any, base: Mapping[str, str], pools: Mapping[str, Sequence[str]]) -> str:
    """A YAML mapping: some keys with other values, repeated, left out, renamed, or in another order."""
    entries = list(base.items())
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 2, 3]))):
        key = draw(st.sampled_from(sorted(pools)))
        value = draw(st.sampled_from(WEIRD if draw(st.integers(0, 5)) == 0 else pools[key]))
        at = draw(st.integers(0, len(entries)))
        kind = draw(st.sampled_from([*["change"] * 8, "repeat", "drop", "odd", "alias"]))
        if kind == "change":
            entries = [(k, v) for k, v in entries if k != key]
        if kind in ("change", "repeat"):
            entries.insert(at, (key, value))
        elif kind == "drop":
            entries = [(k, v) for k, v in entries if k != key]
        elif kind == "odd":
            entries.insert(at, (draw(st.sampled_from(ODD_KEYS)), value))
        else:
            entries = [(k, f"&a{at} {v}" if k == key else v) for k, v in entries]
            entries.append((draw(st.sampled_from(sorted(pools))), f"*a{at}"))
    return "".join(f"{key}: {value}\n" for key, value in entries)


def repeats(node: Any) -> bool:
    """Whether a mapping has a key twice."""
    if isinstance(node, yaml.MappingNode):
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        return len(set(keys)) != len(keys) or any(repeats(value) for _, value in node.value)
    return isinstance(node, yaml.SequenceNode) and any(map(repeats, node.value))


def independent(text: str) -> dict[Any, Any]:
    """What the file says, to anyone."""
    assert not repeats(yaml.compose(text, Loader=yaml.SafeLoader))
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    return values


def done(file: Path, text: str) -> list[dict[str, str]] | None:
    """The rows that `avss evaluate` prints of a plan; None where it refuses the plan, in order."""
    file.write_text(text, encoding="utf-8")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    code, said = hold("evaluate", file, "--task", "perplexity:text.txt", "--executor", "local", "-q", "-w", "w",
                      "--format", "csv", *options)  # fmt: skip
    if code == 0:
        return list(csv.DictReader(said.splitlines()))
    assert code == 2 and file.name in said and said.count("Error: ") == 1, (text, said)
    assert "Run the same command again" not in said, (text, said)
    return None


def mean_loss(model: LanguageModel, rows: torch.Tensor) -> float:
    """In nats for each token that is predicted, by plain transformers."""
    with torch.no_grad():
        logits = model.module(input_ids=rows, use_cache=False).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


# What files say


def a_map(**changes: Any) -> str:
    values = {"layer": 0, "map": "mlp.down_proj", "site": "neuron", "outputs": 32, "inputs": 48, "sparsity": 0.5,
              "by": "top_k", "value": 0.5} | changes  # fmt: skip
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


SPARSE = {"model": "m", "num_layers": str(LAYERS), "sparsity": "0.5", "projections": f"[{a_map()}]"}
ATTENTION = {"map": "self_attn.o_proj", "site": "attention", "inputs": 32}
MAPS = [
    a_map(layer=2, by="threshold", value=0.01),
    a_map(by="threshold", value=0.005),
    f"{a_map()}, {a_map(layer=1, value=0.25, **ATTENTION)}",
    f"{a_map()}, {a_map()}",
    a_map(by="threshold", value=0),
    *(a_map(**change) for change in ({"layer": 3}, {"layer": -1}, {"layer": "true"}, {"layer": "0.0"}, {"inputs": 47})),
    *(a_map(**change) for change in ({"sparsity": 0.25}, {"sparsity": 1}, {"value": 1.0}, {"value": -1}, {"by": "x"})),
    *(a_map(**change) for change in ({"map": "mlp.up"}, {"value": ".nan"}, {"value": "1e-2"}, {"outputs": 10**30})),
    a_map().replace("by: top_k", "by: top_k, by: threshold"),
    a_map().replace("layer: 0", "layer: 0, \u0142ayer: 1"),
]
SPARSE_POOLS = {
    "model": ("m", "absent"),
    "num_layers": ("3", "4", "40", "'3'"),
    "sparsity": ("0.5", "0.9", "0.25", "5e-1", ".5", "'0.5'", "1"),
    "rule": ("all", "last-half", "prefill"),
    "weighted": ("true", "false", "yes", "1"),
    "projections": tuple(f"[{maps}]" for maps in MAPS),
}


@fuzzed(40)
@given(text=documents(SPARSE, SPARSE_POOLS))
def test_an_accepted_sparsity_plan_makes_zero_what_its_file_says(
    text: str, place: Path, model: LanguageModel, rows: torch.Tensor
) -> None:
    found = done(place / "sparse.yaml", text)
    event("refused" if found is None else "accepted")
    if found is None:
        return
    said = independent(text)
    assert set(said) <= {*SPARSE_POOLS, "revision", "run_id", "why", "findings"}
    assert said["num_layers"] == LAYERS and type(said["num_layers"]) is int
    maps = said["projections"]
    weights = [one["outputs"] * one["inputs"] for one in maps]
    planned = sum(one["sparsity"] * size for one, size in zip(maps, weights, strict=True)) / sum(weights)
    assert said["sparsity"] == pytest.approx(planned, abs=1e-3)
    assert len({(one["layer"], one["map"]) for one in maps}) == len(maps)
    where = sparse_tokens(said.get("rule", "all"), rows)
    with ExitStack() as stack:
        for one in maps:
            assert type(one["layer"]) is int and SIZES[one["map"]] == (one["outputs"], one["inputs"])
            module = model.module.model.layers[one["layer"]].get_submodule(one["map"])

            def thin(module: Any, args: Any, one: dict[str, Any] = one) -> Any:
                gone = zeros(args[0], one, said, module.weight) & where[..., None]
                return (args[0].masked_fill(gone, 0.0),)

            stack.callback(module.register_forward_pre_hook(thin).remove)
        expected = mean_loss(model, rows)
    (row,) = [row for row in found if row["metric"] == "loss"]
    assert float(row["value"]) == pytest.approx(expected, rel=1e-5)


def sparse_tokens(rule: str, rows: torch.Tensor) -> torch.Tensor:
    """bool[rows, tokens] of the tokens that a rule makes sparse."""
    first = {"all": 0, "last-half": rows.shape[1] // 2}[rule]
    return (torch.arange(rows.shape[1]) >= first).expand(rows.shape)


def zeros(x: torch.Tensor, one: Mapping[str, Any], said: Mapping[str, Any], weight: torch.Tensor) -> torch.Tensor:
    """bool[..., units] of the elements that become zero, one token at a time."""
    sizes = x.abs().double().numpy() * (weight.norm(dim=0).double().numpy() if said.get("weighted") else 1.0)
    gone = np.zeros(sizes.shape, bool)
    for at in np.ndindex(sizes.shape[:-1]):
        token, order = sizes[at], np.argsort(sizes[at])
        if one["by"] == "threshold":
            gone[at] = token <= one["value"]
        else:
            gone[at][order[: int(one["value"] * len(token))]] = True
    return torch.from_numpy(gone)


# What must be accepted, so that the test above is not about refusals alone


def test_a_whole_file_is_accepted(place: Path) -> None:
    assert done(place / "sparse.yaml", "".join(f"{key}: {value}\n" for key, value in SPARSE.items()))
