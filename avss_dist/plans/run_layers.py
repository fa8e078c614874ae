"""Plans of the layers of a run's checkpoint: from values of a criterion, or from layers that were chosen otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from avss_dist.core.intervention import Removals
from avss_dist.core.values import JsonObject, NewObject, TableRow
from avss_dist.corpus.seen import SeenText, distinct
from avss_dist.plans.choice import Choice, PlanError
from avss_dist.plans.criteria import CriterionValues, Rows, count_layers
from avss_dist.plans.pattern import Pattern
from avss_dist.plans.plan import Plan
from avss_dist.plans.seen import seen_by_run
from avss_dist.stats.catalog import LOWEST_SHARE, RANDOM, READING
from avss_dist.warehouse.names import MEASURED_ONLY


@dataclass(frozen=True, kw_only=True)
class RunLayers:
    """Layers of the checkpoint of a run.

    Attributes:
        run: row of ``runs``.
        rows: rows of ``scores`` of the run; of a checkpoint that was not scored, the index and the name of each layer.
    """

    run: TableRow
    rows: Rows

    @property
    def number(self) -> int:
        """Number of layers."""
        return count_layers(self.rows)

    def list_path(self) -> str:
        """Return the module path of the list that holds the layers.

        Raises:
            PlanError: the layers are not one list of modules that are used once.
        """
        name_by_layer = {row["layer"]: row["layer_name"] for row in self.rows}
        names = [name_by_layer[layer] for layer in sorted(name_by_layer)]
        paths = {name.rpartition(".")[0] for name in names}
        indices = [name.rpartition(".")[2] for name in names]
        consecutive = [str(index) for index in range(len(names))]
        if len(paths) != 1 or indices != consecutive:
            raise PlanError(
                f"The layers of {self.run['model']} are not one list of modules that are used once: none can be "
                "dropped.",
                f"They are {', '.join(names[:6])} ...",
            )
        return paths.pop()


def plan_choice(layers: RunLayers, choice: Choice, values: CriterionValues, pattern: Pattern | None = None) -> Plan:
    """Return the plan of a choice of layers, by the values of its criterion.

    Args:
        pattern: see `Choice.choose`.

    Raises:
        PlanError: see `Choice.choose` and `RunLayers.list_path`.
    """
    why = reasons(choice)
    if values.run_id:
        why["evaluation"] = values.run_id
        why["task"] = values.task
    return plan_removal(layers, choice.choose(values, layers.number, pattern), why, values.seen)


def plan_removal(layers: RunLayers, removed: Removals, why: JsonObject, seen: Iterable[SeenText] = ()) -> Plan:
    """Return a plan that removes layers, sublayers or experts from the checkpoint of a run.

    Args:
        seen: texts that were read for the choice, beside that of the run.

    Raises:
        PlanError: see `RunLayers.list_path`.
    """
    run = layers.run
    return Plan(
        model=run["model"],
        revision=run["revision"],
        num_layers=layers.number,
        layers=layers.list_path(),
        drop=removed,
        why=why,
        run_id=None if run.get("status") == MEASURED_ONLY else run["run_id"],
        seen=distinct([*seen_by_run(run), *seen]),
    )


def reasons(choice: Choice) -> NewObject:
    """Return the reason of a plan for a choice."""
    values = asdict(choice)
    reading = values.pop("reading")
    seed = values.pop("seed")
    why = {name: value for name, value in values.items() if value not in (None, False, 0)}
    if choice.by == RANDOM:
        why["seed"] = seed
    if not choice.share and not choice.count:
        why["share"] = LOWEST_SHARE
    if choice.by == "avss" and reading is not None:
        why.update(zip(READING, reading, strict=True))
    return why
