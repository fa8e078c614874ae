"""vLLM: ``/v1/completions`` takes token ids and returns log-probabilities of the prompt (``prompt_logprobs``)."""

from __future__ import annotations

from collections.abc import Mapping

from avss_dist.core.values import JsonObject
from avss_dist.serving.client import Client
from avss_dist.serving.server import ListingServer, Predictions, Row, require_read_whole, unexpected

PATH = "/v1/completions"
GREEDY = {
    "max_tokens": 1,
    "n": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 0,
    "stop": [],
    "ignore_eos": True,
    "add_special_tokens": False,
    "stream": False,
}
"""Every parameter of sampling, as a server takes defaults from the checkpoint's ``generation_config.json``."""


class VllmServer(ListingServer):
    """A server of vLLM."""

    def __init__(self, client: Client, model: str | None) -> None:
        version = (client.probe("/version") or {}).get("version")
        super().__init__(client, model, runtime="vLLM", version=version)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens as which the server reads a text."""
        body = {**GREEDY, "model": self.info.model, "prompt": text, "add_special_tokens": True}
        usage = self._client.post(PATH, body).get("usage") or {}
        if type(usage.get("prompt_tokens")) is not int:
            raise unexpected(PATH)
        return int(usage["prompt_tokens"])

    def predict(self, row: Row) -> list[Predictions]:
        """Return the predictions of a row by one request."""
        ids = row.ids.tolist()
        answer = self._client.post(PATH, {**GREEDY, "model": self.info.model, "prompt": ids, "prompt_logprobs": 1})
        require_read_whole((answer.get("usage") or {}).get("prompt_tokens"), len(ids), self._client.url + PATH)
        try:
            by_token = answer["choices"][0]["prompt_logprobs"]
            best = [most_likely(by_token[position]) for position in row.positions]
            losses = [-float(by_token[position][str(ids[position])]["logprob"]) for position in row.positions]
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise unexpected(PATH) from error
        return [Predictions.of_scored(row.ids, row.positions, best, losses)]


def most_likely(candidates: Mapping[str, JsonObject]) -> int:
    """Return the token with the highest log-probability of a position."""
    return int(max(candidates, key=lambda token: float(candidates[token]["logprob"])))
