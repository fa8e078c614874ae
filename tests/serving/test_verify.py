"""`avss verify`: servers that compute a checkpoint as transformers does, and servers with a fault, by kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import VOCABULARY
from support.command_line import avss, files, mistake
from support.inference_servers import InferenceServer, serving
from support.tiers import all_of

import avss_dist
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.models.checkpoint.locate import VERIFIED, resolve
from avss_dist.serving.client import KEY_VARIABLE, ServerFailed
from avss_dist.serving.receipt import Receipt, read_receipts, write_receipt

KINDS = ("vllm", "sglang", "llama.cpp", "ollama")
WINDOW = 16
SMALL: dict[str, Any] = {"max_sequences": 3, "sequence_length": 40, "device": "cpu"}
KEY = "sk-secret-0123456789"


def _model(seed: int = 3, **changes: Any) -> Any:
    """A seeded Gemma 3 of 6 layers, every third with full attention, whose norms differ."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 256,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = Gemma3ForCausalLM(Gemma3TextConfig(**values | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """The model of the checkpoint. Its head never prefers a token that is only a part of a character."""
    model = _model()
    partial = [token for token in range(VOCABULARY) if "\ufffd" in tokenizer.decode([token])]
    with torch.no_grad():
        model.lm_head.weight[partial] = 0.0
    return model


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    return save_checkpoint(model, tmp_path / "checkpoint")


@dataclass(frozen=True)
class Agreement:
    """A comparison, and the server."""

    done: avss_dist.Verified
    server: InferenceServer


def _verify(checkpoint: Path, server: InferenceServer, **options: Any) -> avss_dist.Verified:
    with serving(server):
        return avss_dist.verify(checkpoint, server=server.url, **SMALL | options)


@pytest.fixture(scope="module", params=all_of(KINDS, ["vllm", "llama.cpp"]))
def agreement(
    request: pytest.FixtureRequest,
    model: Any,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
    save_checkpoint: Callable[[Any, Path], Path],
) -> Agreement:
    """A comparison with a server of each kind that has the same model, and what the server was sent."""
    folder = save_checkpoint(model, tmp_path_factory.mktemp("same") / "checkpoint")
    server = InferenceServer(request.param, model, tokenizer)
    return Agreement(_verify(folder, server), server)


def test_a_server_with_the_same_model_is_the_same(agreement: Agreement) -> None:
    assert agreement.done.outcome == "same", agreement.done.sentences


def test_all_predictions_are_equal_to_those_of_the_same_model(agreement: Agreement) -> None:
    assert agreement.done.comparison is not None
    assert agreement.done.comparison.share_equal == 1.0


def test_positions_beyond_the_window_are_compared(agreement: Agreement) -> None:
    assert agreement.done.comparison is not None
    names = [group.name for group in agreement.done.comparison.groups]
    assert names == [f"up to {WINDOW}", f"{WINDOW + 1} or more"]


def test_losses_of_servers_that_tell_them_are_those_of_the_model(agreement: Agreement) -> None:
    receipt = agreement.done.receipt
    assert receipt is not None
    if agreement.server.kind == "ollama":
        assert receipt.server_loss is None
    else:
        assert receipt.server_loss == pytest.approx(receipt.loss, abs=1e-4)


def test_every_parameter_of_sampling_is_sent(agreement: Agreement) -> None:
    body = agreement.server.bodies[-1]
    sampling = {**body, **body.get("options", {}), **body.get("sampling_params", {})}
    penalties = {"presence_penalty", "frequency_penalty"}
    assert {"temperature", "top_k", "top_p", "min_p", *penalties} <= sampling.keys()


def _shifted_kinds(model: Any) -> Any:
    other = _model(layer_types=["full_attention", "sliding_attention", "sliding_attention"] * 2)
    other.load_state_dict(model.state_dict())
    return other


def _other_rope_base(model: Any) -> Any:
    rope = copy.deepcopy(model.config.rope_parameters)
    rope["full_attention"]["rope_theta"] = 1e4
    other = _model(rope_parameters=rope)
    other.load_state_dict(model.state_dict())
    return other


def _other_norm(model: Any) -> Any:
    other = copy.deepcopy(model)
    norms = [layer.input_layernorm for layer in other.model.layers]
    norms[1].load_state_dict(norms[2].state_dict())
    return other


def _swapped_layers(model: Any) -> Any:
    other = copy.deepcopy(model)
    layers = other.model.layers
    first = copy.deepcopy(layers[0].state_dict())
    layers[0].load_state_dict(layers[1].state_dict())
    layers[1].load_state_dict(first)
    return other


FAULTS = {
    "shifted kinds of layers": _shifted_kinds,
    "another rope base": _other_rope_base,
    "norm of another layer": _other_norm,
    "swapped layers": _swapped_layers,
}


CASES = [(kind, fault) for kind in KINDS for fault in FAULTS]
QUICK = [("vllm", fault) for fault in FAULTS]


@pytest.mark.parametrize(("kind", "fault"), all_of(CASES, QUICK))
def test_a_model_that_is_read_differently_is_told(
    kind: str, fault: str, checkpoint: Path, model: Any, tokenizer: Any
) -> None:
    done = _verify(checkpoint, InferenceServer(kind, FAULTS[fault](model), tokenizer))

    assert done.outcome == "different", done.sentences


@pytest.mark.nightly
def test_an_ignored_window_is_told_from_its_end_on(checkpoint: Path, model: Any, tokenizer: Any) -> None:
    other = _model(sliding_window=256)
    other.load_state_dict(model.state_dict())
    done = _verify(checkpoint, InferenceServer("vllm", other, tokenizer))

    assert done.receipt is not None
    assert done.receipt.first in range(WINDOW + 2, WINDOW + 6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_bos_is_told_before_anything_is_compared(
    kind: str, checkpoint: Path, model: Any, tokenizer: Any
) -> None:
    done = _verify(checkpoint, InferenceServer(kind, model, tokenizer, start=(1,)))

    assert done.outcome == "not comparable"
    assert "BOS" in done.sentences[0]


@pytest.mark.parametrize("kind", all_of(("vllm", "sglang"), ["vllm"]))
def test_another_model_of_the_same_sizes_is_told(kind: str, checkpoint: Path, tokenizer: Any) -> None:
    done = _verify(checkpoint, InferenceServer(kind, _model(seed=4), tokenizer))

    assert "another model" in " ".join(done.sentences)


@pytest.mark.parametrize("kind", ["llama.cpp", "ollama"])
def test_the_whole_model_in_place_of_the_pruned_one_is_told_by_its_sizes(
    kind: str, checkpoint: Path, tokenizer: Any
) -> None:
    whole = _model(num_hidden_layers=9, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 3)
    done = _verify(checkpoint, InferenceServer(kind, whole, tokenizer))

    assert done.outcome == "not comparable", done.sentences


@pytest.mark.parametrize("kind", all_of(KINDS, ["sglang"]))
def test_a_server_that_dies_in_the_middle_is_a_failure(kind: str, checkpoint: Path, model: Any, tokenizer: Any) -> None:
    with pytest.raises(ServerFailed, match="broke off"):
        _verify(checkpoint, InferenceServer(kind, model, tokenizer, dies_after=2))


def test_a_model_that_the_server_does_not_have_is_named(checkpoint: Path, model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="serves no model 'other'"):
        _verify(checkpoint, InferenceServer("vllm", model, tokenizer), served_model="other")


def test_a_missing_key_is_a_mistake(
    checkpoint: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with serving(InferenceServer("vllm", model, tokenizer, key=KEY)) as server:
        message = mistake("verify", checkpoint, "--server", server.url)

    assert KEY_VARIABLE in message


def test_a_wrong_key_is_not_repeated(
    checkpoint: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-wrong-key")
    with serving(InferenceServer("vllm", model, tokenizer, key=KEY)) as server:
        message = mistake("verify", checkpoint, "--server", server.url)

    assert "sk-wrong-key" not in message


def test_the_key_is_sent_and_written_nowhere(
    checkpoint: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with serving(InferenceServer("vllm", model, tokenizer, key=KEY)) as server:
        words = ["--server", server.url, "--max-sequences", 2, "--sequence-length", 40, "--device", "cpu"]
        result = avss("verify", checkpoint, *words)

    written = b"".join(content for name, content in files(checkpoint).items() if not name.endswith(".safetensors"))
    assert result.exit_code == 0
    assert KEY not in result.output + result.stderr + written.decode()


def test_the_command_ends_with_code_1_if_the_model_is_read_differently(
    checkpoint: Path, model: Any, tokenizer: Any
) -> None:
    with serving(InferenceServer("vllm", _swapped_layers(model), tokenizer)) as server:
        words = ["--server", server.url, "--max-sequences", 2, "--sequence-length", 40, "--device", "cpu"]
        result = avss("verify", checkpoint, *words)

    assert result.exit_code == 1
    assert "reads this checkpoint differently" in " ".join(result.stdout.split())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:99999", "http://a:b@host"])
def test_what_is_no_address_is_refused(url: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError):
        avss_dist.verify(checkpoint, server=url)


def test_an_address_at_which_nothing_answers_is_a_mistake(checkpoint: Path, model: Any, tokenizer: Any) -> None:
    with serving(InferenceServer("vllm", model, tokenizer)) as server:
        url = server.url

    assert "Nothing answers" in mistake("verify", checkpoint, "--server", url)


def test_a_receipt_does_not_change_the_revision(checkpoint: Path, model: Any, tokenizer: Any) -> None:
    before = resolve(str(checkpoint)).revision
    _verify(checkpoint, InferenceServer("vllm", model, tokenizer))

    assert (checkpoint / VERIFIED).is_file()
    assert resolve(str(checkpoint)).revision == before


def test_another_json_file_changes_the_revision(checkpoint: Path) -> None:
    before = resolve(str(checkpoint)).revision
    (checkpoint / "avss_verified2.json").write_text("{}")

    assert resolve(str(checkpoint)).revision != before


def test_a_receipt_is_not_copied_into_a_smaller_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / VERIFIED).write_text("{}")
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"model: {checkpoint}\nnum_layers: 6\nlayers: layers\ndrop: [1]\n")
    avss_dist.prune(checkpoint, plan, tmp_path / "pruned")

    assert not (tmp_path / "pruned" / VERIFIED).exists()


def _receipt(runtime: str) -> Receipt:
    shares: dict[str, Any] = {"positions": 1000, "equal": 0.99, "different": 0.0, "largest": 0.1, "tolerance": 0.2}
    words = {"date": "2026-12-01", "outcome": "same", "revision": "1", "corpus": "a.txt", "rows": "1"}
    return Receipt(runtime=runtime, version="1.0", dtype="float16", transformers="5.0", **words, **shares)


def test_the_model_card_has_one_line_of_each_program(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# A model\n\n- A note.\n\nWritten by avss_dist.\n")
    for runtime in ("vLLM", "llama.cpp", "vLLM"):
        write_receipt(tmp_path, _receipt(runtime))

    lines = [line for line in card.read_text().splitlines() if line.startswith("- Compared with")]
    assert [line.split()[3] for line in lines] == ["vLLM", "llama.cpp"]


def test_the_rest_of_the_model_card_stays(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# A model\n\n- A note.\n\nWritten by avss_dist.\n")
    write_receipt(tmp_path, _receipt("vLLM"))

    rest = [line for line in card.read_text().splitlines() if not line.startswith("- Compared with")]
    assert rest == ["# A model", "", "- A note.", "", "Written by avss_dist."]


def test_receipts_of_programs_are_kept_beside_one_another(tmp_path: Path) -> None:
    for runtime in ("vLLM", "llama.cpp", "vLLM"):
        write_receipt(tmp_path, _receipt(runtime))

    assert [receipt.runtime for receipt in read_receipts(tmp_path)] == ["llama.cpp", "vLLM"]


def test_a_damaged_file_of_receipts_is_named(tmp_path: Path) -> None:
    (tmp_path / VERIFIED).write_text("{")

    with pytest.raises(ModelError, match=VERIFIED):
        read_receipts(tmp_path)


@pytest.mark.nightly
def test_a_runtimes_own_difference_is_told_apart(
    checkpoint: Path, model: Any, tokenizer: Any, tmp_path: Path, save_checkpoint: Callable[[Any, Path], Path]
) -> None:
    whole = save_checkpoint(model, tmp_path / "whole")
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.mul_(1 + 2e-2 * torch.randn_like(parameter).sign())
    alone = _verify(checkpoint, InferenceServer("vllm", rounded, tokenizer))
    with serving(InferenceServer("vllm", rounded, tokenizer)) as server:
        beside = _verify(checkpoint, InferenceServer("vllm", rounded, tokenizer), original=server.url, base=str(whole))

    assert alone.outcome == "different"
    assert beside.outcome != "different"


@pytest.mark.nightly
def test_a_streamed_model_is_compared_with_the_same_numbers(checkpoint: Path, model: Any, tokenizer: Any) -> None:
    whole = _verify(checkpoint, InferenceServer("vllm", model, tokenizer), partition="single")
    streamed = _verify(checkpoint, InferenceServer("vllm", model, tokenizer), partition="streaming")

    assert whole.receipt is not None
    assert streamed.receipt is not None
    assert streamed.receipt.loss == pytest.approx(whole.receipt.loss, abs=1e-6)


def test_a_checkpoint_whose_card_names_no_whole_model_needs_its_name(
    checkpoint: Path, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match="names no model that it was pruned from"):
        _verify(checkpoint, InferenceServer("vllm", model, tokenizer), original="http://localhost:1")


def test_a_server_that_writes_nothing_is_not_the_same(checkpoint: Path, model: Any, tokenizer: Any) -> None:
    server = InferenceServer("ollama", model, tokenizer)
    server.writes = 0

    assert _verify(checkpoint, server).outcome == "not comparable"


def test_a_server_with_a_short_context_is_told_not_to_show_the_window(
    checkpoint: Path, model: Any, tokenizer: Any
) -> None:
    done = _verify(checkpoint, InferenceServer("vllm", model, tokenizer, limit=WINDOW + 3), sequence_length=12)

    assert "beyond the window" in " ".join(done.sentences)
