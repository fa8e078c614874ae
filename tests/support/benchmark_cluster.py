"""Parts of the benchmarks on changing Ray clusters. Import it before Ray: it sets the environment of all nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of drivers, nodes and workers
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_prestart_worker_first_driver": "0"}
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "TQDM_DISABLE": "1"}

SIZES: dict[str, Any] = {"sequence_length": 128, "batch_size": 4, "sequences_per_shard": 8, "partition": "single"}


def write_model(folder: Path) -> Path:
    """Write a random Llama of 8 layers and 256 units, which takes long enough for a cluster to change meanwhile."""
    from support.checkpoints import llama, save_tokenizer

    model = save_tokenizer(folder / "model")
    llama(7, hidden_size=256, intermediate_size=1024, num_hidden_layers=8).save_pretrained(model)
    return model
