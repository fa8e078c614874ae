"""Paired text of tests."""

from __future__ import annotations

import json
from pathlib import Path


def write_pairs(folder: Path, prompts: int) -> str:
    """A corpus of so many prompts, each with a good and a bad answer, of which some are longer than others."""
    lines = []
    for i in range(prompts):
        for kind, word in (("good", "itself"), ("bad", "something else")):
            answer = f"{i} times {word}" * (1 + i % 2)
            lines.append(json.dumps({"q": f"What is {i * i}?", "a": answer, "kind": kind}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"{folder}/pairs.jsonl:q+a:kind"
