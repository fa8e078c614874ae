"""`avss ls evaluations` lists every result that somebody asked for, and none of the machine's own."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.command_line import avss
from support.warehouses import write_scores

from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store


def test_results_by_layer_are_a_row_for_each_metric_and_internal_tasks_are_none(tmp_path: Path) -> None:
    write_scores(tmp_path, "run-1", [1.0, 2.0, 3.0])

    def write(task: str, rows: list[dict[str, Any]], hour: int) -> None:
        run = RunIdentity(run_id=task.split(":")[0], model="org/m", revision="main", family="llama")
        about = {"task": task, "drop": [], "num_samples": 1, "created_at": datetime(2026, 1, 1, hour, tzinfo=UTC)}
        Store(tmp_path).write_evaluations(run, [{**about, **row} for row in rows])

    write("damage:a.txt", [{"metric": f"taylor_{k}", "layer": i, "value": 1.0} for k in range(4) for i in range(3)], 1)
    maps = [(layer, path) for layer in range(3) for path in ("mlp.up", "mlp.down")]
    rounded = [{"metric": f"predicted:{p}", "layer": i, "rounding": f"int4@{i}.{p}", "value": 1.0} for i, p in maps]
    write("rounding:a.txt", rounded, 2)
    write("perplexity:a.txt", [{"metric": "loss", "value": 2.5}, {"metric": "loss", "drop": [1], "value": 3.0}], 3)
    write("row-start:a.txt", [{"metric": "loss_as_read", "value": 2.5}], 4)
    write("repair:refit:a.txt", [{"metric": "missing", "drop": [1], "value": 0.1}], 5)

    listed = avss("ls", "evaluations", "-w", tmp_path, "--format", "json")
    assert listed.exit_code == 0, listed.stderr
    columns = ("task", "metric", "drop", "rounding", "layers", "value")
    rows = [tuple(json.loads(line)[name] for name in columns) for line in listed.stdout.splitlines()]
    assert rows == [
        ("perplexity:a.txt", "loss", [], None, None, 2.5),
        ("perplexity:a.txt", "loss", ["1"], None, None, 3.0),
        ("rounding:a.txt", "predicted", [], "int4", 3, None),
        ("damage:a.txt", "taylor", [], None, 3, None),
    ]
