"""Every image-text family that a small random configuration can build: scored, evaluated, pruned. A line for each.

Run by hand: python tests/benchmarks/multimodal.py [FAMILY ...]
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from support.families import tiny_batch, tiny_model
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES

from avss_dist.corpus.shards import Batch
from avss_dist.errors import AvssError, first_line
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import quiet
from avss_dist.partition.base import Placement
from avss_dist.partition.open import open_replica
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.plan import Plan
from avss_dist.settings import Settings

SETTINGS = Settings(device="cpu")


def capabilities(family: str, folder: Path) -> tuple[list[str], str]:
    """What can be done with a family, in order, and why no more can."""
    can: list[str] = []
    try:
        with quiet():
            model: Any = tiny_model("image-text", family)
            model.save_pretrained(folder / "whole")
    except Exception as error:  # the library refuses its own configuration, in whatever way
        return can, first_line(error)
    can.append("built")
    try:
        checkpoint = resolve(str(folder / "whole"))
        with closing(open_replica(checkpoint, SETTINGS, Placement())) as replica:
            layers, number = replica.layers[0].name.rpartition(".")[0], len(replica.layers)
        can.append("scored")
        ids = tiny_batch()
        real = np.ones(ids.shape, bool)
        batch = Batch(input_ids=ids.numpy().astype(np.int32), attention_mask=real, observed=real)
        with closing(open_replica(checkpoint, SETTINGS, Placement(), head=True)) as replica:
            assert replica.language_model is not None
            replica.language_model.losses_without([batch], [(), (1,)])
        can.append("evaluated")
        plan = Plan(model=str(folder / "whole"), num_layers=number, layers=layers, drop=(1,))
        prune(str(folder / "whole"), plan, folder / "less")
        can.append("pruned")
    except AvssError as error:
        return can, str(error.message)
    return can, ""


def main(families: list[str]) -> None:
    """Print the table, and the number of families that can do each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    numbers: Counter[str] = Counter()
    for family in families or sorted(FAMILIES):
        with TemporaryDirectory() as folder:
            can, why = capabilities(family, Path(folder))
        numbers.update(can)
        print(f"{family:28} {' '.join(can):32} {why[:160]}", flush=True)
    print(dict(numbers))


if __name__ == "__main__":
    main(sys.argv[1:])
