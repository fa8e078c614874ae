"""Adapters of servers, by the kind that is named or that the server tells."""

from __future__ import annotations

from avss_dist.core.errors import ConfigError
from avss_dist.corpus.documents import Tokenizer
from avss_dist.requests import SERVERS
from avss_dist.serving.client import Client, base_url, server_key
from avss_dist.serving.llama_cpp import LlamaCppServer
from avss_dist.serving.ollama import OllamaServer
from avss_dist.serving.server import Server, entries
from avss_dist.serving.sglang import SglangServer
from avss_dist.serving.vllm import VllmServer

_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
"""Kinds by ``owned_by`` of the models that a server lists."""


def connect(url: str, kind: str | None, model: str | None, timeout: float, tokenizer: Tokenizer) -> Server:
    """Return the adapter of the server at an address.

    Args:
        kind: one of `SERVERS`, or None to ask the server.
        model: name of the model there; None for its only one.
        timeout: seconds to wait for each answer.
        tokenizer: tokenizer of the checkpoint.

    Raises:
        ConfigError: nothing answers, it is of no known kind, or it does not serve the model.
        ServerFailed: the server fails.
    """
    client = Client(base_url(url), timeout, server_key())
    kind = kind or _kind(client)
    if kind == "vllm":
        return VllmServer(client, model)
    if kind == "sglang":
        return SglangServer(client, model)
    if kind == "llama.cpp":
        return LlamaCppServer(client, model)
    return OllamaServer(client, model, tokenizer)


def _kind(client: Client) -> str:
    """Return the kind of a server. Ollama is asked last, as others imitate its interface."""
    for entry in entries(client.probe("/v1/models"), "data"):
        owner = entry.get("owned_by")
        if owner in _OWNERS:
            return _OWNERS[owner]
    if (client.probe("/api/version") or {}).get("version"):
        return "ollama"
    raise ConfigError(
        f"{client.url} answers, and does not say that it is one of: {', '.join(SERVERS)}.",
        "Check the address. If it is one of them behind another program, name it with `kind`.",
    )
