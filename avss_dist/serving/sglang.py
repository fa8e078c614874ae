"""SGLang: ``/generate`` takes token ids and returns log-probabilities of the prompt (``return_logprob``)."""

from __future__ import annotations

from avss_dist.serving.client import Client
from avss_dist.serving.server import ListingServer, Predictions, Row, require_read_whole, unexpected

PATH = "/generate"
GREEDY = {
    "max_new_tokens": 1,
    "n": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stop": [],
    "ignore_eos": True,
}
"""Every parameter of sampling, as a server takes defaults from the checkpoint's ``generation_config.json``."""


class SglangServer(ListingServer):
    """A server of SGLang."""

    def __init__(self, client: Client, model: str | None) -> None:
        about = client.probe("/server_info") or client.probe("/get_server_info") or {}
        super().__init__(client, model, runtime="SGLang", version=about.get("version"))

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens as which the server reads a text."""
        answer = self._client.post(PATH, {"text": text, "sampling_params": GREEDY, "stream": False})
        count = (answer.get("meta_info") or {}).get("prompt_tokens")
        if type(count) is not int:
            raise unexpected(PATH)
        return count

    def predict(self, row: Row) -> list[Predictions]:
        """Return the predictions of a row by one request."""
        ids = row.ids.tolist()
        answer = self._client.post(
            PATH,
            {
                "input_ids": ids,
                "sampling_params": GREEDY,
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": 1,
                "return_text_in_logprobs": False,
                "stream": False,
            },
        )
        try:
            about = answer["meta_info"]
            require_read_whole(about.get("prompt_tokens"), len(ids), self._client.url + PATH)
            # An entry is log-probability, token, text. The first token has none.
            best = [int(about["input_top_logprobs"][position][0][1]) for position in row.positions]
            losses = [-float(about["input_token_logprobs"][position][0]) for position in row.positions]
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise unexpected(PATH) from error
        return [Predictions.of_scored(row.ids, row.positions, best, losses)]
