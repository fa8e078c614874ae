"""A score that is an entry of the registry and a line of its computation is stored, planned by, compared and drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = """
import json, sys
from avss_dist.core import registry

registry.SCORES["distance"] = registry.ScoreInfo(
    title="distance to the end", meaning="number of layers behind it", column="distance",
    definition="layers behind it", caption="The layers that come after.",
)
registry.FROM_ACTIVATIONS += ("distance",)
registry.BASELINES += ("distance",)

from avss_dist.stats import scores

computed = scores.layer_baselines
scores.layer_baselines = lambda stats, layer: computed(stats, layer) | {"distance": 3.0 - layer}

import avss_dist
from avss_dist.report.page.page import report_page
from avss_dist.warehouse.reader import Warehouse

model, folder = sys.argv[1:]
sizes = {"sequence_length": 32, "max_sequences": 4, "sequences_per_shard": 2, "device": "cpu", "executor": "local"}
runs = [
    avss_dist.score(model, warehouse=folder, corpus="builtin:pydoc", skip_first_tokens=skipped, **sizes)
    for skipped in (0, 1)
]
warehouse = Warehouse(folder)
rows = runs[0].scores(site="block", recipe="pooled", threshold=1e-5).sort_by("layer").to_pylist()
page = report_page(warehouse)
compared = avss_dist.compare(warehouse=folder, score="distance", allow_mismatch=True)
print(json.dumps({
    "stored": [row["distance"] for row in rows],
    "dropped": avss_dist.plan(warehouse=folder, run=runs[0].run_id, by="distance", count=1).drop,
    "compared": compared.pairs["spearman"].to_pylist(),
    "drawn": 'data-chart="distance"' in page and "The layers that come after." in page,
}))
"""


@pytest.mark.nightly
def test_a_new_score_is_known_everywhere(tiny_llama: Path, tmp_path: Path) -> None:
    """In a process of its own, which registers it before anything reads the registry, as an entry there would."""
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, tmp_path / "use.py", tiny_llama, tmp_path / "warehouse"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "stored": [3.0, 2.0, 1.0],
        "dropped": [2],
        "compared": [1.0],
        "drawn": True,
    }
