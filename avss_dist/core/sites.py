"""Sites in a layer whose activations are measured, and the option that chooses them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from avss_dist.core.validation import OneOf, check

SITES = ("block", "update", "attention", "mlp", "neuron")  # measured by default
INPUT_SITES = ("query_input", "output_input", "up_input")  # what q, k and v read; what o reads; what gate and up read
EVERY_SITE = (*SITES, *INPUT_SITES)
INPUTS = (*INPUT_SITES, "neuron")
"""Sites of the inputs of a layer's linear maps, where activations are made sparse."""
SITE_FAMILIES = {"inputs": INPUTS}
"""Names that stand for several sites."""


def _in_order(sites: tuple[str, ...]) -> tuple[str, ...]:
    """Return sites in the order of `EVERY_SITE`, each once, with the members of families."""
    members: set[str] = set()
    for site in sites:
        members.update(SITE_FAMILIES.get(site, (site,)))
    return tuple(site for site in EVERY_SITE if site in members)


Sites = Annotated[
    tuple[Annotated[str, OneOf((*EVERY_SITE, *SITE_FAMILIES))], ...],
    Field(strict=False, min_length=1),
    check(_in_order),
]
