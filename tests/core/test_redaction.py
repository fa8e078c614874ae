"""Keys of URIs: whatever is kept, written or shown of a text has none, whoever made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from avss_dist.core.intervention import THRESHOLD
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.distillation.record import RecordedText
from avss_dist.plans.map_plans import MapPlan, MapPrecision, PrecisionPlan, SparsityPlan
from avss_dist.plans.plan import ModelPlan, Plan
from avss_dist.pruning.repair.registry import RepairText
from avss_dist.read_requests import FindingsRequest, ReportRequest, ShowRequest
from avss_dist.requests import PlanRequest
from avss_dist.tasks.task import Task

KEYS = "KEY:SECRET"
URI = f"s3://{KEYS}@bucket/a.txt"
PLAIN = "s3://bucket/a.txt"
MAP: dict[str, Any] = {"layer": 0, "map": "mlp.up_proj"}


def layers_plan(**about: Any) -> ModelPlan:
    return Plan(layers="layers", drop=(1,), evaluated=(f"perplexity:{URI}: 7",), **about)


def sparsity_plan(**about: Any) -> ModelPlan:
    sparse_map = MapPlan(**MAP, site="block", outputs=4, inputs=4, sparsity=0.5, by=THRESHOLD, value=1.0)
    return SparsityPlan(sparsity=0.5, projections=(sparse_map,), **about)


def precision_plan(**about: Any) -> ModelPlan:
    rounded_map = MapPrecision(**MAP, format="bf16", weights=16, bits=16.0)
    return PrecisionPlan(bits=16.0, rounded=(rounded_map,), **about)


PLANS: dict[str, Callable[..., ModelPlan]] = {
    "layers": layers_plan,
    "sparsity": sparsity_plan,
    "precision": precision_plan,
}


@pytest.mark.parametrize("text", [URI, RedactedURI(URI)], ids=["text", "uri"])
@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_has_no_keys(kind: str, text: str, tmp_path: Path) -> None:
    """Not even one that was made by hand, and its file can be written."""
    plan = PLANS[kind](model="m", num_layers=3, why={"by": "greedy", "text": text}, findings=(f"Chosen on {URI}.",))
    plan.write(tmp_path / "plan.yaml")  # type: ignore[attr-defined]
    written = (tmp_path / "plan.yaml").read_text()
    assert KEYS not in written + repr(plan.values())
    assert yaml.safe_load(written)["why"]["text"] == PLAIN


def test_a_record_of_a_repair_has_no_keys() -> None:
    text = RepairText(corpus=URI, fingerprint="", rows=1, tokens=1)
    assert asdict(text)["corpus"] == PLAIN


def test_a_record_of_a_distillation_has_no_keys() -> None:
    numbers: dict[str, Any] = {"weight": 1.0, "trained_rows": 1, "held_out_rows": 1, "teacher_perplexity": 1.0}
    text = RecordedText(corpus=URI, label=URI, fingerprint="", **numbers)
    assert text.corpus == PLAIN
    assert text.label == PLAIN


def test_a_task_has_no_keys_in_its_name() -> None:
    """It is that of every cell and evaluation."""
    assert Task(name=f"perplexity:{URI}", parts=()).name == f"perplexity:{PLAIN}"


def test_a_tokenized_text_has_no_keys() -> None:
    prints = {"corpus_fingerprint": "", "tokens_fingerprint": ""}
    assert CorpusPlan(source=URI, shards=(), num_sequences=0, num_tokens=0, **prints).source == PLAIN


@pytest.mark.parametrize("request_of", [ShowRequest, FindingsRequest, ReportRequest])
def test_a_score_of_ones_own_is_shown_without_keys_and_read_with_them(request_of: Callable[..., Any]) -> None:
    options = {"truth": True} if request_of is FindingsRequest else {}
    (name,) = request_of(by=[f"{URI}:mine"], **options).by
    assert f"{name}" == f"{PLAIN}:mine"
    assert name.full == f"{URI}:mine"


def test_a_plan_by_a_score_of_ones_own_reads_it_with_keys() -> None:
    name: Any = PlanRequest(by=f"{URI}:mine").by
    assert f"{name}" == f"{PLAIN}:mine"
    assert name.full == f"{URI}:mine"
