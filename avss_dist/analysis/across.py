"""Agreement of the layer rankings of several runs, and the order of checkpoints of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avss_dist.analysis.agreement import Scores, summarize
from avss_dist.analysis.rank_matrix import RankMatrix
from avss_dist.core.text import count_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import MIN_VALUES, depth_correlation

Row = Mapping[str, Any]  # of the table `runs`


@dataclass(frozen=True, kw_only=True)
class RunAgreement:
    """Rank correlations of every pair of runs at one reading of a score. Undefined correlations are NaN.

    Attributes:
        with_depth: Spearman's rho of the score with the order of the layers, by run.
        pairs: int64[pairs, 2], the positions of the two runs of each pair, ascending.
        spearman: float64[pairs].
        given_depth: float64[pairs], the partial correlation given depth.
    """

    with_depth: Mapping[int, float]
    pairs: NDArray[np.int64]
    spearman: Float64
    given_depth: Float64

    @property
    def summary(self) -> str:
        """Sentence with the median correlation and the least similar pair. Empty if no correlation is defined.

        Runs are numbered from 1, as in labels.
        """
        whole, given_depth = summarize(self.spearman), summarize(self.given_depth)
        if not whole.count:
            return ""
        median = f"The median of {count_of(whole.count, 'pair')} is {whole.median:z.3f}"
        beside_depth = f", and {given_depth.median:z.3f} given depth" if given_depth.count else ""
        first, second = self.pairs[np.nanargmin(self.spearman)] + 1
        return f"{median}{beside_depth}; least alike are runs {first} and {second} ({whole.lowest:z.3f})."


def run_agreement(profiles: Mapping[int, Scores]) -> RunAgreement:
    """Correlate the layer rankings of every pair of runs, as `analysis.compare.compare` does.

    Args:
        profiles: depth and score of the layers by run position: float64[layers] each, ascending in depth. Runs of
            fewer than `MIN_VALUES` layers are left out.
    """
    runs = [run for run in sorted(profiles) if len(profiles[run][0]) >= MIN_VALUES]
    positions = np.arange(len(runs))
    rho, partial = RankMatrix([profiles[run] for run in runs]).correlations(positions, positions)
    first, second = np.triu_indices(len(runs), 1)
    return RunAgreement(
        with_depth={run: depth_correlation(profiles[run][1].tolist()) for run in runs},
        pairs=np.array(runs, np.int64)[np.stack([first, second], 1)],
        spearman=rho[first, second],
        given_depth=partial[first, second],
    )


def in_training(run: Row) -> tuple[Any, ...]:
    """Return the sort key of a checkpoint: its training step and tokens, then the time of its run."""
    return (run["training_step"] or 0, run["training_tokens"] or 0, str(run["created_at"]), run["run_id"])
