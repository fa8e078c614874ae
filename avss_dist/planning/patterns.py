"""Rules by which programs take the kinds of a checkpoint's layers from their places, and the pattern that they make."""

from __future__ import annotations

from collections.abc import Sequence

from avss_dist.core.errors import ModelError
from avss_dist.core.values import TableRow
from avss_dist.models.checkpoint.layer_kinds import Rule, rules_of
from avss_dist.models.checkpoint.layer_settings import may_go_by_place
from avss_dist.plans.pattern import Pattern
from avss_dist.warehouse.checks import checkpoint_name


def rules_of_run(run: TableRow) -> list[Rule]:
    """Return the rules for the checkpoint of a run; none if its configuration is not found.

    Args:
        run: a row of ``runs``.
    """
    from avss_dist.models.checkpoint.locate import find_checkpoint, read_config

    try:
        checkpoint = find_checkpoint(checkpoint_name(run))
        if checkpoint.gguf or not may_go_by_place(read_config(checkpoint.folder, checkpoint.name)):
            return []
        # transformers takes seconds to import, and most models have layers of one kind.
        from avss_dist.models.checkpoint.loading import text_config

        return rules_of(text_config(checkpoint))
    except ModelError:
        return []


def pattern_of(rules: Sequence[Rule], num_layers: int) -> Pattern:
    """Return the pattern that all rules make, except for those that do not describe the whole model either.

    Without a rule, any set of layers keeps it.
    """
    valid = [rule for rule in rules if rule.reads_whole]

    def derive(number: int) -> list[tuple[object, ...]]:
        return _kinds_by_place([rule.derive(number) for rule in valid], number)

    whole = _kinds_by_place([rule.whole for rule in valid], num_layers)
    return Pattern(whole, derive)


def _kinds_by_place(by_rule: Sequence[Sequence[object]], number: int) -> list[tuple[object, ...]]:
    """Return the kinds at each place by all rules.

    Args:
        by_rule: the kinds at all places, by each rule.
        number: number of places.
    """
    by_place = []
    for place in range(number):
        by_place.append(tuple(kinds[place] for kinds in by_rule))
    return by_place
