"""Interventions: sets of layers and sublayers, their stored numbers, and keys that agree with stored rows."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from avss_dist.core.errors import ConfigError
from avss_dist.core.fingerprint import NUMBERS_VERSION, fingerprint
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    Expert,
    Intervention,
    InterventionKey,
    MapSparsity,
    Sparsity,
    Sublayer,
    can_be_added,
    count_removed,
    describe_removed,
    experts_by_layer,
    joined,
    numbered_removal,
    parse_removal,
    removal_columns,
    removal_names,
    removal_numbers,
    round_place,
    size_removed,
    stored_removals,
    sublayers_of,
)
from avss_dist.core.settings import Settings
from avss_dist.evaluation.placed import PlannedTask
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.partition.placement import Placement
from avss_dist.tasks.task import Task

SPARSE_MAP = MapSparsity(layer=0, path="mlp.up_proj", outputs=4, inputs=2, by="threshold", value=0.5)
SPARSITY = Sparsity(maps=(SPARSE_MAP,), rule="all")


@dataclass(frozen=True)
class Patch:
    key: str

    def read(self) -> bytes:
        return self.key.encode()


@pytest.fixture
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return resolve(str(tiny_llama))


class Measure:
    key = "measure"

    def __call__(self, model: Any, intervention: Intervention = NO_INTERVENTION) -> list[Any]:
        return []


def test_sublayers_come_after_layers_and_attentions_before_mlps() -> None:
    removals = [Sublayer(0, "mlp"), Sublayer(2, "attention"), 7, Sublayer(1, "attention"), 3]
    assert joined(removals) == (3, 7, Sublayer(1, "attention"), Sublayer(2, "attention"), Sublayer(0, "mlp"))
    assert describe_removed(joined(removals)) == "3, 7, attention.1, attention.2, mlp.0"


def test_sublayers_are_larger_than_layers() -> None:
    of_sublayer = (5, (Sublayer(0, "mlp"),), 1)
    assert max((5, (3,), 1), of_sublayer) == of_sublayer


def test_sublayers_are_named_by_their_part() -> None:
    assert str(Sublayer(1, "attention")) == "attention.1"
    assert str(Sublayer(0, "mlp")) == "mlp.0"


def test_both_sublayers_of_a_layer_are_the_layer() -> None:
    assert joined([*sublayers_of([4]), Sublayer(5, "mlp")]) == (4, Sublayer(5, "mlp"))
    assert joined([4, Sublayer(4, "mlp")]) == (4,)
    assert not can_be_added(Sublayer(4, "mlp"), (4,))
    assert not can_be_added(4, (Sublayer(4, "mlp"),))
    assert can_be_added(Sublayer(4, "mlp"), (Sublayer(4, "attention"),))


def test_numbers_of_sublayers_are_those_that_ids_are_hashes_of() -> None:
    removals = (1, 9_999, Sublayer(0, "attention"), Sublayer(9_999, "attention"), Sublayer(7, "mlp"))
    numbers = [1, 9_999, 10_000, 19_999, 20_007]
    assert removal_numbers(removals) == numbers
    assert tuple(map(numbered_removal, numbers)) == removals


def test_a_number_that_no_sublayer_has_is_that_of_a_layer() -> None:
    assert numbered_removal(30_000) == 30_000


def test_columns_of_a_row_say_what_was_removed() -> None:
    removals = (1, 7, Sublayer(3, "attention"), Sublayer(0, "mlp"), Expert(8, 12))
    row = removal_columns(removals)
    assert row == {"drop": [1, 7], "drop_parts": ["attention.3", "mlp.0", "expert.8.12"]}
    assert stored_removals(row) == removals


EXPERTS = (Expert(1, 7), Expert(2, 0), Expert(2, 5), Expert(9_999, 9_999))


def test_experts_come_last() -> None:
    removals = (4, Sublayer(0, "mlp"), *EXPERTS)
    assert joined(removals[::-1]) == removals


def test_experts_go_with_what_they_are_in() -> None:
    of_first, _, _, of_last = EXPERTS
    holders = (1, Sublayer(2, "mlp"))
    assert joined([*EXPERTS, *holders]) == (*holders, of_last)
    assert joined([*sublayers_of([2]), *EXPERTS]) == (2, of_first, of_last)


def test_an_expert_can_be_added_to_what_it_is_not_in() -> None:
    assert not can_be_added(Expert(2, 5), (2,))
    assert not can_be_added(Expert(2, 5), (Sublayer(2, "mlp"),))
    assert can_be_added(Expert(2, 5), (Sublayer(2, "attention"), Expert(2, 4)))


def test_experts_have_numbers_and_layers() -> None:
    removals = (4, Sublayer(0, "mlp"), *EXPERTS)
    assert experts_by_layer(removals) == {1: (7,), 2: (0, 5), 9_999: (9_999,)}
    numbers = [4, 20_000, 1_010_007, 1_020_000, 1_020_005, 1_000_000 + 99_999_999]
    assert removal_numbers(removals) == numbers
    assert tuple(map(numbered_removal, numbers)) == removals
    names = [4, "mlp.0", "expert.1.7", "expert.2.0", "expert.2.5", "expert.9999.9999"]
    assert removal_names(removals) == names
    assert tuple(map(parse_removal, names)) == removals
    assert size_removed(removals) == 1.5
    assert count_removed(removals) == "1 layer, 1 sublayer, 4 experts"
    assert describe_removed(EXPERTS[:2]) == "expert.1.7, expert.2.0"
    many = [Expert(1, expert) for expert in range(16)]
    many += [Expert(2, expert) for expert in range(16)]
    assert describe_removed(many) == "32 experts of layers 1-2"


@pytest.mark.parametrize("value", ["expert.1", "expert.1.x", "expert.-1.2", "experts.1.2", "expert.1.2.3", 1.5, True])
def test_no_removal(value: object) -> None:
    with pytest.raises(ConfigError, match="neither a layer nor a sublayer nor an expert") as caught:
        parse_removal(value)
    assert "expert.7.12" in str(caught.value.hint)


def test_the_key_of_an_intervention_is_that_of_its_rows() -> None:
    intervention = Intervention(
        removed=(1, Sublayer(2, "mlp")),
        patch=Patch("p"),
        sparsity=SPARSITY,
        rounding=round_place("int4", 3),
    )
    row = intervention.key.row()
    assert row == {
        "drop": [1],
        "drop_parts": ["mlp.2"],
        "patch": "p",
        "sparsity_plan": SPARSITY.key,
        "rounding": "int4@3",
    }
    assert InterventionKey.of_row(row) == intervention.key
    assert (
        InterventionKey.of_row({"drop": [1], "drop_parts": ["mlp.2"]}) == Intervention(removed=intervention.removed).key
    )
    assert pickle.loads(pickle.dumps(intervention)) == intervention
    assert hash(intervention) == hash(replace(intervention, patch=Patch("p")))
    changes, removals = intervention.split()
    assert changes.removed == ()
    assert removals.patch is None
    assert removals.sparsity is None
    assert removals.rounding is None
    assert removals.key[:1] == intervention.key[:1]
    assert changes.key[1:] == intervention.key[1:]
    assert intervention
    assert not NO_INTERVENTION
    assert Intervention(sparsity=SPARSITY)


def test_evaluations_and_cells_have_the_ids_that_warehouses_know(checkpoint: Checkpoint) -> None:
    """Sparsity makes another evaluation, removals and a patch another cell; by these very values."""
    settings = Settings()
    task = Task(name="t", parts=(Measure(),))
    planned = PlannedTask(checkpoint=checkpoint, settings=settings, task=task, placement=Placement())
    whole = {"schema": NUMBERS_VERSION, "checkpoint": checkpoint.revision, "task": task.key}
    whole["settings"] = settings.numbers(statistics=False)
    cuts = [{"layer": 0, "path": "mlp.up_proj", "outputs": 4, "inputs": 2, "by": "threshold", "value": 0.5}]
    cuts[0] |= {"center": 0.0, "weighted": False, "kept": 0, "group": 0}
    changed = {"sparsity": fingerprint(cuts=cuts, rule="all")}
    removed = Intervention(removed=(1, Sublayer(2, "attention")), patch=Patch("p"))
    both = replace(removed, sparsity=SPARSITY)
    for intervention, more in ((NO_INTERVENTION, {}), (removed, {}), (both, changed)):
        assert planned.run_id(intervention) == f"{checkpoint.slug}-{fingerprint(**whole, **more)[:10]}"
    cells = planned.cells([NO_INTERVENTION, removed, removed, both])
    id_of_whole = fingerprint(measure="measure", part=0, drop=[])[:20]
    id_of_removed = fingerprint(measure="measure", part=0, drop=[1, 10_002], patch="p")[:20]
    assert [cell.cell_id for cell in cells] == [id_of_whole, id_of_removed, id_of_removed]
    (rounded,) = planned.cells([replace(NO_INTERVENTION, rounding=round_place("int4", 3))])
    assert rounded.run_id == planned.run_id()
    assert rounded.cell_id == fingerprint(measure="measure", part=0, drop=[], rounding="int4@3")[:20]


def test_an_evaluation_is_hashed_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all parts of a task and all removals, and once more for a sparsity."""
    task = Task(name="t", parts=(Measure(),) * 5)
    planned = PlannedTask(checkpoint=checkpoint, settings=Settings(), task=task, placement=Placement())
    hashed: list[dict[str, Any]] = []

    def counted(**parts: Any) -> str:
        hashed.append(parts)
        return fingerprint(**parts)

    monkeypatch.setattr("avss_dist.evaluation.placed.fingerprint", counted)
    without = NO_INTERVENTION.without(1)
    cells = planned.cells([NO_INTERVENTION, without, replace(without, sparsity=SPARSITY)])
    assert len(cells) == 15
    assert len({cell.run_id for cell in cells}) == 2
    assert len(hashed) == 2


def test_plans_are_interventions_without_torch() -> None:
    modules = "avss_dist.core.intervention, avss_dist.plans.plan, avss_dist.plans.map_plans"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
