"""Corpora with short names: data sets of the hub, at a fixed commit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedCorpus:
    """A data set of the hub.

    Attributes:
        repository, config, split, column: place of its text on the hub. ``config`` is empty where there is only one.
        revision: commit.
    """

    repository: str
    revision: str
    config: str
    split: str
    column: str

    def source(self, split: str = "") -> str:
        """Return the corpus as a source, ``hf:...``, of its own split or another one."""
        return f"hf:{self.repository}@{self.revision}:{self.config}:{split or self.split}:{self.column}"


NAMED = {
    "wikitext2": NamedCorpus(
        "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-2-raw-v1", "train", "text"
    ),
    "c4": NamedCorpus("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "en", "train", "text"),
    "pile10k": NamedCorpus("NeelNanda/pile-10k", "127bfedcd5047750df5ccf3a12979a47bfa0bafa", "", "train", "text"),
    "fineweb-edu": NamedCorpus(
        "HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample-10BT", "train", "text"
    ),
    "ultrachat": NamedCorpus(
        "HuggingFaceH4/ultrachat_200k", "8049631c405ae6576f93f445c6b8166f76f5505a", "", "train_sft", "messages"
    ),
    "open-platypus": NamedCorpus(
        "garage-bAInd/Open-Platypus", "37141edbdb7826378cce118c46a109b813e1f038", "", "train", "output"
    ),
    "cnn-dailymail": NamedCorpus(
        "abisee/cnn_dailymail", "96df5e686bee6baa90b8bee7c28b81fa3fa6223d", "3.0.0", "train", "article"
    ),
    "alpaca": NamedCorpus("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "", "train", "text"),
}
"""Named corpora; users write ``NAME[:split]``."""
