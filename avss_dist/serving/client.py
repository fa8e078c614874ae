"""JSON over HTTP to an inference server, by the standard library, with errors for people."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.core.values import JsonObject

KEY_VARIABLE = "AVSS_SERVER_KEY"
"""Environment variable with the API key of the servers. It is sent as a bearer token, and written nowhere."""
MISSING = (404, 405, 501)
"""Statuses of a server that does not know a path, or not with this method."""
REFUSED = (401, 403)
REASON_CHARACTERS = 300
"""Length of a server's own message in an error."""


class ServerFailed(RunFailed):
    """A server failed, or answered with something else than its documentation says."""


class _NoRedirects(HTTPRedirectHandler):
    """Handler that leaves a redirect to the caller, as it would send the API key to another address."""

    def redirect_request(self, *_: object) -> None:
        return None


def server_key() -> str | None:
    """Return the API key of the environment, or None without one.

    Raises:
        ConfigError: it has characters that cannot be sent. The message does not name them.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return None
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE} has characters that no API key has.", "Copy the key again.")
    return key


def base_url(url: str) -> str:
    """Return the address of a server without the path of its OpenAI interface, with which programs often name it.

    Raises:
        ConfigError: it is no address of a server.
    """
    hint = "Write it like http://localhost:8000."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"'{url}' is not the address of a server: {error}.", hint) from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "The address of a server has a name or a password in it.", f"Put the key into {KEY_VARIABLE}."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or port == 0:
        raise ConfigError(f"'{url}' is not the address of a server.", hint)
    return url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True)
class Client:
    """A server at an address.

    Args:
        url: result of `base_url`.
        timeout: seconds to wait for each answer.
        key: API key, or None.
    """

    url: str
    timeout: float
    key: str | None = field(default=None, repr=False)

    @cached_property
    def _opener(self) -> OpenerDirector:
        return build_opener(_NoRedirects)

    def probe(self, path: str) -> JsonObject | None:
        """Return what a server answers at a path, or None if it does not know the path, or answers without JSON.

        Raises:
            ConfigError: nothing answers, or the key is refused.
            ServerFailed: the server fails.
        """
        return self._ask(path, None, optional=True)

    def probe_with(self, path: str, body: JsonObject) -> JsonObject | None:
        """Return what a server answers to an object that is posted to a path. See `probe`."""
        return self._ask(path, body, optional=True)

    def post(self, path: str, body: JsonObject) -> JsonObject:
        """Post an object to a path, and return the answer.

        Raises:
            ConfigError: nothing answers, or the key is refused.
            ServerFailed: the server fails, refuses the request, or answers with something else than an object.
        """
        answer = self._ask(path, body, optional=False)
        if answer is None:
            raise ServerFailed(f"{self.url}{path} answers with something else than a JSON object.")
        return answer

    def _ask(self, path: str, body: JsonObject | None, *, optional: bool) -> JsonObject | None:
        request = Request(f"{self.url}{path}", headers={"Accept": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                text = response.read()
        except HTTPError as error:
            if optional and error.code in MISSING:
                return None
            raise self._refusal(path, error) from None
        except (URLError, OSError, HTTPException) as error:
            raise self._failure(error) from error
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return answer if isinstance(answer, dict) else None

    def _refusal(self, path: str, error: HTTPError) -> ConfigError | ServerFailed:
        """Return the error for an answer with a status that is no success."""
        with error:
            try:
                reason = self._without_key(_reason(error.read()))
            except (OSError, HTTPException):
                reason = ""
        if error.code in REFUSED:
            given = f"The key in {KEY_VARIABLE} is not accepted." if self.key else f"No key is in {KEY_VARIABLE}."
            return ConfigError(
                f"{self.url} refuses access ({error.code}). {given}", f"Put its key into {KEY_VARIABLE}."
            )
        if 300 <= error.code < 400:
            target = error.headers.get("Location") or "another address"
            return ConfigError(f"{self.url}{path} redirects to {target}.", "Name the server's own address.")
        return ServerFailed(f"{self.url}{path} answers with status {error.code}: {reason or error.reason}")

    def _failure(self, error: Exception) -> ConfigError | ServerFailed:
        """Return the error for a request that got no answer."""
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, TimeoutError):
            return ServerFailed(
                f"{self.url} did not answer within {self.timeout:g} seconds.",
                "Is it still loading the model? Raise `timeout`.",
            )
        if isinstance(error, URLError):
            return ConfigError(f"Nothing answers at {self.url}: {cause}.", "Start the server, or correct the address.")
        return ServerFailed(f"{self.url} broke off its answer: {error!r}.", "Did the server end? Look into its log.")

    def _without_key(self, text: str) -> str:
        """Return a server's message without the key, which some repeat."""
        return text.replace(self.key, "***") if self.key else text


def _reason(body: bytes) -> str:
    """Return the message in the body of a refusal, on one line."""
    text = body.decode("utf-8", "replace")
    try:
        message: object = json.loads(text)
    except (ValueError, RecursionError):
        message = text
    while isinstance(message, dict):
        message = message.get("error") or message.get("message") or message.get("detail") or ""
    return " ".join(str(message).split())[:REASON_CHARACTERS]
