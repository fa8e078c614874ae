"""Names in tables: prefixes of tasks, metrics, and labels of answers."""

from __future__ import annotations

SUBLAYER_LOSS = "sublayers:"  # before a corpus: the task of the loss without each sublayer
SEARCH = "search:"  # before a corpus: the task of a search
CONTRAST = "contrast"  # score of an experiment: contrast of hallucinated and truthful answers by AVSS
LOSS = "loss"  # a metric of a model: nats per token; higher is worse
ENTROPY = "entropy"  # a metric of a model: entropy of its predictions, in nats per token
CHANCE = "chance"  # a metric of multiple choice: the accuracy of a guess
PERPLEXITY = "perplexity:"  # before a corpus: the task of predicting it
ROW_START = "row-start:"  # before a corpus: the task of comparing two starts of its rows
TRUTHFUL, INCORRECT = "truthful", "incorrect"  # labels of the answers of TruthfulQA
BEST = "best"  # the label of the first of several truthful answers
TRUTHFULQA = "truthfulqa:"  # before a file: the task of choosing among its answers
AFTER_ANOTHER = ", after another prompt"  # after a label: the stratum of the same answers to other prompts
CONTINUATION = "continuation"  # the task of continuing prompts
REPAIR = "repair:"  # before a repair and its corpora: the task of fitting it
SPARSITY_TASK = "sparsity:"  # before a method and its corpus: the task of allocating sparsity
ROUNDING_TASK = "rounding:"  # before a corpus: the task of predicting the effect of rounded weights
NUM_WEIGHTS, BITS_PER_WEIGHT, PREDICTED_RISE = "num_weights", "bits_per_weight", "predicted"  # its metrics
ROUNDED_LOSS = "rounded:"  # before a number format and a corpus: the task of the loss with each layer rounded
REALIZED = "realized:"  # before the path of a linear map: a metric, the share of its inputs that were zero
SPARSITY = "sparsity"  # a metric of a model: the share of the weights of its linear maps that met a zero
