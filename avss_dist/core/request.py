"""The base of the requests of all commands."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from avss_dist.core.validation import NO_OPTION, Accepts, checked


@checked
class Request:
    """Values of a command. Subclasses inherit groups of options: of a text, a model, batches, statistics, a cluster."""

    on_event: Annotated[Any, NO_OPTION, Accepts("Callable[[Any], object] | None")] = field(
        default=None, compare=False, repr=False
    )
    """Function that receives the events of the work."""

    def __getstate__(self) -> dict[str, object]:
        """Return the values without the function, which stays in its process."""
        return vars(self) | {"on_event": None}
