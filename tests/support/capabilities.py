"""What can be done with a family, tried on a tiny random model of it: a row of the table of families."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avss_dist.core.errors import AvssError, first_line
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.settings import Settings
from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.corpus.shards import Batch
from avss_dist.models.checkpoint.loading import Backbone, forward_function, open_module, quiet
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import open_replica
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune
from avss_dist.stats.layer_stats import merge_strata
from avss_dist.stats.scores import score_run
from support.checkpoints import checkpoint_at
from support.families import tiny_batch, tiny_model
from support.observing import observe

TABLE = Path(__file__).parent / "families.csv"
YES = "yes"
VERSION = "5.24"  # of transformers, whose families the table has
AGAIN = "Run tests/benchmarks/families.py, and put what it prints into docs/reference/inputs.md."


@dataclass(frozen=True)
class Row:
    """``yes``, or the reason why not; empty where the library refuses its own small configuration."""

    kind: str
    family: str
    built: str
    scored: str = ""
    evaluated: str = ""
    pruned: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """As `families.model_types` has it."""
        return self.kind, self.family


CAPABILITIES = tuple(field.name for field in fields(Row))[3:]


def read_table() -> list[Row]:
    """The rows as they were found last; ``tests/benchmarks/families.py`` writes them."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def write_table(rows: Iterable[Row]) -> None:
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(sorted(astuple(row) for row in rows))


def counts(rows: Iterable[Row]) -> Counter[tuple[str, str]]:
    """By kind, how many families are ``known`` to transformers, ``built`` here, and have each capability."""
    numbers: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for name in ("known", "built", *CAPABILITIES):
            if getattr(row, name, YES) == YES:
                numbers[row.kind, name] += 1
    return numbers


def families_markdown(rows: Iterable[Row]) -> str:
    """The numbers of families, and the names of those without a capability."""
    rows = list(rows)
    number = counts(rows)
    kinds = dict.fromkeys(row.kind for row in rows)
    lines = ["| kind | in transformers | built small | scored | evaluated | pruned |", "|---|---|---|---|---|---|"]
    for kind in kinds:
        of_kind = (str(number[kind, name]) for name in ("known", "built", *CAPABILITIES))
        lines.append(f"| {kind} | {' | '.join(of_kind)} |")
    lines += ["", "| kind | not | families |", "|---|---|---|"]
    for kind in kinds:
        for name in ("built", *CAPABILITIES):
            families = ", ".join(row.family for row in rows if row.kind == kind and _is_refused(row, name))
            lines += [f"| {kind} | {name} | {families} |"] if families else []
    return "\n".join(lines) + "\n"


def _is_refused(row: Row, name: str) -> bool:
    """Whether a family lacks a capability that others of its kind have, and is built and scored where that is asked."""
    earlier = {"built": YES, "scored": row.built}.get(name, row.scored)
    return earlier == YES and getattr(row, name) != YES and (row.kind, name) != ("masked", "evaluated")


@dataclass(frozen=True)
class Outcome:
    """``built`` and ``scored`` as a `Row` has them; the sites that a family was scored at."""

    built: str
    scored: str = ""
    sites: tuple[str, ...] = ()


def try_scoring(kind: str, family: str) -> Outcome:
    """Build and score a family; what is wrong with what is not refused raises AssertionError."""
    model = build(kind, family)
    if isinstance(model, str):
        return Outcome(built=model)
    try:
        return Outcome(YES, YES, score(model))
    except AvssError as error:
        return Outcome(YES, str(error.message))


def build(kind: str, family: str) -> Any:
    """A tiny model of a family, or why the library refuses its own configuration, in whatever way."""
    try:
        with quiet():
            return tiny_model(kind, family)
    except Exception as error:
        return first_line(error.__cause__ or error)


def try_family(kind: str, family: str, folder: Path) -> Row:
    """As `try_scoring`; it is evaluated and pruned, too."""
    model = build(kind, family)
    if isinstance(model, str):
        return Row(kind, family, built=model)

    whole = folder / "whole"

    def tried(action: Callable[[], object]) -> str:
        try:
            action()
        except AvssError as error:
            return str(error.message).replace(str(whole), family)
        return YES

    scored = tried(lambda: score(model))
    if scored != YES:
        return Row(kind, family, YES, scored, scored, scored)
    with quiet():
        model.save_pretrained(whole)
    return Row(
        *(kind, family, YES, scored),
        evaluated=tried(lambda: evaluate(model, whole)),
        pruned=tried(lambda: prune_a_layer(model, folder)),
    )


def score(model: Any) -> tuple[str, ...]:
    """Observe and score a model; the sites that it has."""
    backbone = open_module(model)
    stats = observe_twice(backbone, forward_function(backbone.module), tiny_batch())
    layers = [layer.name for layer in backbone.layers]
    rows = score_run(stats, layers)
    block = [r for r in rows if (r["site"], r["recipe"], r["threshold"]) == ("block", "pooled", 1e-5)]
    assert len(block) == len(layers)
    for r in block:
        assert np.isfinite(r["avss_smoothed"])
    assert sorted(r["rank"] for r in block) == list(range(1, len(layers) + 1))
    observed = {site for _, site in stats}
    return tuple(site for site in SITES if site in observed)


def observe_twice(backbone: Backbone, run: Callable, input_ids: torch.Tensor) -> dict:
    """Observe one batch; the hooks must change no bit of the output, see every token, and be gone afterwards."""
    with torch.no_grad():
        before = last_hidden(run(input_ids, None))
        with (
            observe(backbone.layers, SITES, THRESHOLDS) as observer,
            observer.batch(np.ones(input_ids.shape, bool)),
        ):
            during = last_hidden(run(input_ids, None))
    stats = merge_strata(observer.strata())
    assert torch.equal(before, during) or not is_deterministic(run, input_ids)
    for m in backbone.module.modules():
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
    for (_, site), s in stats.items():
        assert s.count + s.nonfinite_count > 0, site
        assert (s.count + s.nonfinite_count) % input_ids.numel() == 0, site
        assert s.sequence_count == len(input_ids)
    return stats


def is_deterministic(run: Callable, input_ids: torch.Tensor) -> bool:
    return torch.equal(last_hidden(run(input_ids, None)), last_hidden(run(input_ids, None)))


def last_hidden(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))  # type: ignore[attr-defined]


def evaluate(model: Any, folder: Path) -> np.ndarray:
    """The summed losses of rows of `text_batch`, whole and without layer 1: as transformers alone has them, whole."""
    with closing(open_replica(checkpoint_at(folder), Settings(device="cpu"), Placement(), head=True)) as replica:
        assert replica.language_model is not None
        whole, without = replica.language_model.losses_under(
            [text_batch()], [NO_INTERVENTION, NO_INTERVENTION.without(1)]
        )
    assert np.isfinite(without).all()
    expected = own_losses(model)
    np.testing.assert_allclose(whole, expected, rtol=1e-4 if np.allclose(expected, own_losses(model)) else 1)
    return without


def text_batch() -> Batch:
    """`tiny_batch`, of which every token counts."""
    ids = tiny_batch()
    real = np.ones(ids.shape, bool)
    return Batch(input_ids=ids.numpy().astype(np.int32), attention_mask=real, observed=real)


def own_losses(model: Any) -> np.ndarray:
    """The summed loss of each row of `tiny_batch`, by transformers alone."""
    ids = tiny_batch()
    with torch.no_grad():
        logits = own_predictor(model)(input_ids=ids, use_cache=False).logits[:, :-1].double()
    chosen = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None])
    losses: np.ndarray = -chosen.sum(dim=(1, 2)).numpy()
    return losses


def own_predictor(model: Any) -> Any:
    """The model, or, of those that do not run without an image, the whole causal model that is its language tower."""
    name = {"llama4": "language_model", "blip-2": "language_model", "instructblip": "language_model"}
    name |= {"instructblipvideo": "language_model", "kosmos-2": "text_model"}
    return getattr(model, name.get(model.config.model_type, ""), model)


def prune_a_layer(model: Any, folder: Path) -> None:
    """Write ``less`` beside ``whole``, without layer 1, or another if the family keeps that."""
    names = [layer.name.partition("#")[0] for layer in open_module(model).layers]
    refusals = []
    whole = folder / "whole"
    for drop in (1, 0, 2):
        plan = Plan(model=str(whole), num_layers=len(names), layers=names[0].rpartition(".")[0], drop=(drop,))
        try:
            done = prune(str(whole), plan, folder / "less")
        except AvssError as error:
            refusals.append(error)
            continue
        assert done["difference"] is not None
        return
    raise refusals[0]
