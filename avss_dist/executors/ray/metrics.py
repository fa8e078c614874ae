"""What the work has done so far, as Ray metrics: the dashboard and Prometheus show them."""

from __future__ import annotations

from ray.util.metrics import Counter


class Metrics:
    """Counters of tokens, shards and runs; the rate of ``avss_tokens`` is tokens/s."""

    def __init__(self) -> None:
        self._tokens = Counter("avss_tokens", description="Tokens measured, each once.")
        self._shards = Counter("avss_shards", description="Shards measured, each once.")
        self._runs = Counter("avss_runs", description="Runs that ended.", tag_keys=("status",))

    def measured(self, num_tokens: int, *, is_last: bool) -> None:
        """A shard's first result; ``is_last`` where it was the last of its run."""
        if num_tokens:
            self._tokens.inc(num_tokens)
        self._shards.inc()
        if is_last:
            self._runs.inc(tags={"status": "done"})

    def failed(self) -> None:
        """A run that cannot go on."""
        self._runs.inc(tags={"status": "failed"})
