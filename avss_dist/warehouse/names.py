"""Names of tasks in the tables of evaluations. A name that ends with a colon stands before what the task reads."""

from __future__ import annotations

from avss_dist.core.text import describe_rows

PERPLEXITY = "perplexity:"
"""Before a corpus: the task of predicting it."""
ROW_START = "row-start:"
"""Before a corpus: the task of comparing two starts of its rows."""
TRUTHFULQA = "truthfulqa:"
"""Before a file: the task of choosing among its answers."""
CONTINUATION = "continuation"
"""The task of continuing prompts."""
OWN_TEXT = "own text"
"""The task of writing text."""
SUBLAYER_LOSS = "sublayers:"
"""Before a corpus: the task of the loss without each sublayer."""
SEARCH = "search:"
"""Before a corpus: the task of a search."""
REPAIR = "repair:"
"""Before a repair and its corpora: the task of fitting it."""
SPARSITY_TASK = "sparsity:"
"""Before a method and its corpus: the task of allocating sparsity."""
ROUNDING_TASK = "rounding:"
"""Before a corpus: the task of predicting the effect of rounded weights."""
ROUNDED_LOSS = "rounded:"
"""Before a number format and a corpus: the task of the loss with each layer rounded."""
MEASURED_ONLY = "measured"
"""Status of a row like those of ``runs`` for a checkpoint that was measured and not scored; no table has it."""


def describe_task(task: str, skipped: int, samples: int | None) -> str:
    """Return the name of a task, with the rows that it read of a text whose perplexity it is.

    Args:
        samples: number of samples; None if it is not known.
    """
    if samples is None or not task.startswith(PERPLEXITY):
        return task
    return f"{task} ({describe_rows(skipped, samples)})"
