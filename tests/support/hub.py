"""A hub of Hugging Face on the loopback, which keeps what is uploaded to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest


class Hub:
    """What was uploaded.

    Attributes:
        endpoint: its address.
        files: the bytes of each file, by repository (``models/org/name``) and path.
        created: what was said of new repositories.
        refuses: whether nobody may write.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.refuses = False

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        parts = path.partition("?")[0].strip("/").split("/")[1:]  # without "api"
        repository = "/".join(parts[:3])
        if self.refuses:
            return 403, {"error": "You may not write here."}
        if parts == ["repos", "create"]:
            self.created.append(json.loads(body))
            kind, name = self.created[-1].get("type") or "model", self.created[-1]["name"]
            name = "/".join(filter(None, (self.created[-1].get("organization"), name)))
            self.files.setdefault(f"{kind}s/{name}", {})
            return 200, {"url": f"{self.endpoint}/{name}" if kind == "model" else f"{self.endpoint}/{kind}s/{name}"}
        if parts[3:4] == ["preupload"]:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **mode} for file in json.loads(body)["files"]]}
        if parts[3:4] == ["commit"]:
            self._commit(self.files[repository], body)
            return 200, {"commitUrl": f"{self.endpoint}/{repository}/commit/0", "commitOid": "0" * 40, "success": True}
        if parts[3:4] == ["tree"]:
            listed = self.files[repository].items()
            return 200, [{"type": "file", "path": p, "size": len(data), "oid": "0" * 40} for p, data in listed]
        siblings = [{"rfilename": name} for name in self.files.get(repository, ())]
        return 200, {"id": "/".join(parts[1:3]), "sha": "0" * 40, "siblings": siblings, "private": True, "tags": []}

    @staticmethod
    def _commit(files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]


@contextmanager
def serving_hub(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for that of Hugging Face; there is a token."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = hub.answer(self.command, self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    patch.setenv("HF_TOKEN", "hf_planted")
    yield hub
    server.shutdown()
    server.server_close()
