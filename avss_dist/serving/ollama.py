"""Ollama: ``/api/generate`` takes text alone. What the model writes is compared up to a difference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avss_dist.corpus.documents import Tokenizer
from avss_dist.corpus.tokens import encode, special_tokens_around
from avss_dist.serving.client import Client
from avss_dist.serving.server import (
    HIDDEN_SIZE,
    LAYERS,
    PARAMETERS,
    UNKNOWN,
    Predictions,
    Row,
    Server,
    ServerInfo,
    TokensDiffer,
    entries,
    known_sizes,
    served_name,
    unexpected,
    whole_number,
)

PATH = "/api/generate"
GREEDY = {
    "temperature": 0.0,
    "top_k": 1,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 0,
    "stop": [],
}
"""Every parameter of sampling: Ollama repeats no token as often as the model would, unless it is told otherwise, and a
Modelfile may set others."""
PROMPTS = 4
"""Prompts that are made of a row."""
WRITTEN = 16
"""Tokens that the server writes after each prompt."""
MOVES = 16
"""Tokens by which a prompt is shortened at most, until it is a text that is read as the same tokens again."""
_SIZES = {"block_count": LAYERS, "embedding_length": HIDDEN_SIZE}


class OllamaServer(Server):
    """A server of Ollama.

    Args:
        tokenizer: tokenizer of the checkpoint.
    """

    can_score = False

    def __init__(self, client: Client, model: str | None, tokenizer: Tokenizer) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._around = special_tokens_around(tokenizer)
        names = [str(entry.get("name")) for entry in entries(client.probe("/api/tags"), "models")]
        if model is not None and f"{model}:latest" in names:
            model = f"{model}:latest"
        name = served_name(names, model, client.url)
        shown = client.probe_with("/api/show", {"model": name}) or {}
        about = shown.get("model_info") or {}
        family = about.get("general.architecture")
        names_of_sizes = {f"{family}.{key}": size for key, size in _SIZES.items()}
        names_of_sizes["general.parameter_count"] = PARAMETERS
        version = (client.probe("/api/version") or {}).get("version")
        self.info = ServerInfo(
            runtime="Ollama",
            version=str(version or UNKNOWN),
            model=name,
            limit=whole_number(about.get(f"{family}.context_length")),
            weights=str((shown.get("details") or {}).get("quantization_level") or ""),
            sizes=known_sizes(about, names_of_sizes),
        )
        self._context = 0

    def tokens_of(self, text: str) -> Sequence[int] | None:
        """Return None: the server does not tell."""
        return None

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens as which the server reads a text."""
        count = self._generate(text, 1, 0)[1]
        if type(count) is not int:
            raise unexpected(PATH)
        return count

    def predict(self, row: Row) -> list[Predictions]:
        """Return what the server writes after several prompts that are made of a row."""
        # With another context, Ollama loads the model again. The longest row is the first.
        self._context = max(self._context, len(row.ids) + WRITTEN)
        step = len(row.positions) // (PROMPTS + 1)
        ends = [row.positions[number * step] for number in range(1, PROMPTS + 1)]
        predictions = []
        for end in dict.fromkeys(ends):
            prompt = self._readable(row.ids[:end])
            if prompt is not None:
                predictions.append(self._continued(*prompt))
        return [written for written in predictions if len(written.positions)]

    def _readable(self, ids: np.ndarray) -> tuple[str, list[int]] | None:
        """Return a text and its tokens, which are the first ones of a row, or None if no such text is read as them."""
        start = len(self._around.prefix)
        for length in range(len(ids), max(start, len(ids) - MOVES), -1):
            tokens = ids[:length].tolist()
            text = self._tokenizer.decode(tokens[start:], clean_up_tokenization_spaces=False)
            if self._around.prefix.tolist() + encode([text], self._tokenizer, special=False)[0] == tokens:
                return text, tokens
        return None

    def _continued(self, text: str, prompt: list[int]) -> Predictions:
        """Return the tokens that the server writes after a prompt, as its predictions.

        The last token is left out: it may be a part of what the server would have written.
        """
        written, count = self._generate(text, WRITTEN, self._context)
        # Some versions do not count the tokens that they still know from an earlier prompt.
        if type(count) is int and count > len(prompt):
            raise TokensDiffer(f"{self.info.name} reads a prompt of {len(prompt)} tokens as {count}.")
        # A part of a character is sent as this one, and its token is not known.
        written = written.partition("\ufffd")[0]
        tokens = encode([text + written], self._tokenizer, special=False)[0]
        ids = [*self._around.prefix.tolist(), *tokens][:-1]
        if ids[: len(prompt)] != prompt:
            ids = prompt  # The first token that was written joins the last one of the prompt.
        positions = np.arange(len(prompt), len(ids))
        return Predictions(
            ids=np.array(ids, np.int32),
            positions=positions,
            best=np.array(ids, np.int64)[positions],
            losses=np.full(len(positions), np.nan),
            until_difference=True,
        )

    def _generate(self, text: str, tokens: int, context: int) -> tuple[str, object]:
        """Return what the server writes after a text, and its number of tokens of the text."""
        options = {**GREEDY, "num_predict": tokens}
        if context:
            options["num_ctx"] = context
        answer = self._client.post(
            PATH,
            {
                "model": self.info.model,
                "prompt": text,
                "raw": True,
                "stream": False,
                "truncate": False,
                "options": options,
            },
        )
        written = answer.get("response")
        if not isinstance(written, str):
            raise unexpected(PATH)
        return written, answer.get("prompt_eval_count")
