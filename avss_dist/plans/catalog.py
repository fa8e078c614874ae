"""Catalog of the methods that allocate sparsity and number formats over linear maps, and of estimates for formats.

It imports nothing but the description of a score, so that the command line lists the names without loading anything
else.
"""

from __future__ import annotations

from avss_dist.stats.catalog import ScoreInfo

ROUNDING_ESTIMATES = {
    "first_order": ScoreInfo(
        title="first order",
        meaning="rise of the loss with rounded weights, predicted from gradients of the text's labels",
    ),
    "second_order": ScoreInfo(
        title="second order",
        meaning="the same, from gradients of drawn labels, summed over the linear maps of the layer",
    ),
    "predicted": ScoreInfo(title="first + second order", meaning="first_order + second_order"),
    "output_error": ScoreInfo(
        title="error of outputs",
        meaning="relative squared change of the outputs of linear maps with rounded weights, without gradients",
    ),
}
"""Estimates of a layer's sensitivity to rounded weights by metric; high is sensitive."""
SECOND_ORDER = "second_order"
"""Estimate that the number format of each linear map is chosen by, unless another one is named. It holds on other text
than that of the estimate, where the first order does not."""
PRECISION_ESTIMATES = {
    "predicted": "where the loss that avss ablate --quantize predicts rises the least",
    SECOND_ORDER: "where its second order, which is never negative, rises the least",
    "output_error": "where the outputs of linear maps change the least",
}
"""Estimates that the number format of each linear map is chosen by, with their meanings."""
PRECISION_METHODS = PRECISION_ESTIMATES | {
    "uniform": "one format for all linear maps",
    "random": "linear maps in random order",
}
"""Methods of choosing the number format of each linear map, with their meanings."""
PRECISION_FILES = ("plan", "llama-cpp", "llm-compressor")
"""Formats of files of number formats: that of this package, and those of other programs."""
SPARSITY_METHODS = {
    "uniform": "the same sparsity everywhere, by thresholds",
    "loss": "where the predicted loss rises the least, by one backward pass",
    "teal": "greedily inside of each block, by what its output changes (TEAL, arXiv 2408.14690)",
    "acttail": "by the heavy tail of each weight's spectrum, the largest of each token (ActTail, arXiv 2603.12272)",
    "wina": "the same everywhere, the largest of each token, weighted by columns (WINA, arXiv 2505.19427)",
}
"""Methods of allocating a sparsity over linear maps, with their meanings."""
