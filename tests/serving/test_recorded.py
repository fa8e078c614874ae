"""Adapters of servers, held against answers of the real programs that are kept in ``recorded``.

`tests/runtimes/real_servers.py` recorded them from a real checkpoint. Each file says the program, its version and the
date, and has what transformers computes of the same row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.inference_servers import serving
from support.recorded_answers import TEXT, RecordedServer

from avss_dist.serving.connect import connect
from avss_dist.serving.server import Predictions, Row, Server

FILES = sorted((Path(__file__).parent / "recorded").glob("*.json"))


@dataclass(frozen=True)
class Recorded:
    """The adapter of a server whose answers are recorded, and the file's content."""

    server: Server
    record: dict[str, Any]

    def predict(self) -> Predictions:
        ids = np.array(self.record["ids"], np.int32)
        (predictions,) = self.server.predict(Row(ids=ids, positions=range(1, len(ids))))
        return predictions


@pytest.fixture(params=FILES, ids=[file.stem for file in FILES])
def recorded(request: pytest.FixtureRequest) -> Iterator[Recorded]:
    answers = RecordedServer(request.param)
    with serving(answers):
        tokenizer: Any = None  # these kinds do without
        yield Recorded(connect(answers.url, None, None, 60, tokenizer), answers.record)


def test_programs_are_told_by_what_they_say(recorded: Recorded) -> None:
    assert recorded.server.info.name == recorded.record["program"]


def test_the_room_of_a_prompt_is_told(recorded: Recorded) -> None:
    assert recorded.server.info.limit == 1024


def test_the_only_model_is_the_one_to_ask_for(recorded: Recorded) -> None:
    assert recorded.record["model"] in recorded.server.info.model


def test_texts_are_read_as_the_tokenizer_reads_them(recorded: Recorded) -> None:
    assert recorded.server.tokens_of(TEXT) == recorded.record["ids"]


def test_tokens_are_counted(recorded: Recorded) -> None:
    assert recorded.server.count_tokens(TEXT) == len(recorded.record["ids"])


def test_the_most_likely_tokens_are_those_of_transformers(recorded: Recorded) -> None:
    assert recorded.predict().best.tolist() == recorded.record["best"]


def test_the_losses_are_those_of_transformers(recorded: Recorded) -> None:
    assert recorded.predict().losses == pytest.approx(recorded.record["losses"], abs=0.01)
