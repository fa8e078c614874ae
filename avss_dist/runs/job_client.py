"""Ray's client of a job server, with limits on what it waits for and takes. Imported late: it loads Ray."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from threading import Thread
from typing import Any, TypeVar

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from requests import Response
from requests.exceptions import ConnectionError, RequestException, Timeout

from avss_dist.text import describe_bytes

MOST_BYTES = 64 << 20  # of one answer
PATIENCE = 5.0  # times the limits until an answer must be whole

T = TypeVar("T")

NO_ANSWER = (ConnectionError, Timeout)  # requests raises either where a server says nothing more
__all__ = ["NO_ANSWER", "AuthenticationError", "Client", "Redirected"]


class Redirected(Exception):
    """The server sends its clients to another address."""


class Client(JobSubmissionClient):
    """A client that waits ``limits`` (connect, answer) seconds at most, takes `MOST_BYTES`, and follows no redirect.

    Raises:
        Redirected: the server answers with another address.
        NO_ANSWER: one of them: it does not accept a connection, breaks it off, or sends nothing, or not
            all, in time.
    """

    def __init__(self, address: str, limits: tuple[float, float]) -> None:
        self._limits = limits
        super().__init__(address)

    def _do_request(self, method: str, endpoint: str, *, data: Any = None, **options: Any) -> Any:
        body: Any = data and io.BytesIO(data)  # sent in blocks: the limit is for each of them, not for the whole file
        limits: dict[str, Any] = {
            "timeout": self._limits,
            "allow_redirects": False,
            "stream": True,
            "hooks": {"response": _read},
        }
        ask = partial(super()._do_request, method, endpoint, data=body, **limits, **options)
        answer = ask() if data else _within(sum(self._limits) * PATIENCE, ask)
        if answer.is_redirect:
            raise Redirected(answer.headers["location"])
        return answer


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """What a request gives; the limits of `requests` are for each piece of an answer, which may come bit by bit.

    Raises:
        Timeout: it is not there in time.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except FutureTimeout as error:
        if answer.done():
            raise
        raise Timeout(f"no whole answer in {seconds:g} seconds") from error


def _read(answer: Response, **_: Any) -> None:
    """Read an answer whole, as far as it may be long; what says no encoding is UTF-8, and no other one is looked for.

    Raises:
        RequestException: it is longer than `MOST_BYTES`.
    """
    data = bytearray()
    for part in answer.iter_content(1 << 16):
        data += part
        if len(data) > MOST_BYTES:
            answer.close()
            raise RequestException(f"an answer is longer than {describe_bytes(MOST_BYTES)}")
    answer._content = bytes(data)
    answer.encoding = answer.encoding or "utf-8"
