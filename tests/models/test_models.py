"""Checkpoints: found and pinned to their content, loaded without a head, and their layers and sites found.

Pickled weights are converted once; of quantized weights, the modules that compute with them are told. Names of
checkpoints of a training tell when they were saved, and a pattern means revisions of a hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import LAYERS, checkpoint_at, config_in, llama, weights_in
from support.command_line import avss
from support.families import tiny_model
from support.json_files import write_json
from support.quantized import block_fp8, compressed_tensors
from support.tables import run_rows

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.sites import INPUT_SITES
from avss_dist.models.checkpoint.convert import convert_pickles
from avss_dist.models.checkpoint.loading import (
    forward_function,
    load,
    load_tokenizer,
    open_module,
    skeleton,
    text_config,
)
from avss_dist.models.checkpoint.locate import (
    content_hash,
    matching_revisions,
    resolve,
    slug,
)
from avss_dist.models.checkpoint.quantization import describe_computing, quantize_skeleton
from avss_dist.runs.job_file import read_job
from avss_dist.warehouse.reader import Warehouse

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Save = Callable[[Any, Path], Path]


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local hub cache with ``org/tiny``: a branch ``main``, a tag ``v1``, one commit."""
    hub_folder = tmp_path / "hub"
    repository = hub_folder / "models--org--tiny"
    shutil.copytree(tiny_llama, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_folder))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    return repository


def test_a_folder_is_found_by_any_path_and_hashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    absolute = checkpoint_at(folder)
    assert absolute.source == "folder"
    assert absolute.folder == folder
    assert absolute.gguf == {}
    assert len(absolute.revision) == 64
    for spec in (str(folder), "copy", "./copy", "copy/", "~/copy"):
        checkpoint = resolve(spec)
        assert checkpoint.name == spec
        assert checkpoint.path == str(folder)
        assert checkpoint.revision == absolute.revision
        assert checkpoint.slug == "copy"


@pytest.mark.parametrize("spec", ["org/tiny", "org/tiny@main", "org/tiny@v1", f"org/tiny@{COMMIT}"])
def test_a_hub_id_is_found_in_the_cache_and_pinned_to_its_commit(hub: Path, spec: str) -> None:
    checkpoint = resolve(spec)
    assert checkpoint.name == "org/tiny"
    assert checkpoint.source == "hub"
    assert checkpoint.revision == COMMIT
    assert Path(checkpoint.path) == hub / "snapshots" / COMMIT
    assert checkpoint.slug == "org-tiny"
    assert len(load_tokenizer(checkpoint)) == 320


def test_a_folder_goes_before_a_hub_id(hub: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "org").mkdir()
    folder.rename(folder.parent / "org" / "tiny")
    assert resolve("org/tiny").source == "folder"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.gguf", "There is no file 'missing.gguf'"),
        ("/missing/folder", "There is no folder '/missing/folder'"),
        ("./missing", "There is no folder './missing'"),
        ("~no-such-user/m", "There is no folder '~no-such-user/m'"),
        ("two words", "There is no folder 'two words'"),
        ("org/absent", "'org/absent' is no folder here, and cannot be fetched from the hub"),
        ("org/tiny@v2", "'org/tiny@v2' is no folder here, and cannot be fetched from the hub"),
        (__file__, f"'{__file__}' is a file"),
    ],
)
def test_what_is_missing_is_named(hub: Path, spec: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(spec)
    assert caught.value.message.startswith(message)
    hint = "Name the checkpoint's folder" if spec == __file__ else "Check the"
    assert caught.value.hint
    assert caught.value.hint.startswith(hint)


def test_the_revision_is_that_of_what_is_read(folder: Path, tiny_llama: Path) -> None:
    """Not of the path or of unrelated files, and of shipped code only where it runs."""
    before = checkpoint_at(folder).revision
    (folder / "README.md").write_text("Changed.")
    logs = folder / "logs"
    logs.mkdir()
    (logs / "training.json").write_text("{}")
    trusted = []
    for number in (3, 4):
        (folder / "modeling.py").write_text(f"layers = {number}\n")
        trusted.append(resolve(str(folder), trust_remote_code=True).revision)
    moved = folder.rename(folder.parent / "moved")
    assert checkpoint_at(moved).revision == checkpoint_at(tiny_llama).revision == before
    llama(seed=7).save_pretrained(moved)
    weights = checkpoint_at(moved).revision
    config = config_in(moved)
    write_json(moved / "config.json", config | {"rms_norm_eps": 0.1})
    assert len({before, *trusted, weights, checkpoint_at(moved).revision}) == 5


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, kind: reads.append(f.name) or digest(f, kind))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(2 << 20))
    first = content_hash(tmp_path, [file])
    assert content_hash(tmp_path, [file]) == first
    assert reads == [str(file)]
    file.write_bytes(bytes([1]) * (2 << 20))
    os.utime(file, ns=(1, 1))
    second = content_hash(tmp_path, [file])
    assert second != first
    assert reads == [str(file)] * 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert content_hash(tmp_path, [file]) == second  # a cache that cannot be written costs time, nothing else


LONGEST = "a" * (255 - len("run_id=") - len("-0123456789"))
"""The longest slug that fits beside ``run_id=`` and the fingerprint in 255 bytes."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("Qwen/Qwen3-0.6B", "Qwen-Qwen3-0.6B"), ("<script>alert(1)<", "script-alert-1"), ("a_b.c-d", "a_b.c-d")),
        *(("été 模型", "t"), ("模型", "model"), ("..", "model"), ("", "model")),
        *((LONGEST, LONGEST), (f"{LONGEST}a", "a{80}-[0-9a-f]{16}"), (f"{LONGEST}b", "a{80}-[0-9a-f]{16}")),
    ],
)
def test_a_slug_is_a_plain_file_name(name: str, expected: str) -> None:
    assert re.fullmatch(expected, slug(name))
    assert slug(name) != slug(f"{name}/x")


def test_the_slug_of_a_gguf_file_is_its_stem(tmp_path: Path) -> None:
    gguf_file = tmp_path / "tiny-Q8_0.gguf"
    gguf_file.write_bytes(b"GGUF")
    checkpoint = checkpoint_at(gguf_file)
    assert checkpoint.source == "gguf"
    assert checkpoint.slug == "tiny-Q8_0"
    assert checkpoint.folder == tmp_path


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_bert"])
def test_a_decoder_and_an_encoder_load_as_backbones(fixture: str, request: pytest.FixtureRequest) -> None:
    backbone = load(checkpoint_at(request.getfixturevalue(fixture)), Settings(), CPU)
    names = type(backbone.module).__name__, backbone.columns["architecture"], backbone.columns["family"]
    assert names == ("LlamaModel", "LlamaForCausalLM", "llama") or names == ("BertModel", "BertModel", "bert")
    expected = {"hidden_size": 32, "dtype": "float32", "attention_implementation": "sdpa"}
    assert backbone.columns == {**backbone.columns, **expected}
    assert len(backbone.layers) == LAYERS
    assert not backbone.module.training


def test_a_checkpoint_for_sequence_classification_loads_as_a_backbone(tmp_path: Path, save_checkpoint: Save) -> None:
    """The demonstration of the AVSS authors: DistilBERT fine-tuned to classify."""
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=320, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    backbone = load(checkpoint_at(save_checkpoint(model, tmp_path / "classifier")), Settings(), CPU)
    assert type(backbone.module).__name__ == "DistilBertModel"
    assert backbone.columns["family"] == "distilbert"
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(forward_function(backbone.module)(ids, None)[0], model.distilbert(input_ids=ids)[0])


@pytest.mark.parametrize(
    ("stored", "asked", "computed"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_asked(
    stored: str, asked: str, computed: str, tmp_path: Path, save_checkpoint: Save
) -> None:
    folder = save_checkpoint(llama().to(getattr(torch, stored)), tmp_path / "model")
    backbone = load(checkpoint_at(folder), Settings(dtype=asked), CPU)
    assert backbone.columns["dtype"] == computed
    assert {p.dtype for p in backbone.module.parameters()} == {getattr(torch, computed)}


def test_the_attention_implementation_is_the_one_asked_for(tiny_llama: Path) -> None:
    assert (
        load(checkpoint_at(tiny_llama), Settings(attention="eager"), CPU).columns["attention_implementation"] == "eager"
    )


@pytest.mark.parametrize("rows_padded", [False, True])
def test_a_pass_keeps_no_cache_and_leaves_out_the_head(rows_padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the head ran"))
    backbone = open_module(model)
    mask = torch.ones(2, 12, dtype=torch.int64) if rows_padded else None
    output = forward_function(backbone.module)(torch.arange(24).reshape(2, 12), mask)
    assert output[0].shape == (2, 12, 32)
    assert output.past_key_values is None
    assert "lm_head" not in dict(backbone.module.named_modules())


def test_opening_a_module_leaves_no_hook_and_changes_no_weight() -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert open_module(model).columns["num_parameters"] == sum(p.numel() for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("family", "layers", "points"),
    [
        ("llama", "layers", ("self_attn.output", "mlp.output", "mlp.down_proj.input")),
        ("gpt2", "h", ("attn.output", "mlp.output", "mlp.c_proj.input")),
        # These add the residual inside the sublayer, so what it adds is its last linear map's output.
        ("bert", "encoder.layer", ("attention.output.dense.output", "output.dense.output", "output.dense.input")),
        ("opt", "decoder.layers", ("self_attn.output", "fc2.output", "fc2.input")),
        ("mixtral", "layers", ("self_attn.output", "mlp.output", None)),
        ("mamba", "layers", ("mixer.output", None, None)),
    ],
)
def test_the_sites_of_a_family(family: str, layers: str, points: tuple[str | None, ...]) -> None:
    """A site that a family lacks is noted."""
    backbone = open_module(tiny_model("masked" if family == "bert" else "causal", family))
    names = {module: name for name, module in backbone.module.named_modules()}
    wanted = dict(zip(("attention", "mlp", "neuron"), points, strict=True))
    assert [layer.name for layer in backbone.layers] == [f"{layers}.{i}" for i in range(LAYERS)]
    for index, layer in enumerate(backbone.layers):
        assert layer.index == index
        assert names[layer.module] == layer.name
        assert layer.call == 0
        taps = {site: tap for site, tap in layer.taps.items() if site not in INPUT_SITES}
        points_of_layer = {}
        for site, tap in taps.items():
            path = names[tap.module].removeprefix(f"{layer.name}.")
            points_of_layer[site] = f"{path}.{tap.reads}"
        assert points_of_layer == {site: point for site, point in wanted.items() if point}
    notes = backbone.columns["notes"]
    assert [note.split("'")[1] for note in notes] == [site for site, point in wanted.items() if not point]
    for note in notes:
        assert "is absent" in note


QUERIES = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        (
            "llama",
            {
                "query_input": QUERIES,
                "output_input": {"self_attn.o_proj": (64, 64)},
                "up_input": {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64)},
                "neuron": {"mlp.down_proj": (64, 128)},
            },
        ),
        (
            "gpt2",
            {
                "query_input": {"attn.c_attn": (192, 64)},
                "output_input": {"attn.c_proj": (64, 64)},
                "up_input": {"mlp.c_fc": (128, 64)},
                "neuron": {"mlp.c_proj": (64, 128)},
            },
        ),
        (
            "opt",
            {
                "query_input": {f"self_attn.{name}_proj": (64, 64) for name in "qkv"},
                "output_input": {"self_attn.out_proj": (64, 64)},
                "up_input": {"fc1": (128, 64)},
                "neuron": {"fc2": (64, 128)},
            },
        ),
        ("mixtral", {"query_input": QUERIES, "output_input": {"self_attn.o_proj": (64, 64)}}),  # its experts are fused
    ],
)
def test_the_linear_maps_of_a_family_and_what_they_read(family: str, wanted: dict[str, Any]) -> None:
    for layer in open_module(tiny_model("masked" if family == "bert" else "causal", family)).layers:
        shapes: dict[str, Any] = {}
        for projection in layer.projections:
            assert layer.module.get_submodule(projection.path) is projection.module
            shapes.setdefault(projection.site, {})[projection.path] = (projection.outputs, projection.inputs)
        assert shapes == wanted
        for site, maps in wanted.items():
            tap = layer.taps[site]
            assert tap.reads == "input"
            assert any(layer.module.get_submodule(path) is tap.module for path in maps)


def test_each_call_of_a_shared_layer_is_a_layer() -> None:
    structure = open_module(tiny_model("masked", "albert"))
    name = "encoder.albert_layer_groups.0"
    assert [layer.name for layer in structure.layers] == [name, f"{name}#1", f"{name}#2"]
    assert [layer.call for layer in structure.layers] == [0, 1, 2]
    assert len({layer.module for layer in structure.layers}) == 1
    assert structure.columns["notes"] == ["layers share modules: 3 calls of 1 modules, each call is a layer"]


def test_a_named_layer_list_is_taken_where_none_is_found() -> None:
    model = tiny_model("causal", "xlm")
    with pytest.raises(ModelError, match="could not be found") as caught:
        open_module(model)
    assert caught.value.hint is not None
    assert "attentions (3 x MultiHeadAttention), ffns (3 x TransformerFFN)" in caught.value.hint
    assert "`layers`" in caught.value.hint
    layers = open_module(model, layers="ffns").layers
    assert [layer.name for layer in layers] == ["ffns.0", "ffns.1", "ffns.2"]


@pytest.mark.parametrize("wrong", ["layer", "Layers", "model.layers"])
def test_a_wrong_layer_list_names_the_nearest(wrong: str) -> None:
    with pytest.raises(ModelError, match=f"LlamaModel has no layer list '{wrong}'") as caught:
        open_module(llama(), layers=wrong)
    assert caught.value.hint == "Did you mean 'layers'? Valid: layers."


def test_a_model_that_is_no_decoder_or_encoder_of_tokens_is_refused() -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
    config = transformers.T5Config(vocab_size=64, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=48)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        open_module(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(ModelError, match="ViTModel does not run on token ids alone"):
        open_module(transformers.ViTModel(transformers.ViTConfig(hidden_size=32, **sizes)).eval())


SMALL = ("--sequence-length", "32", "--max-sequences", "2", "--executor", "local")


def pickle_weights(copy: Path) -> None:
    """Keep the weights in two pickles and an index, as older checkpoints do."""
    weights_file = copy / "model.safetensors"
    tensors = load_file(weights_file)
    weights_file.unlink()
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, copy / file)
    write_json(copy / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})


def test_a_pickle_is_converted_once_and_noted(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """To the same numbers, as tensors alone."""
    pickle_weights(folder)
    out = tmp_path / "warehouse"
    done = avss("score", folder, "--corpus", "builtin:pydoc", "-w", out, "--allow-pickle", *SMALL)
    assert done.exit_code == 0, done.stderr
    (run,) = run_rows(str(out))
    assert any("stored as pickles" in note for note in run["notes"])
    # Without being allowed to: nothing is unpickled any more.
    converted = checkpoint_at(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(converted.path).glob("*.safetensors"):
        tensors |= load_file(file)
    original = weights_in(tiny_llama)
    assert tensors.keys() == original.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, original[name])
    weights = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({name: t + 1 for name, t in torch.load(weights, weights_only=True).items()}, weights)
    with pytest.raises(ModelError, match="has pickled weights only"):  # of other content
        checkpoint_at(folder)


def test_what_is_no_table_of_tensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds more than tensors"):
        convert_pickles(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="holds more than tensors, or is damaged"):
        convert_pickles(str(folder))


def test_the_whole_model_of_fsdp_is_loaded(folder: Path) -> None:
    torch.save(weights_in(folder), folder / "pytorch_model_fsdp.bin")
    (folder / "model.safetensors").unlink()
    convert_pickles(str(folder))
    assert len(load(checkpoint_at(folder), Settings(), CPU).layers) == LAYERS


def test_weights_of_one_rank_of_fsdp_are_refused(folder: Path) -> None:
    torch.save(weights_in(folder), folder / "pytorch_model_fsdp_0_rank0.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"_0_rank0.bin has what one rank of a training had"):
        convert_pickles(str(folder))


FP8 = "of transformers.integrations.finegrained_fp8"


def int4(whole: Path, folder: Path) -> Path:
    return compressed_tensors(whole, folder, "int4")


@pytest.mark.parametrize(
    ("family", "quantize", "expected"),
    [
        ("llama", block_fp8, f"FP8Linear x 21 {FP8}"),
        ("qwen3_moe", block_fp8, f"FP8Experts x 3 {FP8}, FP8Linear x 12 {FP8}"),
        ("llama", int4, "Linear x 21 of torch.nn.modules.linear"),
    ],
)
def test_modules_that_compute_with_quantized_weights_are_named_with_where_they_come_from(
    family: str, quantize: Callable[[Path, Path], Path], expected: str, tmp_path: Path
) -> None:
    """The modules that transformers builds for the stored weights, and none once weights are unpacked."""
    whole = tmp_path / "whole"
    tiny_model("causal", family).save_pretrained(whole)
    checkpoint = checkpoint_at(quantize(whole, tmp_path / "quantized"))
    config = text_config(checkpoint)
    model = skeleton(config, Settings(), torch.float32)
    assert describe_computing(model) is None
    assert describe_computing(quantize_skeleton(checkpoint, config, model)) == expected
    unpacked = load(checkpoint, Settings(device="cpu", dequantize=True), torch.device("cpu"))
    assert describe_computing(unpacked.model) is None


BRANCHES = [
    "main",
    "stage1-step9000-tokens19B",
    "stage1-step1000-tokens3B",
    "stage1-step10000-tokens21B",
    "stage2-step5",
]


def test_a_series_of_folders_drifts_in_the_order_of_its_steps(tiny_llama: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "run7" / f"checkpoint-{step}" for step in (1000, 500)]
    for seed, folder in enumerate(folders):
        shutil.copytree(tiny_llama, folder)
        tensors = weights_in(folder)
        doubled = {name: tensor * (1 + seed) for name, tensor in tensors.items()}
        save_file(doubled, folder / "model.safetensors", metadata={"format": "pt"})
    options = ("--max-sequences", 4, "--sequence-length", 16, "--sites", "block", "--executor", "local")
    warehouse = tmp_path / "w"
    done = avss("score", *folders, "--corpus", "builtin:pydoc", "-w", warehouse, *options)
    assert done.exit_code == 0, done.stderr
    rows = Warehouse(warehouse).sql("@drift").to_pylist()
    assert {row["series"] for row in rows} == {f"{tmp_path}/run7/checkpoint-*"}
    assert [row["training_step"] for row in rows if row["layer"] == 0] == [500, 1000]


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that knows the branches of one model."""

    class Refs(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.path.startswith("/api/models/org/a/refs")
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": "0"} for b in BRANCHES]
            if is_known:
                body = json.dumps({"branches": branches, "converts": [], "tags": []}).encode()
                self.send_response(200)
            else:
                body = json.dumps({"error": "not found"}).encode()
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    yield endpoint
    server.shutdown()
    server.server_close()


def test_a_pattern_means_the_branches_that_match_in_the_order_of_their_numbers(
    hub_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert matching_revisions("org/a", "stage1-*") == [BRANCHES[2], BRANCHES[1], BRANCHES[3]]
    with pytest.raises(ModelError, match=r"No revision of 'org/a' matches 'stage9-\*'") as refused:
        matching_revisions("org/a", "stage9-*")
    assert "There are: main, stage1-step1000-tokens3B" in str(refused.value)
    with pytest.raises(ModelError, match="'org/none' is no folder here"):
        matching_revisions("org/none", "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelError, match="cannot be fetched from the hub"):
        matching_revisions("org/a", "*")


def test_a_job_takes_revisions_by_pattern(hub_server: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "warehouse: w\nmodels:\n- model: org/a\n  revisions: [stage1-*, stage2-step5]\ncorpora: [builtin:pydoc]\n"
    )
    names = [f"org/a@{BRANCHES[i]}" for i in (2, 1, 3, 4)]
    assert [spec.model for spec in read_job(job).specs] == names
    job.write_text("warehouse: w\nmodels:\n- model: org/a\n  revisions: [stage9-*]\ncorpora: [builtin:pydoc]\n")
    with pytest.raises(ConfigError, match=r"job\.yaml:4: No revision of 'org/a' matches 'stage9-\*'"):
        read_job(job)
