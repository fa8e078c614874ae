"""A failed cell: the command is to be run again only where that can help."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from avss_dist.core.errors import BatchTooLarge, as_failure
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.evaluation.session import failure

CELL: Any = SimpleNamespace(
    task="perplexity:text.txt", checkpoint=SimpleNamespace(name="model"), intervention=NO_INTERVENTION.without(7)
)


@pytest.mark.parametrize(
    "error", [IndexError("index 7 is out of range"), KeyError("layer"), TypeError("x"), OSError("y")]
)
def test_a_mistake_of_the_code_or_the_plan_stays_one(error: Exception) -> None:
    told = failure([(CELL, as_failure(error))])
    assert told.hint is None and "perplexity:text.txt of model without layers 7" in told.message


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ConnectionResetError("reset by peer"), "Run the same command again."),
        (TimeoutError("timed out"), "Run the same command again."),
        (MemoryError("no memory"), "Run the same command again."),
        (OSError(errno.ENOSPC, "No space left"), "Free some space and run the same command again."),
        (BatchTooLarge("It is too large.", "Lower `batch_size`."), "Lower `batch_size`."),
    ],
)
def test_a_failure_that_can_pass_is_tried_again(error: Exception, hint: str) -> None:
    assert failure([(CELL, as_failure(error))]).hint == hint
