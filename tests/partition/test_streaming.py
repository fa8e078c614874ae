"""The partition `streaming`: the bytes of `single`, each weight read once, two layers in memory, nothing left."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import greenlet
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.causal_lm import packed_or_padded as shard
from support.checkpoints import checkpoint_at, llama, weights_in
from support.ggufs import write_gguf
from support.json_files import read_json, write_json
from support.oracle import assert_same_result
from support.quantized import block_fp8, compressed_tensors, mxfp4
from support.tiers import nightly
from transformers import Lfm2Config, Lfm2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.sites import SITES
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.models.structure.layers import Layer
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica, no_observation
from avss_dist.partition.streaming.passes import HiddenStateOffloader, Window
from avss_dist.partition.streaming.replica import StreamingReplica
from avss_dist.partition.streaming.weights import buffer_bytes, copied, copied_into, mapped

ROWS = 5
TOKENS = 12
SETTINGS = Settings(batch_size=2, sequence_length=TOKENS, device="cpu")
CLASSES = [
    ("causal", "mamba"),
    ("causal", "mixtral"),  # experts that transformers fuses
    ("causal", "gemma3n_text"),  # layers given more than states
    ("causal", "zamba"),  # layers that share tensors
    *(("masked", name) for name in ("yoso", "albert")),  # NaN where queries equal keys; one layer, used three times
]
OTHERS = [
    *(("causal", name) for name in ("llama", "gpt2", "bloom", "jamba")),
    *(("causal", name) for name in ("qwen2", "gemma2", "gemma3_text", "gpt_neox", "opt", "phi", "falcon")),
    *(("causal", name) for name in ("qwen3_moe", "deepseek_v3", "qwen3_next")),
    ("masked", "bert"),
]
IN_BFLOAT16 = [
    *(("causal", name) for name in ("mixtral", "gpt2", "mamba", "gemma3n_text", "jamba")),
    ("masked", "yoso"),
]


def streaming(folder: Path, settings: Settings = SETTINGS, **placement: Any) -> StreamingReplica:
    return StreamingReplica(checkpoint_at(folder), settings, Placement(partition="streaming", **placement))


def single(folder: Path, settings: Settings = SETTINGS) -> Replica:
    return Replica(checkpoint_at(folder), settings)


def assert_same(folder: Path, settings: Settings = SETTINGS, **placement: Any) -> tuple[StreamingReplica, Replica]:
    """Packed and padded, a shard after the other through the same two replicas."""
    got = streaming(folder, settings, **placement)
    wanted = single(folder, settings)
    for padded in (False, True):
        one = shard(padded=padded)
        assert_same_result(analyze_shard(got, one, settings), analyze_shard(wanted, one, settings))
    return got, wanted


def assert_as_whole(replica: StreamingReplica, folder: Path) -> None:
    """A shard's result is that of the model in memory."""
    streamed = analyze_shard(replica, shard(), SETTINGS)
    assert_same_result(streamed, analyze_shard(single(folder), shard(), SETTINGS))


def weights_of_two_layers(folder: Path, settings: Settings = SETTINGS) -> int:
    """The limit for host memory at which nothing is left for hidden states."""
    left = streaming(folder, settings, max_memory={"cpu": 1 << 40})._passes.host_bytes
    assert left is not None
    return (1 << 40) - left


def without_numbers(layer: Layer) -> bool:
    return all(p.is_meta for p in layer.module.parameters())


def points(layer: Layer) -> dict[str, tuple[str, str, str]]:
    """By site: the module's path in the layer, what is read of it, its axes."""
    paths = {module: path for path, module in layer.module.named_modules()}
    return {site: (paths[point.module], point.reads, point.axes) for site, point in layer.taps.items()}


def stored_bytes(folder: Path, *names: str) -> int:
    """Bytes of the tensors in a checkpoint's files whose name contains one of ``names``."""
    size = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if any(name in key for name in names):
                    size += tensors.get_tensor(key).nbytes
    return size


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    llama_folder = tmp_path / "llama"
    llama().save_pretrained(llama_folder)
    return llama_folder


def gradients_wanted(layer: Layer) -> list[bool]:
    return [parameter.requires_grad for parameter in layer.module.parameters()]


def names_of(layers: Sequence[Layer]) -> list[str]:
    return [layer.name for layer in layers]


@pytest.mark.parametrize(
    ("kind", "family", "dtype"),
    [
        *((*family, "float32") for family in CLASSES),
        ("causal", "llama", "bfloat16"),
        *nightly(*((*family, "float32") for family in OTHERS), *((*family, "bfloat16") for family in IN_BFLOAT16)),
    ],
)
def test_the_bytes_of_single(kind: str, family: str, dtype: str, family_folder: Callable[[str, str], Path]) -> None:
    """Batches of 2, 2 and 1 rows; layers, sites and axes too, though they were found without a weight."""
    folder = family_folder(kind, family)
    mixed = family == "mamba" and dtype == "bfloat16"  # its first layer is given bfloat16 and returns float32
    settings = replace(SETTINGS, dtype=dtype, sites=SITES[1:] if mixed else SITES)
    got, wanted = assert_same(folder, settings)
    for ours, theirs in zip(got.layers, wanted.layers, strict=True):
        for name in ("index", "name", "call", "axes"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert type(ours.module).__qualname__ == type(theirs.module).__qualname__
        assert points(ours) == points(theirs)
        # Whether a gradient is wanted decides how torch multiplies, and so the last digits.
        assert gradients_wanted(ours) == gradients_wanted(theirs)


@pytest.mark.nightly
def test_half_precision_files(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    for compute, dtype in (("float32", "float32"), ("auto", "bfloat16")):
        replica, _ = assert_same(tmp_path, replace(SETTINGS, dtype=compute))
        assert replica.model["dtype"] == dtype


@pytest.mark.parametrize("ties", ["untied", "stored twice", *nightly("tied", "stored twice, unequal")])
def test_heads(ties: str, tmp_path: Path) -> None:
    """The head is not read where it is no embedding; it counts as a parameter as `single` counts it."""
    llama(tie_word_embeddings=ties != "untied").save_pretrained(tmp_path)
    weights_file = tmp_path / "model.safetensors"
    if ties.startswith("stored twice"):
        tensors = load_file(weights_file)
        head = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"] = head * 2 if ties.endswith("unequal") else head
        save_file(tensors, weights_file, {"format": "pt"})
    replica, _ = assert_same(tmp_path)
    head = replica._weights.model.lm_head.weight
    assert head.is_meta == (ties in ("untied", "stored twice, unequal"))


def test_several_files_and_a_backbone_without_prefix(tmp_path: Path) -> None:
    several = tmp_path / "several"
    llama().save_pretrained(several, max_shard_size="20KB")
    assert len(list(several.glob("*.safetensors"))) > 3
    replica, _ = assert_same(several)
    backbone = tmp_path / "backbone"
    llama().model.save_pretrained(backbone)
    other, _ = assert_same(backbone)
    assert names_of(other.layers) == names_of(replica.layers)


def test_each_weight_is_read_once(tmp_path: Path) -> None:
    """Opening reads what is no layer; a shard reads every layer once, however many batches it has."""
    llama(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    replica = streaming(tmp_path)
    assert replica._weights.bytes_read == stored_bytes(tmp_path, "embed_tokens", "model.norm")
    layers = stored_bytes(tmp_path, "model.layers.")
    for batches in (1, 3):
        before = replica._weights.bytes_read
        replica.forward(list(shard().batches(ROWS // batches)), no_observation)
        assert replica._weights.bytes_read - before == layers
    before = replica._weights.bytes_read
    replica.forward([], no_observation)
    assert replica._weights.bytes_read == before


def test_weights_are_where_the_system_has_the_files(tmp_path: Path) -> None:
    """On a CPU, none of a layer is copied; it is in memory while the layer runs, and mapped only then."""
    llama(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    replica = streaming(tmp_path)
    resident: list[int] = []

    def look(*_: Any) -> None:
        resident.append(resident_bytes(tmp_path))

    for layer in replica.layers:
        layer.module.register_forward_pre_hook(look)
    replica.forward(list(shard().batches(ROWS)), no_observation)
    look()
    layer_bytes = stored_bytes(tmp_path, "model.layers.0.")
    *in_layers, after = resident
    assert len(in_layers) == 3
    for size in in_layers:
        assert layer_bytes <= size < 1.5 * layer_bytes
    assert after == 0


def resident_bytes(folder: Path) -> int:
    """The bytes of a folder's files that this process has mapped and that are in memory."""
    total = 0
    is_in_folder = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if str(folder) in line:
            is_in_folder = True
        elif is_in_folder and line.startswith("Rss:"):
            _name, kibibytes, _unit = line.split()
            total += int(kibibytes) * 1024
            is_in_folder = False
    return total


def test_what_a_model_writes_into_its_weights_does_not_reach_the_file(tiny: Path) -> None:
    replica = streaming(tiny)
    weights_file = tiny / "model.safetensors"
    before = weights_file.read_bytes()

    def scribble(module: Any, *_: Any) -> None:
        with torch.no_grad():
            next(module.parameters()).zero_()

    handle = replica.layers[1].module.register_forward_pre_hook(scribble)
    replica.forward(list(shard().batches(ROWS)), no_observation)
    handle.remove()
    assert weights_file.read_bytes() == before
    assert_as_whole(replica, tiny)


def test_layers_in_another_order_than_expected(tiny: Path) -> None:
    """What was read ahead for nothing is taken away."""
    replica = streaming(tiny)
    stored = weights_in(tiny)
    with Window(replica._weights, replica._parts, [0, 1, 2], replica.device) as window:
        for index in (2, 0, 1, 1, 0):
            window.load(index)
            weights = replica.layers[index].module.state_dict()
            for name, weight in weights.items():
                assert torch.equal(weight, stored[f"model.layers.{index}.{name}"])
    assert all(map(without_numbers, replica.layers))


def test_code_of_the_checkpoint_itself(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model class that comes with the checkpoint is built and filled as transformers would."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tiny / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    config_file = tiny / "config.json"
    config = read_json(config_file)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": code}
    config_file.write_text(json.dumps(config), encoding="utf-8")
    checkpoint = resolve(str(tiny), trust_remote_code=True)
    settings = replace(SETTINGS, trust_remote_code=True)
    got = StreamingReplica(checkpoint, settings, Placement(partition="streaming"))
    assert got.model["architecture"] == "OwnForCausalLM"
    wanted = Replica(checkpoint, settings)
    assert_same_result(analyze_shard(got, shard(), settings), analyze_shard(wanted, shard(), settings))


def test_two_layers_at_most(tmp_path: Path) -> None:
    """Weights of the layer that runs, and perhaps of the next; after the shard of none. No gradient anywhere."""
    llama(num_hidden_layers=6).save_pretrained(tmp_path)
    replica = streaming(tmp_path)
    calls: list[int] = []
    for layer in replica.layers:

        def look(*_: Any, index: int = layer.index) -> None:
            in_memory = {other.index for other in replica.layers if not without_numbers(other)}
            calls.append(index)
            assert index in in_memory
            assert in_memory <= {index, index + 1}
            assert not torch.is_grad_enabled()

        layer.module.register_forward_pre_hook(look)
    replica.forward(list(shard().batches(2)), no_observation)
    assert calls == sorted([0, 1, 2, 3, 4, 5] * 3)
    assert torch.is_grad_enabled()
    assert all(map(without_numbers, replica.layers))


def test_each_batch_runs_in_its_own_context(tiny: Path) -> None:
    """The context is around all of a batch and nothing of another, though they take turns."""
    from contextlib import contextmanager
    from contextvars import ContextVar

    number: ContextVar[int] = ContextVar("number", default=-1)
    outer: ContextVar[str] = ContextVar("outer", default="")
    replica = streaming(tiny)
    batches = list(shard().batches(2))
    seen: list[tuple[int, int]] = []

    @contextmanager
    def context(batch: Any) -> Iterator[None]:
        before = number.set(list(map(id, batches)).index(id(batch)))
        yield
        number.reset(before)

    for layer in replica.layers:

        def note(*_: Any, index: int = layer.index) -> None:
            seen.append((index, number.get()))
            assert outer.get() == "inherited"

        layer.module.register_forward_hook(note)
    outer.set("inherited")
    replica.forward(batches, context)
    assert seen == list(product(range(3), range(3)))
    assert number.get() == -1


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        *(("llama", "none of them"), ("bloom", "some of them")),
        *nightly(("gpt2", "none of them"), ("gemma3n_text", "some of them")),
    ],
)
def test_hidden_states_wait_in_files(
    family: str, limit: str, offload: Path, family_folder: Callable[[str, str], Path]
) -> None:
    """What has no room beside the weights is written, and nothing stays."""
    folder = family_folder("causal", family)
    most = weights_of_two_layers(folder) + (5000 if limit == "some of them" else 0)
    replica, _ = assert_same(folder, max_memory={"cpu": most})
    numbers: list[int] = []

    def count(*_: Any) -> None:
        files = list(offload.rglob("avss-offload-*/*"))
        numbers.append(len(files))

    for layer in replica.layers:
        layer.module.register_forward_hook(count)
    replica.forward(list(shard().batches(1)), no_observation)
    least = ROWS - 1 if limit == "none of them" else 1
    assert max(numbers) >= least
    assert list(offload.iterdir()) == []


def test_hidden_states_stay_on_a_gpu_while_it_has_room() -> None:
    """Two fit, and wait where they are, layer after layer; the others go. (The tensors are the CPU's.)"""
    tensors = [torch.arange(1000.0) + batch for batch in range(4)]
    with closing(HiddenStateOffloader(torch.device("cuda"), 8000, 0)) as offloader:
        for _ in range(2):
            for batch, tensor in enumerate(tensors):
                offloader.offload(batch, [tensor])
            assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [4000, 4000, 0, 0]
            for batch in range(4):
                offloader.restore(batch)
            for batch, tensor in enumerate(tensors):
                assert torch.equal(tensor, torch.arange(1000.0) + batch)


def test_a_limit_without_room_for_a_layer_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"`max_memory` leaves 1 Byte .* streaming needs [\d.]+ kB for one layer"):
        streaming(tiny, max_memory={"cpu": 1})


def test_a_folder_that_cannot_be_written(tiny: Path, offload: Path) -> None:
    replica = streaming(tiny, max_memory={"cpu": weights_of_two_layers(tiny)})
    offload.rmdir()
    with pytest.raises(ConfigError, match=r"temporary folder .* cannot be written.*\n.*TMPDIR"):
        replica.forward(list(shard().batches(2)), no_observation)
    assert all(map(without_numbers, replica.layers))


@pytest.mark.parametrize(
    ("error", "place"),
    [(ModelError("on purpose"), (0, 0)), (torch.OutOfMemoryError("on purpose"), (1, 1)), (KeyboardInterrupt(), (2, 2))],
)
def test_after_an_error_the_replica_is_as_before(
    error: BaseException, place: tuple[int, int], tiny: Path, offload: Path
) -> None:
    """In whatever layer of whatever batch: batches are unwound, and no thread, file, weight or hook stays."""
    replica = streaming(tiny, max_memory={"cpu": weights_of_two_layers(tiny)})
    calls: list[None] = []
    left: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == place[1] + 1:
            raise error

    def context(batch: Any) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        stack.callback(left.append, len(batch.input_ids))
        return stack

    handle = replica.layers[place[0]].module.register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        replica.forward(list(shard().batches(2)), context)
    handle.remove()
    assert sorted(left) == [1, 2, 2]
    assert list(offload.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("avss-weights")]
    assert all(map(without_numbers, replica.layers))
    assert torch.is_grad_enabled()
    assert greenlet.getcurrent().parent is None
    assert_as_whole(replica, tiny)


@pytest.mark.parametrize(("harm", "told"), [("shrinks", "ends before its tensor"), ("goes", "cannot be read")])
def test_a_file_that_changes(harm: str, told: str, tiny: Path) -> None:
    """It is told which; when the file is as it was, the replica works."""
    replica = streaming(tiny)
    file = tiny / "model.safetensors"
    whole = file.read_bytes()
    if harm == "goes":
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=f"{file.name} {told}"):
        analyze_shard(replica, shard(), SETTINGS)
    assert all(map(without_numbers, replica.layers))
    file.write_bytes(whole)
    assert_as_whole(replica, tiny)


DEQUANTIZED = replace(SETTINGS, dequantize=True)


@pytest.mark.parametrize(
    ("kind", "family", "dtype"),
    [
        ("fp8", "qwen3_moe", "bfloat16"),
        ("mxfp4", "gpt_oss", "float32"),
        ("int8", "llama", "float32"),
        *nightly(("fp8 in partial blocks", "deepseek_v3", "float32"), ("int4", "qwen3_moe", "bfloat16")),
        *nightly(("fp8", "llama", "float32"), ("mxfp4", "gpt_oss", "bfloat16")),
        *nightly(("fp8-tensor", "qwen3_moe", "float32"), ("fp8-channel", "llama", "bfloat16")),
    ],
)
def test_quantized_weights(
    kind: str, family: str, dtype: str, family_folder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """They are unpacked to the numbers of `single` with `dequantize`, layer by layer."""
    whole = family_folder("causal", family)
    folder = tmp_path / "quantized"
    if kind == "mxfp4":
        mxfp4(whole, folder)
    elif kind.startswith("fp8") and "-" not in kind:
        block_fp8(whole, folder, 24 if "partial" in kind else 16)
    else:
        compressed_tensors(whole, folder, kind)
    replica, _ = assert_same(folder, replace(DEQUANTIZED, dtype=dtype))
    assert all(map(without_numbers, replica.layers))


@pytest.mark.parametrize(
    ("architecture", "kind", "dtype"),
    [
        ("llama", "Q4_0", "bfloat16"),
        ("lfm2", "Q8_0", "auto"),
        *nightly(("llama", "BF16", "float32"), ("qwen3moe", "Q8_0", "float32")),
    ],
)
def test_gguf(architecture: str, kind: str, dtype: str, tmp_path: Path) -> None:
    """Of both readers of transformers: lfm2 goes through its conversions."""
    model: Any = llama(tie_word_embeddings=True)
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    if architecture == "qwen3moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, intermediate_size=96, num_hidden_layers=2))
    elif architecture == "lfm2":
        layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "block_auto_adjust_ff_dim": False}
        model = Lfm2ForCausalLM(Lfm2Config(**sizes, **layers, intermediate_size=96))
    file = tmp_path / "model.gguf"
    write_gguf(model, file, architecture=architecture, kind=GGMLQuantizationType[kind])
    replica, _ = assert_same(file, replace(SETTINGS, dtype=dtype))
    assert all(map(without_numbers, replica.layers))


def test_unpacked_blocks_are_the_stored_numbers_times_their_scales(tmp_path: Path) -> None:
    """Also in a last block of fewer rows or columns: of 48 in blocks of 20, or of 32."""
    whole = tmp_path / "whole"
    llama().save_pretrained(whole)
    folder = block_fp8(whole, tmp_path / "fp8", 20)
    stored = weights_in(folder)
    replica = streaming(folder, DEQUANTIZED)
    part = replica._parts[1]
    buffer = torch.empty(buffer_bytes(part.stored), dtype=torch.uint8)
    for read in (copied, mapped, lambda stored: copied_into(buffer, stored)):
        replica._weights.load(part, replica.device, read)
        weights = replica.layers[1].module.state_dict()
        for name in ("mlp.up_proj.weight", "mlp.down_proj.weight", "self_attn.k_proj.weight"):
            packed, scale = (stored[f"model.layers.1.{name}{suffix}"] for suffix in ("", "_scale_inv"))
            scales = scale.repeat_interleave(20, 0).repeat_interleave(20, 1)[: len(packed), : packed.shape[1]]
            assert scale.numel() > 1
            assert torch.equal(weights[name], packed.float() * scales)
        assert torch.equal(weights["input_layernorm.weight"], stored["model.layers.1.input_layernorm.weight"])
        part.unload()


def test_weights_are_unpacked_a_few_at_a_time(family_folder: Callable[[str, str], Path], tmp_path: Path) -> None:
    """With the stored tensors of one weight, which for fused experts are those of all experts."""
    folder = block_fp8(family_folder("causal", "qwen3_moe"), tmp_path / "fp8")
    replica, _ = assert_same(folder, DEQUANTIZED)
    sizes = sorted({len(group) for group in replica._parts[0].groups})
    assert sizes == [2, 2 * 4, 2 * 2 * 4]  # a matrix and its scales; four experts down; gate and up


def test_the_memory_that_unpacking_takes_is_no_room_for_hidden_states(tmp_path: Path, tiny: Path) -> None:
    folder = block_fp8(tiny, tmp_path / "fp8")
    replica = streaming(folder, DEQUANTIZED, max_memory={"cpu": 1 << 40})
    weights = replica._weights
    layer = sum(p.nbytes for p in replica.layers[0].module.parameters())
    outside = sum(p.nbytes for p in weights.model.model.parameters() if not p.is_meta)
    unpacking = 2 * 4 * 32 * 48  # two copies of a matrix of the MLP in float32
    used = (1 << 40) - (replica._passes.host_bytes or 0)
    assert layer + outside + unpacking <= used < layer + outside + unpacking + 3000  # buffers, and alignment
    with pytest.raises(ConfigError, match="for one layer and the weights outside of layers"):
        streaming(folder, DEQUANTIZED, max_memory={"cpu": layer + outside})


@pytest.mark.parametrize("open_replica", [streaming, single])
@pytest.mark.parametrize(
    ("kind", "suffix", "named"),
    [
        ("fp8", "weight_scale_inv", "layers.1.mlp.up_proj.weight"),
        ("mxfp4", "_scales", "layers.1.mlp.experts.down_proj_blocks"),
        ("int4", "weight_scale", "layers.1.mlp.up_proj.weight_packed"),
    ],
)
def test_missing_scales_are_refused(
    open_replica: Callable[[Path, Settings], Any],
    kind: str,
    suffix: str,
    named: str,
    family_folder: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    """transformers would take them for 1."""
    whole = family_folder("causal", "gpt_oss" if kind == "mxfp4" else "llama")
    folder = tmp_path / "quantized"
    {"fp8": block_fp8, "mxfp4": mxfp4}.get(kind, lambda *at: compressed_tensors(*at, kind))(whole, folder)
    tensors = weights_in(folder)
    stem = "down_proj" if kind == "mxfp4" else "up_proj."
    lacking = {name for name in tensors if name.endswith(f"{stem}{suffix}") and ".1." in name}
    assert len(lacking) == 1
    save_file({name: tensor for name, tensor in tensors.items() if name not in lacking}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"lack the scales of quantized weights: model.{named}\\.\n"):
        open_replica(folder, DEQUANTIZED)


@pytest.mark.parametrize(
    ("quantization", "dequantize", "message"),
    [
        (None, False, r"stores 'model\.norm\.weight' as F8_E4M3"),
        ({"quant_method": "fp8"}, False, r"is quantized \(fp8\); `partition` streaming computes with unpacked weights"),
        ({"quant_method": "shrinkwrap"}, True, "quantized by 'shrinkwrap', which transformers does not know"),
        ({"quant_method": "bitnet"}, True, "transformers cannot unpack while it loads"),
    ],
)
def test_quantizations_that_cannot_be_streamed(
    quantization: dict[str, str] | None, dequantize: bool, message: str, tiny: Path
) -> None:
    weights_file = tiny / "model.safetensors"
    if quantization is None:
        tensors = load_file(weights_file)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
        save_file(tensors, weights_file, {"format": "pt"})
    config_file = tiny / "config.json"
    config = read_json(config_file)
    write_json(config_file, config | {"quantization_config": quantization})
    with pytest.raises(ModelError, match=message):
        streaming(tiny, replace(SETTINGS, dequantize=dequantize))


def test_experts_of_another_layer_are_refused(family_folder: Callable[[str, str], Path], tmp_path: Path) -> None:
    """A layer whose experts are missing is not filled with noise."""
    folder = family_folder("causal", "mixtral")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {
        name: tensor
        for name, tensor in weights_in(folder).items()
        if not (name.startswith("model.layers.1.") and name.endswith("experts.3.w2.weight"))
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError):
        replica = streaming(tmp_path)
        analyze_shard(replica, shard(), SETTINGS)


def test_closing_gives_the_layers_their_classes_back(tiny: Path) -> None:
    replica = streaming(tiny)
    modules = [layer.module for layer in replica.layers]
    kinds = {type(module).__mro__[1] for module in modules}
    replica.close()
    assert {type(module) for module in modules} == kinds
    assert not hasattr(replica, "layers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "gguf"])
def test_quantized_weights_on_a_gpu(kind: str, family_folder: Callable[[str, str], Path], tmp_path: Path) -> None:
    if kind == "gguf":
        folder = write_gguf(llama(), tmp_path / "model.gguf", kind=GGMLQuantizationType.Q8_0)
    elif kind == "mxfp4":
        folder = mxfp4(family_folder("causal", "gpt_oss"), tmp_path / "mxfp4")
    else:
        folder = block_fp8(family_folder("causal", "qwen3_moe"), tmp_path / "fp8")
    assert_same(folder, replace(SETTINGS, device="cuda", dequantize=kind != "gguf"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("limited", [False, True])
def test_on_a_gpu(limited: bool, tmp_path: Path) -> None:
    """The bytes of `single` on the same GPU; a waiting batch's hidden states are not on it."""
    llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=6).save_pretrained(tmp_path)
    settings = replace(SETTINGS, device="cuda", sequence_length=128, batch_size=8)
    limit = {"cpu": weights_of_two_layers(tmp_path, settings)} if limited else {}
    replica = streaming(tmp_path, settings, max_memory=limit)
    one = shard(rows=64, tokens=128)
    assert_same_result(analyze_shard(replica, one, settings), analyze_shard(single(tmp_path, settings), one, settings))
    used: list[int] = []
    replica.layers[3].module.register_forward_pre_hook(lambda *_: used.append(torch.cuda.memory_allocated()))
    for batches in (1, 8):
        replica.forward(list(shard(rows=8 * batches, tokens=128).batches(8)), no_observation)
    assert max(used[1:]) < used[0] + 2 * 8 * 128 * 512 * 4
