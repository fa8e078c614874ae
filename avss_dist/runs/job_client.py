"""Ray's client of a job server, with time limits. Imported late, as it loads Ray."""

from __future__ import annotations

import io
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from requests.exceptions import ConnectionError, Timeout

NO_ANSWER = (ConnectionError, Timeout)  # `requests` raises either when a server stops answering
__all__ = ["NO_ANSWER", "AuthenticationError", "Client"]


class Client(JobSubmissionClient):
    """Client that waits at most ``limits`` (connect, answer) seconds for each piece of an answer."""

    def __init__(self, address: str, limits: tuple[float, float]) -> None:
        self._limits = limits
        super().__init__(address)

    def _do_request(self, method: str, endpoint: str, *, data: Any = None, **options: Any) -> Any:
        body: Any = data and io.BytesIO(data)  # sent in blocks: the limit is for each of them, not for the whole file
        limits: dict[str, Any] = {"timeout": self._limits}
        return super()._do_request(method, endpoint, data=body, **limits, **options)
