"""The estimate: peak memory against a fresh process's, what fits and what does not, and that no weight is read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.checkpoints import VOCABULARY, llama, save_tokenizer
from support.ggufs import write_gguf
from support.pairs import write_pairs
from support.quantized import block_fp8

import avss_dist.estimation.estimate
import avss_dist.partition.cost
from avss_dist.core.errors import AvssError, ConfigError, CorpusError, ModelError, RunFailed
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Execution, Settings
from avss_dist.estimation import benchmark
from avss_dist.estimation.benchmark import LOADS
from avss_dist.estimation.estimate import Estimate, Row, estimate, partition_costs, row
from avss_dist.estimation.small_models import shortened
from avss_dist.measure.shard import counter_bytes
from avss_dist.models.size import footprint
from avss_dist.partition.choose import choose, least_host_bytes
from avss_dist.partition.cost import Calibration, Cost, Machine
from avss_dist.partition.streaming.weights import StreamedWeights
from avss_dist.report.terminal.estimate import automatic, describe_seconds, estimate_table, summary
from avss_dist.requests import EstimateRequest
from avss_dist.system.devices import Devices

SETTINGS = Settings(max_sequences=6, sequence_length=32, batch_size=2, sequences_per_shard=4, device="cpu")
Save = Callable[[Any, Path], Path]


@pytest.fixture(scope="module")
def header_only(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights file ends after its header."""
    folder = tmp_path_factory.mktemp("header-only")
    for file in tiny_llama.iterdir():
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
        (folder / file.name).write_bytes(content[:end])
    return folder


def estimated(model: str, corpus: str, settings: Settings, max_memory: Mapping[str, Any] | None = None) -> Estimate:
    """The estimate of a run with settings."""
    taken = {name: value for name, value in settings.as_dict().items() if name in EstimateRequest.shared}
    return estimate(EstimateRequest(model, corpus=corpus, max_memory=max_memory or {}, **taken))


@pytest.fixture(scope="module")
def guess(header_only: Path) -> Estimate:
    """The estimate of a checkpoint without weights, by a short benchmark in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SECONDS", 0.1)
        patch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
        return estimated(str(header_only), "builtin:pydoc", SETTINGS)


def test_no_weight_is_read(guess: Estimate) -> None:
    """`guess` is of a checkpoint that has none."""
    assert guess.num_parameters == sum(p.numel() for p in llama().parameters())
    assert [row.partition for row in guess.rows] == list(PARTITIONS)
    assert [row.ranks for row in guess.rows] == [1, 1, 1, 2, 2, 2, 2]


def test_the_plan_is_that_of_a_run(guess: Estimate) -> None:
    assert (guess.num_sequences, guess.num_tokens, guess.num_shards) == (6, 6 * 32, 2)
    assert guess.flops > 2 * guess.num_tokens * guess.num_layers * 3 * 32 * 48
    assert all(row.seconds > 0 and row.device_bytes > guess.weight_bytes for row in guess.rows)


def test_it_is_json(guess: Estimate) -> None:
    read = json.loads(json.dumps(guess.as_dict()))
    assert read["rows"][0] == {
        "partition": "single",
        "ranks": 1,
        "gpus": 0,
        "replicas": 1,
        "device_bytes": guess.rows[0].device_bytes,
        "host_bytes": guess.rows[0].host_bytes,
        "exchanged_bytes": 0,
        "fits": True,
        "seconds": guess.rows[0].seconds,
        "shard_seconds": guess.rows[0].seconds / 2,
        "why": "175 kB of weights stay in memory",
    }
    assert "distillation" not in read  # of a teacher, which is not named here


def test_the_table_has_every_partition(guess: Estimate) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(estimate_table(guess))
    text = console.export_text()
    assert all(row.partition in text for row in guess.rows)
    assert guess.best and f"{guess.best.partition} fits: about" in text and "192 tokens in 2 shards" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (12.4, "12 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")],
)
def test_seconds_in_words(seconds: float, said: str) -> None:
    assert describe_seconds(seconds) == said


MEASURE = """
import sys, json, resource
import avss_dist.runs.api
from avss_dist.models.checkpoints import resolve
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.loading import load_tokenizer
from avss_dist.partition.base import Placement
from avss_dist.partition.open import open_replica
from avss_dist.measure.shard import analyze_shard
folder, partition, settings = sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3]))
checkpoint = resolve(folder)
shards = tokenize_corpus("builtin:pydoc", load_tokenizer(checkpoint), settings).shards
replica = open_replica(checkpoint, settings, Placement(partition=partition))
print(max(analyze_shard(replica, shard, settings).peak_memory_bytes for shard in shards))
"""


@pytest.mark.nightly
def test_peak_memory_is_within_15_percent(tmp_path: Path, save_checkpoint: Save) -> None:
    """A random Llama of 400 MB: more than the libraries, and the activations of rows that are real.

    While a model is opened, pages of its weight files may be resident beside their copies, or not, as the system likes.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    folder = save_checkpoint(llama(**sizes, num_key_value_heads=4, max_position_embeddings=256), tmp_path / "model")
    settings = Settings(max_sequences=4, sequence_length=128, batch_size=4, device="cpu")
    guess = estimated(str(folder), "builtin:pydoc", settings)
    assert guess.weight_bytes > 300e6
    for found in (found for found in guess.rows if found.partition in ("single", "streaming")):
        command = [sys.executable, "-c", MEASURE, str(folder), found.partition, json.dumps(settings.as_dict())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(done.stdout.split()[-1])
        mapped = guess.weight_bytes if found.partition != "streaming" else 0
        assert 0.85 * (peak - mapped) <= found.device_bytes <= 1.15 * peak, found.partition


CALIBRATION = Calibration(
    num_sequences=32,
    num_tokens=32 * 100,
    num_shards=8,
    num_batches=16,
    rows_per_shard=4,
    num_strata=1,
    share=8.0,
    costs={
        "single": Cost(layer=2.0, other=1.0),
        "device_map": Cost(layer=3.0, other=1.0),
        "streaming": Cost(layer=2.5, other=1.0),
    },
    library_bytes=300_000_000,
    planned_bytes=400_000_000,
    plan_peak_bytes=450_000_000,
    working_bytes=100_000_000,
    device_working_bytes=7_000_000,
    copy_bytes_per_second=1e9,
    touched_bytes=1 << 40,
    sublayer_share=0.75,
    sum_seconds=0.01,
    gather_bytes_per_second=1e9,
    link_bytes_per_second=0.25e9,
    network_bytes_per_second=0.0,
    unpacked_bytes_per_second=1e6,
)
GB = 10**9


def rows(
    folder: Path,
    machine: Machine,
    execution: Execution | None = None,
    calibration: Calibration = CALIBRATION,
    **sizes: float,
) -> dict[str, Row]:
    settings = replace(SETTINGS, dtype="float32", device=machine.device)
    size = replace(footprint(str(folder), settings), **sizes)  # type: ignore[arg-type]
    execution = execution or Execution()
    counters = counter_bytes(size, settings, calibration.num_strata)
    request = EstimateRequest(folder, corpus="builtin:pydoc", ranks=execution.ranks, max_memory=execution.max_memory)
    costs = partition_costs(str(folder), size, settings, machine, request)
    shards = calibration.num_shards
    return {name: row(cost, cost.usage(calibration, counters), shards) for name, [cost] in costs.items()}


def test_seconds_are_layers_and_the_rest_of_every_shard(tiny_llama: Path) -> None:
    found = rows(tiny_llama, Machine("cpu", 0, GB, 2 * GB))
    assert found["single"].seconds == 8 * (1 + 3 * 2.0)
    assert found["device_map"].seconds == found["single"].seconds
    assert found["streaming"].seconds == 8 * (1 + 3 * 2.5)
    assert found["zero3"].seconds > found["single"].seconds  # two ranks share the cores, and exchange weights


def test_layers_on_disk_take_longer(tiny_llama: Path) -> None:
    found = rows(tiny_llama, Machine("cpu", 0, GB, GB), Execution(max_memory={"cpu": 1}))
    assert not found["device_map"].fits
    assert found["device_map"].seconds == 8 * (1 + 3 * 3.0)
    assert "3 of 3 layers on disk" in found["device_map"].why


def test_embeddings_that_no_token_needs_stay_in_the_file(tiny_llama: Path) -> None:
    """On a CPU; where the dtype is another than the stored one, they do not."""
    machine, half = Machine("cpu", 0, GB, GB), replace(CALIBRATION, touched_bytes=VOCABULARY * 32 * 4 // 2)
    whole, part = (rows(tiny_llama, machine, calibration=c)["single"].device_bytes for c in (CALIBRATION, half))
    assert whole - part == VOCABULARY * 32 * 4 // 2
    other = footprint(str(tiny_llama), replace(SETTINGS, dtype="bfloat16"))
    assert not other.zero_copy and footprint(str(tiny_llama), SETTINGS).zero_copy


def test_weights_that_stay_quantized_are_not_streamed(tiny_llama: Path) -> None:
    found = rows(tiny_llama, Machine("cpu", 0, GB, GB), quantized=True)
    assert found["single"].fits and not found["streaming"].fits
    assert "needs the setting dequantize, which unpacks the weights" in found["streaming"].why


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_unpacking_is_measured_without_the_weights(
    kind: str, tiny_llama: Path, tmp_path: Path, benchmark_in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On zeros: of the checkpoint in block FP8, nothing is left but headers."""
    rates: list[float] = []
    convert = StreamedWeights.convert_zeros
    monkeypatch.setattr(StreamedWeights, "convert_zeros", lambda *args: (rates.append(1.0), convert(*args)))
    if kind == "fp8":
        model = block_fp8(tiny_llama, tmp_path / "fp8")
        file = model / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    else:
        model = write_gguf(llama(), tmp_path / "tiny.gguf")
        save_tokenizer(tmp_path)
    settings = replace(SETTINGS, dtype="float32", dequantize=kind == "fp8")
    found = {row.partition: row for row in estimated(str(model), "builtin:pydoc", settings).rows}
    assert len(rates) == LOADS and found["streaming"].fits and "unpacked in" in found["streaming"].why


def test_only_mixtures_fit_expert_parallel(tiny_llama: Path, tmp_path: Path, save_checkpoint: Save) -> None:
    from support.families import tiny_model

    mixture = save_checkpoint(tiny_model("causal", "mixtral"), tmp_path / "mixtral")
    machine = Machine("cpu", 0, 99 * GB, 99 * GB)
    dense, fits = (rows(folder, machine)["expert_parallel"] for folder in (tiny_llama, mixture))
    assert fits.fits and not dense.fits and "no plan that spreads experts of LlamaForCausalLM" in dense.why
    three = rows(mixture, machine, Execution(partition="expert_parallel", ranks=3))["expert_parallel"]
    assert not three.fits and "3 ranks do not divide the 4 experts" in three.why


def test_more_ranks_than_heads_fit_nothing(tiny_llama: Path) -> None:
    execution = Execution(partition="tensor_parallel", ranks=5)
    row = rows(tiny_llama, Machine("cpu", 0, 99 * GB, 99 * GB), execution)["tensor_parallel"]
    assert not row.fits and "5 ranks cannot share" in row.why


def test_what_auto_takes_is_part_of_the_estimate(guess: Estimate) -> None:
    assert guess.auto == "single" and "fit into" in guess.auto_why
    assert automatic(guess).startswith("auto takes single: 175 kB of weights")
    assert automatic(replace(guess, auto="", auto_why="It is refused.")) == "auto: It is refused."


def test_a_model_that_deepspeed_splits_fits_too(tmp_path: Path, save_checkpoint: Save) -> None:
    """As three ranks do not divide its heads, transformers does not split it; each rank maps the whole model then."""
    folder = save_checkpoint(llama(num_attention_heads=4, num_key_value_heads=4), tmp_path / "four-heads")
    ranks = Execution(partition="tensor_parallel", ranks=3)
    whole, part = (rows(folder, Machine("cpu", 0, 4 * GB, 4 * GB), e)["tensor_parallel"] for e in (ranks, None))
    assert whole.fits and whole.why.startswith("every rank loads the whole model first")
    assert part.fits and part.why.startswith("every rank loads and keeps a part of each matrix")


def test_unpacking_takes_memory_and_time_beside_a_layer(tiny_llama: Path) -> None:
    """A CPU has one layer, unpacked; a GPU two, and the host two as they are stored."""
    layer, packed = (
        footprint(str(tiny_llama), SETTINGS).layer_bytes[0],
        {"unpacking_bytes": 10**6, "stored_share": 0.25},
    )
    for device, gpus, device_more, host_more in (
        ("cpu", 0, 10**6 - layer, 10**6 - layer),
        ("cuda", 1, 10**6, int(2 * layer * 0.25) - 2 * layer),
    ):
        machine = Machine(device, gpus, GB, GB)
        plain, unpacked = (rows(tiny_llama, machine, zero_copy=False, **sizes)["streaming"] for sizes in ({}, packed))
        assert unpacked.device_bytes - plain.device_bytes == device_more
        assert unpacked.host_bytes - plain.host_bytes == host_more
        assert unpacked.seconds - plain.seconds == pytest.approx(8 * 3 * layer / 1e6)
        assert "unpacked in 1 MB" in unpacked.why and "unpacked" not in plain.why


def test_what_fits_is_what_is_free(tiny_llama: Path) -> None:
    """One process fits into 800 MB, two do not; the reason says what is missing."""
    found = rows(tiny_llama, Machine("cpu", 0, 800_000_000, 800_000_000))
    assert found["single"].fits and found["streaming"].fits
    assert not found["zero3"].fits and found["zero3"].host_bytes > 800_000_000
    missing = found["zero3"].host_bytes - 800_000_000
    assert f"lacks {missing / 1e6:.3g} MB of host memory" in found["zero3"].why
    full = rows(tiny_llama, Machine("cpu", 0, 10_000_000, 10_000_000))
    assert not any(row.fits for row in full.values())


def test_planning_can_be_the_peak(tiny_llama: Path) -> None:
    calibration = replace(CALIBRATION, plan_peak_bytes=2 * GB)
    assert rows(tiny_llama, Machine("cpu", 0, GB, GB), calibration=calibration)["single"].device_bytes == 2 * GB


def test_a_gpu_holds_weights_and_the_host_the_process(tiny_llama: Path) -> None:
    found = rows(tiny_llama, Machine("cuda", 1, GB, GB))
    assert 10_000_000 < found["single"].device_bytes < 12_000_000
    assert found["single"].host_bytes == 500_000_000
    assert (
        found["zero3"].ranks == 2 and not found["zero3"].fits and "2 GPUs are needed, 1 are here" in found["zero3"].why
    )
    tight = rows(tiny_llama, Machine("cuda", 1, 10_100_000, GB))
    assert not tight["single"].fits and "of GPU memory" in tight["single"].why


def test_while_zero3_opens_a_model_on_a_cpu_its_files_are_in_memory_too(tiny_llama: Path) -> None:
    """Beside the rank's part; what the libraries take is the same in all of them."""
    machine, execution = Machine("cpu", 0, 99 * GB, 99 * GB), Execution(partition="zero3", ranks=4)
    small, large = (rows(tiny_llama, machine, execution, weight_bytes=n * GB)["zero3"].device_bytes for n in (8, 16))
    assert large - small == (16 + 4) * GB - (8 + 2) * GB
    on_gpu = [rows(tiny_llama, Machine("cuda", 4, GB, GB), execution, weight_bytes=n * GB)["zero3"] for n in (8, 16)]
    assert on_gpu[1].device_bytes - on_gpu[0].device_bytes == 2 * GB


def test_the_simplest_that_is_about_as_fast_as_the_fastest_is_the_best(guess: Estimate) -> None:
    single, device_map, streaming, *others = (replace(row, seconds=10.0) for row in guess.rows)
    equal = replace(guess, rows=(single, device_map, streaming, *others))
    assert equal.best == single
    tight = (replace(single, fits=False), device_map, replace(streaming, seconds=5.0), *others)
    assert replace(guess, rows=tight).best == tight[2]
    near = replace(guess, rows=(*tight[:2], replace(streaming, seconds=9.0), *others))
    assert near.best == device_map
    assert summary(replace(guess, rows=tight)).startswith("streaming fits: about 5.0 s")
    none = replace(guess, rows=tuple(replace(row, fits=False) for row in guess.rows))
    assert none.best is None and summary(none).endswith("fits no partition here.")


def test_free_memory_is_looked_up_and_no_more_than_allowed_is_free(
    header_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that no process keeps fits nothing."""
    monkeypatch.setattr(avss_dist.partition.cost, "available_memory", lambda: 50_000_000)
    assert Machine.look("cpu", {"cpu": 20_000_000}) == Machine("cpu", 0, 20_000_000, 20_000_000)
    assert Machine.look("cpu", {"cpu": 90_000_000, "0": 1}).host_free == 50_000_000
    monkeypatch.setattr(avss_dist.estimation.estimate, "calibrate", lambda *_: CALIBRATION)
    for limits, free in (({}, 50_000_000), ({"cpu": "20MB"}, 20_000_000)):
        found = estimated(str(header_only), "builtin:pydoc", SETTINGS, limits)
        assert found.host_free_bytes == free and found.best is None


def test_what_fits_a_limit_is_what_a_run_accepts(tiny_llama: Path) -> None:
    """Whatever was measured: a run is refused by `choose`, before anything can be."""
    devices = Devices(
        kind="cpu",
        count=1,
        count_of_largest_node=1,
        device_bytes=64 * GB,
        host_bytes=64 * GB,
        cpus=1,
        cpus_of_largest_node=1,
    )
    size, partitions = footprint(str(tiny_llama), SETTINGS), ("device_map", "streaming")
    for partition in partitions:
        least = least_host_bytes(partition, size, SETTINGS, "cpu")
        for limit, fits in ((least, True), (least - 1, False)):
            execution = Execution(partition=partition, max_memory={"cpu": limit})
            found = rows(tiny_llama, Machine("cpu", 0, limit, limit), execution)[partition]
            assert (found.fits, "of host memory" in found.why) == (fits, not fits)
            with nullcontext() if fits else pytest.raises(ConfigError, match="`max_memory` allows"):
                choose(size, SETTINGS, execution, devices)
    least = least_host_bytes("single", size, SETTINGS, "cpu")
    for limit, fits in ((least, True), (least - 1, False)):
        execution = Execution(max_memory={"cpu": limit})
        assert rows(tiny_llama, Machine("cpu", 0, limit, limit), execution)["single"].fits == fits
        assert (choose(size, SETTINGS, execution, devices).partition == "single") == fits


def test_a_benchmark_that_is_killed_is_an_error(header_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_prepare_process", partial(os._exit, 9))
    with pytest.raises(RunFailed, match="ended without a result"):
        estimated(str(header_only), "builtin:pydoc", SETTINGS)


def test_a_short_model_keeps_what_belongs_to_its_layers() -> None:
    from transformers import Gemma3TextConfig

    whole = Gemma3TextConfig(num_hidden_layers=12, vocab_size=262_144)
    short = shortened(whole, 3)
    assert short.num_hidden_layers == 3 == len(short.layer_types) and short.vocab_size == 1024
    assert short.layer_types == whole.layer_types[:3] and whole.num_hidden_layers == 12 == len(whole.layer_types)


@pytest.mark.nightly
def test_mistakes_of_the_plan_come_from_another_process_as_what_they_are(header_only: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.txt"):
        estimated(str(header_only), "nowhere.txt", SETTINGS)


@pytest.mark.parametrize(
    ("model", "corpus", "settings", "error", "said"),
    [
        ("./nowhere", "builtin:pydoc", SETTINGS, ModelError, "There is no folder"),
        ("", "builtin:pydoc", replace(SETTINGS, sequence_length=500_000), AvssError, "sequence"),
        ("", "builtin:pydoc", replace(SETTINGS, layers="nowhere"), ModelError, "no layer list 'nowhere'"),
        ("", "builtin:pydoc", replace(SETTINGS, device="cuda"), ConfigError, "torch sees no GPU here"),
    ],
)
def test_mistakes_are_told(
    model: str,
    corpus: str,
    settings: Settings,
    error: type[AvssError],
    said: str,
    header_only: Path,
    benchmark_in_this_process: None,
) -> None:
    with pytest.raises(error, match=said):
        estimated(model or str(header_only), corpus, settings)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, benchmark_in_this_process: None) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer"):
        estimated(str(tmp_path), "builtin:pydoc", SETTINGS)


def test_counters_are_of_every_stratum(tiny_llama: Path) -> None:
    machine, four = Machine("cpu", 0, GB, GB), replace(CALIBRATION, num_strata=4)
    plain, paired = (rows(tiny_llama, machine, calibration=c)["single"].device_bytes for c in (CALIBRATION, four))
    assert paired - plain == 3 * counter_bytes(footprint(str(tiny_llama), SETTINGS), SETTINGS)


@pytest.mark.parametrize("family", ["mixtral", "mamba", "bert"])
def test_other_families(family: str, tmp_path: Path, save_checkpoint: Save, benchmark_in_this_process: None) -> None:
    """Of paired text, in one of them."""
    from support.families import tiny_model

    model = tiny_model("masked" if family == "bert" else "causal", family)
    model.resize_token_embeddings(VOCABULARY)
    corpus = write_pairs(tmp_path, 4) if family == "mixtral" else "builtin:pydoc"
    settings = replace(SETTINGS, sequence_length=48, max_sequences=12)
    found = estimated(str(save_checkpoint(model, tmp_path / family)), corpus, settings)
    assert found.num_layers == 3 and all(row.seconds > 0 for row in found.rows)
