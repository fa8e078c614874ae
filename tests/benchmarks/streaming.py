"""Cost of the partition `streaming`: memory and bytes read for a checkpoint of any size, speed against `single`.

    python tests/benchmarks/streaming.py write FOLDER [--gigabytes 6]     a random Llama-shaped checkpoint, bfloat16
    python tests/benchmarks/streaming.py run FOLDER                       a shard of it, in a process of its own
    python tests/benchmarks/streaming.py ablate FOLDER [--memory 2e9]     leave-one-out of it, in a process of its own
    python tests/benchmarks/streaming.py round FOLDER [--memory 2e9]      sensitivity to rounding, in its own process
    python tests/benchmarks/streaming.py repair FOLDER [--memory 2e9]     a quarter of its layers off, repaired
    python tests/benchmarks/streaming.py compare MODEL_FOLDER             against `single`, in one process

`run` prints tokens/s, the peak of anonymous memory (RssAnon) against a budget of embedding + two layers + the shard's
hidden states + 600 MB, and bytes read a shard against the checkpoint's. `ablate` does the same of the losses without
each layer of 2 x 32 tokens, within a limit, and gives their time in passes of the whole model; `round` of the losses
with each layer rounded to int8, and of those that gradients predict for two formats. `repair` fits channels
at the cuts that every fourth layer leaves to 16 x 32 tokens. `compare` takes medians of rounds in which both take
turns, on a default shard of 32 x 256 tokens in batches of 8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
import torch
from safetensors.torch import save_file
from support.benchmarking import PeakMemory

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import CorpusPlan, Shard
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.partition.base import Placement
from avss_dist.partition.single import SingleReplica
from avss_dist.partition.streaming.buffers import stored_in
from avss_dist.partition.streaming.replica import StreamingReplica
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.hidden_states import hidden_states_of
from avss_dist.pruning.repair.repair import Repair, fit_repair
from avss_dist.pruning.weights import StoredWeights
from avss_dist.tasks.base import Measure, TextLoss
from avss_dist.tasks.layer_removal import LeaveOneOut
from avss_dist.tasks.rounding import RoundedLosses, RoundingDamage

VOCABULARY, HIDDEN, MLP, HEADS, KEYS = 32_000, 2048, 8192, 16, 4
ALLOWANCE = 600_000_000
SHARD_ROWS = 32
WITHIN = {name: f"{name}-here" for name in ("ablate", "round", "repair")}
"""Commands with a limit of memory, and what they run in a process of its own."""
ROUNDED: dict[str, Callable[..., Measure]] = {
    "each layer in int8": partial(RoundedLosses, format="int8"),
    "predicted, two formats": partial(RoundingDamage, formats=("int4", "int8")),
}


def write(folder: Path, gigabytes: float) -> None:
    """A checkpoint of a file a layer, each of which is made and forgotten before the next."""
    width = HIDDEN // HEADS * KEYS
    shapes = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (width, HIDDEN),
        "self_attn.v_proj.weight": (width, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (MLP, HIDDEN),
        "mlp.up_proj.weight": (MLP, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, MLP),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * HIDDEN) / layer_bytes))
    folder.mkdir(parents=True, exist_ok=True)
    groups = [{f"model.layers.{i}.{name}": shape for name, shape in shapes.items()} for i in range(layers)]
    groups.append({"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    files: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        save_file({name: random_weight(shape) for name, shape in group.items()}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    print(f"{folder}: {layers} layers, {checkpoint_bytes(folder) / 1e9:.2f} GB")


def random_weight(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.randn(shape).mul_(0.02).bfloat16()


def checkpoint_bytes(folder: Path) -> int:
    return sum(stored.size for stored in stored_in(folder))


def random_shard(settings: Settings, vocabulary: int) -> Shard:
    rows, tokens = settings.sequences_per_shard or SHARD_ROWS, settings.sequence_length
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, tokens)).astype(np.int32)
    lengths = np.full(rows, tokens, np.int32)
    return Shard(shard_id=0, input_ids=ids, lengths=lengths, skip_first_tokens=0, content_hash="")


def opened(folder: Path) -> Checkpoint:
    """Without hashing its files: gigabytes would be in the page cache."""
    return Checkpoint(name=str(folder), source="folder", path=str(folder), revision="")


def measure(folder: Path) -> None:
    """`run`, in this process."""
    settings = Settings(device="cpu")
    with PeakMemory("RssAnon") as memory:
        replica = StreamingReplica(opened(folder), settings, Placement(partition="streaming"))
        config = json.loads((folder / "config.json").read_text())
        shard = random_shard(settings, config["vocab_size"])
        opened_bytes, opened_peak = replica.bytes_read, memory.peak
        seconds, read = [], []
        for _ in range(2):
            start, before = time.perf_counter(), replica.bytes_read
            analyze_shard(replica, shard, settings)
            seconds.append(time.perf_counter() - start)
            read.append(replica.bytes_read - before)
    parts = [sum(stored.size for stored in part.stored) for part in replica._parts]
    hidden = shard.input_ids.size * replica.model["hidden_size"] * torch.bfloat16.itemsize
    budget = opened_bytes + sum(sorted(parts)[-2:]) + hidden + ALLOWANCE
    size = checkpoint_bytes(folder)
    print(f"{folder.name}: {size / 1e9:.2f} GB, {len(parts)} layers of {max(parts) / 1e6:.0f} MB")
    print(f"tokens/s               {', '.join(f'{shard.num_tokens / s:,.0f}' for s in seconds)}")
    print(f"peak RssAnon           {memory.peak / 1e6:,.0f} MB; until opened {opened_peak / 1e6:,.0f} MB")
    print(f"budget                 {budget / 1e6:,.0f} MB: {'kept' if memory.peak <= budget else 'EXCEEDED'}")
    print(f"read to open           {opened_bytes / size:.3f} of the checkpoint")
    print(f"read for a shard       {', '.join(f'{ours / size:.3f}' for ours in read)} of the checkpoint")


def ablate(folder: Path, memory_bytes: int, work: Mapping[str, Callable[..., Measure]]) -> None:
    """`ablate` and `round`, in this process: measures of a text, by their names."""
    settings = Settings(device="cpu", batch_size=1, sequence_length=32, sequences_per_shard=2)
    placement = Placement(partition="streaming", max_memory={"cpu": memory_bytes})
    seconds: dict[str, float] = {}
    read: dict[str, int] = {}
    rows: dict[str, int] = {}
    with PeakMemory("RssAnon") as memory:
        replica = StreamingReplica(opened(folder), settings, placement, head=True)
        model = replica.language_model
        config = json.loads((folder / "config.json").read_text())
        shard = random_shard(settings, config["vocab_size"])
        assert model is not None
        opened_bytes = replica.bytes_read
        for name, make in {"warm up": TextLoss, "the whole model": TextLoss, **work}.items():
            start, before = time.perf_counter(), replica.bytes_read
            rows[name] = len(make(shard=shard)(model))
            seconds[name] = time.perf_counter() - start
            read[name] = replica.bytes_read - before
    parts = [sum(stored.size for stored in part.stored) for part in replica._parts]
    hidden = 2 * (len(parts) + 1) * shard.input_ids.size * config["hidden_size"] * torch.bfloat16.itemsize
    budget = opened_bytes + sum(sorted(parts)[-2:]) + hidden + ALLOWANCE
    size = checkpoint_bytes(folder)
    print(f"{folder.name}: {size / 1e9:.2f} GB, {memory_bytes / 1e9:g} GB allowed, {len(parts)} layers")
    for name in ("the whole model", *work):
        passes = seconds[name] / seconds["the whole model"]
        print(
            f"{name:<22} {seconds[name]:.1f} s, {passes:.1f} passes, {rows[name]} rows, {read[name] / size:.3f} of the "
            "checkpoint read"
        )
    print(f"peak RssAnon           {memory.peak / 1e6:,.0f} MB; budget {budget / 1e6:,.0f} MB")


def repair(folder: Path, memory_bytes: int) -> None:
    """`repair`, in this process."""
    checkpoint = opened(folder)
    settings = Settings(device="cpu", dtype="bfloat16", batch_size=4, sequence_length=32, sequences_per_shard=16)
    shard = random_shard(settings, VOCABULARY)
    rows, tokens = shard.input_ids.shape
    text = CorpusPlan(
        source="random",
        corpus_fingerprint="",
        tokens_fingerprint="",
        shards=(shard,),
        num_sequences=rows,
        num_tokens=rows * tokens,
    )
    number = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    plan = Plan(model=folder.name, num_layers=number, layers="layers", drop=tuple(range(3, number, 4)))
    wanted = Repair(by="channel", corpora=("random",), settings=settings)
    placement = Placement(partition="streaming", max_memory={"cpu": memory_bytes})
    with PeakMemory("RssAnon") as memory:
        replica = StreamingReplica(checkpoint, settings, placement, head=True)
        model = replica.language_model
        assert model is not None
        stored = StoredWeights.of_checkpoint(checkpoint, plan, settings).read
        start, before = time.perf_counter(), replica.bytes_read
        found = fit_repair(checkpoint, hidden_states_of(model), plan, wanted, [text], stored)
        seconds, read = time.perf_counter() - start, replica.bytes_read - before
    size = checkpoint_bytes(folder)
    print(f"{folder.name}: {size / 1e9:.2f} GB, {memory_bytes / 1e9:g} GB allowed, {number} layers")
    print(f"layers left out        {len(plan.drop)}; {len(found.tensors)} tensors repaired in {seconds:.0f} s")
    print(f"read                   {read / size:.2f} of the checkpoint")
    print(f"peak RssAnon           {memory.peak / 1e6:,.0f} MB")


def compare(folder: Path, rounds: int) -> None:
    settings = Settings(device="cpu", dtype="bfloat16")
    replicas = {
        "single": SingleReplica(opened(folder), settings),
        "streaming": StreamingReplica(opened(folder), settings, Placement(partition="streaming")),
    }
    shard = random_shard(settings, json.loads((folder / "config.json").read_text())["vocab_size"])
    seconds: dict[str, list[float]] = {name: [] for name in replicas}
    for round_ in range(rounds + 1):  # the first one only warms up
        for name, replica in in_turn(replicas, round_):
            start = time.perf_counter()
            analyze_shard(replica, shard, settings)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name:<10} {shard.num_tokens / statistics.median(times):>8,.0f} tokens/s")
    ratios = sorted(a / b for a, b in zip(seconds["single"], seconds["streaming"], strict=True))
    middle = statistics.median(ratios)
    print(f"streaming / single: median {middle:.3f} of {rounds} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f}")


def in_turn(replicas: dict[str, SingleReplica | StreamingReplica], round_: int) -> Iterator[tuple[str, object]]:
    items = list(replicas.items())
    return iter(items if round_ % 2 else items[::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("write", "run", "measure", "compare", *WITHIN, *WITHIN.values()))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--memory", type=float, default=2e9, help="bytes that weights may take")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder, memory = options.folder, int(options.memory)
    if own := {"run": "measure", **WITHIN}.get(options.command):
        subprocess.run([sys.executable, __file__, own, *sys.argv[2:]], check=True)
        return
    commands: dict[str, Callable[[], None]] = {
        "write": lambda: write(folder, options.gigabytes),
        "measure": lambda: measure(folder),
        "ablate-here": lambda: ablate(folder, memory, {"without each layer": LeaveOneOut}),
        "round-here": lambda: ablate(folder, memory, ROUNDED),
        "repair-here": lambda: repair(folder, memory),
        "compare": lambda: compare(folder, options.rounds),
    }
    commands[options.command]()


if __name__ == "__main__":
    main()
