"""The first minutes with a GPU: how fast are the CUDA kernels, what does measuring a model cost.

    python tests/gpu/first.py kernels      at most ten minutes; so is the other
    python tests/gpu/first.py models

`--dry` goes through the same on a CPU, small and emulated, to see that the script works; its times mean nothing.
What to read, and what was predicted: README.md beside this file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from avss_dist.core.devices import pick_device
from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.corpus.shards import Shard
from avss_dist.measure import observer as observing
from avss_dist.measure.kernels import kernels_for
from avss_dist.measure.kernels.cuda import CudaKernels
from avss_dist.measure.kernels.reference import Accumulator, Kernels
from avss_dist.measure.observer import Observer, attached
from avss_dist.models.checkpoint.loading import forward_function, open_module
from avss_dist.partition.replica import run_batch
from avss_dist.stats.layer_stats import merge_strata

GRID = np.array(THRESHOLDS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODELS = {  # layers, hidden, intermediate, heads, heads of keys and values
    "8B": (32, 4096, 14336, 32, 8),
    "1B": (16, 2048, 8192, 32, 8),
}


class Run:
    """Where it runs, and what it has to say."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = pick_device("cpu" if dry else "cuda")
        self.lines: list[str] = []
        self._start = time.monotonic()

    def say(self, *parts: object) -> None:
        self.lines.append(f"[{time.monotonic() - self._start:5.0f} s] {' '.join(map(str, parts))}")
        print(self.lines[-1], flush=True)

    def own_kernels(self) -> CudaKernels:
        """What the card gets, and not what stands in for it."""
        if self.dry:
            from support.emulated_cuda import Emulator

            return CudaKernels(Emulator())
        kernels = kernels_for(self.device)
        assert isinstance(kernels, CudaKernels), "the kernels do not compile here: see the warning"
        return kernels

    def timed(self, function: Callable[[], object], rounds: int = 20, warm: int = 3) -> tuple[float, float]:
        """Median milliseconds on the device, and of the host until it has started everything."""
        if self.dry:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3, 0.0
        for _ in range(warm):
            function()
        torch.cuda.synchronize()
        device, host = [], []
        for _ in range(rounds):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            start = time.perf_counter()
            function()
            host.append((time.perf_counter() - start) * 1e3)
            last.record()
            last.synchronize()
            device.append(first.elapsed_time(last))
        return statistics.median(device), statistics.median(host)

    def values(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str = "normal", seed: int = 0) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(shape, generator=generator, device=self.device)
        if kind == "sparse":
            x = x.relu() * (torch.rand(shape, generator=generator, device=self.device) < 0.1)
        elif kind == "tiny":
            x *= 2.0**-60  # outside of the counters in shared memory
        elif kind == "constant":
            x.fill_(1)  # every lane adds to one counter
        elif kind == "nan":
            x[..., 5] = torch.nan
        return x.to(dtype)


def alone(run: Run) -> None:
    """Each kernel at an 8B model's shapes, and what torch takes for the same."""
    rows, tokens = (2, 32) if run.dry else (8, 2048)
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=run.device)
    for dtype, units in itertools.product(DTYPES, (256,) if run.dry else (4096, 14336)):
        for kind in ("normal", "sparse", "constant", "tiny", "nan") if dtype == torch.bfloat16 else ("normal",):
            x, before = run.values((rows, tokens, units), dtype, kind), run.values((rows, tokens, units), dtype, seed=1)
            cases = {
                "plain": lambda k, into, x=x: k.add(into, x, mask),
                "block": lambda k, into, x=x, before=before: k.add(into, x, mask, before),
                "update": lambda k, into, x=x, before=before: k.add_update(into, x, before, mask),
            }
            for name, add in cases.items():
                into = Accumulator(x, GRID, units=name != "plain", geometry=name == "block")
                kernels = run.own_kernels()

                def once(kernels: Kernels = kernels, into: Accumulator = into, add: Any = add) -> None:
                    add(kernels, into)
                    kernels.finish()

                ms, host = run.timed(once)
                read = x.nbytes * {"plain": 1, "block": 3, "update": 2}[name]
                run.say(
                    f"{str(dtype)[6:]:8} {kind:8} {units:5} units {name:6}: {ms:7.3f} ms, {read / ms / 1e6:6.0f} GB/s"
                )
                run.say(f"    host {host:.3f} ms for {3 if name == 'block' else 2} launches")
        into = Accumulator(x, GRID, units=True, geometry=True)
        torch_kernels = Kernels()
        ms, _ = run.timed(lambda k=torch_kernels, i=into, x=x, b=before: k.add(i, x, mask, b), 3, 1)
        run.say(f"{str(dtype)[6:]:8} normal   {units:5} units block by torch: {ms:.2f} ms")


def _model(run: Run, shape: tuple[int, int, int, int, int]) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    layers, hidden, intermediate, heads, kv_heads = shape
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with run.device:
            return LlamaModel(config).eval()
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _counting_with(kernels: Kernels) -> Iterator[None]:
    before = observing.kernels_for
    observing.kernels_for = lambda device: kernels
    try:
        yield
    finally:
        observing.kernels_for = before


def speed(run: Run) -> None:
    """Bare forward passes, and measured at five sites by our kernels and by torch's."""
    for name, shape in {"tiny": (2, 64, 96, 4, 2)}.items() if run.dry else MODELS.items():
        module = _model(run, shape)
        backbone = open_module(module, device=run.device)
        forward = forward_function(backbone.module)
        for rows, tokens in ((2, 24),) if run.dry else ((8, 2048), (8, 256), (1, 2048)):
            shard = _shard(rows, tokens)
            batch = next(iter(shard.batches(rows)))

            def bare(forward: Any = forward, batch: Any = batch) -> None:
                run_batch(forward, batch, run.device)

            base, host = run.timed(bare, 7)
            parameters = sum(p.numel() for n, p in module.named_parameters() if "embed" not in n)
            flops = rows * tokens * (2 * parameters + 2 * tokens * shape[1] * shape[0])
            say = f"{name} {rows} x {tokens}:"
            run.say(f"{say} bare {base:.1f} ms (host {host:.1f}), {flops / base / 1e9:.0f} TFLOP/s")
            for what, kernels, rounds in (("ours", run.own_kernels(), 7), ("torch", Kernels(), 2)):
                with _counting_with(kernels), attached(backbone.layers, SITES) as on_layers:
                    observer = Observer(on_layers, THRESHOLDS)

                    def measured(observer: Observer = observer, batch: Any = batch, bare: Any = bare) -> None:
                        with observer.batch(batch.observed):
                            bare()

                    ms, host = run.timed(measured, rounds, 1)
                    peak = _peak(run, measured) - _peak(run, bare)
                    start = time.perf_counter()
                    merge_strata(observer.strata())
                    last = (time.perf_counter() - start) * 1e3
                run.say(f"{say} {what} {ms:.1f} ms = {base / ms:.3f} of bare (host {host:.1f}), {peak / 1e6:+.0f} MB")
                run.say(f"    and {last:.0f} ms for the result of a shard")
        del module, backbone, forward, bare, measured, observer
        gc.collect()
        if not run.dry:
            torch.cuda.empty_cache()


def _peak(run: Run, function: Callable[[], object]) -> int:
    if run.dry:
        return 0
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _shard(rows: int, tokens: int) -> Shard:
    ids = np.random.default_rng(0).integers(10, 300, (rows, tokens)).astype(np.int32)
    lengths = np.full(rows, tokens, np.int32)
    return Shard(shard_id=0, input_ids=ids, lengths=lengths, skip_first_tokens=0, content_hash="")


COMMANDS: dict[str, Callable[[Run], None]] = {"kernels": alone, "models": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--dry", action="store_true", help="on a CPU, emulated, to see that the script works")
    options = parser.parse_args()
    run = Run(options.dry)
    run.say("torch", torch.__version__, "CUDA", torch.version.cuda)
    if not run.dry:
        card = torch.cuda.get_device_properties(0)
        run.say(card.name, f"{card.multi_processor_count} multiprocessors, {card.total_memory / 1e9:.0f} GB")
    COMMANDS[options.command](run)
    print("\n" + "\n".join(run.lines))


if __name__ == "__main__":
    main()
