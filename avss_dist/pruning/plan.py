"""Plans: which layers to drop, and why. A plan is a small YAML file that says of which model it was made, from what.

Layers count from 0, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from avss_dist.errors import AvssError, ConfigError, require_known
from avss_dist.settings import GROUND_TRUTH, LOWEST_SHARE, SCORES
from avss_dist.stats.rankings import count_lowest, rank_lowest
from avss_dist.stats.scores import score_column

RANDOM = "random"


class PlanError(AvssError):
    """A plan cannot be made, read, or carried out on a model."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How layers are chosen.

    Attributes:
        by: one of ``config.SCORES`` or ``config.GROUND_TRUTH``, or ``random``.
        fraction, count, mass: at most one: the lowest share of the layers, so many of them, or the lowest layers that
            hold at most this share of the summed score. The lowest quarter if there is none.
        first, last: layers at the start and at the end that are never dropped.
        contiguous: drop neighbours: those whose scores add up to the least.
        seed: of ``random``.

    Raises:
        ConfigError: a value is out of its range.
    """

    by: str = "avss"
    fraction: float | None = None
    count: int | None = None
    mass: float | None = None
    first: int = 0
    last: int = 0
    contiguous: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_known("score", self.by, (*SCORES, *GROUND_TRUTH, RANDOM))
        given = [n for n in ("fraction", "count", "mass") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} were given; they say the same thing twice.", "Keep one of them.")
        for name in ("fraction", "mass"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ConfigError(f"{name} must be between 0 and 1, not {share:g}.")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"count must be at least 1, not {self.count}.")
        if min(self.first, self.last) < 0:
            raise ConfigError("Protected layers cannot be fewer than 0.", "Write --protect first=1,last=1.")
        if self.mass is not None and (self.contiguous or self.by == RANDOM):
            raise ConfigError("mass is a share of a score that is summed in its order.", "Use a fraction or a count.")

    def drop(self, scores: Sequence[float]) -> list[int]:
        """The layers to drop, ascending, by the score of each (low is unimportant; ties go to the earlier layer).

        Raises:
            PlanError: no layer would be left, or none dropped, or a score is missing.
        """
        values = np.asarray(scores, np.float64)
        if not np.isfinite(values).all():
            missing = ", ".join(map(str, np.flatnonzero(~np.isfinite(values))))
            raise PlanError(f"Layers {missing} have no score '{self.by}'.", "Choose by another score or recipe.")
        open_ = np.arange(self.first, len(values) - self.last)
        number = self._number(values, open_)
        if number >= len(values):
            raise PlanError(f"{number} of {len(values)} layers would be dropped.", "Leave one at least.")
        if number > len(open_):
            raise PlanError(
                f"{number} layers are to be dropped, and {max(0, len(open_))} of {len(values)} are not protected.",
                "Protect fewer, or drop fewer.",
            )
        if self.contiguous:
            sums = np.convolve(values[open_], np.ones(number), "valid")
            start = int(open_[0]) + int(np.argmin(sums))
            return list(range(start, start + number))
        ranks = rank_lowest(values[open_])
        return sorted(int(layer) for layer in open_[ranks <= number])

    def _number(self, values: np.ndarray, open_: np.ndarray) -> int:
        if self.count is not None:
            return self.count
        if self.mass is None:
            return count_lowest(len(values), LOWEST_SHARE if self.fraction is None else self.fraction)
        held = np.cumsum(np.sort(values[open_])) / values.sum()
        number = int(np.searchsorted(held, self.mass, "right"))
        if not number:
            raise PlanError(
                f"No layer holds as little as {self.mass:g} of the summed score: the least holds {held[0]:.3g}.",
                "Allow more, or use a fraction or a count.",
            )
        return number


@dataclass(frozen=True, kw_only=True)
class LayerTruth:
    """What an evaluation says of each layer: see `ground_truth`.

    Attributes:
        values: by layer; low is unimportant.
        run_id, task: the evaluation.
    """

    values: Mapping[int, float]
    run_id: str
    task: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Layers to drop from a model.

    Attributes:
        model, revision: of the checkpoint; revision is its content hash or the hub's commit.
        num_layers: of the whole model.
        layers: module path of the layer list, below the model's head.
        drop: ascending, from 0.
        why: what they were chosen by.
        run_id: the run whose scores were read; None for a plan by hand.
    """

    model: str
    revision: str | None
    num_layers: int
    layers: str
    drop: tuple[int, ...]
    why: Mapping[str, Any]
    run_id: str | None = None

    def __post_init__(self) -> None:
        _check(self.drop, self.num_layers)

    @property
    def keep(self) -> tuple[int, ...]:
        """The other layers."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.drop)

    def write(self, path: Path) -> None:
        """Write the YAML file.

        Raises:
            PlanError: it cannot be written.
        """
        fields = asdict(self) | {"drop": list(self.drop), "keep": list(self.keep), "why": dict(self.why)}
        write_text(path, "# Layers count from 0.\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def make_plan(
    scores: Sequence[Mapping[str, Any]], run: Mapping[str, Any], choice: Choice, truth: LayerTruth | None = None
) -> Plan:
    """A plan from the rows of the scores table of one run, site, recipe and threshold.

    Args:
        truth: what is known of the run's checkpoint, where layers are chosen by one of ``config.GROUND_TRUTH``.

    Raises:
        PlanError: as `Choice.drop`, or the run's layers are not one list of the model.
    """
    rows = sorted(scores, key=lambda row: row["layer"])
    paths = {row["layer_name"].rpartition(".")[0] for row in rows}
    if len(paths) != 1 or [row["layer_name"].rpartition(".")[2] for row in rows] != [str(i) for i in range(len(rows))]:
        raise PlanError(
            f"The layers of {run['model']} are not one list of modules, each used once: none can be taken out.",
            f"They are {', '.join(row['layer_name'] for row in rows[:6])} ...",
        )
    if choice.by == RANDOM:
        values = np.random.default_rng(choice.seed).permutation(len(rows)).astype(np.float64)
    elif choice.by in GROUND_TRUTH:
        assert truth is not None
        values = np.array([truth.values.get(layer, np.nan) for layer in range(len(rows))], np.float64)
    else:
        column = score_column(choice.by)
        values = np.array([np.nan if row[column] is None else row[column] for row in rows], np.float64)
    why: dict[str, Any] = {name: value for name, value in asdict(choice).items() if value not in (None, False)}
    if choice.by == RANDOM:
        why["seed"] = choice.seed
    else:
        why.pop("seed", None)
    if truth is not None:
        why |= {"evaluation": truth.run_id, "task": truth.task}
    if choice.by == "avss":
        why |= {name: rows[0][name] for name in ("site", "recipe", "threshold", "threshold_kind")}
    if not {"fraction", "count", "mass"} & set(why):
        why["fraction"] = LOWEST_SHARE
    return Plan(
        model=run["model"],
        revision=run["revision"],
        num_layers=len(rows),
        layers=paths.pop(),
        drop=tuple(choice.drop(values.tolist())),
        why=why,
        run_id=run["run_id"],
    )


def read_plan(path: str | Path) -> Plan:
    """A plan from its file.

    Raises:
        PlanError: there is none, it is no plan, or its layers are out of range, repeated, or all of them.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}.", "avss plan makes one.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not YAML: {' '.join(str(error).split())}", "avss plan makes one.") from error
    if not isinstance(found, dict):
        raise PlanError(f"{path} is no plan: it has no keys.", "avss plan makes one.")
    names = [*Plan.__dataclass_fields__, "keep"]
    for name in found:
        require_known(f"key of {path}", str(name), names, PlanError)
    if missing := [name for name in ("model", "num_layers", "layers", "drop") if name not in found]:
        raise PlanError(f"{path} has no '{missing[0]}'.", f"A plan has {', '.join(names)}.")
    keep = found.pop("keep", None)
    drop, number = found["drop"], found["num_layers"]
    if not isinstance(number, int) or not (isinstance(drop, list) and all(type(layer) is int for layer in drop)):
        raise PlanError(f"{path}: drop is a list of layers, num_layers a number.", "For example: drop: [3, 7]")
    if len(set(drop)) != len(drop):
        raise PlanError(f"{path} drops a layer twice.", f"drop: {sorted(set(drop))}")
    fields: dict[str, Any] = {"revision": None, "why": {}} | found | {"drop": tuple(sorted(drop))}
    plan = Plan(**fields)
    if keep is not None and tuple(keep) != plan.keep:
        raise PlanError(f"{path}: keep is not what drop leaves.", f"keep: {list(plan.keep)}, or leave it out.")
    return plan


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        PlanError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror}.", "Name another file with -o.") from error


def mergekit_slices(plan: Plan) -> str:
    """The plan as a mergekit configuration: a passthrough merge of the slices of layers that stay, [from, to)."""
    slices: list[list[int]] = []
    for layer in plan.keep:
        if slices and slices[-1][1] == layer:
            slices[-1][1] = layer + 1
        else:
            slices.append([layer, layer + 1])
    sources = [{"sources": [{"model": plan.model, "layer_range": bounds}]} for bounds in slices]
    return yaml.safe_dump({"slices": sources, "merge_method": "passthrough"}, sort_keys=False)


def _check(drop: Sequence[int], number: int) -> None:
    wrong = [layer for layer in drop if not 0 <= layer < number]
    if wrong:
        raise PlanError(f"There is no layer {wrong[0]}: the model has {number}, from 0.", "Mend the list 'drop'.")
    if not drop:
        raise PlanError("The plan drops no layer.", "List one at least under 'drop'.")
    if len(drop) >= number:
        raise PlanError(f"The plan drops all {number} layers.", "Leave one at least.")
