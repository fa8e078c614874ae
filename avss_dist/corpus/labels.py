"""Labels of answers in paired text, and the strata that statistics are counted in."""

from __future__ import annotations

TRUTHFUL = "truthful"
"""Label of the truthful answers of TruthfulQA."""
INCORRECT = "incorrect"
"""Label of the incorrect answers of TruthfulQA."""
BEST = "best"
"""Label of the first of several truthful answers."""
AFTER_ANOTHER = ", after another prompt"
"""End of the name of a stratum, after a label: the same answers, after other prompts than their own."""
