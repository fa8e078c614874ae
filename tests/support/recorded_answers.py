"""Answers of real inference servers for a short row, kept in files: record them, and serve them again.

A file has the answers of a program to the requests that `avss verify` sent it for a real checkpoint, and what
transformers computes of the same row. `tests/runtimes/real_servers.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch

from support.inference_servers import Answer, InferenceServer, serving

TEXT = "The capital of France is Paris, and the capital of Italy is Rome."
UNREAD = ("chat_template", "generation_settings")
"""Long parts of answers that no adapter reads, which are left out."""
TIMEOUT = 120
"""Seconds that a real server may take for an answer."""


class RecordingServer(InferenceServer):
    """A server that passes requests on to a real one, and keeps its answers.

    Attributes:
        exchanges: path, body, status and answer of each request.
    """

    def __init__(self, url: str) -> None:
        super().__init__("real", None, None)
        self.target = url
        self.exchanges: list[dict[str, Any]] = []

    def answer(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        request = Request(f"{self.target}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urlopen(request, timeout=TIMEOUT) as response:
                status = response.status
                answer = json.loads(response.read())
        except HTTPError as error:
            status = error.code
            answer = {"error": error.reason}
        for name in UNREAD:
            answer.pop(name, None)
        self.exchanges.append({"path": path, "body": body, "status": status, "answer": answer})
        return status, answer


class RecordedServer(InferenceServer):
    """A server that gives the answers of a file.

    Attributes:
        record: content of the file. See `record_answers`.
    """

    def __init__(self, file: Path) -> None:
        super().__init__("recorded", None, None)
        self.record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        self._answers: dict[str, Answer] = {}
        for exchange in self.record["exchanges"]:
            key = _key(exchange["path"], exchange["body"])
            self._answers[key] = (exchange["status"], exchange["answer"])

    def answer(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        return self._answers[_key(path, body)]


def _key(path: str, body: Mapping[str, Any] | None) -> str:
    """Return what tells requests apart, as text."""
    return f"{path} {json.dumps(body, sort_keys=True)}"


def record_answers(checkpoint: Path, url: str) -> dict[str, Any]:
    """Return the answers of the server of a checkpoint, and what transformers computes in float32.

    Args:
        checkpoint: folder of the checkpoint that the server serves.

    Returns:
        ``program``, ``date``, ``model``, ``text``, ``ids`` and ``positions`` of the row, ``best`` and ``losses`` of
        transformers at the positions, and ``exchanges``, see `RecordingServer`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from avss_dist.serving.connect import connect
    from avss_dist.serving.server import Row

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXT)["input_ids"]
    recorder = RecordingServer(url)
    with serving(recorder):
        server = connect(recorder.url, None, None, TIMEOUT, tokenizer)
        server.tokens_of(TEXT)
        server.count_tokens(TEXT)
        server.predict(Row(ids=np.array(ids, np.int32), positions=range(1, len(ids))))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)[:-1]
    labels = torch.tensor(ids[1:])
    losses = -logs.gather(1, labels[:, None])[:, 0]
    return {
        "program": server.info.name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "model": checkpoint.name,
        "text": TEXT,
        "ids": ids,
        "best": logs.argmax(dim=-1).tolist(),
        "losses": losses.tolist(),
        "exchanges": recorder.exchanges,
    }
