"""The process of a benchmark, which imports this beside what it imports anyway."""

from avss_dist.estimation import benchmark


def prepare() -> None:
    """Prepare the process as a command does, and time each partition for a moment."""
    benchmark._prepare_process()
    benchmark.SECONDS = 0.1
