"""Servers as the comparison sees them: what they say about themselves, rows that they are given, and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.errors import ConfigError, first_names, nearest
from avss_dist.core.values import JsonObject
from avss_dist.corpus.tokens import Ids
from avss_dist.serving.client import Client, ServerFailed
from avss_dist.stats.layer_stats import Float64

Int64 = NDArray[np.int64]
LAYERS = "layers"
HIDDEN_SIZE = "hidden units"
VOCABULARY = "tokens in the vocabulary"
PARAMETERS = "parameters"
UNKNOWN = "of unknown version"


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """Description of a server and its model, by itself.

    Attributes:
        runtime: name of the program.
        version: version of the program.
        model: name of the model in requests.
        limit: most tokens of a prompt and its continuation, or None if it does not say.
        weights: format of the weights in its own words; empty if it does not say.
        sizes: sizes of the model by `LAYERS`, `HIDDEN_SIZE`, `VOCABULARY`, `PARAMETERS`, those that it says.
    """

    runtime: str
    version: str
    model: str
    limit: int | None = None
    weights: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name and version of the program."""
        return f"{self.runtime} {self.version}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """A row of tokens, and the tokens in it whose predictions are compared.

    Attributes:
        ids: int32[tokens], with the tokenizer's special tokens.
        positions: indices of predicted tokens, from 1. Each is predicted from all tokens before it.
    """

    ids: Ids
    positions: range


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions:
    """Predictions of a server for tokens that are given to it.

    Attributes:
        ids: int32[tokens], the tokens. A server that only writes text has chosen the last ones itself.
        positions: int64[n], indices of predicted tokens in ``ids``, ascending.
        best: int64[n], most likely token at each position.
        losses: float64[n], negative log-likelihood of the token at each position; NaN where it is not known.
        until_difference: the server chose each token itself, so that only its first difference counts.
    """

    ids: Ids
    positions: Int64
    best: Int64
    losses: Float64
    until_difference: bool = False

    @classmethod
    def of_scored(cls, ids: Ids, positions: Sequence[int], best: Sequence[int], losses: Sequence[float]) -> Predictions:
        """Return the predictions for given tokens, of the same fields as numbers."""
        return cls(ids=ids, positions=np.array(positions), best=np.array(best), losses=np.array(losses))


class Server(ABC):
    """Adapter of one kind of server.

    Attributes:
        info: what the server says about itself.
    """

    info: ServerInfo

    @property
    @abstractmethod
    def can_score(self) -> bool:
        """Whether it tells log-probabilities of given tokens."""

    @abstractmethod
    def tokens_of(self, text: str) -> Sequence[int] | None:
        """Return the tokens as which the server reads a text, or None if it does not tell."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Return the number of tokens as which the server reads a text."""

    @abstractmethod
    def predict(self, row: Row) -> list[Predictions]:
        """Return predictions for a row: one object for all positions, or one for each part that was asked for."""


class ListingServer(Server):
    """A server with the interface of vLLM, which SGLang has, too: models at ``/v1/models``, tokens at ``/tokenize``.

    Args:
        model: name of the model that the user gave.
        runtime: name of the program.
        version: version that the server tells, if it does.
    """

    can_score = True

    def __init__(self, client: Client, model: str | None, *, runtime: str, version: object) -> None:
        self._client = client
        listed = entries(client.probe("/v1/models"), "data")
        name = served_name([str(entry.get("id")) for entry in listed], model, client.url)
        self.info = ServerInfo(
            runtime=runtime,
            version=str(version or UNKNOWN),
            model=name,
            limit=whole_number(entry_named(listed, name).get("max_model_len")),
        )

    def tokens_of(self, text: str) -> Sequence[int] | None:
        """Return the tokens as which the server reads a text, or None if it does not tell."""
        answer = self._client.probe_with(
            "/tokenize", {"model": self.info.model, "prompt": text, "add_special_tokens": True}
        )
        if answer is None:
            return None
        return integers(answer.get("tokens"), "/tokenize")


def served_name(names: Sequence[str], requested: str | None, url: str) -> str:
    """Return the name of the model to ask a server for.

    Args:
        names: names of its models.
        requested: name that the user gave.

    Raises:
        ConfigError: there is no such model, or there are several and none was named.
    """
    if requested is not None:
        if names and requested not in names:
            raise ConfigError(f"{url} serves no model '{requested}'.", nearest(requested, names))
        return requested
    if not names:
        raise ConfigError(f"{url} serves no model.", "Load the checkpoint there first.")
    if len(names) > 1:
        raise ConfigError(
            f"{url} serves several models: {first_names(list(names), 5)}.",
            "Name the one to compare by `served_model`.",
        )
    return names[0]


def entries(answer: JsonObject | None, key: str) -> list[JsonObject]:
    """Return the objects in a list of an answer. Empty without an answer, or without such a list."""
    listed = answer.get(key) if answer else None
    if not isinstance(listed, list):
        return []
    return [entry for entry in listed if isinstance(entry, dict)]


def whole_number(value: object) -> int | None:
    """Return a value of an answer if it is an integer, else None."""
    return value if type(value) is int else None


def known_sizes(about: JsonObject, names: Mapping[str, str]) -> dict[str, int]:
    """Return the sizes that a server tells.

    Args:
        names: names of the sizes by the server's own names.
    """
    sizes = {}
    for key, name in names.items():
        size = whole_number(about.get(key))
        if size is not None:
            sizes[name] = size
    return sizes


def entry_named(listed: Sequence[JsonObject], name: str) -> JsonObject:
    """Return the entry of a model in a list of models, or an empty one."""
    for entry in listed:
        if entry.get("id") == name:
            return entry
    return {}


def integers(values: object, path: str) -> list[int]:
    """Return a list of integers of an answer.

    Raises:
        ServerFailed: it is something else.
    """
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise unexpected(path)
    return values


def unexpected(path: str) -> ServerFailed:
    """Return the error for an answer of another form than its documentation says."""
    return ServerFailed(
        f"{path} answers in an unexpected form.", "Is it another program, or a newer version? Name its `kind`."
    )


class TokensDiffer(ServerFailed):
    """A server reads other tokens than it is given."""


def require_read_whole(read: object, sent: int, path: str) -> None:
    """Raise TokensDiffer unless a server read as many tokens as were sent.

    Args:
        read: number of tokens that it counted, or something else if it did not say.
    """
    if type(read) is int and read != sent:
        raise TokensDiffer(
            f"{path} was given {sent} tokens and read {read}.",
            "A server that adds a start token, or cuts prompts, cannot be compared token by token.",
        )
