"""Inference servers over a transformers model in this process, which answer in the JSON of vLLM, SGLang, ... (HTTP)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import torch

Answer = tuple[int, Any]
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}


class InferenceServer:
    """A server of one kind.

    Args:
        kind: vllm, sglang, llama.cpp or ollama.
        model: model that computes.
        tokenizer: tokenizer of texts.
        key: API key that requests must have.
        start: tokens that the server puts before every prompt by itself.
        dies_after: number of answers about tokens after which it breaks off; never by default.
        limit: most tokens of a prompt and its continuation.
        sizes: values that replace those of what the server says about its model.
    """

    def __init__(
        self,
        kind: str,
        model: Any,
        tokenizer: Any,
        *,
        key: str = "",
        start: tuple[int, ...] = (),
        dies_after: int = 1 << 60,
        limit: int = 4096,
        sizes: Mapping[str, Any] = {},
        name: str = "checkpoint",
    ) -> None:
        self.kind = kind
        self.model = model
        self.tokenizer = tokenizer
        self.key = key
        self.name = name
        self.start = [*start]
        self.dies_after = dies_after
        self.limit = limit
        self.sizes = dict(sizes)
        self.url = ""
        self.bodies: list[Mapping[str, Any]] = []
        self.lock = Lock()
        self.writes = 1 << 60  # most tokens that Ollama writes

    def answer(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        """Return status and object for a request."""
        if path == "/v1/models" and self.kind in OWNERS:
            return 200, {"object": "list", "data": [self._listed()]}
        answers: dict[str, Callable[..., Answer]] = {
            "vllm": self._vllm,
            "sglang": self._sglang,
            "llama.cpp": self._llama_cpp,
            "ollama": self._ollama,
        }
        return answers[self.kind](path, body)

    def _listed(self) -> dict[str, Any]:
        entry = {"id": self.name, "object": "model", "owned_by": OWNERS[self.kind]}
        if self.kind != "llama.cpp":
            return {**entry, "root": f"/models/{self.name}", "max_model_len": self.limit}
        sizes = {"n_vocab": 320, "n_embd": 32, "n_ctx_train": 512, "size": 1, "ftype": "F16", **self.sizes}
        return {**entry, "meta": {"vocab_type": 2, "n_params": self._parameters(), **sizes}}

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _encode(self, text: str) -> list[int]:
        return self.start + self.tokenizer(text)["input_ids"]

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    @torch.no_grad()
    def logs(self, ids: list[int]) -> torch.Tensor:
        """Return the log-probabilities of the next token after each token, float32[tokens, vocabulary]."""
        with self.lock:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise ConnectionAbortedError
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)

    def _vllm(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        if path == "/version":
            return 200, {"version": "0.12.0"}
        if path == "/tokenize" and body:
            tokens = self._encode(body["prompt"])
            return 200, {"count": len(tokens), "max_model_len": self.limit, "tokens": tokens, "token_strs": None}
        if path != "/v1/completions" or not body:
            return 404, {"detail": "Not Found"}
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        ids = self.start + list(body["prompt"])
        logs = self.logs(ids)
        entries: list[Any] = [None]
        for number, token in enumerate(ids[1:]):
            row = logs[number]
            best = int(row.argmax())
            entry = {str(token): self._candidate(row, token)}
            entry[str(best)] = self._candidate(row, best)
            entries.append(entry)
        choice = {"index": 0, "text": "?", "logprobs": None, "finish_reason": "length", "prompt_logprobs": entries}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}

    def _candidate(self, row: torch.Tensor, token: int) -> dict[str, Any]:
        rank = int((row > row[token]).sum()) + 1
        return {"logprob": float(row[token]), "rank": rank, "decoded_token": self.tokenizer.decode([token])}

    def _sglang(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        if path == "/server_info":
            return 200, {"version": "0.5.6", "model_path": f"/models/{self.name}"}
        if path != "/generate" or not body:
            return 404, {"detail": "Not Found"}
        if "text" in body:
            return 200, {"text": "?", "meta_info": {"prompt_tokens": len(self._encode(body["text"]))}}
        ids = self.start + list(body["input_ids"])
        logs = self.logs(ids)
        tokens: list[Any] = [[None, ids[0], None]]
        tops: list[Any] = [None]
        for number, token in enumerate(ids[1:]):
            best = int(logs[number].argmax())
            tokens.append([float(logs[number, token]), token, None])
            tops.append([[float(logs[number, best]), best, None]])
        about = {"prompt_tokens": len(ids), "input_token_logprobs": tokens, "input_top_logprobs": tops}
        return 200, {"text": "?", "output_ids": [1], "meta_info": {"id": "1", "completion_tokens": 1, **about}}

    def _llama_cpp(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        if path == "/props":
            settings = {"n_ctx": self.limit, "params": {}}
            build = {"build_info": "b6900-abcdef12", "model_path": "/models/checkpoint.gguf", "model_ftype": "F16"}
            return 200, {"default_generation_settings": settings, **build}
        if path == "/tokenize" and body:
            return 200, {"tokens": self._encode(body["content"])}
        if path != "/completion" or not body:
            return 404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}
        ids = self.start + list(body["prompt"])
        row = self.logs(ids)[-1]
        biased = row.clone()
        for token, bias in body["logit_bias"]:
            biased[token] += bias
        chosen = int(biased.argmax())
        best = int(row.argmax())
        told = [{**self._told(row, chosen), "top_logprobs": [self._told(row, best)]}]
        if "\ufffd" in self._text(chosen):
            told = []  # as the server waits for the other bytes of a character
        values = {"content": "?", "tokens_evaluated": len(ids), "tokens_predicted": 1, "stop_type": "limit"}
        return 200, {**values, "completion_probabilities": told}

    def _told(self, row: torch.Tensor, token: int) -> dict[str, Any]:
        text = self._text(token)
        return {"id": token, "token": text, "bytes": [*text.encode()], "logprob": float(row[token])}

    def _ollama(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        if path == "/api/version":
            return 200, {"version": "0.13.0"}
        if path == "/api/tags":
            return 200, {"models": [{"name": f"{self.name}:latest", "model": f"{self.name}:latest", "details": {}}]}
        if path == "/api/show" and body:
            config = self.model.config
            about = {
                "general.architecture": "gemma3",
                "general.parameter_count": self._parameters(),
                "gemma3.block_count": config.num_hidden_layers,
                "gemma3.embedding_length": config.hidden_size,
                "gemma3.context_length": self.limit,
            }
            return 200, {"details": {"quantization_level": "F16"}, "model_info": {**about, **self.sizes}}
        if path != "/api/generate" or not body:
            return 404, {"error": "not found"}
        ids = self._encode(body["prompt"])
        count = len(ids)
        written: list[int] = []
        for _ in range(min(body["options"]["num_predict"], self.writes)):
            token = int(self.logs(ids)[-1].argmax())
            ids.append(token)
            written.append(token)
        values = {"model": self.name, "done": True, "done_reason": "length", "eval_count": len(written)}
        return 200, {**values, "response": self.tokenizer.decode(written), "prompt_eval_count": count}


@contextmanager
def serving(server: InferenceServer) -> Iterator[InferenceServer]:
    """Answer requests inside the block. ``url`` is the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.bodies.append(body)
            self._reply(body)

        def _reply(self, body: Mapping[str, Any] | None) -> None:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                message = f"Invalid key {self.headers.get('Authorization')}"
                status = 401
                answer = {"error": {"message": message, "code": 401}}
            else:
                try:
                    status, answer = server.answer(self.path, body)
                except ConnectionAbortedError:
                    self.close_connection = True
                    return
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
