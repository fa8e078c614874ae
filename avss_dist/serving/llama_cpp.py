"""llama.cpp's ``llama-server``: ``/completion`` takes token ids, and tells nothing about tokens of the prompt.

So each position is a request for one token. ``logit_bias`` makes the next token of the row win. The probabilities that
the server tells are a softmax of the model's own logits, before the bias (``post_sampling_probs`` is false): that of
the token of the row, and that of the token that the model itself would have chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from avss_dist.core.streams import tracked
from avss_dist.core.values import JsonObject
from avss_dist.serving.client import Client
from avss_dist.serving.server import (
    HIDDEN_SIZE,
    PARAMETERS,
    UNKNOWN,
    VOCABULARY,
    Predictions,
    Row,
    Server,
    ServerInfo,
    entries,
    entry_named,
    integers,
    known_sizes,
    require_read_whole,
    served_name,
    unexpected,
    whole_number,
)

PATH = "/completion"
GREEDY = {
    "n_predict": 1,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "mirostat": 0,
    "seed": 0,
    "stop": [],
    "n_probs": 1,
    "post_sampling_probs": False,
    "cache_prompt": True,
    "stream": False,
}
"""Every parameter of sampling, as a server takes defaults from its options and from the file of the model."""
BIAS = 1e4
"""Bias that is larger than the difference of any two logits."""
NO_PROBABILITY = -1e30
"""The server writes the lowest number of float32 for the logarithm of a probability that is rounded to 0."""
_SIZES = {"n_vocab": VOCABULARY, "n_embd": HIDDEN_SIZE, "n_params": PARAMETERS}


class LlamaCppServer(Server):
    """A ``llama-server`` of llama.cpp."""

    can_score = True

    def __init__(self, client: Client, model: str | None) -> None:
        self._client = client
        listed = entries(client.probe("/v1/models"), "data")
        name = served_name([str(entry.get("id")) for entry in listed], model, client.url)
        about = entry_named(listed, name).get("meta") or {}
        properties = client.probe("/props") or {}
        settings = properties.get("default_generation_settings") or {}
        self.info = ServerInfo(
            runtime="llama.cpp",
            version=str(properties.get("build_info") or UNKNOWN),
            model=name,
            limit=whole_number(settings.get("n_ctx")),
            weights=str(properties.get("model_ftype") or about.get("ftype") or ""),
            sizes=known_sizes(about, _SIZES),
        )

    def tokens_of(self, text: str) -> Sequence[int] | None:
        """Return the tokens as which the server reads a text."""
        answer = self._client.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return integers(answer.get("tokens"), "/tokenize")

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens as which the server reads a text."""
        return len(self.tokens_of(text) or ())

    def predict(self, row: Row) -> list[Predictions]:
        """Return the predictions of a row, by one request for each position.

        The server keeps what it computed of the tokens before, so that each request costs it one token.
        """
        ids = row.ids.tolist()
        positions: list[int] = []
        best: list[int] = []
        losses: list[float] = []
        for position in tracked(row.positions, "asking", bar=False):
            label = ids[position]
            told = self._told(ids[:position], [[label, BIAS]])
            if told is None:
                # The bytes of the label are part of a character, and the server waits for the others.
                told = self._told(ids[:position], [])
            if told is None:
                continue
            try:
                best.append(int(told["top_logprobs"][0]["id"]))
                losses.append(_loss(told, label))
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
                raise unexpected(PATH) from error
            positions.append(position)
        return [Predictions.of_scored(row.ids, positions, best, losses)]

    def _told(self, prompt: list[int], bias: list[object]) -> JsonObject | None:
        """Return what the server tells about the token after a prompt, or None if it writes no token."""
        answer = self._client.post(PATH, {**GREEDY, "prompt": prompt, "logit_bias": bias})
        require_read_whole(answer.get("tokens_evaluated"), len(prompt), self._client.url + PATH)
        told = answer.get("completion_probabilities") or []
        return told[0] if told else None


def _loss(told: JsonObject, label: int) -> float:
    """Return the loss of a label; NaN if the server wrote another token, or has rounded its probability to 0."""
    logprob = float(told["logprob"])
    if int(told["id"]) != label or logprob < NO_PROBABILITY:
        return float("nan")
    return -logprob
