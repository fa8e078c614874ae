"""Ray's client of a job server, with a limit on every wait for it. Imported late: it loads Ray."""

from __future__ import annotations

import io
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from requests.exceptions import ConnectionError, Timeout

NO_ANSWER = (ConnectionError, Timeout)  # requests raises either where a server says nothing more
__all__ = ["NO_ANSWER", "AuthenticationError", "Client", "Redirected"]


class Redirected(Exception):
    """The server sends its clients to another address."""


class Client(JobSubmissionClient):
    """A client that waits ``limits`` (connect, answer) seconds at most, and follows no redirect.

    Raises:
        Redirected: the server answers with another address.
        NO_ANSWER: one of them: it does not accept a connection, breaks it off, or sends nothing in time.
    """

    def __init__(self, address: str, limits: tuple[float, float]) -> None:
        self._limits = limits
        super().__init__(address)

    def _do_request(self, method: str, endpoint: str, *, data: Any = None, **options: Any) -> Any:
        body: Any = data and io.BytesIO(data)  # sent in blocks: the limit is for each of them, not for the whole file
        answer = super()._do_request(
            method, endpoint, data=body, timeout=self._limits, allow_redirects=False, **options
        )
        if answer.is_redirect:
            raise Redirected(answer.headers["location"])
        return answer
