"""The registry of repairs: what each needs, and records of those that no longer exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avss_dist.pruning.repair.registry import (
    DEFAULT_REPAIR,
    FILE,
    NO_REPAIR,
    REPAIRS,
    read_repairs,
    searched_repair,
)

DOCS = Path(__file__).parents[2] / "avss_dist" / "docs"


def test_a_matrix_has_an_unknown_for_each_input_of_its_fit() -> None:
    unknowns = {name: method.unknowns(inputs=1536, outputs=576) for name, method in REPAIRS.items()}
    assert unknowns == {"channel": 1, "map": 576, "refit": 1536, "refit_all": 1536}
    assert REPAIRS["map"].tokens_needed(1536, 576) == 4 * 576
    by_text = sorted(REPAIRS, key=lambda name: REPAIRS[name].text_rank)
    assert [unknowns[name] for name in by_text] == sorted(unknowns.values())


def test_a_search_fits_no_repair_that_needs_more_text_than_a_map() -> None:
    searched = {name: searched_repair(name) for name in (NO_REPAIR, *REPAIRS)}
    assert searched == {n: n for n in ("none", "channel", "map")} | {"refit": "map", "refit_all": "map"}
    assert DEFAULT_REPAIR in REPAIRS


def test_a_record_of_a_repair_that_no_longer_exists_is_read(tmp_path: Path) -> None:
    """As earlier versions wrote it, with the linear maps that were fitted behind a cut."""
    cut = {"after": 2, "removed": [], "ridges": [0.01, None], "error_before": 0.5, "error_after": 0.25}
    cuts = [{**cut, "maps": []}, {**cut, "maps": ["self_attn.q_proj", "mlp.up_proj"]}]
    text = {"corpus": "a.txt", "fingerprint": "f", "rows": 9, "tokens": 99, "weight": 1.0}
    record = {
        "repair": "refit_around",
        "model": "m",
        "revision": "r",
        "removed": [1],
        "texts": [text],
        "cuts": cuts,
        "sequence_length": 32,
        "layout": "packed",
        "row_start": "auto",
        "dtype": "float32",
    }
    (tmp_path / FILE).write_text(json.dumps({"repairs": [record]}))
    (read,) = read_repairs(tmp_path)
    assert read.repair == "refit_around" and read.describe() == [
        "Repaired by refit_around, fitted on a.txt (99 tokens); do not evaluate on that text.",
        "Repaired after 2: error 0.5 -> 0.25 on held-back text (ridge 0.01, none helps).",
        "Repaired in 2: error 0.5 -> 0.25 on held-back text (ridge 0.01, none helps).",
    ]


@pytest.mark.parametrize("name", REPAIRS)
def test_the_docs_name_every_repair(name: str) -> None:
    assert f"`{name}`" in (DOCS / "explanations" / "repair.md").read_text(encoding="utf-8")
