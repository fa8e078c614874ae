"""Which folders are complete checkpoints, while a training writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.written import safetensors_bytes, write_as_trainer, write_parts, write_pieces, write_weights

from avss_dist.models.checkpoint.written import file_states, missing_part

WHOLE = len(safetensors_bytes())


@pytest.mark.parametrize("write", [write_weights, write_parts, write_as_trainer])
def test_a_whole_checkpoint_lacks_nothing(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert missing_part(write(tmp_path / "checkpoint-10")) == ""


@pytest.mark.parametrize(
    ("file", "content", "missing"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b'{"model_ty', "config.json cannot be read"),
        ("model.safetensors", None, "no weights (*.safetensors)"),
        ("model.safetensors", safetensors_bytes()[:-7], f"model.safetensors has {WHOLE - 7} of {WHOLE} bytes"),
        ("model.safetensors", safetensors_bytes()[:20], "model.safetensors has no header of a safetensors file"),
        ("model.safetensors", b"", "model.safetensors has no header of a safetensors file"),
    ],
)
def test_a_file_that_is_not_written_to_its_end_is_missing(
    file: str, content: bytes | None, missing: str, tmp_path: Path
) -> None:
    folder = write_weights(tmp_path / "step 10")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert missing_part(folder).startswith(missing)


def test_a_file_that_the_index_names_is_missing(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "step-10")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert missing_part(folder) == "no model-00002-of-00002.safetensors"


def test_parts_of_weights_are_incomplete_without_their_index(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "step-10")
    (folder / "model.safetensors.index.json").unlink()
    assert missing_part(folder) == "no model.safetensors.index.json"


@pytest.mark.parametrize("state", [None, '{"global_st'])
def test_a_checkpoint_of_the_trainer_ends_with_its_state(state: str | None, tmp_path: Path) -> None:
    folder = write_as_trainer(tmp_path / "checkpoint-10")
    (folder / "trainer_state.json").unlink()
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    assert missing_part(folder) == "no complete trainer_state.json, which the Trainer writes last"


def test_the_model_that_a_trainer_saves_at_the_end_has_no_state(tmp_path: Path) -> None:
    folder = write_as_trainer(tmp_path / "final")
    (folder / "trainer_state.json").unlink()
    assert missing_part(folder) == ""


def test_pieces_of_tensors_are_complete_with_their_list(tmp_path: Path) -> None:
    assert missing_part(write_pieces(tmp_path / "checkpoint-10"), pickles=True) == ""


def test_pieces_of_tensors_are_incomplete_without_their_list(tmp_path: Path) -> None:
    folder = write_pieces(tmp_path / "checkpoint-10")
    (folder / "pytorch_model_fsdp_0" / ".metadata").unlink()
    missing = missing_part(folder, pickles=True)
    assert missing == "no .metadata in pytorch_model_fsdp_0, which is written last"


def test_pieces_of_tensors_need_a_configuration(tmp_path: Path) -> None:
    folder = write_pieces(tmp_path / "run" / "checkpoint-10")
    (tmp_path / "run" / "config.json").unlink()
    assert missing_part(folder, pickles=True) == "no config.json, nor is one above"


def test_pieces_of_tensors_are_no_weights_if_pickles_are_not_opened(tmp_path: Path) -> None:
    missing = missing_part(write_pieces(tmp_path / "checkpoint-10"))
    assert missing == "no weights (*.safetensors), and its pieces of tensors need allow_pickle"


def test_a_piece_that_grows_has_another_state(tmp_path: Path) -> None:
    folder = write_pieces(tmp_path / "checkpoint-10")
    before = file_states(folder)
    with (folder / "pytorch_model_fsdp_0" / "__1_0.distcp").open("ab") as file:
        file.write(b"more")
    assert file_states(folder) != before


def test_a_folder_that_is_gone_lacks_all(tmp_path: Path) -> None:
    assert missing_part(tmp_path / "gone") == "no config.json"


def test_a_folder_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert missing_part(tmp_path / ("a" * 300)) == "it cannot be read (File name too long)"


def test_a_file_that_grows_has_another_state(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "step-10")
    before = file_states(folder)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert file_states(folder) != before


def test_a_file_that_is_replaced_has_another_state(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "step-10")
    before = file_states(folder)
    (folder / "new").write_bytes(safetensors_bytes(1))
    (folder / "new").replace(folder / "model.safetensors")
    assert file_states(folder) != before
