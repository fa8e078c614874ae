"""Distributed checkpoints: pieces of tensors that ranks wrote, put together once, as tensors alone."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.checkpoints import checkpoint_at, llama, weights_in
from support.command_line import avss
from support.fsdp_training import train_and_save
from support.json_files import read_json, write_json
from support.rank_processes import Gang
from support.tables import assert_same_tables, run_rows
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoint import convert
from avss_dist.models.checkpoint.convert import convert_pickles
from avss_dist.models.checkpoint.distributed import (
    METADATA,
    Chunk,
    TensorList,
    distributed_folder,
    is_written,
    read_list,
)
from avss_dist.models.checkpoint.locate import find_checkpoint, resolve
from avss_dist.models.checkpoint.safetensors import NewTensor, write_tensors
from avss_dist.models.checkpoint.training import TrainingPoint, training_point
from avss_dist.runs.ray.worker import resolve_on_node

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FSDP = "pytorch_model_fsdp_0"


def save_pieces(state: Mapping[str, Any], folder: Path, **options: Any) -> Path:
    """Write a distributed checkpoint, as one rank does."""
    writer = dcp.FileSystemWriter(folder, sync_files=False, **options)
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    return folder


@pytest.fixture
def training(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint of a training with FSDP, as Accelerate writes it, whose configuration is above."""
    run = tmp_path / "run"
    folder = run / "checkpoint-500"
    save_pieces({"model": weights_in(tiny_llama)}, folder / FSDP)
    for file in tiny_llama.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, run / file.name)
    return folder


def saved(value: object) -> bytes:
    """Return what ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def converted(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint after it was converted."""
    convert_pickles(str(folder))
    return weights_in(checkpoint_at(folder).folder)


def same(tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    if tensors.keys() != others.keys():
        return False
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("named", [".", FSDP])
def test_pieces_become_the_weights(named: str, training: Path, tiny_llama: Path) -> None:
    assert same(converted(training / named), weights_in(tiny_llama))


def test_a_tokenizer_above_is_copied(training: Path) -> None:
    convert_pickles(str(training))
    assert (checkpoint_at(training).folder / "tokenizer.json").is_file()


def test_the_nearest_configuration_is_taken(training: Path) -> None:
    config = read_json(training.parent / "config.json")
    write_json(training / "config.json", config | {"rope_theta": 77.0})
    convert_pickles(str(training))
    assert read_json(checkpoint_at(training).folder / "config.json")["rope_theta"] == 77.0


def test_a_converted_checkpoint_keeps_its_place_in_the_training(training: Path) -> None:
    convert_pickles(str(training / FSDP))
    checkpoint = checkpoint_at(training / FSDP)
    assert training_point(checkpoint) == TrainingPoint(f"{training.parent}/checkpoint-*", 500)


def test_a_converted_checkpoint_keeps_its_name(training: Path) -> None:
    convert_pickles(str(training / FSDP))
    assert checkpoint_at(training / FSDP).slug == "checkpoint-500"


def test_the_configuration_is_found_without_a_conversion(training: Path) -> None:
    assert (find_checkpoint(str(training), weights=False).folder / "config.json").is_file()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"model.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}".replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: f"model._orig_mod.{name}",
    ],
)
def test_names_of_wrappers_are_removed(rename: Callable[[str], str], training: Path, tiny_llama: Path) -> None:
    weights = weights_in(tiny_llama)
    shutil.rmtree(training / FSDP)
    save_pieces({rename(name): tensor for name, tensor in weights.items()}, training / FSDP)
    assert same(converted(training), weights)


def test_the_state_of_an_optimizer_is_left_out(training: Path, tiny_llama: Path) -> None:
    weights = weights_in(tiny_llama)
    moments = {name: {"exp_avg": torch.ones_like(tensor), "step": 3} for name, tensor in weights.items()}
    state = {"model": weights, "optim": {"state": moments, "param_groups": [{"lr": 0.1}]}}
    shutil.rmtree(training / FSDP)
    save_pieces(state, training / "model_and_optim")
    assert same(converted(training), weights)


def test_an_encoder_is_read_without_its_head(tiny_bert: Path, tmp_path: Path) -> None:
    weights = weights_in(tiny_bert)
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors")))
    state: dict[str, Any] = {f"bert.{name}": tensor for name, tensor in weights.items()}
    save_pieces({"model": state | {"cls.predictions.bias": torch.ones(3)}}, folder / FSDP)
    assert same(converted(folder), weights)


def test_a_tied_weight_is_written_once(save_checkpoint: Any, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    folder = save_checkpoint(model, tmp_path / "tied")
    weights = weights_in(folder)
    (folder / "model.safetensors").unlink()
    save_pieces(model.state_dict(), folder)
    assert same(converted(folder), weights)


def test_names_of_olmo_core_are_those_of_transformers(save_checkpoint: Any, tmp_path: Path) -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0}
    model = Olmo2ForCausalLM(Olmo2Config(vocab_size=200, num_hidden_layers=2, **sizes))
    run = save_checkpoint(model, tmp_path / "run")
    weights = weights_in(run)
    (run / "model.safetensors").unlink()
    names = {
        "model.embed_tokens": "embeddings",
        "model.norm": "lm_head.norm",
        "lm_head": "lm_head.w_out",
        "self_attn.q_proj": "attention.w_q",
        "self_attn.k_proj": "attention.w_k",
        "self_attn.v_proj": "attention.w_v",
        "self_attn.o_proj": "attention.w_out",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "post_attention_layernorm": "attention_norm",
        "post_feedforward_layernorm": "feed_forward_norm",
    }
    renamed = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        layer = ""
        if module.startswith("model.layers."):
            _, _, index, module = module.split(".", 3)
            layer = f"blocks.{index}."
        renamed[f"{layer}{names[module]}.weight"] = tensor
    step = run / "step1000"
    save_pieces({"model": renamed}, step / "model_and_optim")
    write_json(step / "config.json", {"model": {"d_model": 32}})  # OLMo-core's own
    assert same(converted(step), weights)


def test_pieces_can_be_safetensors(training: Path, tiny_llama: Path) -> None:
    weights = weights_in(tiny_llama)
    shutil.rmtree(training / FSDP)
    state = {"model": weights, "step": 3}  # which stands before the safetensors in the file
    save_pieces(state, training / FSDP, serialization_format=SerializationFormat.SAFETENSORS)
    assert same(converted(training), weights)


Pieces = Sequence[tuple[Sequence[int], torch.Tensor]]


def write_by_hand(folder: Path, tensors: Mapping[str, tuple[torch.Size, Pieces]], **changes: Any) -> None:
    """Write a distributed checkpoint with the pieces of each tensor at their offsets, a file for each piece."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, (size, pieces) in tensors.items():
        chunks = []
        for offsets, piece in pieces:
            chunks.append(dcp_metadata.ChunkStorageMetadata(torch.Size(offsets), piece.size()))
            data = saved(piece.clone())
            file = folder / f"__{len(places)}_0.distcp"
            file.write_bytes(data)
            info = _StorageInfo(file.name, 0, len(data), changes.get("transform_descriptors"))
            places[dcp_metadata.MetadataIndex(name, offsets)] = info
        properties = dcp_metadata.TensorProperties(dtype=pieces[0][1].dtype)
        entries[name] = dcp_metadata.TensorStorageMetadata(properties, torch.Size(size), chunks)
    metadata = dcp_metadata.Metadata(entries, storage_data=places)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def divided(training: Path, tiny_llama: Path) -> Callable[[Pieces], Path]:
    """A function that writes the training's checkpoint with the given pieces of one weight."""

    def write(pieces: Pieces) -> Path:
        shutil.rmtree(training / FSDP)
        weights = weights_in(tiny_llama)
        whole: dict[str, tuple[torch.Size, Pieces]] = {}
        for name, tensor in weights.items():
            whole[name] = (tensor.size(), [([0] * tensor.dim(), tensor)])
        whole[UP] = (weights[UP].size(), pieces)
        write_by_hand(training / FSDP, whole)
        return training

    return write


def test_pieces_are_put_together_by_their_offsets(divided: Callable[[Pieces], Path], tiny_llama: Path) -> None:
    weights = weights_in(tiny_llama)
    up = weights[UP]
    pieces = [([20, 0], up[20:]), ([0, 10], up[:20, 10:]), ([0, 0], up[:20, :10]), ([48, 0], up[48:])]
    assert same(converted(divided(pieces)), weights)


def test_overlapping_pieces_are_refused(divided: Callable[[Pieces], Path], tiny_llama: Path) -> None:
    up = weights_in(tiny_llama)[UP]
    folder = divided([([0, 0], up[:30]), ([20, 0], up[20:])])
    with pytest.raises(ModelError, match=rf"'{UP}' of .* has pieces that overlap, at \(0, 0\) and \(20, 0\)"):
        convert_pickles(str(folder))


def test_a_missing_piece_is_refused(divided: Callable[[Pieces], Path], tiny_llama: Path) -> None:
    up = weights_in(tiny_llama)[UP]
    folder = divided([([0, 0], up[:20]), ([40, 0], up[40:])])
    with pytest.raises(ModelError, match=rf"'{UP}' of .* pieces of 896 of its 1,536 elements"):
        convert_pickles(str(folder))


def test_a_piece_beyond_its_tensor_is_refused(divided: Callable[[Pieces], Path], tiny_llama: Path) -> None:
    up = weights_in(tiny_llama)[UP]
    with pytest.raises(ModelError, match=rf"'{UP}' of .* a piece of \(48, 32\) beyond it"):
        convert_pickles(str(divided([([8, 0], up)])))


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (Chunk((0, 0), (2, 2)), Chunk((1, 1), (2, 2)), True),
        (Chunk((0, 0), (2, 2)), Chunk((2, 0), (2, 2)), False),
        (Chunk((0, 0), (2, 2)), Chunk((0, 2), (2, 2)), False),
        (Chunk((0, 0), (9, 9)), Chunk((4, 4), (1, 1)), True),
        (Chunk((), ()), Chunk((), ()), True),
    ],
)
def test_chunks_overlap_that_have_an_element_in_common(one: Chunk, other: Chunk, overlap: bool) -> None:
    assert one.overlaps(other) is other.overlaps(one) is overlap


def test_a_missing_tensor_is_named(training: Path, tiny_llama: Path) -> None:
    weights = weights_in(tiny_llama)
    del weights[UP]
    shutil.rmtree(training / FSDP)
    save_pieces({"model": weights}, training / FSDP)
    with pytest.raises(ModelError, match=rf"lacks weights of the LlamaForCausalLM that .*config.json .*: {UP}\."):
        convert_pickles(str(training))


def test_a_missing_head_is_not_needed_for_a_score(training: Path, tiny_llama: Path) -> None:
    weights = weights_in(tiny_llama)
    del weights["lm_head.weight"]
    shutil.rmtree(training / FSDP)
    save_pieces({"model": weights}, training / FSDP)
    assert same(converted(training), weights)


def test_another_shape_is_named(training: Path, tiny_llama: Path) -> None:
    weights = weights_in(tiny_llama)
    weights[UP] = weights[UP][:7]
    shutil.rmtree(training / FSDP)
    save_pieces({"model": weights}, training / FSDP)
    with pytest.raises(ModelError, match=rf"'model.{UP}' of .*.metadata has the shape \(7, 32\).* has \(48, 32\)"):
        convert_pickles(str(training))


def test_the_weights_of_another_library_are_refused_by_their_names(training: Path) -> None:
    shutil.rmtree(training / FSDP)
    save_pieces({"tok_embeddings.weight": torch.ones(3)}, training / FSDP)
    with pytest.raises(ModelError, match=r"no weight of the LlamaForCausalLM.* has tok_embeddings.weight"):
        convert_pickles(str(training))


def test_a_list_that_is_not_written_yet_is_waited_for(training: Path) -> None:
    (training / FSDP / METADATA).unlink()
    pieces = distributed_folder(training)
    assert pieces is not None
    assert not is_written(pieces)
    with pytest.raises(ModelError, match=r"no list of them.*\n.*still write it"):
        resolve(str(training))


def test_without_a_configuration_the_message_says_where_it_goes(training: Path) -> None:
    (training.parent / "config.json").unlink()
    with pytest.raises(ModelError, match=r"distributed checkpoint without the config.json.*\nCopy config.json"):
        convert_pickles(str(training))


def test_a_distributed_checkpoint_is_opened_only_if_allowed(training: Path) -> None:
    with pytest.raises(ModelError, match=r"is a distributed checkpoint.*\navss score --allow-pickle"):
        resolve(str(training))


@pytest.fixture
def later(training: Path, tiny_llama: Path) -> Path:
    """The next checkpoint of the training, with the same configuration."""
    folder = training.parent / "checkpoint-1000"
    tensors = {name: tensor + 1 for name, tensor in weights_in(tiny_llama).items()}
    save_pieces({"model": tensors}, folder / FSDP)
    return folder


def test_checkpoints_are_told_apart_before_they_are_converted(training: Path, later: Path) -> None:
    revisions = [resolve(str(folder), unconverted=True).revision for folder in (training, later)]
    assert revisions[0] != revisions[1]


def test_a_converted_checkpoint_has_the_revision_of_its_weights(training: Path) -> None:
    convert_pickles(str(training))
    assert resolve(str(training), unconverted=True) == checkpoint_at(training)


def test_a_node_with_another_cache_converts_the_checkpoint_again(training: Path) -> None:
    convert_pickles(str(training))
    checkpoint = checkpoint_at(training)
    elsewhere = replace(checkpoint, path="/cache/of/another/node")
    assert resolve_on_node(elsewhere, pickles=True) == checkpoint


def test_a_conversion_that_another_process_ends_first_is_taken(
    training: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = convert.read_list

    def read_late(folder: Path) -> TensorList:
        """Read a list, after another process has converted the checkpoint."""
        monkeypatch.setattr(convert, "read_list", read)
        convert_pickles(str(training))
        return read(folder)

    monkeypatch.setattr(convert, "read_list", read_late)
    assert same(converted(training), weights_in(tiny_llama))


def test_a_dry_run_takes_what_the_run_converts(training: Path, later: Path, tmp_path: Path) -> None:
    settings = {"allow_pickle": True, "sequence_length": 32, "max_sequences": 2}
    job = {
        "warehouse": str(tmp_path / "w"),
        "models": [str(training), str(later)],
        "corpora": ["builtin:pydoc"],
        "settings": settings,
    }
    write_json(tmp_path / "job.yaml", job)
    done = avss("run", tmp_path / "job.yaml", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "2 missing" in done.stdout


class _Attack:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __call__(self) -> None: ...

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (__import__("os").system, ("touch ran",), "posix.system"),
        (Path.write_text, (Path("ran"), "code ran"), "pathlib.Path.write_text"),
        (eval, ("open('ran', 'w')",), "builtins.eval"),
        (torch.load, ("ran",), "torch.serialization.load"),
    ],
)
def test_a_list_that_runs_code_is_refused(
    function: Any,
    arguments: tuple[Any, ...],
    named: str,
    training: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (training / FSDP / METADATA).write_bytes(pickle.dumps(_Attack(function, *arguments)))
    with pytest.raises(ModelError, match=rf"is refused: it names {named}, .* Nothing of it was run"):
        convert_pickles(str(training))
    assert not Path("ran").exists()


def test_a_list_gets_no_attribute_of_anything(training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `getattr`, which old versions of Python write into lists, all else could be reached."""
    monkeypatch.chdir(tmp_path)
    function = _Attack(getattr, dcp_metadata.Metadata, "__init__")
    module = _Attack(getattr, function, "__globals__")
    builtins = _Attack(_Attack(getattr, module, "get"), "__builtins__")
    evaluate = _Attack(_Attack(getattr, builtins, "get"), "eval")
    (training / FSDP / METADATA).write_bytes(pickle.dumps(_Attack(evaluate, "open('ran', 'w')")))
    with pytest.raises(ModelError, match="is no list of the tensors"):
        convert_pickles(str(training))
    assert not Path("ran").exists()


def test_a_list_cannot_change_the_classes_that_it_is_made_of(training: Path) -> None:
    """The attributes of a class would be those of all lists that are read later."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    empty = b"}" + text("state_dict_metadata") + b"}s" + text("storage_data") + b"}s"
    build = b"N}" + text("state") + empty + b"s\x86b"  # the class gets an attribute, which its instances then have
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (training / FSDP / METADATA).write_bytes(b"\x80\x04" + name + build + b")\x81.")
    with pytest.raises(ModelError, match="is no list of the tensors"):
        read_list(training / FSDP)


def test_a_piece_that_runs_code_is_refused(training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (file,) = (training / FSDP).glob("*.distcp")
    attack = saved(_Attack(Path.write_text, Path("ran"), "code ran"))
    file.write_bytes(attack + bytes(file.stat().st_size))
    with pytest.raises(ModelError, match="holds more than tensors, or is damaged"):
        convert_pickles(str(training))
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../checkpoint-500/x"])
def test_a_file_outside_of_the_folder_is_not_opened(name: str, training: Path) -> None:
    listed = (training / FSDP / METADATA).read_bytes()
    metadata = pickle.loads(listed)
    for info in metadata.storage_data.values():
        info.relative_path = name
    (training / FSDP / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ModelError, match=f"names the file '{name}', which is outside of its folder"):
        convert_pickles(str(training))


def test_a_piece_through_an_extension_is_refused(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    write_by_hand(tmp_path, {"a": (tensor.size(), [([0], tensor)])}, transform_descriptors=["zstd"])
    tensor_list = read_list(tmp_path)
    with pytest.raises(ModelError, match="written through an extension"):
        tensor_list.pieces(tensor_list.tensors["a"])


def test_a_truncated_file_of_pieces_is_refused(training: Path) -> None:
    (file,) = (training / FSDP).glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"__0_0.distcp ends before its piece of '.*' does"):
        convert_pickles(str(training))


def test_a_damaged_piece_is_refused(training: Path) -> None:
    (file,) = (training / FSDP).glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ModelError, match=r"The piece .* in .*__0_0.distcp holds more than tensors, or is damaged"):
        convert_pickles(str(training))


def test_a_missing_file_of_pieces_is_named(training: Path) -> None:
    (file,) = (training / FSDP).glob("*.distcp")
    file.unlink()
    with pytest.raises(ModelError, match=r"lacks the file __0_0.distcp, with a piece of '"):
        convert_pickles(str(training))


def test_a_piece_of_another_shape_is_refused(divided: Callable[[Pieces], Path], tiny_llama: Path) -> None:
    up = weights_in(tiny_llama)[UP]
    folder = divided([([0, 0], up)])
    listed = read_list(folder / FSDP)
    (piece,) = listed.pieces(listed.tensors[UP])
    piece.file.write_bytes(saved(up.reshape(32, 48).clone()))
    with pytest.raises(ModelError, match=rf"of '{UP}' in .* of the shape \(32, 48\), and its list says .* \(48, 32\)"):
        convert_pickles(str(folder))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_list_is_refused(share: float, training: Path) -> None:
    file = training / FSDP / METADATA
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match="is no list of the tensors of a distributed checkpoint, or damaged"):
        read_list(training / FSDP)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_lists_of_all_versions_of_pickles_are_read(protocol: int, training: Path) -> None:
    file = training / FSDP / METADATA
    before = read_list(training / FSDP).tensors
    file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes()), protocol))
    assert read_list(training / FSDP).tensors == before


def test_nothing_is_left_in_the_cache_after_a_refusal(training: Path, private_cache: Path) -> None:
    before = sorted((private_cache / "avss_dist").glob("converted/*"))
    (file,) = (training / FSDP).glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ModelError):
        convert_pickles(str(training))
    assert sorted((private_cache / "avss_dist").glob("converted/*")) == before


def test_a_file_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    """A tensor is read after the one before was written."""
    target = tmp_path / "a.safetensors"
    sizes: list[int] = []

    def read(name: str) -> torch.Tensor:
        sizes.append(target.stat().st_size)
        return torch.full((1 << 18,), float(name))

    write_tensors(target, [NewTensor(str(number), torch.float32, (1 << 18,)) for number in range(3)], read)
    assert [size >> 20 for size in sizes] == [0, 1, 2]
    assert {name: tensor[0].item() for name, tensor in load_file(target).items()} == {"0": 0.0, "1": 1.0, "2": 2.0}


def test_tensors_of_all_widths_and_shapes_are_written(tmp_path: Path) -> None:
    tensors = {
        "flag": torch.tensor([True, False, True]),
        "half": torch.arange(3, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(7),
    }
    entries = [NewTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_tensors(tmp_path / "a.safetensors", entries, tensors.__getitem__)
    assert same(load_file(tmp_path / "a.safetensors"), tensors)


# DeepSpeed.


@pytest.fixture
def zero(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint of a training with ZeRO, without weights of the whole model."""
    folder = tmp_path / "checkpoint-9"
    step = folder / "global_step9"
    step.mkdir(parents=True)
    shutil.copyfile(tiny_llama / "config.json", folder / "config.json")
    (step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    (folder / "rng_state_0.pth").write_bytes(b"")
    (folder / "zero_to_fp32.py").write_text("")
    return folder


@pytest.mark.parametrize("named", [".", "global_step9"])
def test_the_script_that_deepspeed_brings_is_named(named: str, zero: Path) -> None:
    command = f"python {zero}/zero_to_fp32.py {zero} {zero} --safe_serialization"
    with pytest.raises(ModelError) as caught:
        resolve(str(zero / named))
    assert caught.value.hint == f"DeepSpeed put a script beside them that writes safetensors: {command}"


def test_a_script_that_is_not_there_is_to_be_copied(zero: Path) -> None:
    (zero / "zero_to_fp32.py").unlink()
    with pytest.raises(ModelError, match=f"zero_to_fp32.py. Copy it to {zero}"):
        resolve(str(zero))


# Two ranks.


@pytest.mark.nightly
def test_what_accelerate_writes_is_scored_as_its_safetensors(
    two_ranks: Gang, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole" / "checkpoint-2"
    run = tmp_path / "run"
    pieces = run / "checkpoint-2"
    assert two_ranks.run(train_and_save, whole, pieces) == [["DTensor"], ["DTensor"]]
    for file in tokenizer_folder.iterdir():
        shutil.copyfile(file, whole / file.name)
        shutil.copyfile(file, run / file.name)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(whole / name, run / name)
    options = ("--corpus", "builtin:pydoc", "--max-sequences", 4, "--sequence-length", 32, "--executor", "local")
    warehouses = [tmp_path / "w1", tmp_path / "w2"]
    for folder, warehouse in zip((whole, pieces), warehouses, strict=True):
        monkeypatch.chdir(folder.parent)
        done = avss("score", folder.name, "-w", warehouse, "--allow-pickle", *options)
        assert done.exit_code == 0, done.stderr
    assert_same_tables(*warehouses)
    assert run_rows(warehouses[1])[0]["training_step"] == 2
    assert same(weights_in(checkpoint_at(pieces).folder), weights_in(whole))


def test_a_folder_in_the_home_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(ModelError, match="'~nobody-here/x' is no folder here"):
        convert_pickles("~nobody-here/x")
