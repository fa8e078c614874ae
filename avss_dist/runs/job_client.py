"""Ray's client of a job server, with limits on time and size of answers. Imported late, as it loads Ray."""

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

from avss_dist.core.text import describe_bytes

MOST_BYTES = 64 << 20  # of one answer
PATIENCE = 5.0  # times the limits until an answer must be whole

T = TypeVar("T")

NO_ANSWER = (ConnectionError, Timeout)  # `requests` raises either when a server stops answering
__all__ = ["NO_ANSWER", "AuthenticationError", "Client", "Redirected"]


class Redirected(Exception):
    """The server redirects to another address."""


class Client(JobSubmissionClient):
    """Client that waits at most ``limits`` (connect, answer) seconds, reads `MOST_BYTES`, and follows no redirect.

    Raises:
        Redirected: the server redirects to another address.
        NO_ANSWER: one of these errors: the server refuses or closes the connection, or does not answer in time.
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
    """Return the answer to a request within a total time. The timeouts of `requests` apply to each piece of an answer.

    Raises:
        Timeout: the answer is not complete in time.
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
    """Read a whole answer. Without a declared encoding it is UTF-8.

    Raises:
        RequestException: the answer is longer than `MOST_BYTES`.
    """
    data = bytearray()
    for part in answer.iter_content(1 << 16):
        data += part
        if len(data) > MOST_BYTES:
            answer.close()
            raise RequestException(f"an answer is longer than {describe_bytes(MOST_BYTES)}")
    answer._content = bytes(data)
    answer.encoding = answer.encoding or "utf-8"
